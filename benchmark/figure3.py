"""Figure 3: AIHF against RLHF, what each source of data gives, and fewer or worse data.

    bash benchmark/main_job.sh && bash benchmark/figure3.sh    # the runs
    python benchmark/figure3.py                                # needs pip install -e '.[figures]'

adds what it finds in runs/ to results/figure3.csv (a row an evaluation) and results/figure3_runs.csv (a row a run, of
every variant), draws figures/figure3*.png from these and prints the README's tables. Runs that are no longer in runs/
keep their rows.
"""

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np
from rliable import library, metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
CURVES, RUNS = ROOT / "benchmark/results/figure3.csv", ROOT / "benchmark/results/figure3_runs.csv"
COLUMNS = ("env", "method", "seed", "sac_steps", "env_steps", "return_mean", "return_std", "wall_seconds")
RUN_COLUMNS = ("env", "method", "variant", "seed", "sac_steps", "final", "best", "reward_correlation", "wall_seconds")
ENVS = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4")
COLORS = {
    "aihf": "tab:orange",
    "rlhf": "tab:blue",
    "rlhf-no-kl": "tab:cyan",
    "demonstrations-only": "tab:purple",
    "preferences-only": "tab:red",
    "bc": "tab:green",
}
TIERS = {"high": ("demonstrations", "-"), "medium": ("preferred", "--"), "low": ("non-preferred", ":")}


def collect(runs: Path) -> tuple[list[dict], list[dict]]:
    """Rows of figure3.csv and of figure3_runs.csv for the finished runs in this folder. RLHF's evaluation at 0 steps
    is of the cloned policy alone, bc."""
    curves, finals = [], []
    for folder in sorted(path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []:
        kind, *name = folder.name.split("__")
        if kind == "main_job":
            env, method, variant, seed = name[0], "aihf", "default", name[1]
        elif kind == "figure3":
            env, method, variant, seed = name
        else:
            continue
        with open(folder / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["eval/return_mean"]]
        total = json.loads((folder / "args.json").read_text())["total_timesteps"]
        if not rows or float(rows[-1]["charts/sac_steps"]) < total:
            continue
        by_method = {method: [row for row in rows if float(row["charts/sac_steps"]) > 0]}
        if method == "rlhf" and (variant == "default" or variant.startswith("demos")):  # its own clone
            by_method["bc"] = rows[:1]
        for which, rows in by_method.items():
            returns = [float(row["eval/return_mean"]) for row in rows]
            last = rows[-1]
            values = (env, which, variant, seed, last["charts/sac_steps"], last["eval/return_mean"], f"{max(returns)}")
            values += (last["eval/reward_correlation"], last["charts/wall_seconds"])
            finals.append(dict(zip(RUN_COLUMNS, values)))
            if variant == "default":
                keys = ("charts/sac_steps", "charts/env_steps", "eval/return_mean", "eval/return_std")
                for row in rows:
                    values = (env, which, seed, *(row[key] for key in keys), row["charts/wall_seconds"])
                    curves.append(dict(zip(COLUMNS, values)))
    return curves, finals


def merge(path: Path, new: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Write the file's rows, those of the same run replaced by the new ones, back to it; returns them."""
    have = {tuple(row[key] for key in keys) for row in new}
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    rows = [row for row in rows if tuple(row[key] for key in keys) not in have] + new
    rows.sort(key=lambda row: (*(row[key] for key in keys), float(row["sac_steps"])))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def finals_of(finals: list[dict], env: str, method: str, variant: str = "default", key: str = "final") -> np.ndarray:
    """That column of the runs, in the order of their seeds."""
    rows = [row for row in finals if (row["env"], row["method"], row["variant"]) == (env, method, variant)]
    return np.array([float(row[key] or "nan") for row in sorted(rows, key=lambda row: int(row["seed"]))])


def iqm(scores: np.ndarray) -> str:
    """Interquartile mean of runs (seeds,) with its 95 % interval from 10,000 bootstraps (Agarwal et al. 2021)."""
    estimate = library.get_interval_estimates(
        {"x": scores[:, None]},
        lambda x: np.array([metrics.aggregate_iqm(x)]),
        reps=10_000,
        random_state=np.random.RandomState(0),
    )
    low, high = estimate[1]["x"][:, 0]
    return f"{estimate[0]['x'][0]:.0f} [{low:.0f}, {high:.0f}]"


def table(finals: list[dict], demonstrations: dict[str, float]) -> str:
    lines = ["| environment | method | data | runs | final | final / demo | best | IQM of final | correlation | min |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    order = {env: n for n, env in enumerate(ENVS)}, {method: n for n, method in enumerate(COLORS)}
    groups = {(row["env"], row["method"], row["variant"]) for row in finals}
    for group in sorted(groups, key=lambda g: (order[0][g[0]], g[2] != "default", g[2], order[1][g[1]])):
        env, method, variant = group
        final, best, correlation, seconds = (
            finals_of(finals, *group, key) for key in ("final", "best", "reward_correlation", "wall_seconds")
        )
        of_best, of_correlation = f"{best.mean():.0f} ± {best.std():.0f}", f"{correlation.mean():.2f}"
        if method == "bc":  # evaluated once, and has no reward
            of_best = of_correlation = ""
        lines.append(
            f"| {env} | {method} | {variant} | {len(final)} | {final.mean():.0f} ± {final.std():.0f} | "
            f"{final.mean() / demonstrations[env]:.0%} | {of_best} | {iqm(final)} | "
            f"{of_correlation} | {seconds.mean() / 60:.0f} |"
        )
    return "\n".join(lines)


def improvement(finals: list[dict], x: str, y: str) -> str:
    """Probability that a run of x ends above one of y on a robot chosen at random (Agarwal et al. 2021)."""
    envs = [env for env in ENVS if len(finals_of(finals, env, x)) and len(finals_of(finals, env, y))]
    runs = min((len(finals_of(finals, env, method)) for env in envs for method in (x, y)), default=0)
    if not runs:
        return f"{x} and {y}: no environment has both"
    scores = [np.stack([finals_of(finals, env, method)[:runs] for env in envs], 1) for method in (x, y)]
    estimate, interval = library.get_interval_estimates(
        {"x,y": scores}, metrics.probability_of_improvement, reps=2_000, random_state=np.random.RandomState(0)
    )
    low, high = interval["x,y"].ravel()
    return f"P({x} > {y}) = {estimate['x,y']:.2f} [{low:.2f}, {high:.2f}] over {len(envs)} robots, {runs} seeds each"


def draw_curves(curves: list[dict], tiers: dict, envs: list[str], methods: tuple[str, ...], path: Path) -> None:
    """Mean over seeds against SAC steps, the seeds' standard deviation shaded; bc and the data's tiers as lines."""
    figure, axes = plt.subplots(1, len(envs), figsize=(1 + 4 * len(envs), 3.8), layout="constrained", squeeze=False)
    for axis, env in zip(axes[0], envs):
        for method in methods:
            points: dict[int, list[float]] = {}
            for row in curves:
                if (row["env"], row["method"]) == (env, method):
                    points.setdefault(int(float(row["sac_steps"])), []).append(float(row["return_mean"]))
            if not points:
                continue
            steps = sorted(points)
            mean = np.array([np.mean(points[step]) for step in steps])
            std = np.array([np.std(points[step]) for step in steps])
            if method == "bc":
                axis.axhline(mean[0], color=COLORS[method], label="cloning alone")
                continue
            thousands = np.array(steps) / 1000
            axis.plot(thousands, mean, color=COLORS[method], linewidth=2, label=method)
            axis.fill_between(thousands, mean - std, mean + std, color=COLORS[method], alpha=0.2, linewidth=0)
        for tier, (name, style) in TIERS.items():
            axis.axhline(tiers[env][tier]["return_mean"], color="gray", linestyle=style, linewidth=1, label=name)
        axis.set(title=env, xlabel="SAC steps (thousands)", ylabel="true return")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_sweeps(finals: list[dict], tiers: dict, path: Path) -> None:
    """Final return on Hopper-v4 against the share of the pairs, of flipped labels, and the demonstrated episodes."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    sweeps = {
        "share of the preference pairs": {0.1: "share0.1", 0.3: "share0.3", 1.0: "default"},
        "share of flipped labels": {0.0: "default", 0.1: "flip0.1", 0.3: "flip0.3"},
        "demonstrated episodes": {2: "demos2", 4: "demos4", 10: "default"},
    }
    for axis, (label, sweep) in zip(axes, sweeps.items()):
        for method in ("aihf", "rlhf", "bc") if "episodes" in label else ("aihf", "rlhf"):
            found = {x: finals_of(finals, "Hopper-v4", method, variant) for x, variant in sweep.items()}
            found = {x: final for x, final in found.items() if len(final)}
            for x, final in found.items():
                axis.plot([x] * len(final), final, "o", color=COLORS[method], alpha=0.4, markersize=4)
            mean = [final.mean() for final in found.values()]
            axis.plot(list(found), mean, color=COLORS[method], linewidth=2, label=method)
        level = tiers["Hopper-v4"]["high"]["return_mean"]
        axis.axhline(level, color="gray", linewidth=1, label="demonstrations")
        axis.set(xlabel=label, xticks=list(sweep))
    axes[0].set_ylabel("final true return, Hopper-v4")
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    new_curves, new_finals = collect(ROOT / "runs")
    curves = merge(CURVES, new_curves, ("env", "method", "seed"))
    finals = merge(RUNS, new_finals, ("env", "method", "variant", "seed"))
    folder = ROOT / "data_gen/assets/mujoco"
    tiers = {env: json.loads((folder / env / "manifest.json").read_text())["tiers"] for env in ENVS}
    print(table(finals, {env: tiers[env]["high"]["return_mean"] for env in ENVS}))
    for pair in (("aihf", "rlhf"), ("aihf", "rlhf-no-kl"), ("aihf", "bc")):
        print(improvement(finals, *pair))
    envs = [env for env in ENVS if any(row["env"] == env for row in curves)]
    figures = ROOT / "benchmark/figures"
    draw_curves(curves, tiers, envs, ("aihf", "rlhf", "rlhf-no-kl", "bc"), figures / "figure3.png")
    sources = ("aihf", "demonstrations-only", "preferences-only", "bc")
    draw_curves(curves, tiers, [env for env in envs if env != "Walker2d-v4"], sources, figures / "figure3_sources.png")
    draw_sweeps(finals, tiers, figures / "figure3_less_data.png")
