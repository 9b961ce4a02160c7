"""Figures 6 to 10 on language models: AIHF against RLHF, AIHF-DPO against DPO.

    bash benchmark/llm.sh             # the runs of the embedded models
    python benchmark/llm.py           # needs pip install -e '.[plot]'
    bash benchmark/smollm2.sh         # those of SmolLM2-135M
    python benchmark/llm.py smollm2   # the same, in files whose names begin with smollm2

adds what it finds in runs/ to results/llm.csv (a row an evaluation) and results/llm_scores.csv (a
row a held-out response of the last evaluation, for Figure 8), draws figures/figure6.png to
figure10.png from these and prints the tables of benchmark/README.md. Runs that are no longer in
runs/ keep their rows. kl is to the base model, whatever a run's own reference is; win_rate, of a
run's last evaluation, is over SFT on as many demonstrations, prompt by prompt (ties count half).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from main_job import ROOT, finished, merge

RESULTS, FIGURES = ROOT / "benchmark/results", ROOT / "benchmark/figures"
ASSETS = ROOT / "data_gen/assets/imdb"
KEYS = ("method", "demonstrations", "preferences", "seed")
METRICS = {  # a column of results/llm.csv: that of metrics.csv
    "policy_steps": "charts/step",
    "seconds": "charts/wall_seconds",
    "gt_score": "eval/gt_score",
    "kl": "eval/kl_base",
    "win_rate": None,
    "correlation": "eval/reward_correlation",
}
METHODS = {  # in the order of the tables
    "rlhf": ("RLHF, PPO", "tab:blue"),
    "aihf-ppo": ("AIHF, PPO", "tab:orange"),
    "aihf-ppo-sft": ("AIHF, PPO, from SFT", "tab:purple"),
    "dpo": ("DPO, from SFT", "tab:cyan"),
    "aihf-dpo": ("AIHF-DPO", "tab:red"),
    "aihf-dpo-sft": ("AIHF-DPO, from SFT", "tab:brown"),
    "sft": ("SFT", "tab:green"),
    "random": ("PPO from SFT on a random reward", "tab:gray"),
}
# Sizes of data, (demonstrations, preferences), as in the runs' names
MAIN = ("1000", "1000")
SWEEPS = {  # Figure 7
    "preferences": [("1000", n) for n in ("100", "300", "1000", "3000")],
    "demonstrations": [(n, "1000") for n in ("100", "300", "1000", "3000")],
    "share of flipped labels": [("1000", n) for n in ("1000", "1000flip0.1", "1000flip0.3")],
}
MORE = {  # Figures 9 and 10
    ("aihf-ppo", "rlhf"): [MAIN, *(("3000", n) for n in ("1000", "2000", "3000"))],
    ("aihf-dpo", "dpo", "aihf-dpo-sft"): [("1000", n) for n in ("1000", "2000", "3000")],
}
SIZES = list(dict.fromkeys(x for sweep in (*SWEEPS.values(), *MORE.values()) for x in sweep))
SIZES.remove(MAIN)


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
        _, method, demonstrations, preferences, seed = path.parent.name.split("__")
        _, evaluations = finished(path.parent)
        # SFT does not read the preferences: the run with 1,000 has it
        sft = runs / f"{name}__rlhf__{demonstrations}__1000__{seed}/samples_sft.jsonl"
        if not evaluations or not sft.exists():
            continue
        run = dict(zip(KEYS, (method, demonstrations, preferences, seed)))
        of = [
            run | {key: row.get(metric, "0") if metric else "" for key, metric in METRICS.items()}
            for row in evaluations
        ]
        own = samples(path.parent / "samples.jsonl")
        of[-1]["win_rate"] = str(win_rate(own, samples(sft)))
        if method == "rlhf" and preferences == "1000":
            of.append(of[0] | {"method": "sft", "win_rate": "0.5"})
        rows += of
        for sample in own if (demonstrations, preferences) == MAIN else ():
            score = {"method": method, "seed": seed}
            for key in ("learned_score", "gt_score"):
                score[key] = f"{sample[key]:.5g}" if key in sample else ""
            scores.append(score | {"response": " ".join(sample["response"].split())})
    return rows, scores


def runs_of(rows: list[dict], *values: str, keys=KEYS) -> dict[str, dict]:
    """Of the runs whose keys but the last, the seed, have these values: their columns over the
    evaluations, {seed: {column: array}}."""
    found = {}
    for row in rows:
        if tuple(row[key] for key in keys[:-1]) == values:
            found.setdefault(row["seed"], []).append(row)
    return {
        seed: {key: np.array([float(row.get(key) or "nan") for row in its]) for key in METRICS}
        for seed, its in found.items()
    }


def plus_minus(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation; of one value itself."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def fall(run: dict) -> float:
    """How far the ground truth falls below its best so far, at most."""
    return (np.maximum.accumulate(run["gt_score"]) - run["gt_score"]).max()


def lead_at_equal_kl(run: dict, rlhf: dict) -> float:
    """The run's ground truth minus RLHF's where each first passed, between two evaluations, the KL
    to the base model at which the run ends; nan where RLHF never did, or began beyond it."""
    kl = run["kl"][-1]

    def first_passage(curve: dict) -> float:
        i = (curve["kl"] >= kl).argmax()  # 0 also where it never is
        return (
            np.interp(kl, *(curve[x][i - 1 : i + 1] for x in ("kl", "gt_score"))) if i else np.nan
        )

    return first_passage(run) - first_passage(rlhf)


def table(rows: list[dict], sizes: list[tuple[str, str]], name: str = "llm") -> str:
    """A line a size and method: means ± std over seeds; of each seed how far it falls, in shares of
    the way from the base model to the expert that wrote the data, and AIHF's lead over RLHF."""
    # smollm2_data.json: the manifest of the data that the committed rows are of
    path = ASSETS / "manifest.json" if name == "llm" else RESULTS / f"{name}_data.json"
    checkpoints = json.loads(path.read_text())["checkpoints"]
    base, *_, expert = (checkpoint["mean"] for checkpoint in checkpoints.values())
    heads = ["data", "method", "ground truth, final", "best", "KL", "win rate over SFT"]
    heads += ["rank correlation", "falls by", "ahead of RLHF at equal KL by", "min"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for size in sizes:
        rlhf = runs_of(rows, "rlhf", *size)
        for method, (label, _) in METHODS.items():
            if not (found := runs_of(rows, method, *size)):
                continue
            last = {key: [run[key][-1] for run in found.values()] for key in METRICS}
            cells = [label_of(size), label, plus_minus(last["gt_score"])]
            cells.append(plus_minus([run["gt_score"].max() for run in found.values()]))
            cells.append(plus_minus(last["kl"], 1))
            cells.append(plus_minus([100 * x for x in last["win_rate"]], 0) + " %")
            cells.append(plus_minus(last["correlation"]))
            falls = [fall(run) / (expert - base) for run in found.values()]
            cells.append(", ".join(f"{100 * x:.0f}" for x in falls) + " %")
            both = [seed for seed in found if seed in rlhf and method.startswith("aihf-ppo")]
            leads = [lead_at_equal_kl(found[seed], rlhf[seed]) for seed in both]
            cells.append(
                ", ".join("?" if np.isnan(x) else f"{round(x, 2) + 0.0:+.2f}" for x in leads)
            )
            cells.append(f"{np.mean(last['seconds']) / 60:.1f}")
            if method == "sft":  # evaluated once
                cells[3] = cells[7] = cells[9] = ""  # RLHF's reward is learned by then too
            cells[2:] = (cell.replace("-", "−") for cell in cells[2:])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def label_of(size: tuple[str, str]) -> str:
    """In words; 1,000 where nothing is said."""
    demonstrations, (preferences, _, flipped) = size[0], size[1].partition("flip")
    words = [f"{int(demonstrations):,} demonstrations"] * (demonstrations != "1000")
    words += [f"{int(preferences):,} preferences"] * (preferences != "1000")
    words += [f"{100 * float(flipped):.0f} % of labels flipped"] if flipped else []
    return ", ".join(words) or "1,000 of both"


def draw_curves(axis, rows: list[dict], method: str, size, x: str) -> None:
    """Mean of the runs' ground truth against the mean of their x, evaluation by evaluation; the
    seeds' standard deviation is shaded."""
    label, color = METHODS[method]
    if runs := runs_of(rows, method, *size).values():
        x = np.mean([run[x] for run in runs], axis=0)
        mean, std = (f([run["gt_score"] for run in runs], axis=0) for f in (np.mean, np.std))
        axis.plot(x, mean, label=f"{label}, {len(runs)} seeds", linewidth=2, color=color)
        axis.fill_between(x, mean - std, mean + std, alpha=0.15, linewidth=0, color=color)


def draw_sweep(axis, rows: list[dict], name: str) -> None:
    """Final ground truth of a sweep, the sizes evenly spaced."""
    sizes, which = SWEEPS[name], int(name != "demonstrations")
    for method in ("aihf-ppo", "rlhf"):
        label, color = METHODS[method]
        finals = [[x["gt_score"][-1] for x in runs_of(rows, method, *z).values()] for z in sizes]
        for x, y in enumerate(finals):
            axis.plot([x] * len(y), y, "o", color=color, alpha=0.4, markersize=4)
        means = {x: np.mean(y) for x, y in enumerate(finals) if y}
        axis.plot(list(means), list(means.values()), color=color, label=label)
    labels = [size[which].partition("flip")[2] or size[which] for size in sizes]
    axis.set_xticks(range(len(sizes)), ["0", *labels[1:]] if "flipped" in name else labels)


def draw_scores(axes, scores: list[dict]) -> None:
    """Histograms of true and of learned scores, and one against the other."""
    for method in ("aihf-ppo", "rlhf"):
        rows = [row for row in scores if row["method"] == method]
        values = np.array([[float(row[n]) for n in ("gt_score", "learned_score")] for row in rows])
        seeds = np.array([row["seed"] for row in rows])
        for seed in np.unique(seeds):  # R is free up to a constant and, for a policy, a scale
            values[seeds == seed, 1] -= values[seeds == seed, 1].mean()
        style = dict(zip(("label", "color"), METHODS[method]))
        for axis, x in zip(axes, values.T):
            axis.hist(x, 40, histtype="step", density=True, linewidth=2, **style)
        axes[2].scatter(*values.T, s=4, alpha=0.4, **style)


def draw_all(rows: list[dict], scores: list[dict], begin: str) -> None:
    """Figures whose files begin with `begin`; 7 of the embedded models alone."""

    def panels(count: int, sharey: bool = False):
        options = {"figsize": (4 + 3.2 * count, 3.8), "sharey": sharey, "layout": "constrained"}
        figure, axes = plt.subplots(1, count, squeeze=False, **options)
        return figure, axes[0]

    def finish(figure, name: str, x: list[str], y: list[str], titles=("", "", "")) -> None:
        for axis, xlabel, ylabel, title in zip(figure.axes, x, y, titles):
            axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
            axis.legend(frameon=False, fontsize=8)
        figure.savefig(FIGURES / f"{begin}{name}", dpi=130)

    truth = "ground-truth score"
    figure, (axis,) = panels(1)
    for method in ("aihf-ppo", "rlhf", "aihf-ppo-sft"):
        draw_curves(axis, rows, method, MAIN, "policy_steps")
    label, color = METHODS["sft"]
    level = np.mean([run["gt_score"] for run in runs_of(rows, "sft", *MAIN).values()])
    axis.axhline(level, color=color, linewidth=1, label=label)
    finish(figure, "figure6.png", ["PPO steps"], [truth])

    if not begin:
        figure, axes = panels(3, sharey=True)
        for axis, name in zip(axes, SWEEPS):
            draw_sweep(axis, rows, name)
        titles = ["1,000 demonstrations", "1,000 preferences", "1,000 of both"]
        finish(figure, "figure7.png", list(SWEEPS), [f"final {truth}"] * 3, titles)

    figure, axes = panels(3)
    draw_scores(axes, scores)
    labels = [truth, "learned score, centred", truth]
    finish(figure, "figure8.png", labels, ["density", "density", "learned score, centred"])

    for name, (methods, sizes) in zip(("figure9.png", "figure10.png"), MORE.items()):
        sizes = [size for size in sizes if any(runs_of(rows, x, *size) for x in methods[:2])]
        if not sizes:
            continue
        figure, axes = panels(len(sizes), sharey=True)
        for axis, size in zip(axes, sizes):
            for method in methods:
                if name == "figure10.png":
                    draw_curves(axis, rows, method, size, "policy_steps")
                    continue
                label, color = METHODS[method]
                for i, run in enumerate(runs_of(rows, method, *size).values()):
                    style = {"color": color, "label": None if i else label}
                    axis.plot(run["kl"], run["gt_score"], "o-", alpha=0.7, markersize=3, **style)
        x = "DPO steps" if name == "figure10.png" else "KL to the base model, nats"
        titles = [label_of(size) for size in sizes]
        finish(figure, name, [x] * len(sizes), [truth] * len(sizes), titles)


if __name__ == "__main__":
    name = tyro.cli(Args, description=__doc__.split("\n\n")[0]).runs
    new_rows, new_scores = collect(ROOT / "runs", name)
    rows = merge(RESULTS / f"{name}.csv", new_rows, KEYS)  # stable: evaluations stay in their order
    scores = merge(RESULTS / f"{name}_scores.csv", new_scores, ("method", "seed"))
    draw_all(rows, scores, "" if name == "llm" else f"{name}_")
    print(table(rows, [MAIN], name))
    print(table(rows, SIZES, name))
