"""Preferences between texts, some of them with chosen and rejected the wrong way round.

    python benchmark/llm_data.py --flip 0.3 --output runs/flipped.jsonl

Whether a row is flipped depends on the seed and on its number alone: what is flipped at a smaller
share is flipped at a larger one, and the first 1,000 rows hold about the same share as all.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import read, write

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass
class Args:
    output: Path  # a file of preferences for --preferences
    preferences: str = "data_gen/assets/imdb/preferences.jsonl"  # {prompt, chosen, rejected}
    flip: float = 0.3  # probability of a row's being flipped
    seed: int = 1  # of which rows these are


def flip_some(rows: list[tuple], share: float, seed: int) -> list[dict]:
    """The rows (prompt, chosen, rejected) as dicts, the latter two exchanged where a uniform number
    is below share."""
    flipped = np.random.default_rng(seed).random(len(rows)) < share
    return [
        dict(zip(COLUMNS, (x, b, a) if wrong else (x, a, b)))
        for (x, a, b), wrong in zip(rows, flipped.tolist())
    ]


def main() -> None:
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        if not 0 <= args.flip <= 1:
            raise ValueError("--flip must lie between 0 and 1")
        rows = flip_some(read.rows(args.preferences, " ".join(COLUMNS)), args.flip, args.seed)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write.rows(args.output, rows)


if __name__ == "__main__":
    main()
