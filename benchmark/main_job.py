"""Collect the runs of benchmark/main_job.sh into benchmark/results/main_job.csv, a figure and the README's table.

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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark/results/main_job.csv"
COLUMNS = ("env", "method", "seed", "sac_steps", "env_steps", "return_mean", "return_std", "wall_seconds")
ENVS = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4")
TIERS = {"high": ("demonstrations", "-"), "medium": ("preferred", "--"), "low": ("non-preferred", ":")}


def collect(runs: Path) -> list[dict]:
    """One row for each evaluation of each run named main_job__<env>__<seed>."""
    rows = []
    for folder in sorted(path for path in runs.glob("main_job__*") if path.is_dir()):
        _, env, seed = folder.name.split("__")
        with open(folder / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                if row["eval/return_mean"]:
                    keys = ("charts/sac_steps", "charts/env_steps", "eval/return_mean", "eval/return_std")
                    values = [env, "aihf", seed, *(row[key] for key in keys), row["charts/wall_seconds"]]
                    rows.append(dict(zip(COLUMNS, values)))
    return rows


def summarise(rows: list[dict], manifests: dict[str, dict]) -> str:
    """The README's table: final and best true return of every seed, beside the data's."""
    lines = [
        "| environment | seed | SAC steps | final return | best | demonstrations | final / demo | above medium | min |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for env in manifests:
        tiers = manifests[env]["tiers"]
        demo, medium = tiers["high"]["return_mean"], tiers["medium"]["return_mean"]
        for seed in sorted({row["seed"] for row in rows if row["env"] == env}):
            run = [row for row in rows if row["env"] == env and row["seed"] == seed]
            final, best = float(run[-1]["return_mean"]), max(float(row["return_mean"]) for row in run)
            lines.append(
                f"| {env} | {seed} | {float(run[-1]['sac_steps']) / 1000:.0f}k | {final:.0f} ± "
                f"{float(run[-1]['return_std']):.0f} | {best:.0f} | {demo:.0f} | {final / demo:.0%} | "
                f"{'yes' if final > medium else 'no'} ({medium:.0f}) | {float(run[-1]['wall_seconds']) / 60:.0f} |"
            )
    return "\n".join(lines)


def draw(rows: list[dict], manifests: dict[str, dict], path: Path) -> None:
    envs = [env for env in manifests if any(row["env"] == env for row in rows)]
    figure, axes = plt.subplots(1, len(envs), figsize=(1 + 4 * len(envs), 3.8), layout="constrained", squeeze=False)
    for axis, env in zip(axes[0], envs):
        curves = {}
        for row in rows:
            if row["env"] == env:
                curves.setdefault(row["seed"], []).append((float(row["sac_steps"]), float(row["return_mean"])))
        for curve in curves.values():
            axis.plot(*zip(*curve), color="tab:orange", alpha=0.35, linewidth=1)
        if curves:
            length = min(len(curve) for curve in curves.values())
            steps = [step for step, _ in next(iter(curves.values()))[:length]]
            mean = np.mean([[value for _, value in curve[:length]] for curve in curves.values()], axis=0)
            axis.plot(steps, mean, color="tab:orange", linewidth=2, label=f"AIHF, mean of {len(curves)} seeds")
        for tier, (name, style) in TIERS.items():
            level = manifests[env]["tiers"][tier]["return_mean"]
            axis.axhline(level, color="gray", linestyle=style, linewidth=1, label=name)
        axis.set(title=env, xlabel="SAC steps", ylabel="true return")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    assets = ROOT / "data_gen/assets/mujoco"
    manifests = {
        env: json.loads((assets / env / "manifest.json").read_text()) for env in ENVS if (assets / env).is_dir()
    }
    rows = collect(ROOT / "runs")
    found = {(row["env"], row["seed"]) for row in rows}
    with open(RESULTS, newline="") as file:
        rows += [row for row in csv.DictReader(file) if (row["env"], row["seed"]) not in found]
    rows.sort(key=lambda row: (ENVS.index(row["env"]), row["seed"], float(row["sac_steps"])))
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, manifests, ROOT / "benchmark/figures/main_job.png")
    print(summarise(rows, manifests))
