"""Figures 4, 5 and 11 in small: AIHF against RLHF on HH, from two initial models.

    bash benchmark/hh.sh        # the runs
    python benchmark/hh.py      # needs pip install -e '.[plot]'

adds what it finds in runs/ to results/hh.csv (a row an evaluation) and results/hh_scores.csv (the
judge's score of every held-out response, without the text), draws figures/hh.png from these, prints
the table of benchmark/README.md, and how often the judge orders held-out pairs as people did. KL,
win rate (ties count half) and `demo` are of the demonstration-SFT model.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from llm import METHODS as LLM_METHODS
from llm import plus_minus, runs_of, samples, win_rate
from main_job import ROOT, finished, merge

sys.path.insert(0, str(ROOT))
from aihf_ppo_llm import Args, Scorer
from data_gen import read

RESULTS = ROOT / "benchmark/results/hh.csv"
KEYS = ("start", "method", "seed")
METRICS = {
    "policy_steps": "charts/step",
    "seconds": "charts/wall_seconds",
    "gt_score": "eval/gt_score",
    "kl": "eval/kl_base",
    "correlation": "eval/reward_correlation",
}
STARTS = {"demo": "demonstration-SFT", "full": "full-SFT"}
METHODS = {"sft": "none", "rlhf": "RLHF", "aihf-ppo": "AIHF"}


def collect(runs: Path) -> tuple[list[dict], list[dict]]:
    """Rows of hh.csv and of hh_scores.csv for this folder's finished runs hh__<method>__<start>__
    <seed>. RLHF's samples before its first PPO step are those of the initial model."""
    rows, scores = [], []
    for path in sorted(runs.glob("hh__*__*__[0-9]/metrics.csv")):
        folder, (_, table) = path.parent, finished(path.parent)
        _, method, start, seed = folder.name.split("__")
        demo = runs / f"hh__rlhf__demo__{seed}/samples_sft.jsonl"
        if not table or not demo.exists():
            continue
        groups = {method: ("samples.jsonl", table)}
        if method == "rlhf":
            groups["sft"] = "samples_sft.jsonl", table[:1]
        for name, (file, found) in groups.items():
            run, own = {"start": start, "method": name, "seed": seed}, samples(folder / file)
            rows += [run | {key: row[metric] for key, metric in METRICS.items()} for row in found]
            rows[-1]["win_rate"] = str(win_rate(own, samples(demo)))
            scores += [run | {"gt_score": f"{sample['gt_score']:.5g}"} for sample in own]
    return rows, scores


def table(rows: list[dict]) -> str:
    heads = "from | trained by | seeds | judge, final | best | KL | win rate | correlation | min"
    lines = [f"| {heads} |", "|---" * 9 + "|"]
    for start in STARTS:
        for method in METHODS:
            if runs := list(runs_of(rows, start, method, keys=KEYS).values()):
                last = {key: [run[key][-1] for run in runs] for key in runs[0]}
                cells = [STARTS[start], METHODS[method], len(runs), plus_minus(last["gt_score"])]
                cells.append(plus_minus([run["gt_score"].max() for run in runs]))
                cells += [plus_minus(last["kl"], 1), f"{np.mean(last['win_rate']):.0%}"]
                minutes = f"{np.mean(last['seconds']) / 60:.0f}"  # of SFT not known
                cells += [f"{np.mean(last['correlation']):.2f}", minutes if method != "sft" else ""]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(rows: list[dict], scores: list[dict], path: Path) -> None:
    """The judge's score and the KL divergence against PPO steps, and the scores' distribution."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for start, line in zip(STARTS, ("-", "--")):
        for method in METHODS:
            style = {"linestyle": line, "color": LLM_METHODS[method][1]}
            label = f"{start}-SFT" if method == "sft" else f"{METHODS[method]}, from {start}-SFT"
            for run in runs_of(rows, start, method, keys=KEYS).values():
                if method != "sft":
                    axes[0].plot(run["policy_steps"], run["gt_score"], label=label, **style)
                    axes[1].plot(run["policy_steps"], run["kl"], label=label, **style)
            mine = [row for row in scores if (row["start"], row["method"]) == (start, method)]
            x = np.sort([float(row["gt_score"]) for row in mine])
            axes[2].plot(x, np.arange(1, len(x) + 1) / max(1, len(x)), label=label, **style)
    axes[0].set(xlabel="PPO steps", ylabel="judge's score")
    axes[1].set(xlabel="PPO steps", ylabel="KL to demonstration-SFT, nats")
    axes[2].set(xlabel="judge's score", ylabel="share of responses below")
    for axis in axes[1:]:
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def accuracy(judge: Path, pairs: list[tuple[str, str, str]]) -> float:
    """Share of the pairs whose chosen response has the higher score."""
    scorer = Scorer(str(judge), Args(), trained=True)
    sides = zip(*((x + y, x + z) for x, y, z in pairs))
    chosen, rejected = (torch.cat([scorer.score([text]) for text in side]) for side in sides)
    return (chosen > rejected).double().mean().item()


if __name__ == "__main__":
    new_rows, new_scores = collect(ROOT / "runs")
    rows = merge(RESULTS, new_rows, KEYS)
    scores = merge(ROOT / "benchmark/results/hh_scores.csv", new_scores, KEYS)
    draw(rows, scores, ROOT / "benchmark/figures/hh.png")
    print(table(rows))
    test, judge = ROOT / "runs/hh_parts/test.jsonl", ROOT / "runs/hh_full/reward"
    if judge.exists():
        pairs = read.rows(str(test), "prompt chosen rejected")
        print(
            f"the judge orders {accuracy(judge, pairs):.1%} of {len(pairs)} held-out pairs rightly"
        )
