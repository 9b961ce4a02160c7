"""Collect the runs of benchmark/other_robots.sh into benchmark/results/other_robots.csv and the
table of benchmark/README.md.

    bash benchmark/other_robots.sh      # data and runs
    python benchmark/other_robots.py    # seconds

Runs whose folders are gone keep their rows of the committed csv.
"""

import json
from pathlib import Path

from main_job import ROOT, by_steps, finished, merge, numbers

RESULTS = ROOT / "benchmark/results/other_robots.csv"


def collect(runs: Path) -> list[dict]:
    """One row for each evaluation of each finished run, with the returns of its data: of a random
    policy, and of the tiers."""
    rows = []
    for path in sorted(runs.glob("other_robots__*__1/metrics.csv")):
        folder = path.parent
        args, found = finished(folder)
        manifest = runs / f"other_robots_data__{args['env']}/manifest.json"
        if not found or not manifest.exists():
            continue
        manifest = json.loads(manifest.read_text())
        data = {"expert_steps": manifest["arguments"]["total_timesteps"]}
        data["random"] = f"{manifest['random_return']:.6g}"
        for tier, of in manifest["tiers"].items():
            data[tier] = f"{of['return_mean']:.6g}"
        run = {"env": args["env"], "seed": str(args["seed"])} | data
        rows += [run | numbers(row, args) for row in found]
    return rows


def summarise(rows: list[dict]) -> str:
    columns = "environment | expert's steps | random, low, medium | demonstrations | SAC steps"
    columns += " | final return | best | above medium | preference accuracy | loss | min"
    lines = [f"| {columns} |", "|---" * 11 + "|"]
    for env in dict.fromkeys(row["env"] for row in rows):
        of = [row for row in rows if row["env"] == env]
        last, best = of[-1], max(float(row["return_mean"]) for row in of)
        data = {name: float(last[name]) for name in ("random", "low", "medium", "high")}
        digits = 0 if abs(data["high"]) > 100 else 1
        shown = {name: f"{x:.{digits}f}" for name, x in data.items()}
        final, std = float(last["return_mean"]), float(last["return_std"])
        lines.append(
            f"| {env} | {int(last['expert_steps']) // 1000}k | {shown['random']}, {shown['low']}, "
            f"{shown['medium']} | {shown['high']} | {float(last['sac_steps']) / 1000:.0f}k | "
            f"{final:.{digits}f} ± {std:.{digits}f} | {best:.{digits}f} | "
            f"{'yes' if final > data['medium'] else 'no'} | "
            f"{float(last['preference_accuracy']):.2f} | {float(last['preference_loss']):.2f} | "
            f"{float(last['wall_seconds']) / 60:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(summarise(merge(RESULTS, collect(ROOT / "runs"), ("env", "seed"), by_steps)))
