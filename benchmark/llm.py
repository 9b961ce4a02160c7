"""Figures 6 to 10 on the embedded language models: AIHF against RLHF, AIHF-DPO against DPO.

    bash benchmark/llm.sh        # the runs
    python benchmark/llm.py      # needs pip install -e '.[figures]'

adds what it finds in runs/ to results/llm.csv (a row an evaluation; runs that belong to several figures stand there
once for each) and results/llm_scores.csv (a row a held-out response of the last evaluation, for Figure 8), draws
figures/figure6.png to figure10.png from these and prints the README's tables. Runs that are no longer in runs/ keep
their rows. kl is to the base model, whatever a run's own reference is; win_rate is over SFT on as many demonstrations.
"""

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
ROWS, SCORES = ROOT / "benchmark/results/llm.csv", ROOT / "benchmark/results/llm_scores.csv"
KEYS = ("figure", "method", "demonstrations", "preferences", "seed")
COLUMNS = (
    "figure method seed demonstrations preferences policy_steps episodes seconds gt_score kl win_rate correlation"
).split()
SCORE_COLUMNS = ("method", "seed", "learned_score", "gt_score", "response")
FIGURES = {  # which sizes of data, (demonstrations, preferences), belong to which of the paper's figures
    "6": [(1000, 1000)],
    "7": [(1000, 100), (1000, 1000), (1000, 3000), (3000, 3000)],
    "9": [(3000, 1000), (3000, 2000), (3000, 3000)],
    "10": [(1000, 1000), (1000, 2000), (1000, 3000)],
}
METHODS = {"6": ("aihf-ppo", "rlhf", "aihf-dpo", "dpo", "sft"), "7": ("aihf-ppo", "rlhf"), "9": ("aihf-ppo", "rlhf")}
METHODS["10"] = ("aihf-dpo", "dpo")
COLORS = dict(zip(METHODS["6"], ("tab:orange", "tab:blue", "tab:red", "tab:cyan", "tab:green")))


def evaluations(folder: Path, method: str) -> list[dict]:
    """The run's evaluations as rows of llm.csv, without the figure; nothing if it has not finished."""
    args = json.loads((folder / "args.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/gt_score"]]
    if not rows or float(rows[-1]["charts/step"]) < args.get("ppo_steps", args.get("dpo_steps")):
        return []
    names = ("charts/step", "charts/episodes", "charts/wall_seconds", "eval/gt_score", "eval/kl_base", "eval/win_rate")
    table = []
    for row in rows:
        values = (method, args["seed"], args["num_demonstrations"], args["num_preferences"])
        values += (*(row.get(name, "0") for name in names), row["eval/reward_correlation"])
        table.append(dict(zip(COLUMNS[1:], map(str, values))))
    return table


def collect(runs: Path) -> tuple[list[dict], list[dict]]:
    """Rows of llm.csv and of llm_scores.csv for the finished runs in this folder. RLHF's evaluation at 0 steps is of
    SFT alone."""
    rows, scores = [], []
    for folder in sorted(runs.glob("llm__*__*__*__*")):
        if not (folder / "args.json").is_file():  # its log
            continue
        method = folder.name.split("__")[1]
        table = evaluations(folder, method)
        sft = [{**row, "method": "sft"} for row in table[:1] if method == "rlhf"]
        for row in table + sft:
            size = int(row["demonstrations"]), int(row["preferences"])
            rows += [{"figure": f, **row} for f in FIGURES if size in FIGURES[f] and row["method"] in METHODS[f]]
        if table and size == (1000, 1000):
            for line in (folder / "samples.jsonl").read_text().splitlines():
                sample = {"method": method, "seed": table[0]["seed"], "learned_score": "", **json.loads(line)}
                sample["response"] = " ".join(sample["response"].split())
                sample |= {n: f"{x:.5g}" for n, x in sample.items() if isinstance(x, float)}
                scores.append({name: sample[name] for name in SCORE_COLUMNS})
    return rows, scores


def merge(path: Path, new: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Write the file's rows, those of the same run replaced by the new ones, back to it; returns them."""
    have = {tuple(row[key] for key in keys) for row in new}
    rows = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
    rows = [row for row in rows if tuple(row[key] for key in keys) not in have] + new
    rows.sort(key=lambda row: tuple(row[key] for key in keys))  # stable: evaluations stay in their order
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def runs_of(rows: list[dict], figure: str, method: str, size: tuple[int, int]) -> dict[str, dict[str, np.ndarray]]:
    """For each seed, its columns over the evaluations."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if (row["figure"], row["method"], row["demonstrations"], row["preferences"]) == (
            figure,
            method,
            *map(str, size),
        ):
            found.setdefault(row["seed"], []).append(row)
    numbers = COLUMNS[5:]
    return {s: {n: np.array([float(row[n] or "nan") for row in its]) for n in numbers} for s, its in found.items()}


def plus_minus(values: list[float], digits: int = 2) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def table(rows: list[dict], figure: str, sizes: list[tuple[int, int]], methods: tuple[str, ...]) -> str:
    """Final and best ground-truth score, KL, win rate and time, mean ± std over seeds."""
    lines = [
        "| demonstrations | preferences | method | seeds | ground truth, final | best | KL | win rate over SFT | min |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for size in sizes:
        for method in methods:
            if runs := runs_of(rows, figure, method, size).values():
                last = {name: [run[name][-1] for run in runs] for name in COLUMNS[5:]}
                best = [run["gt_score"].max() for run in runs]
                wins = f"{np.mean(last['win_rate']):.0%} ± {np.std(last['win_rate']):.0%}"
                lines.append(
                    f"| {size[0]} | {size[1]} | {method} | {len(best)} | {plus_minus(last['gt_score'])} | "
                    f"{plus_minus(best)} | {plus_minus(last['kl'], 1)} | {wins} | {np.mean(last['seconds']) / 60:.1f} |"
                )
    return "\n".join(lines)


def draw(axis, runs: dict, x: str, y: str, label: str, **style) -> None:
    """Mean of the runs' y against the mean of their x, evaluation by evaluation; y's deviation over seeds is shaded."""
    if not runs:
        return
    xs, ys = (np.array([run[name] for run in runs.values()]) for name in (x, y))
    axis.plot(xs.mean(0), ys.mean(0), label=f"{label}, {len(ys)} seeds", linewidth=2, **style)
    axis.fill_between(xs.mean(0), ys.mean(0) - ys.std(0), ys.mean(0) + ys.std(0), alpha=0.15, linewidth=0, **style)


def draw_all(rows: list[dict], scores: list[dict], folder: Path) -> None:
    kwargs = {"layout": "constrained", "squeeze": False}

    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), **kwargs)
    panels = [(("aihf-ppo", "rlhf"), x, label) for x, label in (
        ("policy_steps", "PPO steps"), ("episodes", "responses sampled by PPO"), ("seconds", "seconds, all stages"),
    )] + [(("aihf-dpo", "dpo"), "policy_steps", "DPO steps")]  # fmt: skip
    for axis, (methods, x, label) in zip(axes[0], panels):
        for method in methods:
            draw(axis, runs_of(rows, "6", method, (1000, 1000)), x, "gt_score", method, color=COLORS[method])
        for run in list(runs_of(rows, "6", "sft", (1000, 1000)).values())[:1]:
            axis.axhline(run["gt_score"][0], color="tab:green", linewidth=1, label="SFT, seed 1")
        axis.set(xlabel=label, ylabel="ground-truth score")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "figure6.png", dpi=130)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, **kwargs)
    sweeps = [("preferences, 1,000 demonstrations", 1, FIGURES["7"][:3])]
    sweeps.append(("demonstrations, 3,000 preferences", 0, FIGURES["7"][2:]))
    for axis, (label, which, sizes) in zip(axes[0], sweeps):
        for method in METHODS["7"]:
            finals = {
                size[which]: [r["gt_score"][-1] for r in runs_of(rows, "7", method, size).values()] for size in sizes
            }
            finals = {x: y for x, y in finals.items() if y}
            for x, y in finals.items():
                axis.plot([x] * len(y), y, "o", color=COLORS[method], alpha=0.4, markersize=4)
            axis.plot(list(finals), [np.mean(y) for y in finals.values()], color=COLORS[method], label=method)
        axis.set(xlabel=label, ylabel="final ground-truth score")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "figure7.png", dpi=130)

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), **kwargs)
    for method in ("aihf-ppo", "rlhf"):
        of_method = [row for row in scores if row["method"] == method]
        learned, truth = (np.array([float(row[n]) for row in of_method]) for n in ("learned_score", "gt_score"))
        seeds = np.array([row["seed"] for row in of_method])
        for seed in np.unique(seeds):  # R is free up to a constant and, for a policy, a scale
            learned[seeds == seed] -= learned[seeds == seed].mean()
        for axis, values in zip(axes[0], (truth, learned)):
            axis.hist(values, 40, histtype="step", density=True, color=COLORS[method], label=method, linewidth=2)
        axes[0, 2].scatter(truth, learned, s=4, alpha=0.4, color=COLORS[method], label=method)
    for axis, label in zip(axes[0], ("ground-truth score", "learned score, centred", "ground-truth score")):
        axis.set(xlabel=label, ylabel="density")
        axis.legend(frameon=False, fontsize=8)
    axes[0, 2].set(ylabel="learned score, centred")
    figure.savefig(folder / "figure8.png", dpi=130)

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True, **kwargs)
    for axis, size in zip(axes[0], FIGURES["9"]):
        for method in METHODS["9"]:
            for seed, run in runs_of(rows, "9", method, size).items():
                style = {"color": COLORS[method], "alpha": 0.7, "markersize": 3}
                axis.plot(run["kl"], run["gt_score"], "o-", label=method if seed == "1" else None, **style)
        title = f"{size[0]:,} demonstrations, {size[1]:,} preferences"
        axis.set(xlabel="KL to the base model, nats", ylabel="ground-truth score", title=title)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "figure9.png", dpi=130)

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True, **kwargs)
    for axis, size in zip(axes[0], FIGURES["10"]):
        for method in METHODS["10"]:
            draw(axis, runs_of(rows, "10", method, size), "policy_steps", "gt_score", method, color=COLORS[method])
        title = f"{size[0]:,} demonstrations, {size[1]:,} preferences"
        axis.set(xlabel="DPO steps", ylabel="ground-truth score", title=title)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "figure10.png", dpi=130)
    plt.close("all")


def distinct(texts: list[str]) -> float:
    """Share of different ones among the pairs of words that follow each other, over all texts (Li et al. 2016)."""
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:])]
    return len(set(pairs)) / len(pairs)


def at_equal_kl(rows: list[dict], figure: str, size: tuple[int, int]) -> str:
    """Ground truth of each seed's AIHF at its end, and of RLHF where it passed the same KL to the base model on its way
    up, between two evaluations."""
    words = []
    aihf, rlhf = (runs_of(rows, figure, method, size) for method in ("aihf-ppo", "rlhf"))
    for seed in sorted(set(aihf) & set(rlhf)):
        kl, truth = (aihf[seed][name][-1] for name in ("kl", "gt_score"))
        way_up = np.maximum.accumulate(rlhf[seed]["kl"])[: rlhf[seed]["kl"].argmax() + 1]
        other = np.interp(kl, way_up, rlhf[seed]["gt_score"][: len(way_up)])
        words.append(f"seed {seed} at {kl:.1f} nats {truth:.2f} / {other:.2f}")
    return f"{size[0]} + {size[1]}, AIHF / RLHF: {', '.join(words)}"


if __name__ == "__main__":
    new_rows, new_scores = collect(ROOT / "runs")
    rows = merge(ROWS, new_rows, KEYS)
    scores = merge(SCORES, new_scores, ("method", "seed"))
    print(table(rows, "6", FIGURES["6"], METHODS["6"]))
    print(table(rows, "7", FIGURES["7"], METHODS["7"]))
    print(table(rows, "9", FIGURES["9"], METHODS["9"]))
    print(table(rows, "10", FIGURES["10"], METHODS["10"]))
    for figure, sizes in (("6", FIGURES["6"]), ("9", FIGURES["9"])):
        for size in sizes:
            methods = ("aihf-ppo", "rlhf")
            wins = [runs_of(rows, figure, method, size) for method in methods]
            seeds = sorted(set(wins[0]) & set(wins[1]))
            above = sum(wins[0][seed]["gt_score"][-1] > wins[1][seed]["gt_score"][-1] for seed in seeds)
            print(f"{size[0]} + {size[1]}: AIHF ends above RLHF in {above} of {len(seeds)} seeds")
            print(at_equal_kl(rows, figure, size))
    demonstrations = (ROOT / "data_gen/assets/imdb/demonstrations.jsonl").read_text().splitlines()
    texts = {"demonstrations": [[json.loads(line)["completion"] for line in demonstrations[:256]]]}
    for method in METHODS["6"][:4]:
        of_seed: dict[str, list[str]] = {}
        for row in scores:
            if row["method"] == method:
                of_seed.setdefault(row["seed"], []).append(row["response"])
        texts[method] = list(of_seed.values())
    for name, groups in texts.items():
        print(f"different word pairs among those of 256 responses, {name}: {plus_minus([distinct(g) for g in groups])}")
    for method in ("aihf-ppo", "rlhf"):
        runs = runs_of(rows, "6", method, (1000, 1000)).values()
        print(f"rank correlation of learned and true score, {method}: start and end", end=" ")
        print(plus_minus([run["correlation"][0] for run in runs]), plus_minus([run["correlation"][-1] for run in runs]))
    draw_all(rows, scores, ROOT / "benchmark/figures")
