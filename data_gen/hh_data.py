"""Demonstrations, preferences and prompts of Anthropic's HH dialogues, as the paper splits them.

    python data_gen/hh_data.py --reward-model Ray2333/gpt2-large-helpful-reward_model

scores every chosen response with a reward model (6.2) and writes, as JSON lines, into runs/hh_data/

    demonstrations.jsonl    {prompt, completion}          the 10,000 of the highest score
    preferences.jsonl       {prompt, chosen, rejected}    10,000 others, at random
    prompts.jsonl           {prompt}                      the rest
    manifest.json           what made them: command, versions, counts, scores, SHA-256 of files

A prompt is the dialogue up to and including its last "\\n\\nAssistant:"; with the response it is
the whole dialogue. `--split test --demonstrations 0 --preferences 0 --output-dir runs/hh_eval`
makes evaluation prompts, without a reward model. Interrupted scoring: the same command carries on.

The paper ranks with PKU-Alignment/beaver-7b-v3.0-reward, whose architecture transformers does not
have; any sequence-classification model of transformers' own can be given (no remote code).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aihf_ppo_llm
from data_gen import read, write


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
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products; weights are float32
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
    """Disjoint indices of demonstrations (highest score first), preferences and the rest, these in
    random order: rows of the hub's parts, which follow each other, are mixed."""
    order = np.argsort(-scores, kind="stable")
    others = rng.permutation(np.sort(order[demonstrations:]))
    return [order[:demonstrations], others[:preferences], others[preferences:]]


# --------------------------------------------------------------------------------------- scoring
@torch.no_grad()
def score(dialogues, judge, args: Args, recipe: list, scores: torch.Tensor) -> None:
    """Puts the reward model's scores of prompt and chosen response where scores (dialogues,) are
    NaN, and saves them with the recipe, which they depend on."""
    texts = [dialogue["prompt"] + dialogue["chosen"] for dialogue in dialogues]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # little memory shows at once
    batches = [order[part] for part in read.parts(0, len(order), args.batch_size)]
    for number, rows in enumerate(tqdm(batches, desc="scores", unit="batch"), 1):
        if scores[rows].isnan().any():
            scores[rows] = judge.score([texts[i] for i in rows]).double().cpu()
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
            judge = aihf_ppo_llm.Scorer(args.reward_model, aihf_ppo_llm.Args(), trained=True)
            judge.limit, judge.args.dtype = min(judge.limit, args.max_length), args.dtype
            recipe += map(read.fingerprint, judge.state_dict().values())
            judge.to("cuda" if torch.cuda.is_available() else "cpu")
            if (output_dir / "checkpoint.pt").exists():
                state = read.checkpoint(output_dir, SCRIPT)
                scores = state["scores"] if state["recipe"] == recipe else scores
        write.open_folders(output_dir)

    if args.demonstrations:
        score(dialogues, judge, args, recipe, scores)
    rng = np.random.default_rng(args.seed)
    split = divide(scores.numpy(), args.demonstrations, args.preferences, rng)
    columns = {"demonstrations": ("prompt", "completion")}  # of prompt, chosen and rejected
    columns |= {"preferences": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}
    counts = {name: len(indices) for name, indices in zip(columns, split)}
    found = {"rows": len(rows), "dropped": dropped, "counts": counts, "chosen_score_mean": {}}
    for (name, keys), indices in zip(columns.items(), split):
        lines = [dict(zip(keys, dialogues[i].values())) for i in indices]
        write.rows(output_dir / f"{name}.jsonl", lines)
        if args.demonstrations and len(indices):
            found["chosen_score_mean"][name] = scores[indices].mean().item()
    write.manifest(output_dir, [f"{name}.jsonl" for name in columns], args, "transformers", found)
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{words}; wrote {output_dir}")


if __name__ == "__main__":
    main()
