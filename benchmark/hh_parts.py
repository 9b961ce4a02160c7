"""Anthropic's HH dialogues in three parts, of which none has a prompt of another's.

    python benchmark/hh_parts.py --data harmless-base-test.jsonl.gz

writes into runs/hh_parts/, as JSON lines,

    judge.jsonl      {prompt, chosen, rejected}   pairs from which a judge learns
    policies.jsonl   {chosen, rejected}           dialogues for data_gen/hh_data.py
    full.jsonl       {prompt, completion}         the chosen responses of these
    test.jsonl       {prompt, chosen, rejected}   to test the judge; its last prompts for evaluation
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import hh_data, read, write


@dataclass
class Args:
    data: str = "Anthropic/hh-rlhf"  # .jsonl(.gz) file of {chosen, rejected}, folder, or hub id
    split: str = "test"  # {split}.jsonl(.gz) in a folder, or which split of the hub's
    judge: int = 1100  # dialogues of the judge, the first ones
    policies: int = 1073  # of the policies, the next ones
    test: int = 128  # and then those of the test
    output_dir: Path = Path("runs/hh_parts")  # where the parts go


def main() -> None:
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        dialogues, _ = hh_data.parse(read.rows(args.data, "chosen rejected", split=args.split))
        ends = args.judge, args.judge + args.policies, args.judge + args.policies + args.test
        if len(dialogues) < ends[2]:
            raise ValueError(f"{args.data} has {len(dialogues)} usable dialogues, not {ends[2]}")
        parts = {"judge": dialogues[: ends[0]], "test": dialogues[ends[1] : ends[2]]}
        policies = dialogues[ends[0] : ends[1]]
        sides = "chosen", "rejected"
        parts["policies"] = [{x: row["prompt"] + row[x] for x in sides} for row in policies]
        parts["full"] = [{"prompt": x["prompt"], "completion": x["chosen"]} for x in policies]
        args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write.rows(args.output_dir / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
