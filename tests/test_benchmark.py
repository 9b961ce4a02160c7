"""benchmark/: pictures of runs, the collecting of runs into results/.

python -m pytest tests/test_benchmark.py
"""

import csv
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_one_line_error, read_csv, read_rows, run_script, write_rows

pytest.importorskip("matplotlib")
HOPPER = ROOT / "data_gen/assets/mujoco/Hopper-v4"


def execute(script: str, *argv) -> tuple[int, str, str]:
    return run_script(ROOT / "benchmark" / script, [*argv], ROOT)


def write_run(folder: Path, rows: list[dict], **args) -> Path:
    folder.mkdir(parents=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "args.json").write_text(json.dumps(args))
    return folder


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    """A robot's run, whose row 0 has no evaluation, and a language model's."""
    zero = {"charts/sac_steps": 0, "charts/env_steps": 0, "charts/wall_seconds": 0}
    one = {"charts/sac_steps": 5000, "charts/env_steps": 7000, "charts/wall_seconds": 9}
    one |= {"eval/return_mean": 310.5, "eval/return_std": 2, "reward/gap": 0.4}
    one |= {"reward/preference_accuracy": 0.9, "reward/preference_loss": 0.3}
    two = {**one, "charts/sac_steps": 10000, "eval/return_mean": 620, "eval/reward_correlation": 1}
    text = {"charts/step": 0, "eval/gt_score": -0.2, "eval/gt_score_std": 0.5}
    args = {"env": "Hopper-v4", "data_dir": "", "reward_range": [-1, 4]}
    args["script"] = "aihf_sac_mujoco.py"
    return {
        "robot": write_run(tmp_path / "robot", [zero, one, two], **args),
        "text": write_run(tmp_path / "text", [text, {**text, "charts/step": 5}]),
    }


# ----------------------------------------------------------------------------------------- plot.py
@pytest.mark.parametrize("names", [["text"], ["robot", "text"]], ids=" ".join)
def test_any_runs_are_drawn(runs, names):
    code, out, err = execute("plot.py", *(runs[name] for name in names))
    picture = runs[names[0]] / "learning_curve.png"
    assert code == 0 and out.strip() == f"wrote {picture}", err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn(runs, tmp_path):
    assert execute("plot.py", runs["robot"], "--output", tmp_path / "x.svg")[0] == 0
    svg = (tmp_path / "x.svg").read_text()
    assert "<!-- true return -->" in svg and "<!-- reward gap -->" in svg
    assert "<!-- ground-truth score -->" not in svg and "<!-- demonstrations -->" in svg
    assert f"<!-- {runs['robot']} -->" in svg  # two runs of one name are told apart


def test_curves_and_lines_are_those_of_the_run(runs):
    import plot

    table = plot.columns(runs["robot"])
    np.testing.assert_array_equal(table["steps"], [0, 5000, 10000])
    np.testing.assert_array_equal(table["eval/return_mean"], [np.nan, 310.5, 620])
    np.testing.assert_array_equal(plot.columns(runs["text"])["steps"], [0, 5])
    returns = json.loads((HOPPER / "manifest.json").read_text())["tiers"]
    assert plot.tiers(runs["robot"]) == {name: returns[name]["return_mean"] for name in plot.TIERS}
    assert plot.tiers(runs["text"]) == {}
    other = {"tiers": {"high": {"return_mean": 1.5}}}
    (runs["text"] / "manifest.json").write_text(json.dumps(other))
    (runs["robot"] / "args.json").write_text(json.dumps({"data_dir": str(runs["text"])}))
    assert plot.tiers(runs["robot"]) == {"high": 1.5}


@pytest.mark.parametrize(
    "given, without, fragment",
    [("nowhere", "", "no run"), ("robot", "matplotlib.figure", "[plot]"), ("", "", "run")],
)
def test_what_cannot_be_drawn(runs, monkeypatch, given, without, fragment):
    if without:
        monkeypatch.setitem(sys.modules, without, None)
    argv = [runs.get(given, given)] if given else []
    assert_one_line_error(execute("plot.py", *argv), fragment)


# ----------------------------------------------------------------------------------------- film.py
def test_a_film_of_a_robots_run(tmp_path, monkeypatch):
    """The run's own policy acts without noise; pictures at the asked rate; a GIF of all."""
    import film
    from PIL import Image

    torch.manual_seed(0)
    actor, drawn = film.Actor(11, 3, (8,)), []
    run = write_run(tmp_path / "run", [{"charts/sac_steps": 0}], script="aihf_sac_mujoco.py")
    averaged = {f"module.{name}": p.detach() for name, p in actor.named_parameters()}
    state = {"sac": {}, "averaged": averaged | {"n_averaged": torch.tensor(9)}}
    state |= {"script": "aihf_sac_mujoco.py", "args": {"env": "Hopper-v4", "hidden": (8,)}}
    torch.save(state, run / "checkpoint.pt")

    def render(env):
        drawn.append(env.unwrapped.data.time)
        return np.roll(np.eye(6)[..., None] * [255, 99, 0], len(drawn), 0).astype(np.uint8)

    monkeypatch.setattr(film.gym.Wrapper, "render", render)
    settings = film.Args(run, seconds=0.06, first_second=0.03, frames_per_second=50)
    env, loaded = film.load(run, settings)
    np.testing.assert_array_equal(loaded.act(np.ones(11), 0.0), actor.act(np.ones(11), 0.0))
    frames = film.film(env, loaded, settings)
    assert np.allclose(drawn, [0.032, 0.056, 0.072]) and len(frames) == 3  # steps of 8 ms
    film.write(frames, run / "film.gif", settings)
    with Image.open(run / "film.gif") as gif:
        assert gif.n_frames == 3 and gif.info["duration"] == 20


def test_a_film_has_the_robots_own_time():
    """More pictures a second than steps: some twice."""
    import film

    unwrapped, nothing = SimpleNamespace(dt=0.05), (0, 0.0, False, False, {})
    env = SimpleNamespace(reset=lambda seed: (0, {}), step=lambda _: nothing, unwrapped=unwrapped)
    env.render = lambda: np.zeros((1, 1, 3))
    args = film.Args(Path("run"), seconds=2.0, first_second=0.5, frames_per_second=50)
    actor = SimpleNamespace(act=lambda obs, noise: 0)
    assert 97 < len(film.film(env, actor, args)) <= 100


@pytest.mark.parametrize("given, fragment", [("nowhere", "no run"), ("robot", "no checkpoint")])
def test_what_cannot_be_filmed(runs, given, fragment):
    assert_one_line_error(execute("film.py", runs.get(given, given)), fragment)


# ------------------------------------------------------------------------------ runs into results/
def test_rows_of_the_same_run_are_replaced(tmp_path):
    import main_job

    old = [{"seed": seed, "sac_steps": steps, "x": "old"} for seed in "12" for steps in ("5", "10")]
    path = tmp_path / "results.csv"
    main_job.merge(path, old, ("seed",))
    new = [{"seed": "1", "sac_steps": steps, "x": "new"} for steps in ("10", "5")]
    rows = main_job.merge(path, new, ("seed",), main_job.by_steps)
    assert [row["x"] for row in rows] == ["new", "new", "old", "old"]
    assert [row["sac_steps"] for row in rows] == ["5", "10"] * 2
    assert path.read_text().splitlines()[1] == "1,5,new"


def test_a_robots_run_becomes_a_row_an_evaluation(runs):
    import main_job

    folder = shutil.move(runs["robot"], runs["robot"].with_name("main_job__Hopper-v4__2"))
    args = json.loads((folder / "args.json").read_text())
    rows = []
    for last in (10_001, 10_000):  # the former is not finished
        assert not rows
        (folder / "args.json").write_text(json.dumps(args | {"total_timesteps": last}))
        rows = main_job.collect(runs["robot"].parent)
    columns = ("sac_steps", "return_mean", "preference_accuracy", "preference_loss", "gap")
    actual = [tuple(row[column] for column in columns) for row in rows]
    assert actual == [
        ("5000", "310.5", "0.9", "0.3", "0.08"),
        ("10000", "620", "0.9", "0.3", "0.08"),
    ]
    committed = read_csv(ROOT / "benchmark/results/main_job.csv")
    assert list(rows[0]) == list(committed[0]) and rows[0]["seed"] == "2"


def test_other_robots(runs):
    import other_robots

    folder, runs = runs["robot"], runs["robot"].parent
    assert other_robots.collect(runs) == []
    args = json.loads((folder / "args.json").read_text()) | {"seed": 1, "total_timesteps": 10_000}
    shutil.move(folder, runs / "other_robots__Hopper-v4__1")
    (runs / "other_robots__Hopper-v4__1/args.json").write_text(json.dumps(args))
    (runs / "other_robots__Ant-v5__1").mkdir()  # one that has only begun
    tiers = {tier: {"return_mean": x} for tier, x in (("low", 10), ("medium", 619), ("high", 700))}
    manifest = {"arguments": {"total_timesteps": 60_000}, "random_return": 1.5, "tiers": tiers}
    (runs / "other_robots_data__Hopper-v4").mkdir()
    (runs / "other_robots_data__Hopper-v4/manifest.json").write_text(json.dumps(manifest))
    rows = other_robots.collect(runs)
    assert [row["return_mean"] for row in rows] == ["310.5", "620"] and rows[0]["gap"] == "0.08"
    line = other_robots.summarise(rows).splitlines()[-1]
    for cell in ("Hopper-v4", "60k", "2, 10, 619", "700", "10k", "620 ± 2", "yes", "0.90"):
        assert f"| {cell} |" in line, (cell, line)


def test_robots_runs_become_figure_3s(tmp_path):
    import figure3

    rows = [{"charts/sac_steps": step, "charts/env_steps": step} for step in (0, 0, 50, 100)]
    for row, value in zip(rows, ("", 5, 8, 7)):
        row |= {"eval/return_mean": value, "eval/return_std": 1, "charts/wall_seconds": 3}
    for method, last in (("rlhf", 100), ("aihf", 200)):  # the latter has not finished
        write_run(
            tmp_path / f"figure3__Hopper-v4__{method}__default__1", rows, total_timesteps=last
        )
    curves, finals = figure3.collect(tmp_path)
    assert [(row["method"], row["final"], row["best"]) for row in finals] == [
        ("rlhf", "7", "8.0"),
        ("bc", "5", "5.0"),
    ]
    assert [row["method"] for row in curves] == ["rlhf", "rlhf", "bc"]
    for name, table in (("figure3", curves), ("figure3_runs", finals)):
        assert list(table[0]) == list(read_csv(ROOT / f"benchmark/results/{name}.csv")[0])


def test_language_models_win_rate_is_over_sft(tmp_path):
    import llm

    evaluations = [
        {"charts/step": step, "eval/gt_score": step, "eval/kl_base": 1} for step in (0, 60)
    ]
    for method in ("rlhf", "dpo"):
        args = {"ppo_steps": 60} if method == "rlhf" else {"dpo_steps": 60}
        run = write_run(tmp_path / f"llm__{method}__1000__1000__1", evaluations, **args)
        for name, scores in (("samples", (1, 2, 3, 0)), ("samples_sft", (0, 2, 4, -1))):
            texts = [{"prompt": f"p{i}", "response": "a  b"} for i in range(4)]
            if (method, name) != ("dpo", "samples_sft"):
                lines = [{**row, "gt_score": s} for row, s in zip(texts, scores)]
                write_rows(run / f"{name}.jsonl", lines)
    rows, scores = llm.collect(tmp_path)
    of = {(row["method"], row["policy_steps"]): row["win_rate"] for row in rows}
    assert of == {
        ("dpo", "0"): "",
        ("dpo", "60"): "0.625",
        ("rlhf", "0"): "",
        ("rlhf", "60"): "0.625",
        ("sft", "0"): "0.5",
    }
    assert len(scores) == 8 and scores[0]["response"] == "a b" and scores[1]["gt_score"] == "2"
    for name, table in (("llm", rows), ("llm_scores", scores)):
        assert table[0].keys() == read_csv(ROOT / f"benchmark/results/{name}.csv")[0].keys()
    with pytest.raises(ValueError, match="same prompts"):
        llm.win_rate([{"prompt": "a", "gt_score": 1}], [{"prompt": "b", "gt_score": 1}])


def test_hh_in_parts(tmp_path):
    """No prompt in two parts; the policies' dialogues are whole."""
    from data_gen import hh_data

    dialogues = [f"\n\nHuman: q{i}\n\nAssistant:" for i in range(9)]
    rows = [{"chosen": f"{x} yes{i}", "rejected": f"{x} no"} for i, x in enumerate(dialogues)]
    write_rows(tmp_path / "test.jsonl", rows)
    flags = f"--data {tmp_path} --judge 3 --policies 4 --output-dir {tmp_path}/x --test".split()
    assert execute("hh_parts.py", *flags, 2)[0] == 0
    found = {path.stem: read_rows(path) for path in (tmp_path / "x").iterdir()}
    prompts = {name: [row["prompt"] for row in found[name]] for name in ("judge", "full", "test")}
    assert prompts == {"judge": dialogues[:3], "full": dialogues[3:7], "test": dialogues[7:]}
    assert found["policies"] == rows[3:7] and found["full"][1]["completion"] == " yes4"
    assert hh_data.parse([tuple(row.values()) for row in found["policies"]])[0][0] == {
        "prompt": dialogues[3],
        "chosen": " yes3",
        "rejected": " no",
    }
    assert_one_line_error(execute("hh_parts.py", *flags, 3), "9 usable dialogues, not 10")


def test_hh_runs_become_a_table(tmp_path):
    """SFT's row is of RLHF's start, the win rate over the start from demonstrations."""
    import hh

    column = {"charts/wall_seconds": 60, "eval/reward_correlation": 0.5}
    table = [
        {"charts/step": step, "eval/gt_score": step / 10, "eval/kl_base": step, **column}
        for step in (0, 20)
    ]
    truths = {"samples": (3, 2, 1, 0), "samples_sft": (2, 2, 2, 2)}
    for name in ("rlhf__demo", "rlhf__full", "aihf-ppo__full"):
        run = write_run(tmp_path / f"hh__{name}__1", table, ppo_steps=20)
        for file, scores in truths.items():
            texts = [
                {"prompt": f"p{i}", "response": "x", "gt_score": s} for i, s in enumerate(scores)
            ]
            write_rows(run / f"{file}.jsonl", texts)
    rows, scores = hh.collect(tmp_path)
    assert len(rows) == 8 and len(scores) == 20 and "response" not in scores[0]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in hh.table(rows).split("\n")
    ]
    rlhf = ["RLHF", "1", "2.00", "2.00", "20.0", "38%", "0.50", "1"]
    sft = ["none", "1", "0.00", "0.00", "0.0", "50%", "0.50", ""]
    found = {(cells[0], cells[1]): cells[1:] for cells in lines[2:]}
    assert found["demonstration-SFT", "RLHF"] == rlhf and found["full-SFT", "none"] == sft
    assert found["full-SFT", "AIHF"] == ["AIHF", *rlhf[1:]] and len(found) == 5
    hh.draw(rows, scores, tmp_path / "hh.png")
    assert (tmp_path / "hh.png").read_bytes().startswith(b"\x89PNG")


def test_flipped_texts(tmp_path):
    import llm_data

    rows = [(f"p{i}", f"a{i}", f"b{i}") for i in range(2000)]
    flipped = {}
    for share in (0.1, 0.3):
        found = llm_data.flip_some(rows, share, 1)
        assert [row["prompt"] for row in found] == [x for x, _, _ in rows]
        assert all(
            {row["chosen"], row["rejected"]} == {a, b} for row, (_, a, b) in zip(found, rows)
        )
        flipped[share] = {i for i, row in enumerate(found) if row["chosen"][0] == "b"}
        assert len(flipped[share]) / 2000 == pytest.approx(share, abs=0.03)
    assert flipped[0.1] < flipped[0.3]
    found, given = tmp_path / "flipped.jsonl", ROOT / "data_gen/assets/imdb/preferences.jsonl"
    flags = ["--preferences", given, "--flip", 1, "--output", found]
    assert execute("llm_data.py", *flags)[0] == 0
    before, after = (read_rows(path)[0] for path in (given, found))
    assert after == before | {"chosen": before["rejected"], "rejected": before["chosen"]}


def test_a_sharper_policy_has_less_entropy():
    """The measures of the base model at two temperatures, its perplexity from transformers' own
    loss."""
    import llm_sharpness
    import torch

    args = llm_sharpness.Settings(micro_batch_size=16)
    base = llm_sharpness.Policy(str(ROOT / args.model_name_or_path), args)
    judge = llm_sharpness.Scorer(str(ROOT / args.ground_truth_path), args, True)
    prompts = ["This film is", "I saw it and", "The plot", "Her acting was"] * 8
    rows, judges = {}, {"gt_score": judge}
    for t in (1.0, 0.5):
        policy = llm_sharpness.Policy(str(ROOT / args.model_name_or_path), args)
        rows[t] = llm_sharpness.measure(policy, base, judges, prompts, t)
        assert policy.args == llm_sharpness.replace(args, temperature=t)
    assert rows[0.5]["entropy"] < 0.7 * rows[1.0]["entropy"]
    assert rows[0.5]["base_perplexity"] < rows[1.0]["base_perplexity"]
    assert rows[0.5]["distinct_bigrams"] < rows[1.0]["distinct_bigrams"] <= 1
    assert rows[1.0]["gt_score"] != rows[0.5]["gt_score"]

    x, y = base.texts.ids(["This film", " is the best of the year."], "")
    logits = base.lm(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y))
    found = llm_sharpness.perplexity(base, [x, x[:1]], [y, y])
    alone = llm_sharpness.perplexity(base, [x], [y])
    assert alone == pytest.approx(loss.exp().item(), rel=1e-4) and found != alone


def test_at_temperature_1_policies_repeat_their_last_evaluation():
    import llm

    def scores(name: str, **which: str) -> dict:  # of several evaluations the last
        rows = read_csv(llm.RESULTS / name)
        rows = [row for row in rows if row["seed"] and which.items() <= row.items()]
        return {tuple(row[key] for key in llm.KEYS): float(row["gt_score"]) for row in rows}

    found = scores("smollm2_sharpness.csv", temperature="1.0")
    assert found == pytest.approx(scores("smollm2.csv"), abs=1e-3)


def test_policies_are_those_of_the_runs_asked_for(tmp_path):
    import llm_sharpness

    for run in ("llm__dpo__1000__1000__1", "smollm2__rlhf__1000__1000__2"):
        for name in ("policy", "sft"):
            (tmp_path / run / name).mkdir(parents=True)
    run = tmp_path / "smollm2__rlhf__1000__1000__2"
    expected = {(x, "1000", "1000", "2"): run / y for x, y in (("rlhf", "policy"), ("sft", "sft"))}
    assert llm_sharpness.policies(tmp_path, "smollm2") == expected


def test_both_rewards_read_the_same_texts(tmp_path):
    """The judge in the place of both, and a ground truth that RLHF's samples have upside down."""
    import llm_rewards

    judge = ROOT / "data_gen/assets/imdb/classifier"
    prompts, signs = ["A great film", "It is awful", "The plot", "Well acted"], {"rlhf": -1}
    scores = llm_rewards.Scorer(str(judge), llm_rewards.Settings(), True).score(prompts).tolist()
    for method in ("rlhf", "aihf-ppo"):
        row = {"charts/step": 3, "eval/gt_score": 1}
        run = write_run(tmp_path / f"smollm2__{method}__100__1000__2", [row], ppo_steps=3)
        (run / "reward").symlink_to(judge)
        for name, sign in (("samples_sft", 1), ("samples", signs.get(method, 1))):
            rows = [
                {"prompt": x, "response": "", "gt_score": sign * y} for x, y in zip(prompts, scores)
            ]
            write_rows(run / f"{name}.jsonl", rows)
    rows = llm_rewards.collect(tmp_path, "smollm2")
    run_of_aihf, run_of_rlhf = sorted(rows, key=lambda row: row["reward"])
    assert not llm_rewards.collect(tmp_path)
    finals = [float(row["gt_score"]) for row in (run_of_aihf, run_of_rlhf)]
    assert finals == pytest.approx([np.mean(scores), -np.mean(scores)], abs=1e-4)
    assert run_of_rlhf == run_of_aihf | {"reward": "rlhf", "gt_score": run_of_rlhf["gt_score"]}
    found = [float(run_of_rlhf[text]) for text in ("sft", "rlhf", "aihf-ppo")]
    assert found == [1, -1, 1] and abs(float(run_of_rlhf["all"])) < 1
    cells = "1.00 | −1.00 | 1.00"
    assert f"| 100 demonstrations | AIHF, PPO | {cells} |" in llm_rewards.table([run_of_aihf])


def test_equal_kl_and_falls(tmp_path, monkeypatch):
    """No number where RLHF never was; a fall before the best evaluation is one too."""
    import llm

    def rows(method: str, *points: tuple[float, float]) -> list[dict]:
        run = dict(zip(llm.KEYS, (method, "9", "1000flip0.2", "1"))) | dict.fromkeys(llm.METRICS)
        run |= {"win_rate": "0.5", "correlation": "-0.1", "seconds": "90"}
        return [run | {"kl": str(kl), "gt_score": str(score)} for kl, score in points]

    scores = {"base": {"mean": 1}, "early": {"mean": 2}, "expert": {"mean": 5}}
    (tmp_path / "manifest.json").write_text(json.dumps({"checkpoints": scores}))
    monkeypatch.setattr(llm, "ASSETS", tmp_path)
    aihf = rows("aihf-ppo", (0, 0), (1, 3), (2, 1), (3, 4), (4, 3.5))
    for far, lead in ((5, "+1.90"), (3, "?")):
        found = [*aihf, *rows("rlhf", (0, 0), (far, 2), (1, 9))]
        lines = llm.table(found, [("9", "1000flip0.2")]).splitlines()
        cells = "3.50 | 4.00 | 4.0 | 50 % | −0.10 | 50 %"
        data = "9 demonstrations, 20 % of labels flipped"
        assert lines[3] == f"| {data} | AIHF, PPO | {cells} | {lead} | 1.5 |" and len(lines) == 4


def test_committed_results_give_the_tables_of_the_readme():
    import figure3
    import hh
    import llm
    import llm_rewards
    import main_job
    import other_robots

    page = (ROOT / "benchmark/README.md").read_text().replace("−", "-")
    tables = {main_job.RESULTS: main_job.summarise, figure3.RUNS: figure3.table}
    tables |= {hh.RESULTS: hh.table, other_robots.RESULTS: other_robots.summarise}
    for path, table in tables.items():
        assert table(read_csv(path)) in page, path
    page_of = llm_rewards.table(read_csv(llm.RESULTS / "llm_rewards.csv")).replace("−", "-")
    assert page_of in page
    for name, sizes in itertools.product(("llm", "smollm2"), ([llm.MAIN], llm.SIZES)):
        rows = read_csv(llm.RESULTS / f"{name}.csv")
        assert llm.table(rows, sizes, name).replace("−", "-") in page, (name, sizes)


def test_every_return_of_a_trial_is_committed():
    rows = read_csv(ROOT / "benchmark/tuning/robots.csv")
    rows = [row for row in rows if row["eval/return_mean"]]
    returns = {
        (row["run"], float(row["charts/sac_steps"]), round(float(row["eval/return_mean"])))
        for row in rows
    }
    lines = (ROOT / "benchmark/tuning/README.md").read_text().splitlines()
    found = 0
    for line in lines:
        if named := re.match(r"\| \**((?:Hopper|HalfCheetah|Walker2d)-v4_[\w.-]+?)\** \|", line):
            for value, steps in re.findall(r"(?<!± )\b(\d+) at (\d+)k", line):
                assert (named[1], 1000 * int(steps), int(value)) in returns, line
                found += 1
    assert found > 25
    pattern = r"^\| \**[\w-]+-v4\** \| .* \| (\S+_rlhf_\S+) \|$"
    for line in (ROOT / "benchmark/tuning/rlhf.md").read_text().splitlines():
        if named := re.match(pattern, line):
            cells = line.replace("*", "").replace("−", "-").split("|")[4:10]
            for steps, cell in zip((0, 25, 50, 75, 100, 150), cells):
                assert not cell.strip() or (named[1], 1000 * steps, int(cell)) in returns, line
