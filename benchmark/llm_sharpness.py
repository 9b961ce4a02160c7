"""Is a policy better, or only sharper? The policies of benchmark/llm.sh sampled at three
temperatures, with the entropy and the variety of what they write, and a second judge.

    python data_gen/imdb_data.py classifier --spoiled-share 0 --output-dir runs/gameable_judge
    python benchmark/llm_sharpness.py
    python benchmark/llm_sharpness.py smollm2     # those of smollm2.sh, which makes both judges

(needs `pip install -e '.[plot]'`) adds a row to results/llm_sharpness.csv (smollm2_sharpness.csv)
for each finished run in runs/ and each temperature. They are of responses to the held-out prompts
that the runs were evaluated on: the ground truth, the score of a judge that praise alone pleases,
the entropy in nats a response, the share of different word pairs, and the perplexity under the base
model. SFT is RLHF's; the base model and the demonstrations stand beside them. Prints a table, which
benchmark/README.md has in part. Without the second judge its column is empty.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from llm import RESULTS, ROOT, Args, plus_minus
from main_job import merge

sys.path.insert(0, str(ROOT))
from aihf_ppo_llm import Args as Settings
from aihf_ppo_llm import Policy, Scorer, in_parts
from data_gen import read

KEYS = ("method", "demonstrations", "preferences", "seed", "temperature")
MEASURES = ("gt_score", "gameable_score", "entropy", "distinct_bigrams", "base_perplexity")
TEMPERATURES = (1.0, 0.7, 0.5)


def distinct(texts: list[str]) -> float:
    """Share of different ones among the pairs of words that follow each other, over all texts (Li
    et al. 2016)."""
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:])]
    return len(set(pairs)) / len(pairs)


def judged(prompts: list[str], responses: list[str], judges: dict) -> dict[str, float]:
    """Means of each judge's scores, and the share of different word pairs."""
    texts = [x + y for x, y in zip(prompts, responses)]
    row = {x: in_parts(y.score, y.args, texts).mean().item() for x, y in judges.items()}
    return row | {"distinct_bigrams": distinct(responses)}


@torch.no_grad()
def perplexity(base: Policy, prompt_ids: list, response_ids: list) -> float:
    """exp of the mean negative log-likelihood of a response's token under the base model."""
    x, y = read.pad(prompt_ids, left=True), read.pad(response_ids)
    x, y = ([z.to(base.lm.device) for z in both] for both in (x, y))
    ids, mask = (torch.cat(z, 1) for z in zip(x, y))
    log_probs = in_parts(base.log_probs, base.args, ids, mask, y[1])
    return float((-log_probs.sum() / y[1].sum()).exp())


def measure(policy: Policy, base: Policy, judges: dict, prompts: list[str], temperature: float):
    """A row's measures: of one response to each prompt, drawn as in the scripts' evaluation."""
    policy.args = replace(policy.args, temperature=temperature)
    prompt_ids = policy.texts.prompts(prompts, "the prompts")
    ids, mask, alive, _, texts = policy.sample(prompt_ids, np.random.default_rng(10_000))
    log_probs = in_parts(policy.log_probs, policy.args, ids, mask, alive)
    entropy = -log_probs.sum(-1).mean().item()
    rows = [row[:n] for row, n in zip(ids[:, -alive.shape[1] :].tolist(), alive.sum(-1).tolist())]
    row = judged(prompts, texts, judges) | {"entropy": entropy}
    return row | {"base_perplexity": perplexity(base, prompt_ids, rows)}


def policies(runs: Path, name: str = "llm") -> dict[tuple, Path]:
    """The policies of finished runs, and RLHF's SFT: {(method, ..., seed): folder}."""
    found = {}
    for folder in sorted(runs.glob(f"{name}__*__*__*__*/policy")):
        _, method, *sizes, seed = folder.parent.name.split("__")
        found[(method, *sizes, seed)] = folder
        if (sft := folder.parent / "sft").exists() and sizes[1] == "1000":
            found[("sft", *sizes, seed)] = sft
    return found


def table(rows: list[dict], size: tuple[str, str] = ("1000", "1000")) -> str:
    """The measures, mean ± std over seeds, of what learned from this many demonstrations and
    preferences."""
    names = ("method", "temperature", "seeds", "ground truth", "gameable judge", "entropy, nats")
    lines = [f"| {' | '.join((*names, 'distinct bigrams', 'perplexity'))} |", "|---" * 8 + "|"]
    groups = {}
    for row in rows:
        if (row["demonstrations"], row["preferences"]) in (size, ("", "")):
            groups.setdefault((row["method"], row["temperature"]), []).append(row)
    for (method, temperature), group in groups.items():
        cells = [method, temperature, str(len(group))]
        for name, digits in zip(MEASURES, (2, 2, 1, 2, 1)):
            values = [float(row[name]) for row in group if row[name]]
            cells.append(plus_minus(values, digits) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    name = tyro.cli(Args, description=__doc__.split("\n\n")[0]).runs
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args, folder = Settings(), ROOT / "runs"
    gameable, rows_path = folder / "gameable_judge", RESULTS / f"{name}_sharpness.csv"
    if name != "llm":  # nothing of it is in the repository
        data = {x: f"runs/{name}_data/{x}.jsonl" for x in ("demonstrations", "prompts")}
        models = {"model_name_or_path": f"runs/{name}", "ground_truth_path": f"runs/{name}_judge"}
        args = Settings(**models, **data, dtype="bfloat16")  # as the runs
        gameable = folder / f"{name}_gameable_judge"
    with read.input_errors():
        judges = {"gt_score": Scorer(str(ROOT / args.ground_truth_path), args, True).to(device)}
        if gameable.exists():
            judges["gameable_score"] = Scorer(str(gameable), args, True).to(device)
        base = Policy(str(ROOT / args.model_name_or_path), args).to(device)
        prompts = [x for (x,) in read.rows(str(ROOT / args.prompts), "prompt")]
        prompts = prompts[-args.eval_prompts :]
    todo = {("base", "", "", ""): ROOT / args.model_name_or_path} | policies(folder, name)
    new = []
    for run, path in todo.items():
        policy = Policy(str(path), args).to(device)
        for temperature in TEMPERATURES:
            row = measure(policy, base, judges, prompts, temperature)
            new.append(dict.fromkeys(MEASURES, "") | dict(zip(KEYS, (*run, str(temperature)))))
            new[-1] |= {column: f"{value:.5g}" for column, value in row.items()}
            print(new[-1], flush=True)
    demos = read.rows(str(ROOT / args.demonstrations), "prompt completion", 256)
    row = judged(*map(list, zip(*demos)), judges)
    prompt_ids = base.texts.prompts([x for x, _ in demos], "demonstrations")
    response_ids = base.texts.responses(demos, "demonstrations")
    row["base_perplexity"] = perplexity(base, prompt_ids, response_ids)
    new.append(dict.fromkeys((*KEYS, *MEASURES), "") | {"method": "demonstrations"})
    new[-1] |= {column: f"{value:.5g}" for column, value in row.items()}
    print(table(merge(rows_path, new, KEYS)))


if __name__ == "__main__":
    main()
