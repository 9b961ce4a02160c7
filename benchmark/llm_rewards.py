"""Which reward knows more? RLHF's and AIHF's on the same texts, of SFT and of both policies.

    python benchmark/llm_rewards.py             # of the runs of benchmark/llm.sh
    python benchmark/llm_rewards.py smollm2     # of those of smollm2.sh

(needs `pip install -e '.[plot]'`) adds rows to results/llm_rewards.csv (smollm2_rewards.csv): for
each size of data and seed of which runs/ has finished runs of both, the final ground truth of the
policy trained on the reward, and the rank correlation of its learned scores with the ground truth
on the responses of each of the three, and on all of them. (In llm.csv each reward is correlated on
its own policy's responses, of which RLHF's vary less.) Prints a table.
"""

import sys
from pathlib import Path

import torch
import tyro
from llm import METHODS, RESULTS, ROOT, Args, label_of, plus_minus, samples
from main_job import finished, merge

sys.path.insert(0, str(ROOT))
from aihf_ppo_llm import Args as Settings
from aihf_ppo_llm import Scorer, in_parts

KEYS = ("demonstrations", "preferences", "seed", "reward")
TEXTS = {"sft": "samples_sft.jsonl", "rlhf": "samples.jsonl", "aihf-ppo": "samples.jsonl"}


def correlations(reward: Scorer, texts: dict[str, list[dict]]) -> dict[str, str]:
    """Rank correlations of learned and true scores on each list of samples, and on all."""
    row = {}
    for name, rows in (texts | {"all": sum(texts.values(), [])}).items():
        learned = in_parts(
            reward.score, Settings(), [x["prompt"] + x["response"] for x in rows]
        ).cpu()
        truth = torch.tensor([x["gt_score"] for x in rows])
        ranks = torch.stack([learned, truth]).argsort().argsort().double()
        row[name] = f"{torch.corrcoef(ranks)[0, 1].item():.4f}"
    return row


def collect(runs: Path, name: str = "llm") -> list[dict]:
    """Rows of llm_rewards.csv."""
    rows = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for rlhf in sorted(runs.glob(f"{name}__rlhf__*__*__[0-9]")):
        size_and_seed = rlhf.name.split("__")[2:]
        folders = {
            "rlhf": rlhf,
            "aihf-ppo": runs / "__".join([f"{name}__aihf-ppo", *size_and_seed]),
        }
        if all((folder / "reward").exists() and finished(folder)[1] for folder in folders.values()):
            texts = {x: samples(folders.get(x, rlhf) / file) for x, file in TEXTS.items()}
            for method, folder in folders.items():
                reward = Scorer(str(folder / "reward"), Settings(), trained=True).to(device)
                row = dict(zip(KEYS, (*size_and_seed, method)))
                truth = [sample["gt_score"] for sample in texts[method]]
                row["gt_score"] = f"{sum(truth) / len(truth):.4f}"
                rows.append(row | correlations(reward, texts))
    return rows


def table(rows: list[dict]) -> str:
    """Means ± std over seeds."""
    lines = [
        "| data | reward | on SFT's responses | on RLHF's | on AIHF's | on all |",
        "|---" * 6 + "|",
    ]
    groups = {}
    for row in rows:
        groups.setdefault((row["demonstrations"], row["preferences"], row["reward"]), []).append(
            row
        )
    for (*size, method), group in groups.items():
        cells = [label_of(tuple(size)), METHODS[method][0]]
        cells += [plus_minus([float(row[x]) for row in group]) for x in (*TEXTS, "all")]
        lines.append(f"| {' | '.join(cells)} |".replace("-", "−"))
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name = tyro.cli(Args, description=__doc__.split("\n\n")[0]).runs
    print(table(merge(RESULTS / f"{name}_rewards.csv", collect(ROOT / "runs", name), KEYS)))
