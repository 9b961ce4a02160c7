"""Collect the runs of benchmark/main_job.sh into benchmark/results/main_job.csv, a figure and the
table of benchmark/README.md.

    bash benchmark/main_job.sh      # the runs
    python benchmark/main_job.py    # seconds

Runs whose folders are gone keep their rows of the committed main_job.csv.
"""

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark/results/main_job.csv"
METRICS = {  # a column of results/: that of metrics.csv
    "sac_steps": "charts/sac_steps",
    "env_steps": "charts/env_steps",
    "return_mean": "eval/return_mean",
    "return_std": "eval/return_std",
    "wall_seconds": "charts/wall_seconds",
}
ENVS = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4")
TIERS = {"high": ("demonstrations", "-"), "medium": ("preferred", "--"), "low": ("other", ":")}


def evaluations(run: Path, column: str = "eval/return_mean") -> list[dict]:
    """The rows of a run's metrics.csv that have an evaluation."""
    with open(run / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


def merge(path: Path, new: list[dict], keys: tuple[str, ...], order=lambda row: 0) -> list[dict]:
    """Write the file's rows, those of the same run replaced by the new ones, back to it; returns
    them, sorted by keys and then by order."""
    replaced = {tuple(row[key] for key in keys) for row in new}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if tuple(row[key] for key in keys) not in replaced] + new
    rows.sort(key=lambda row: (*(row[key] for key in keys), order(row)))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
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
    """One row for each evaluation of each run named main_job__<env>__<seed>."""
    rows = []
    for path in sorted(runs.glob("main_job__*/metrics.csv")):
        _, env, seed = path.parent.name.split("__")
        for row in evaluations(path.parent):
            numbers = {name: row[metric] for name, metric in METRICS.items()}
            rows.append({"env": env, "method": "aihf", "seed": seed, **numbers})
    return rows


def curves_of(rows: list[dict], env: str) -> dict[str, np.ndarray]:
    """{seed: (evaluations, 4)}: steps, true return, its deviation and seconds."""
    names = ("sac_steps", "return_mean", "return_std", "wall_seconds")
    of = [row for row in rows if row["env"] == env]
    return {
        seed: np.array([[float(row[name]) for name in names] for row in of if row["seed"] == seed])
        for seed in sorted({row["seed"] for row in of})
    }


def summarise(rows: list[dict]) -> str:
    """Final and best true return of every seed, beside the data's."""
    lines = [
        "environment | seed | SAC steps | final return | best | demonstrations | final / demo "
    ]
    lines = [f"| {lines[0]}| above medium | min |", "|---" * 9 + "|"]
    for env in ENVS:
        demo, medium = (tiers(env)[tier]["return_mean"] for tier in ("high", "medium"))
        for seed, curve in curves_of(rows, env).items():
            steps, final, std, seconds = curve[-1]
            lines.append(
                f"| {env} | {seed} | {steps / 1000:.0f}k | {final:.0f} ± {std:.0f} | "
                f"{curve[:, 1].max():.0f} | {demo:.0f} | {final / demo:.0%} | "
                f"{'yes' if final > medium else 'no'} ({medium:.0f}) | {seconds / 60:.0f} |"
            )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, len(ENVS), figsize=(13, 3.8), layout="constrained")
    for axis, env in zip(axes, ENVS):
        curves = list(curves_of(rows, env).values())
        for curve in curves:
            axis.plot(curve[:, 0], curve[:, 1], color="tab:orange", alpha=0.35, linewidth=1)
        length = min(map(len, curves))
        steps, mean, *_ = np.mean([curve[:length] for curve in curves], axis=0).T
        label = f"AIHF, mean of {len(curves)} seeds"
        axis.plot(steps, mean, color="tab:orange", linewidth=2, label=label)
        for tier, (name, style) in TIERS.items():
            level = tiers(env)[tier]["return_mean"]
            axis.axhline(level, color="gray", linestyle=style, linewidth=1, label=name)
        axis.set(title=env, xlabel="SAC steps", ylabel="true return")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    rows = merge(RESULTS, collect(ROOT / "runs"), ("env", "method", "seed"), by_steps)
    draw(rows, ROOT / "benchmark/figures/main_job.png")
    print(summarise(rows))
