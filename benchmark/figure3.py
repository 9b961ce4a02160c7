"""Figure 3: AIHF against RLHF, what each source of data gives, and fewer or worse data.

    bash benchmark/main_job.sh && bash benchmark/figure3.sh    # the runs
    python benchmark/figure3.py                                # needs pip install -e '.[plot]'

adds what it finds in runs/ to results/figure3.csv (a row an evaluation) and
results/figure3_runs.csv (a row a run), draws figures/figure3*.png from these and
prints the tables of benchmark/README.md. Runs that are no longer in runs/ keep their rows.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from llm import plus_minus
from main_job import ENVS, METRICS, ROOT, by_steps, finished, merge, tiers
from plot import TIERS

CURVES = ROOT / "benchmark/results/figure3.csv"
RUNS = ROOT / "benchmark/results/figure3_runs.csv"
COLORS = {
    "aihf": "tab:orange",
    "rlhf": "tab:blue",
    "rlhf-no-kl": "tab:cyan",
    "rlhf-kl-1": "tab:olive",
    "demonstrations-only": "tab:purple",
    "preferences-only": "tab:red",
    "bc": "tab:green",
}


def collect(runs: Path) -> tuple[list[dict], list[dict]]:
    """Rows of figure3.csv and of figure3_runs.csv for the finished runs in this folder. RLHF's
    evaluation at 0 steps is of the cloned policy alone, bc."""
    curves, finals = [], []
    for path in sorted(runs.glob("*__*__[123]/metrics.csv")):
        kind, *name = path.parent.name.split("__")
        if kind not in ("main_job", "figure3"):
            continue
        env, method, variant, seed = (
            name if len(name) == 4 else (name[0], "aihf", "default", name[1])
        )
        _, rows = finished(path.parent)
        if not rows:
            continue
        by_method = {method: [row for row in rows if float(row["charts/sac_steps"]) > 0]}
        if method == "rlhf":
            by_method["bc"] = rows[:1]
        for which, rows in by_method.items():
            run = {"env": env, "method": which, "variant": variant, "seed": seed}
            table = [{name: row[metric] for name, metric in METRICS.items()} for row in rows]
            curves += [run | row for row in table]
            if which == "bc" and not variant.startswith(("default", "demos")):
                continue  # cloned from the demonstrations of the default
            last = rows[-1]
            best = max(float(row["eval/return_mean"]) for row in rows)
            final = {"sac_steps": last["charts/sac_steps"], "final": last["eval/return_mean"]}
            final |= {"best": f"{best}"}
            metrics = "eval/reward_correlation charts/wall_seconds reward/preference_accuracy"
            final |= {name.split("/")[1]: last.get(name, "") for name in metrics.split()}
            finals.append(run | final)
    return curves, finals


def finals_of(finals, env: str, method: str, variant="default", key="final") -> np.ndarray:
    """That column of the runs, in the order of their seeds."""
    name = (env, method, variant)
    rows = [row for row in finals if (row["env"], row["method"], row["variant"]) == name]
    return np.array([float(r[key] or "nan") for r in sorted(rows, key=lambda r: int(r["seed"]))])


def table(finals: list[dict]) -> str:
    columns = "environment method data runs final final_/_demo best correlation min".split()
    lines = [f"| {' | '.join(columns)} |".replace("_", " "), "|---" * 9 + "|"]
    variants = sorted({row["variant"] for row in finals})  # default comes first
    groups = [(env, method, name) for env in ENVS for name in variants for method in COLORS]
    for group in groups:
        final, best, correlation, seconds = (
            finals_of(finals, *group, key)
            for key in ("final", "best", "reward_correlation", "wall_seconds")
        )
        if not len(final):
            continue
        share = final.mean() / tiers(group[0])["high"]["return_mean"]
        cells = [*group, len(final), plus_minus(final, 0), f"{share:.0%}"]
        cells += [plus_minus(best, 0), f"{correlation.mean():.2f}"]
        if group[1] == "bc":  # evaluated once, and has no reward
            cells[-2:] = "", ""
        lines.append(f"| {' | '.join(map(str, cells))} | {seconds.mean() / 60:.0f} |")
    return "\n".join(lines)


def draw_curves(curves: list[dict], envs: list[str], methods: tuple[str, ...], path: Path) -> None:
    """Mean over seeds against SAC steps, the seeds' standard deviation shaded; bc and the data's
    tiers as lines."""
    size = (1 + 4 * len(envs), 3.8)
    figure, axes = plt.subplots(1, len(envs), figsize=size, layout="constrained", squeeze=False)
    for axis, env in zip(axes[0], envs):
        for method in methods:
            points: dict[float, list[float]] = {}
            for row in curves:
                if (row["env"], row["method"], row["variant"]) == (env, method, "default"):
                    points.setdefault(by_steps(row), []).append(float(row["return_mean"]))
            if not points:
                continue
            steps = np.array(sorted(points))
            mean, std = (np.array([f(points[step]) for step in steps]) for f in (np.mean, np.std))
            style = {"color": COLORS[method]}
            if method == "bc":
                axis.axhline(mean[0], label="cloning alone", **style)
                continue
            axis.plot(steps / 1000, mean, linewidth=2, label=method, **style)
            axis.fill_between(steps / 1000, mean - std, mean + std, alpha=0.2, linewidth=0, **style)
        for tier, (name, line) in TIERS.items():
            level = tiers(env)[tier]["return_mean"]
            axis.axhline(level, color="gray", linestyle=line, linewidth=1, label=name)
        axis.set(title=env, xlabel="SAC steps (thousands)", ylabel="true return")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    style = {"loc": "outside lower center", "ncols": len(lines), "frameon": False, "fontsize": 8}
    figure.legend(lines.values(), lines.keys(), **style)
    figure.savefig(path, dpi=150)


def draw_sweeps(finals: list[dict], path: Path) -> None:
    """Final return on Hopper-v4 against the share of the pairs, of flipped labels, and the
    demonstrated episodes."""
    sweeps = {
        "share of the preference pairs": {0.1: "share0.1", 0.3: "share0.3", 1.0: "default"},
        "share of flipped labels": {0.0: "default", 0.1: "flip0.1", 0.3: "flip0.3"},
        "demonstrated episodes": {2: "demos2", 10: "default"},
    }
    size = (1 + 4 * len(sweeps), 3.8)
    style = {"layout": "constrained", "squeeze": False, "sharey": True}
    figure, axes = plt.subplots(1, len(sweeps), figsize=size, **style)
    for axis, (label, sweep) in zip(axes[0], sweeps.items()):
        for method in ("aihf", "rlhf", "bc") if "episodes" in label else ("aihf", "rlhf"):
            found = {
                x: finals_of(finals, "Hopper-v4", method, variant) for x, variant in sweep.items()
            }
            found = {x: final for x, final in found.items() if len(final)}
            for x, final in found.items():
                axis.plot(
                    [x] * len(final), final, "o", color=COLORS[method], alpha=0.4, markersize=4
                )
            mean = [final.mean() for final in found.values()]
            axis.plot(list(found), mean, color=COLORS[method], linewidth=2, label=method)
        level = tiers("Hopper-v4")["high"]["return_mean"]
        axis.axhline(level, color="gray", linewidth=1, label="demonstrations")
        axis.set(xlabel=label, xticks=list(sweep))
    axes[0, 0].set(ylabel="final true return, Hopper-v4", ylim=(0, None))
    axes[0, -1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    new_curves, new_finals = collect(ROOT / "runs")
    curves = merge(CURVES, new_curves, ("env", "method", "variant", "seed"), by_steps)
    finals = merge(RUNS, new_finals, ("env", "method", "variant", "seed"), by_steps)
    print(table(finals))
    figures = ROOT / "benchmark/figures"
    draw_curves(curves, ENVS, ("aihf", "rlhf", "rlhf-no-kl", "bc"), figures / "figure3.png")
    sources = ("aihf", "demonstrations-only", "preferences-only", "bc")
    draw_curves(curves, ENVS[:2], sources, figures / "figure3_sources.png")
    draw_sweeps(finals, figures / "figure3_less_data.png")
