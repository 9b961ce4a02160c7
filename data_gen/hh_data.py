"""Demonstrations, preferences and prompts from Anthropic's HH dialogues, split as the AIHF paper splits them (6.2).

    python data_gen/hh_data.py --reward-model Ray2333/gpt2-large-helpful-reward_model

scores every chosen response with a reward model and writes, as JSON lines into runs/hh_data/,

    demonstrations.jsonl    {prompt, completion}          the 10,000 dialogues whose chosen response scores highest
    preferences.jsonl       {prompt, chosen, rejected}    10,000 others, at random
    prompts.jsonl           {prompt}                      the rest
    manifest.json           what made them: command, versions, counts, mean scores, SHA-256 of each file

A prompt is the dialogue up to and including its last "\\n\\nAssistant:"; prompt + response is the whole dialogue. The
data come from the hub (`pip install -e '.[hub]'`) or from a local file or folder. `--split test --demonstrations 0
--preferences 0` makes evaluation prompts and needs no reward model. The scoring can be interrupted: the same command
carries on.

The paper ranks with PKU-Alignment/beaver-7b-v3.0-reward, whose architecture transformers does not have; any
sequence-classification model of transformers' own can be given (no remote code; safetensors, or weights_only).
"""

import gzip
import hashlib
import json
import os
import shlex
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass
class Args:
    data: str = "Anthropic/hh-rlhf"
    """a .jsonl(.gz) file of rows {"chosen", "rejected"} in Anthropic's form, a folder with {split}.jsonl.gz or
    {split}.jsonl, or the id of such a data set on the hub"""
    split: str = "train"
    """which split of a folder or hub data set"""
    reward_model: str = ""
    """sequence-classification model, a folder or hub id, that scores whole dialogues: its one output, or the raw
    logit of label 1 minus that of label 0"""
    output_dir: str = "runs/hh_data"
    """where the data and, meanwhile, the scores go"""
    seed: int = 1
    """draws the preferences"""
    demonstrations: int = 10_000
    """dialogues with the highest-scored chosen responses"""
    preferences: int = 10_000
    """further dialogues whose pair of responses is kept"""
    batch_size: int = 32
    """dialogues scored at once"""
    max_length: int = 512
    """tokens of a dialogue that the reward model reads, the last ones"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the reward model; auto takes bfloat16 on CUDA and float32 on a CPU"""
    checkpoint_every: int = 100
    """batches between saves of the scores"""
    threads: int = 2
    """CPU threads of torch"""


# -------------------------------------------------------------------------------------------------------------- data
def fail(message: str):
    """One line to stderr, exit code 2: the caller's input was wrong and nothing has been written."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_rows(data: str, split: str, columns: tuple[str, ...]) -> list[dict]:
    """Rows with text under all `columns`: of a .jsonl(.gz) file, of {split}.jsonl(.gz) in a folder, or from the hub."""
    path = Path(data)
    if path.is_dir():
        found = [path / f"{split}{ending}" for ending in (".jsonl.gz", ".jsonl")]
        path = next((p for p in found if p.is_file()), None) or fail(f"{path} has no {split}.jsonl.gz or {split}.jsonl")
    if path.is_file():
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: not JSON, or not UTF-8
            fail(f"cannot read {path} ({one_line(error)})")
    elif data.count("/") != 1 or data[0] in "./~" or path.suffix:  # no hub id
        fail(f"there is no {data}")
    else:
        try:
            from datasets import load_dataset

            rows = list(load_dataset(data, split=split))
        except ImportError:
            fail(f"there is no folder {data}; to read it from the hub, pip install -e '.[hub]'")
        except Exception as error:  # of the network, the hub, the cache, the file format ...
            fail(f"cannot load {split} of {data} from the hub ({one_line(error)})")
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) and row[key].strip() for key in columns)):
            fail(f"row {number} of {path} needs text under {' and '.join(columns)}")
    return rows or fail(f"{path} is empty")


def split_dialogue(text: str) -> tuple[str, str] | None:
    """(prompt, response) at the last "\\n\\nAssistant:", one space between them; None if it is no such dialogue."""
    before, tag, response = text.rpartition(ASSISTANT)
    if not tag or not before.lstrip("\n").startswith(HUMAN.strip()) or not response.strip() or HUMAN in response:
        return None
    return before + tag, f" {response.strip()}"


def parse(rows: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Dialogues {prompt, chosen, rejected}, each prompt once, and how many rows were dropped for which reason."""
    dialogues, dropped = {}, dict.fromkeys(("not a dialogue", "two prompts", "equal responses", "repeated prompt"), 0)
    for row in rows:
        chosen, rejected = split_dialogue(row["chosen"]), split_dialogue(row["rejected"])
        if chosen is None or rejected is None:
            dropped["not a dialogue"] += 1
        elif chosen[0] != rejected[0]:
            dropped["two prompts"] += 1
        elif chosen[1] == rejected[1]:
            dropped["equal responses"] += 1
        elif chosen[0] in dialogues:  # kept, it could be a demonstration and a prompt to train on
            dropped["repeated prompt"] += 1
        else:
            dialogues[chosen[0]] = {"prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]}
    return list(dialogues.values()), dropped


def divide(scores: np.ndarray, demonstrations: int, preferences: int, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of demonstrations (highest score first), preferences (at random) and the rest, disjoint."""
    order = np.argsort(-scores, kind="stable")
    others = rng.permutation(np.sort(order[demonstrations:]))
    return order[:demonstrations], np.sort(others[:preferences]), np.sort(others[preferences:])


# ----------------------------------------------------------------------------------------------------------- scoring
def load_reward_model(name: str, dtype: str, device: torch.device):
    """Tokenizer and model; fails with one line on anything that has no trained head of one or two outputs."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # of the network, the hub, the files, an unknown architecture ...
        fail(f"cannot load --reward-model {name} ({one_line(error)})")
    if info["missing_keys"] or model.config.num_labels > 2:
        fail(f"--reward-model {name} is no reward model: it has no trained head of one or two outputs")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            fail(f"--reward-model {name} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders read their score off the token before it
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return tokenizer, model.to(device, getattr(torch, dtype)).eval()


@torch.no_grad()
def score(texts: list[str], tokenizer, model, args: Args, state_path: Path) -> np.ndarray:
    """The reward model's score of each text: (texts,). Carries on from state_path if that is of the same command."""
    recipe = json.dumps([args.reward_model, args.batch_size, args.max_length, str(model.dtype)])
    recipe += hashlib.sha256("\0".join(texts).encode()).hexdigest()
    out = torch.full((len(texts),), torch.nan, dtype=torch.float64)
    if state_path.exists():
        try:
            state = torch.load(state_path, weights_only=True)
            out = state["scores"] if state["recipe"] == recipe else out
        except Exception as error:  # torch.load raises almost anything on a damaged file
            fail(f"{state_path} is damaged ({type(error).__name__}); delete it or give another --output-dir")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)  # too little memory shows at once
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    limit = min(args.max_length, getattr(model.config, "max_position_embeddings", None) or args.max_length)
    for number, rows in enumerate(tqdm(batches, desc="scores", unit="batch"), 1):
        if out[rows].isnan().any():
            batch = [texts[i] for i in rows]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=limit)
            logits = model(**inputs.to(model.device)).logits.double().cpu()
            out[rows] = logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)
            if number % args.checkpoint_every == 0 or number == len(batches):
                torch.save({"recipe": recipe, "scores": out}, state_path.with_suffix(".tmp"))
                os.replace(state_path.with_suffix(".tmp"), state_path)
    if not out.isfinite().all():
        print("error: the reward model gives scores that are not finite; try --dtype float32", file=sys.stderr)
        raise SystemExit(1)
    return out.numpy()


def write(output_dir: Path, files: dict[str, list[dict]], manifest: dict) -> None:
    """The JSON lines and, last, the manifest with their hashes, each whole or not at all."""
    texts = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}
    manifest["sha256"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    for name, text in {**texts, "manifest.json": json.dumps(manifest, indent=2) + "\n"}.items():
        (output_dir / f".{name}.tmp").write_text(text, encoding="utf-8")
    for name in [*texts, "manifest.json"]:
        os.replace(output_dir / f".{name}.tmp", output_dir / name)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    for name, least in dict(batch_size=1, max_length=1, checkpoint_every=1, threads=1, demonstrations=0).items():
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(args, name)}")
    if args.preferences < 0 or args.seed < 0:
        fail("--preferences and --seed must not be negative")
    if args.demonstrations and not args.reward_model:
        fail("--reward-model is needed to choose the demonstrations; a folder or hub id")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    rows = read_rows(args.data, args.split, ("chosen", "rejected"))
    dialogues, dropped = parse(rows)
    if len(dialogues) <= args.demonstrations + args.preferences:
        fail(
            f"{len(dialogues)} usable dialogues in {args.data}: too few for --demonstrations, --preferences and prompts"
        )
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {output_dir} ({error.strerror})")

    scores = np.zeros(len(dialogues))
    if args.demonstrations:
        tokenizer, model = load_reward_model(args.reward_model, args.dtype, device)
        texts = [dialogue["prompt"] + dialogue["chosen"] for dialogue in dialogues]
        scores = score(texts, tokenizer, model, args, output_dir / "scores.pt")
    split = divide(scores, args.demonstrations, args.preferences, np.random.default_rng(args.seed))
    names = ("demonstrations", "preferences", "prompts")
    files = {name: [dialogues[i] for i in index] for name, index in zip(names, split)}
    files["demonstrations"] = [{"prompt": d["prompt"], "completion": d["chosen"]} for d in files["demonstrations"]]
    files["prompts"] = [{"prompt": d["prompt"]} for d in files["prompts"]]
    scored = [(name, index) for name, index in zip(names, split) if args.demonstrations and len(index)]
    manifest = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "arguments": asdict(args),
        "rows": len(rows),
        "dropped": dropped,
        "counts": {name: len(index) for name, index in zip(names, split)},
        "chosen_score_mean": {name: float(scores[i].mean()) for name, i in scored},
        "versions": {
            "python": sys.version.split()[0],
            **{module.__name__: str(module.__version__) for module in (np, torch, transformers)},
        },
        "created": time.strftime("%Y-%m-%d"),
    }
    write(output_dir, files, manifest)
    print(", ".join(f"{count} {name}" for name, count in manifest["counts"].items()) + f"; wrote {output_dir}")
