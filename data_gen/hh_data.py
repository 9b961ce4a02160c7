"""Demonstrations, preferences and prompts of Anthropic's HH dialogues, as the paper splits them.

    python data_gen/hh_data.py --reward-model Ray2333/gpt2-large-helpful-reward_model

scores every chosen response with a reward model (6.2) and writes, as JSON lines, into runs/hh_data/

    demonstrations.jsonl    {prompt, completion}          the 10,000 of the highest score
    preferences.jsonl       {prompt, chosen, rejected}    10,000 others, at random
    prompts.jsonl           {prompt}                      the rest
    manifest.json           what made them: command, versions, counts, scores, SHA-256 of files

A prompt is the dialogue up to and including its last "\\n\\nAssistant:"; with the response it is
the whole dialogue. `--split test --demonstrations 0 --preferences 0` makes evaluation prompts and
needs no reward model. The scoring can be interrupted: the same command carries on.

The paper ranks with PKU-Alignment/beaver-7b-v3.0-reward, whose architecture transformers does not
have; any sequence-classification model of transformers' own can be given (no remote code).
"""

import hashlib
import json
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import read


@dataclass
class Args:
    data: str = "Anthropic/hh-rlhf"  # .jsonl(.gz) file of {chosen, rejected}, folder, or hub id
    split: str = "train"  # {split}.jsonl(.gz) in a folder, or which split of the hub's
    reward_model: str = ""  # scores dialogues: one output, or logit of label 1 minus that of 0
    output_dir: str = "runs/hh_data"  # where the data and, meanwhile, the scores go
    seed: int = 1  # draws the preferences
    demonstrations: int = 10_000  # dialogues with the highest-scored chosen responses
    preferences: int = 10_000  # further dialogues whose pair of responses is kept
    batch_size: int = 32  # dialogues scored at once
    max_length: int = 512  # tokens of a dialogue that the reward model reads, the last ones
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on CUDA
    checkpoint_every: int = 100  # batches between saves of the scores
    threads: int = 2  # CPU threads of torch


SCRIPT = "data_gen/hh_data.py"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


# ------------------------------------------------------------------------------------- dialogues
def split_dialogue(text: str) -> tuple[str, str] | None:
    """(prompt, response), split at the last "\\n\\nAssistant:", the response with one blank before
    it; None if it is no such dialogue."""
    before, tag, response = text.rpartition(ASSISTANT)
    begins = before.lstrip("\n").startswith(HUMAN.strip())
    if not tag or not begins or not response.strip() or HUMAN in response:
        return None
    return before + tag, f" {response.strip()}"


def parse(rows: list[tuple[str, str]]) -> tuple[list[dict], dict[str, int]]:
    """Dialogues {prompt, chosen, rejected} of rows (chosen, rejected), each prompt once, and how
    many rows were dropped for which reason."""
    reasons = ("not a dialogue", "two prompts", "equal responses", "repeated prompt")
    dialogues, dropped = {}, dict.fromkeys(reasons, 0)
    for chosen, rejected in (map(split_dialogue, row) for row in rows):
        if chosen is None or rejected is None:
            dropped["not a dialogue"] += 1
        elif chosen[0] != rejected[0]:
            dropped["two prompts"] += 1
        elif chosen[1] == rejected[1]:
            dropped["equal responses"] += 1
        elif chosen[0] in dialogues:  # kept, it could be a demonstration and a prompt to train on
            dropped["repeated prompt"] += 1
        else:
            prompt, chosen, rejected = *chosen, rejected[1]
            dialogues[prompt] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return list(dialogues.values()), dropped


def divide(scores: np.ndarray, demonstrations: int, preferences: int, rng) -> list[np.ndarray]:
    """Disjoint indices of demonstrations (highest score first), preferences (random), the rest."""
    order = np.argsort(-scores, kind="stable")
    others = rng.permutation(np.sort(order[demonstrations:]))
    return [order[:demonstrations], np.sort(others[:preferences]), np.sort(others[preferences:])]


# --------------------------------------------------------------------------------------- scoring
def load_reward_model(name: str, dtype: str):
    """Tokenizer and model. ValueError on one without a trained head of one or two outputs."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name, trust_remote_code=False, output_loading_info=True
    )
    if info["missing_keys"] or model.config.num_labels > 2:
        raise ValueError(f"{name} is no reward model: it has no trained head of 1 or 2 outputs")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{name}: the tokenizer has more tokens than the model")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{name} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders read their score before it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return tokenizer, model.to(device, getattr(torch, dtype)).eval()


def most_tokens(model, max_length: int) -> int:
    """How many tokens the model reads of max_length; RoBERTa's positions begin after a padding."""
    limit = getattr(model.config, "max_position_embeddings", None) or max_length
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if getattr(positions, "padding_idx", None) is not None:
        limit -= positions.padding_idx + 1
    return min(max_length, limit)


@torch.no_grad()
def score(dialogues, tokenizer, model, args: Args, recipe: list, scores: torch.Tensor) -> None:
    """Puts the reward model's scores of prompt and chosen response where scores (dialogues,) are
    NaN, and saves them with the recipe, which they depend on."""
    texts = [dialogue["prompt"] + dialogue["chosen"] for dialogue in dialogues]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # little memory shows at once
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    cut = {"truncation": True, "max_length": most_tokens(model, args.max_length)}
    cut |= {"padding": True, "return_tensors": "pt", "return_token_type_ids": False}
    for number, rows in enumerate(tqdm(batches, desc="scores", unit="batch"), 1):
        if scores[rows].isnan().any():
            inputs = tokenizer([texts[i] for i in rows], **cut)
            logits = model(**inputs.to(model.device)).logits.double().cpu()
            scores[rows] = logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)
            read.check_finite(number, Path(args.output_dir), scores=scores[rows])
            if number % args.checkpoint_every == 0 or number == len(batches):
                state = {"script": SCRIPT, "recipe": recipe, "scores": scores}
                path = Path(args.output_dir) / "checkpoint.pt"
                read.write_whole(path, lambda path: torch.save(state, path))


def main() -> None:
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        read.check_numbers(args, "seed demonstrations preferences")
        if args.demonstrations and not args.reward_model:
            raise ValueError("demonstrations are chosen by a --reward-model, a folder or hub id")
        torch.set_num_threads(args.threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        rows = read.rows(args.data, "chosen rejected", split=args.split)
        dialogues, dropped = parse(rows)
        if len(dialogues) <= args.demonstrations + args.preferences:
            wanted = "too few for --demonstrations, --preferences and prompts"
            raise ValueError(f"{len(dialogues)} usable dialogues in {args.data}: {wanted}")
        scores = torch.full((len(dialogues),), torch.nan, dtype=torch.float64)
        recipe = [args.batch_size, args.max_length, args.dtype, read.fingerprint(dialogues)]
        output_dir = Path(args.output_dir)
        if args.demonstrations:
            tokenizer, model = load_reward_model(args.reward_model, args.dtype)
            weights = (p.detach().float().cpu().numpy() for p in model.parameters())
            recipe += map(read.fingerprint, weights)
            for number, (text, _) in enumerate(rows, 1):
                if not tokenizer.encode(text, add_special_tokens=False):
                    raise ValueError(f"{args.data} row {number} has no token for the reward model")
            if (output_dir / "checkpoint.pt").exists():
                state = read.checkpoint(output_dir, SCRIPT)
                scores = state["scores"] if state["recipe"] == recipe else scores
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()  # not writable: known now
        for left_over in output_dir.glob(".*.tmp"):
            left_over.unlink()

    if args.demonstrations:
        score(dialogues, tokenizer, model, args, recipe, scores)
    rng = np.random.default_rng(args.seed)
    split = divide(scores.numpy(), args.demonstrations, args.preferences, rng)
    columns = {
        "demonstrations": {"prompt": "prompt", "completion": "chosen"},
        "preferences": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        "prompts": {"prompt": "prompt"},
    }
    modules = {module.__name__: str(module.__version__) for module in (np, torch, transformers)}
    manifest = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "arguments": asdict(args),
        "rows": len(rows),
        "dropped": dropped,
        "counts": {name: len(indices) for name, indices in zip(columns, split)},
        "chosen_score_mean": {},
        "versions": {"python": sys.version.split()[0], **modules},
        "created": time.strftime("%Y-%m-%d"),
        "sha256": {},
    }
    for (name, keys), indices in zip(columns.items(), split):
        lines = [{new: dialogues[i][old] for new, old in keys.items()} for i in indices]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        read.write_whole(output_dir / f"{name}.jsonl", lambda path: path.write_text(text))
        manifest["sha256"][f"{name}.jsonl"] = hashlib.sha256(text.encode()).hexdigest()
        if args.demonstrations and len(indices):
            manifest["chosen_score_mean"][name] = scores[indices].mean().item()
    text = json.dumps(manifest, indent=2) + "\n"
    read.write_whole(output_dir / "manifest.json", lambda path: path.write_text(text))
    counts = ", ".join(f"{count} {name}" for name, count in manifest["counts"].items())
    print(f"{counts}; wrote {output_dir}")


if __name__ == "__main__":
    main()
