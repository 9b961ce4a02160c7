"""Figures 6 to 10 on language models: AIHF against RLHF, AIHF-DPO against DPO.

    bash benchmark/llm.sh             # the runs of the embedded models
    python benchmark/llm.py           # needs pip install -e '.[plot]'
    bash benchmark/smollm2.sh         # those of SmolLM2-135M
    python benchmark/llm.py smollm2   # the same, in files whose names begin with smollm2

adds what it finds in runs/ to results/llm.csv (a row an evaluation; runs that belong to several
figures stand there once for each) and results/llm_scores.csv (a row a held-out response of the last
evaluation, for Figure 8), draws figures/figure6.png to figure10.png from these and prints the
tables of benchmark/README.md. Runs that are no longer in runs/ keep their rows. kl is to the base
model, whatever a run's own reference is; win_rate, of a run's last evaluation, is over SFT on as
many demonstrations, prompt by prompt (ties count half).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from main_job import ROOT, evaluations, merge

sys.path.insert(0, str(ROOT))
from data_gen import read

RESULTS, FIGURES_DIR = ROOT / "benchmark/results", ROOT / "benchmark/figures"
KEYS = ("figure", "method", "demonstrations", "preferences", "seed")
METRICS = {  # a column of results/llm.csv: that of metrics.csv
    "policy_steps": "charts/step",
    "episodes": "charts/episodes",
    "seconds": "charts/wall_seconds",
    "gt_score": "eval/gt_score",
    "kl": "eval/kl_base",
    "win_rate": None,
    "correlation": "eval/reward_correlation",
}
SWEEPS = {  # of figure7.png: sizes of data, (demonstrations, preferences), as in the runs' names
    "preferences": [("1000", n) for n in ("100", "300", "1000", "3000")],
    "demonstrations": [(n, "1000") for n in ("100", "300", "1000", "3000")],
    "share of flipped labels": [("1000", n) for n in ("1000", "1000flip0.1", "1000flip0.3")],
}
FIGURES = {  # which sizes belong to which of the paper's
    "6": [("1000", "1000")],
    "7": list(dict.fromkeys(size for sizes in SWEEPS.values() for size in sizes)),
    "9": [("1000", "1000"), *(("3000", n) for n in ("1000", "2000", "3000"))],
    "10": [("1000", n) for n in ("1000", "2000", "3000")],
}
METHODS = {  # aihf-ppo-sft: AIHF that begins with SFT; random: PPO on a new head
    "6": ("aihf-ppo", "aihf-ppo-sft", "rlhf", "aihf-dpo", "dpo", "sft", "random"),
    "7": ("aihf-ppo", "rlhf"),
    "9": ("aihf-ppo", "rlhf"),
    "10": ("aihf-dpo", "dpo"),
}
COLORS = {"aihf-ppo": "tab:orange", "rlhf": "tab:blue", "sft": "tab:green"}
COLORS |= {"aihf-dpo": "tab:red", "dpo": "tab:cyan", "aihf-ppo-sft": "tab:purple"}


@dataclass
class Args:
    runs: tyro.conf.Positional[Literal["llm", "smollm2"]] = "llm"  # what their names begin with


def samples(path: Path) -> list[dict]:
    """Rows {prompt, response, gt_score ...} of a samples.jsonl, one a held-out prompt."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def win_rate(run: list[dict], sft: list[dict]) -> float:
    """Share of the prompts where the run's response has the higher ground-truth score."""
    if [row["prompt"] for row in run] != [row["prompt"] for row in sft]:
        raise ValueError("the run and its SFT were not evaluated on the same prompts")
    gaps = np.array([a["gt_score"] - b["gt_score"] for a, b in zip(run, sft)])
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def collect(runs: Path, name: str = "llm") -> tuple[list[dict], list[dict]]:
    """Rows of llm.csv and of llm_scores.csv for this folder's finished runs, whose names begin with
    `name` and whose SFT is there. RLHF's evaluation at 0 steps is of SFT alone."""
    rows, scores = [], []
    for path in sorted(runs.glob(f"{name}__*__*__*__[0-9]/metrics.csv")):
        folder, table = path.parent, evaluations(path.parent, "eval/gt_score")
        _, method, demonstrations, preferences, seed = folder.name.split("__")
        args = json.loads((folder / "args.json").read_text())
        last_step = args.get("ppo_steps", args.get("dpo_steps"))
        if not table or float(table[-1]["charts/step"]) < last_step:
            continue
        run = {"method": method, "seed": seed}
        run |= {"demonstrations": demonstrations, "preferences": preferences}
        table = [
            run | {key: row.get(metric, "0") if metric else "" for key, metric in METRICS.items()}
            for row in table
        ]
        # SFT does not read the preferences: the run with 1,000 has it
        sft = runs / f"{name}__rlhf__{demonstrations}__1000__{seed}/samples_sft.jsonl"
        if not sft.exists():
            continue
        own = samples(folder / "samples.jsonl")
        table[-1]["win_rate"] = str(win_rate(own, samples(sft)))
        if method == "rlhf":
            table.append(table[0] | {"method": "sft", "win_rate": "0.5"})
        size = demonstrations, preferences
        for row in table:
            of = [f for f in FIGURES if size in FIGURES[f] and row["method"] in METHODS[f]]
            rows += [{"figure": figure, **row} for figure in of]
        for sample in own if size == ("1000", "1000") else ():
            score = {"method": method, "seed": seed}
            for key in ("learned_score", "gt_score"):
                score[key] = f"{sample[key]:.5g}" if key in sample else ""
            scores.append(score | {"response": " ".join(sample["response"].split())})
    return rows, scores


def runs_of(rows: list[dict], figure: str, method: str, size: tuple[str, str]) -> dict[str, dict]:
    """For each seed, its columns over the evaluations: {seed: {column: array}}."""
    name, found = (figure, method, *size), {}
    for row in rows:
        if tuple(row[key] for key in KEYS[:4]) == name:
            found.setdefault(row["seed"], []).append(row)
    return {
        seed: {key: np.array([float(row[key] or "nan") for row in its]) for key in METRICS}
        for seed, its in found.items()
    }


def plus_minus(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation; of one value itself."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def table(rows: list[dict], figure: str) -> str:
    """Final and best ground-truth score, KL, win rate and time, mean ± std over seeds."""
    lines = ["| demonstrations | preferences | method | seeds | ground truth, final | best | KL |"]
    lines = [f"{lines[0]} win rate over SFT | min |", "|---" * 9 + "|"]
    for size in FIGURES[figure]:
        for method in METHODS[figure]:
            if runs := runs_of(rows, figure, method, size).values():
                last = {key: [run[key][-1] for run in runs] for key in METRICS}
                wins = f"{np.mean(last['win_rate']):.0%} ± {np.std(last['win_rate']):.0%}"
                wins = "" if "nan" in wins else wins  # SFT is not there yet
                cells = [*size, method, len(runs), plus_minus(last["gt_score"])]
                cells += [plus_minus([run["gt_score"].max() for run in runs])]
                cells += [plus_minus(last["kl"], 1), wins, f"{np.mean(last['seconds']) / 60:.1f}"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw_curves(axis, rows: list[dict], figure: str, method: str, size, x: str) -> None:
    """Mean of the runs' ground truth against the mean of their x, evaluation by evaluation; the
    seeds' standard deviation is shaded."""
    runs, style = runs_of(rows, figure, method, size).values(), {"color": COLORS[method]}
    if runs:
        x = np.mean([run[x] for run in runs], axis=0)
        mean, std = (f([run["gt_score"] for run in runs], axis=0) for f in (np.mean, np.std))
        axis.plot(x, mean, label=f"{method}, {len(runs)} seeds", linewidth=2, **style)
        axis.fill_between(x, mean - std, mean + std, alpha=0.15, linewidth=0, **style)


def draw_sweep(axis, rows: list[dict], name: str) -> None:
    """Final ground truth of a sweep, the sizes evenly spaced."""
    sizes, which = SWEEPS[name], int(name != "demonstrations")
    for method in METHODS["7"]:
        finals = [
            [run["gt_score"][-1] for run in runs_of(rows, "7", method, size).values()]
            for size in sizes
        ]
        for x, y in enumerate(finals):
            axis.plot([x] * len(y), y, "o", color=COLORS[method], alpha=0.4, markersize=4)
        means = {x: np.mean(y) for x, y in enumerate(finals) if y}
        axis.plot(list(means), list(means.values()), color=COLORS[method], label=method)
    labels = [size[which].partition("flip")[2] or size[which] for size in sizes]
    axis.set_xticks(range(len(sizes)), ["0", *labels[1:]] if "flipped" in name else labels)


def draw_scores(axes, scores: list[dict]) -> None:
    """Histograms of true and of learned scores, and one against the other."""
    for method in METHODS["9"]:
        rows, style = [row for row in scores if row["method"] == method], {"color": COLORS[method]}
        table = np.array([[float(row[n]) for n in ("gt_score", "learned_score")] for row in rows])
        seeds = np.array([row["seed"] for row in rows])
        if not rows:
            continue
        for seed in np.unique(seeds):  # R is free up to a constant and, for a policy, a scale
            table[seeds == seed, 1] -= table[seeds == seed, 1].mean()
        style |= {"label": method}
        for axis, values in zip(axes, table.T):
            axis.hist(values, 40, histtype="step", density=True, linewidth=2, **style)
        axes[2].scatter(*table.T, s=4, alpha=0.4, **style)


def draw_all(rows: list[dict], scores: list[dict], begin: str) -> None:
    """Figures whose files begin with `begin`; 7 needs runs of several sizes."""

    def panels(count: int, sharey: bool = False):
        size = (4 + 3.2 * count, 3.8)
        options = {"figsize": size, "sharey": sharey, "layout": "constrained", "squeeze": False}
        figure, axes = plt.subplots(1, count, **options)
        return figure, axes[0]

    def finish(figure, name: str, x: list[str], y: list[str], titles=("", "", "", "")) -> None:
        for axis, xlabel, ylabel, title in zip(figure.axes, x, y, titles):
            axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
            axis.legend(frameon=False, fontsize=8)
        figure.savefig(FIGURES_DIR / f"{begin}{name}", dpi=130)
        plt.close(figure)

    truth, of_size = "ground-truth score", "{} demonstrations, {} preferences".format
    figure, axes = panels(4 if any(row["figure"] == "10" for row in rows) else 3)
    labels = ["PPO steps", "responses sampled by PPO", "seconds, all stages", "DPO steps"]
    sft = runs_of(rows, "6", "sft", ("1000", "1000"))
    for axis, x in zip(axes, ("policy_steps", "episodes", "seconds", "policy_steps")):
        for method in ("aihf-dpo", "dpo") if axis in axes[3:] else METHODS["6"][:3]:
            if x == "seconds" and method == "aihf-ppo-sft":  # its seconds leave out SFT's
                continue
            draw_curves(axis, rows, "6", method, ("1000", "1000"), x)
        for seed, run in [*sft.items()][:1]:
            label = f"SFT, seed {seed}"
            axis.axhline(run["gt_score"][0], color="tab:green", linewidth=1, label=label)
    finish(figure, "figure6.png", labels, [truth] * 4)

    if (
        len({(row["demonstrations"], row["preferences"]) for row in rows if row["figure"] == "7"})
        > 1
    ):
        figure, axes = panels(3, sharey=True)
        for axis, name in zip(axes, SWEEPS):
            draw_sweep(axis, rows, name)
        titles = ["1,000 demonstrations", "1,000 preferences", "1,000 of both"]
        finish(figure, "figure7.png", list(SWEEPS), [f"final {truth}"] * 3, titles)

    figure, axes = panels(3)
    draw_scores(axes, scores)
    labels = [truth, "learned score, centred", truth]
    finish(figure, "figure8.png", labels, ["density", "density", "learned score, centred"])

    there = {tuple(row[key] for key in KEYS[:4]) for row in rows}
    sizes = [size for size in FIGURES["9"] if ("9", "rlhf", *size) in there]
    figure, axes = panels(max(1, len(sizes)), sharey=True)
    for axis, size in zip(axes, sizes):
        for method in METHODS["9"]:
            for i, run in enumerate(runs_of(rows, "9", method, size).values()):
                style = {"color": COLORS[method], "label": None if i else method}
                axis.plot(run["kl"], run["gt_score"], "o-", alpha=0.7, markersize=3, **style)
    titles, labels = [of_size(*size) for size in sizes], ["KL to the base model, nats"] * len(sizes)
    finish(figure, "figure9.png", labels, [truth] * len(sizes), titles)

    sizes = [size for size in FIGURES["10"] if ("10", "dpo", *size) in there]
    if not sizes:
        return
    figure, axes = panels(len(sizes), sharey=True)
    for axis, size in zip(axes, sizes):
        for method in METHODS["10"]:
            draw_curves(axis, rows, "10", method, size, "policy_steps")
    titles = [of_size(*size) for size in sizes]
    finish(figure, "figure10.png", ["DPO steps"] * len(sizes), [truth] * len(sizes), titles)


def distinct(texts: list[str]) -> float:
    """Share of different ones among the pairs of words that follow each other, over all texts (Li
    et al. 2016)."""
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:])]
    return len(set(pairs)) / len(pairs)


def stability(rows: list[dict], figure: str, method: str, size, data: Path) -> str:
    """How far each seed falls below its best so far, at most, in shares of the way from the base
    model to the expert, whose scores are in the data's manifest."""
    manifest = json.loads((data / "manifest.json").read_text())
    base, *_, expert = (row["mean"] for row in manifest["checkpoints"].values())
    falls = {
        seed: (np.maximum.accumulate(run["gt_score"]) - run["gt_score"]).max()
        for seed, run in runs_of(rows, figure, method, size).items()
    }
    words = [f"seed {seed} {fall / (expert - base):.0%}" for seed, fall in falls.items()]
    return f"{method}, {' + '.join(size)}, falls below its best so far by: {', '.join(words)}"


def at_equal_kl(rows: list[dict], figure: str, size: tuple[str, str]) -> str:
    """Ground truth of each seed's AIHF at its end, and of RLHF where it passed the same KL to the
    base model on its way up, between two evaluations."""
    words = []
    aihf, rlhf = (runs_of(rows, figure, method, size) for method in ("aihf-ppo", "rlhf"))
    for seed in sorted(set(aihf) & set(rlhf)):
        kl, truth = (aihf[seed][name][-1] for name in ("kl", "gt_score"))
        way_up = np.maximum.accumulate(rlhf[seed]["kl"])[: rlhf[seed]["kl"].argmax() + 1]
        passed = rlhf[seed]["gt_score"][: len(way_up)]
        nowhere = {"left": np.nan, "right": np.nan}  # RLHF was never there
        other = np.interp(kl, way_up, passed, **nowhere)
        words.append(f"seed {seed} at {kl:.1f} nats {truth:.2f} / {other:.2f}")
    return f"{size[0]} + {size[1]}, AIHF / RLHF: {', '.join(words)}"


if __name__ == "__main__":
    name = tyro.cli(Args, description=__doc__.split("\n\n")[0]).runs
    data = ROOT / ("data_gen/assets/imdb" if name == "llm" else f"runs/{name}_data")
    new_rows, new_scores = collect(ROOT / "runs", name)
    rows = merge(RESULTS / f"{name}.csv", new_rows, KEYS)  # stable: evaluations stay in their order
    scores = merge(RESULTS / f"{name}_scores.csv", new_scores, ("method", "seed"))
    draw_all(rows, scores, "" if name == "llm" else f"{name}_")
    for figure in FIGURES:
        print(table(rows, figure))
    for size, figure in {size: figure for figure in "97" for size in FIGURES[figure]}.items():
        aihf, rlhf = (runs_of(rows, figure, method, size) for method in METHODS["9"])
        if both := sorted(set(aihf) & set(rlhf)):
            above = sum(aihf[n]["gt_score"][-1] > rlhf[n]["gt_score"][-1] for n in both)
            print(f"{' + '.join(size)}: AIHF ends above RLHF in {above} of {len(both)} seeds")
            print(at_equal_kl(rows, figure, size))
            if (data / "manifest.json").exists():
                print(stability(rows, figure, "aihf-ppo", size, data))
    texts = {}
    if (data / "demonstrations.jsonl").exists():
        demonstrations = read.rows(str(data / "demonstrations.jsonl"), "completion", 256)
        texts["demonstrations"] = [[completion for (completion,) in demonstrations]]
    for method in dict.fromkeys(row["method"] for row in scores if row["method"] != "random"):
        of = [(row["seed"], row["response"]) for row in scores if row["method"] == method]
        texts[method] = [[text for n, text in of if n == seed] for seed in sorted(dict(of))]
    for source, groups in texts.items():
        share = plus_minus([distinct(group) for group in groups])
        print(f"different word pairs among those of {len(groups[0])} responses, {source}: {share}")
    for method in METHODS["9"]:
        if not (runs := runs_of(rows, "6", method, ("1000", "1000")).values()):
            continue
        start, end = (plus_minus([run["correlation"][k] for run in runs]) for k in (0, -1))
        print(f"rank correlation of learned and true score, {method}: start {start}, end {end}")
