"""Collect the runs of benchmark/main_job.sh into benchmark/results/main_job.csv, a figure and the
table of benchmark/README.md.

    bash benchmark/main_job.sh      # the runs
    python benchmark/main_job.py    # seconds

Runs whose folders are gone keep their rows of the committed main_job.csv.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from plot import TIERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results/main_job.csv"
METRICS = {  # a column of results/: that of metrics.csv
    "sac_steps": "charts/sac_steps",
    "env_steps": "charts/env_steps",
    "return_mean": "eval/return_mean",
    "return_std": "eval/return_std",
    "wall_seconds": "charts/wall_seconds",
}
FIT = {  # how well the reward fits both kinds of data, likewise
    "preference_accuracy": "reward/preference_accuracy",
    "preference_loss": "reward/preference_loss",
    "gap": "reward/gap",
}
ENVS = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4")


def finished(run: Path) -> tuple[dict, list[dict]]:
    """A run's arguments, and the rows of its metrics.csv that have an evaluation: none while it has
    not finished."""
    args = json.loads((run / "args.json").read_text())
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row.get("eval/return_mean") or row.get("eval/gt_score")]
    name = next(name for name in ("total_timesteps", "ppo_steps", "dpo_steps") if name in args)
    last = rows and float(rows[-1].get("charts/sac_steps") or rows[-1]["charts/step"])
    return args, rows if rows and last >= args[name] else []


def numbers(row: dict, args: dict) -> dict:
    """Those of METRICS and FIT; the gap as a share of the width of the reward's range."""
    found = {name: row[metric] for name, metric in (METRICS | FIT).items()}
    low, high = args["reward_range"]
    return found | {"gap": f"{float(found['gap']) / (high - low):.6g}"}


def merge(path: Path, new: list[dict], keys: tuple[str, ...], order=lambda row: 0) -> list[dict]:
    """Write the file's rows, those of the same run replaced by the new ones, back to it; returns
    them, sorted by keys and then by order. Says how many stay: they are of other runs, perhaps of
    another machine and, if judges and data are made anew, of another judge."""
    replaced = {tuple(row[key] for key in keys) for row in new}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = list(csv.DictReader(text.splitlines()))
    rows = [row for row in rows if tuple(row[key] for key in keys) not in replaced]
    print(
        f"{path.name}: {len(new)} rows are of runs/, {len(rows)} stay as they were", file=sys.stderr
    )
    rows += new
    rows.sort(key=lambda row: (*(row[key] for key in keys), order(row)))
    columns = dict.fromkeys(key for row in rows for key in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def tiers(env: str) -> dict[str, dict]:
    """True returns of the data, from its manifest.json: {tier: {return_mean, return_std ...}}."""
    path = ROOT / "data_gen/assets/mujoco" / env / "manifest.json"
    return json.loads(path.read_text())["tiers"]


def by_steps(row: dict) -> float:
    return float(row["sac_steps"])


def collect(runs: Path) -> list[dict]:
    """One row for each evaluation of each finished run named main_job__<env>__<seed>."""
    rows = []
    for path in sorted(runs.glob("main_job__*__[0-9]/metrics.csv")):
        _, env, seed = path.parent.name.split("__")
        args, found = finished(path.parent)
        run = {"env": env, "method": "aihf", "seed": seed}
        rows += [run | numbers(row, args) for row in found]
    return rows


def curves_of(rows: list[dict], env: str) -> dict[str, np.ndarray]:
    """{seed: (evaluations, 7)}: steps, true return, its deviation, seconds, and FIT's columns."""
    names = ("sac_steps", "return_mean", "return_std", "wall_seconds", *FIT)
    of = [row for row in rows if row["env"] == env]
    curves = {row["seed"]: [] for row in sorted(of, key=lambda row: row["seed"])}
    for row in of:
        curves[row["seed"]].append([float(row.get(name) or "nan") for name in names])
    return {seed: np.array(curve) for seed, curve in curves.items()}


def summarise(rows: list[dict]) -> str:
    """Final true return of every seed, beside the data's, the best, the lowest of the second half,
    and how well the last reward fits preferences and demonstrations."""
    columns = "environment | seed | SAC steps | final return | best | lowest of second half"
    columns += " | final / demonstrations | above medium | preference accuracy | loss"
    columns += " | gap / range | min"
    lines = [f"| {columns} |", "|---" * 12 + "|"]
    for env in ENVS:
        demo, medium = (tiers(env)[tier]["return_mean"] for tier in ("high", "medium"))
        for seed, curve in curves_of(rows, env).items():
            steps, final, std, seconds, accuracy, loss, gap = curve[-1]
            returns = curve[:, 1]
            lines.append(
                f"| {env} | {seed} | {steps / 1000:.0f}k | {final:.0f} ± {std:.0f} | "
                f"{returns.max():.0f} | {returns[len(returns) // 2 :].min():.0f} | "
                f"{final / demo:.1%} ({demo:.0f}) | "
                f"{'yes' if final > medium else 'no'} ({medium:.0f}) | "
                f"{accuracy:.2f} | {loss:.2f} | {gap:.1%} | {seconds / 60:.0f} |"
            )
    return "\n".join(lines)


PANELS = ("true return", "preference accuracy", "preference loss, nats", "gap, share of range")


def draw(rows: list[dict], path: Path) -> None:
    size = {"figsize": (13, 10), "sharex": "col", "layout": "constrained"}
    figure, axes = plt.subplots(len(PANELS), len(ENVS), **size)
    for i, env in enumerate(ENVS):
        curves = list(curves_of(rows, env).values())
        for axis, title, column in zip(axes[:, i], PANELS, (1, 4, 5, 6)):
            for curve in curves:
                axis.plot(curve[:, 0], curve[:, column], color="tab:orange", alpha=0.35, lw=1)
            mean, label = np.mean(curves, axis=0), "AIHF, mean of seeds"
            axis.plot(mean[:, 0], mean[:, column], color="tab:orange", lw=2, label=label)
            axis.set_ylabel(title if i == 0 else "")
        for tier, (name, style) in TIERS.items():
            level = tiers(env)[tier]["return_mean"]
            axes[0, i].axhline(level, color="gray", linestyle=style, linewidth=1, label=name)
        for axis, level in zip(axes[1:, i], (0.85, 0.5, 0.05)):  # what was aimed at
            axis.axhline(level, color="gray", linestyle=":", linewidth=1, label="aim")
        axes[0, i].set_title(f"{env}, {len(curves)} seeds")
        axes[-1, i].set_xlabel("SAC steps")
    for axis in axes[:2, 0]:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    rows = merge(RESULTS, collect(ROOT / "runs"), ("env", "method", "seed"), by_steps)
    draw(rows, ROOT / "benchmark/figures/main_job.png")
    print(summarise(rows))
