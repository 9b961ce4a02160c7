"""Learning curves of any runs of any script, from their metrics.csv, in one picture.

    python benchmark/plot.py RUN [RUN ...] [--output FILE]      # needs pip install -e '.[plot]'

True return or ground-truth score ± std of each evaluation, and the returns of a robot's data.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import read

STEPS = ("charts/sac_steps", "charts/step")  # the first that a run has
PANELS = {  # column: that of its deviation, and a title; a panel without any number is left out
    "eval/return_mean": ("eval/return_std", "true return"),
    "eval/gt_score": ("eval/gt_score_std", "ground-truth score"),
    "eval/kl": ("", "KL to the reference"),
    "reward/gap": ("", "reward gap"),
    "reward/preference_accuracy": ("", "preference accuracy"),
    "reward/preference_loss": ("", "preference loss"),
}
TIERS = {"high": ("demonstrations", "-"), "medium": ("preferred", "--"), "low": ("other", ":")}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    output: Path | None = None  # the picture; default learning_curve.png in the first run's folder


def columns(run: Path) -> dict[str, np.ndarray]:
    """The columns (rows,) of a run's metrics.csv, nan where a cell is empty."""
    if not (run / "metrics.csv").is_file():
        raise ValueError(f"{run} is no run: it has no metrics.csv")
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}
    return table | {"steps": table[STEPS[0] if STEPS[0] in table else STEPS[1]]}


def tiers(run: Path) -> dict[str, float]:
    """{tier: true return} of the data of a robot's run, as far as its manifest.json has them."""
    args = json.loads((run / "args.json").read_text())
    data_dir = args.get("data_dir") or f"data_gen/assets/mujoco/{args.get('env')}"
    folders = (Path(), Path(__file__).resolve().parents[1])
    manifests = [folder / data_dir / "manifest.json" for folder in folders]
    found = [json.loads(path.read_text()) for path in manifests if path.is_file()]
    returns = found[0].get("tiers", {}) if found else {}
    return {tier: returns[tier]["return_mean"] for tier in TIERS if tier in returns}


if __name__ == "__main__":
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        runs = {run: columns(run) for run in args.runs}
        levels = dict.fromkeys(level for run in runs for level in tiers(run).items())
        known = {key for table in runs.values() for key in table if np.isfinite(table[key]).any()}
        panels = {panel: PANELS[panel] for panel in PANELS if panel in known}
        if not panels:
            raise ValueError("give run folders with an evaluation, at least one")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError("drawing needs matplotlib: pip install -e '.[plot]'") from None

    widths = [2 if "eval" in panel else 1 for panel in panels]
    figure = Figure(figsize=(1 + 3 * sum(widths), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, (panel, (deviation, title)) in zip(axes, panels.items()):
        for run, table in runs.items():
            rows = np.isfinite(table.get(panel, table["steps"] * np.nan))  # those with a number
            x, y = table["steps"][rows], table.get(panel, table["steps"])[rows]
            (line,) = axis.plot(x, y, label=str(run))
            std = table.get(deviation, np.zeros(len(rows)))[rows]
            axis.fill_between(x, y - std, y + std, color=line.get_color(), alpha=0.2, linewidth=0)
        for tier, value in levels if "return" in panel else ():
            axis.axhline(value, color="gray", linestyle=TIERS[tier][1], label=TIERS[tier][0])
        axis.set(title=title, xlabel="steps")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8)
    with read.input_errors():
        figure.savefig(output := args.output or args.runs[0] / "learning_curve.png", dpi=130)
    print(f"wrote {output}")
