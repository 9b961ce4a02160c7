"""The READMEs against the code: commands parse, links lead somewhere, names, numbers and budgets
hold. And the command lines of the five trainings against each other.

python -m pytest tests/test_readme.py
"""

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import typing
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest
import tyro
from helpers import ROOT, read_csv, run_script

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings this one along
    import tomli as tomllib

README = ROOT / "README.md"
PAGES = [README, ROOT / "benchmark/README.md", ROOT / "data_gen/README.md"]
RESULTS = ROOT / "benchmark/results"
NOTES = sorted((ROOT / "benchmark/tuning").glob("*.md"))
BUDGETS = {  # lines, at most
    "aihf_sac_mujoco.py": 520,
    "aihf_ppo_llm.py": 640,
    "aihf_dpo_llm.py": 457,
    "rlhf_baseline.py": 1100,
    "data_gen/read.py": 483,
    "benchmark/plot.py": 90,
}
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def text(page: Path) -> str:
    return page.read_text() if page.is_file() else ""


def commands(page: str) -> list[list[str]]:
    """The words of each command in a page: of bash blocks, and of `code` that begins as one."""
    blocks = [body for language, body in FENCE.findall(page) if language == "bash"]
    inline = re.findall(r"`((?:python|bash|pip|torchrun) [^`\n]+)`", FENCE.sub("", page))
    lines = [*re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines(), *inline]
    found = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in found if words]


COMMANDS = [words for page in (*PAGES, *NOTES) for words in commands(text(page))]
PIPS = [words for words in COMMANDS if words[0] == "pip"]
SCRIPTS = {" ".join(words): words for words in COMMANDS if words[0] in ("python", "torchrun")}


def parse(words: list[str]):
    """What a script's own dataclass of arguments makes of a command; the script is not run."""
    script = next(n for n, word in enumerate(words) if word.endswith(".py"))
    path, argv = ROOT / words[script], words[script + 1 :]
    assert path.is_file(), f"{path} is not there"
    if "tyro" not in path.read_text():
        assert not argv, f"{path.name} takes no arguments"
        return None
    module = importlib.import_module(path.stem)
    if hasattr(module, "MujocoArgs"):
        kind, *argv = {"mujoco": module.MujocoArgs, "llm": module.LlmArgs}[argv[0]], *argv[1:]
    elif hasattr(module, "Args"):
        kind = module.Args
    else:  # a union of subcommands
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Call]
        call = next(call for call in calls if ast.unparse(call.func) == "tyro.cli")
        kind = eval(ast.unparse(call.args[0]), vars(module))
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            return tyro.cli(kind, args=argv)
    except SystemExit as stop:
        assert stop.code == 0, f"{' '.join(words)}\n{err.getvalue()}"  # 0 is --help


def test_pages_have_commands():
    for page in PAGES:
        assert any(words[0] in ("python", "bash") for words in commands(text(page))), page
    assert PIPS


@pytest.mark.parametrize("words", SCRIPTS.values(), ids=SCRIPTS)
def test_command_parses(words):
    parse(words)


TORCHRUNS = {name: words for name, words in SCRIPTS.items() if words[0] == "torchrun"}


@pytest.mark.parametrize("words", TORCHRUNS.values(), ids=TORCHRUNS)
def test_processes_can_share_the_batches(words, monkeypatch):
    """Else start_processes raises ValueError."""
    flags = dict(zip(words, words[1:]))
    processes = int(flags["--nproc-per-node"]) * int(flags.get("--nnodes", 1))
    script = next(n for n, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[script].removesuffix(".py"))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(sys, "argv", [*words[script:], "--threads", "1", "--no-cuda"])
    monkeypatch.setattr(module.dist, "init_process_group", lambda backend, timeout: None)
    assert module.start_processes(module.parse_args()[0])[1] == processes


TEXTS = "seed num_demonstrations num_preferences"
TRAININGS = {  # their arguments, and which numbers may be 0
    "aihf_sac_mujoco": ("Args", "seed demo_weight preference_weight gradient_penalty"),
    "aihf_ppo_llm": (
        "Args",
        f"{TEXTS} demo_weight preference_weight reward_penalty kl_coefficient",
    ),
    "aihf_dpo_llm": ("Args", f"{TEXTS} demo_weight preference_weight"),
    "rlhf_baseline mujoco": ("MujocoArgs", "seed critic_warmup_steps kl_coefficient"),
    "rlhf_baseline llm": ("LlmArgs", f"{TEXTS} kl_coefficient"),
}


@pytest.mark.parametrize("script", TRAININGS)
def test_numbers(script):
    """Presets' and defaults are accepted; each number may be 0 or not, and none negative."""
    module, *command = script.split()
    module = importlib.import_module(module)
    for preset in [["--preset", "imdb"], ["--preset", "hh"]] * ("llm" in script) + [[]]:
        with mock.patch.object(module.read, "check_numbers", side_effect=ValueError) as check:
            run_script(module, [*command, *preset], ROOT)
        (args, *others), options = check.call_args
        module.read.check_numbers(args, *others, **options)
    for field in fields(args):
        kinds = {field.type, *typing.get_args(field.type)}  # of int | None: int and None
        for bad in (-1, 0) if kinds & {int, float} else ():
            value = (bad, 64) if typing.get_origin(field.type) is tuple else bad
            refused = bad or field.name not in TRAININGS[script][1].split()
            flag = f"--{field.name.replace('_', '-')} must be"
            with pytest.raises(ValueError, match=flag) if refused else contextlib.nullcontext():
                module.read.check_numbers(replace(args, **{field.name: value}), *others, **options)


OWN = {  # defaults in which two trainings differ
    ("aihf_sac_mujoco", "rlhf_baseline mujoco"): "learning_rate reward_learning_rate",
    ("aihf_ppo_llm", "rlhf_baseline llm"): "kl_coefficient",
    ("aihf_ppo_llm", "aihf_dpo_llm"): "preference_weight batch_size eval_every checkpoint_every",
}


@pytest.mark.parametrize("trainings", OWN)
def test_shared_flags_have_the_same_defaults(trainings):
    """The same models, data, SAC and PPO for every method."""
    kinds = (getattr(importlib.import_module(x.split()[0]), TRAININGS[x][0]) for x in trainings)
    one, other = (vars(kind()) for kind in kinds)
    different = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    assert different == {*OWN[trainings].split()}


@pytest.mark.parametrize("script", TRAININGS)
def test_evaluate_beside_resume_reads_the_run_to_evaluate(script, monkeypatch):
    module, *command = script.split()
    module, runs = importlib.import_module(module), []

    def checkpoint(run, _, **go_on):
        runs.append((run, go_on))
        raise ValueError

    monkeypatch.setattr(module.read, "checkpoint", checkpoint)
    monkeypatch.setattr(sys, "argv", ["", *command, "--resume", "one", "--evaluate", "another"])
    with pytest.raises(SystemExit):
        module.main()
    assert runs == [("another", {"go_on": False})]


@pytest.mark.parametrize(
    "words",
    "main_job.sh,figure3.sh,other_robots.sh,llm.sh,smollm2.sh,smollm2.sh tuning,hh.sh".split(","),
)
def test_benchmark_scripts_give_flags_that_exist(words, tmp_path):
    """Run with a `python` that only notes what it was asked."""
    script, *parts = words.split()
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin/python"
    stub.write_text('#!/bin/bash\necho "$*" >>"$NOTES"\n')
    stub.chmod(0o755)
    for part in ("hh_small/prompts", "hh_parts/test"):  # hh.sh puts these together
        (tmp_path / "runs" / part).parent.mkdir(parents=True)
        (tmp_path / f"runs/{part}.jsonl").touch()
    (tmp_path / "benchmark").mkdir()
    shutil.copy(ROOT / "benchmark" / script, tmp_path / "benchmark")
    env = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "JOBS": "1"}
    env["NOTES"] = str(tmp_path / "notes")
    subprocess.run(["bash", tmp_path / "benchmark" / script, *parts], env=env, check=True)
    asked = (tmp_path / "notes").read_text().splitlines()
    assert len(asked) >= 8
    for line in sorted(set(asked)):  # a run that several figures need is skipped when it is there
        parse(["python", *line.split()])


@pytest.mark.parametrize("words", PIPS, ids=" ".join)
def test_extras_exist(words):
    extras = PYPROJECT["project"]["optional-dependencies"]
    for named in re.findall(r"\[([^\]]*)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *NOTES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"`[^`\n]*`", "``", FENCE.sub("", text(page)))  # without code
    for link in re.findall(r"\]\(\s*<?([^)\s>]+)", prose):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        assert target.exists() and target.resolve().is_relative_to(ROOT.resolve()), link
        headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", text(target)), re.M) if anchor else []
        assert not anchor or anchor in map(slug, headings), f"no such heading: {link}"
    named = re.findall(
        r"`((?:results|figures|benchmark|data_gen|tuning)/[\w/.]+\.\w+)`", text(page)
    )
    for path in named:
        assert (page.parent / path).exists() or (ROOT / path).exists(), path


def test_budgets():
    assert README.stat().st_size <= 15_000
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in BUDGETS}
    too_long = {name: count for name, count in lines.items() if count > BUDGETS[name]}
    assert not too_long, f"lines: {too_long}"


def test_names_in_read_it_are_the_scripts():
    rows = re.search(r"^\| paper \|.*?\n\n", text(README), re.M | re.S)[0].splitlines()
    scripts = [(ROOT / cell.strip(" `")).read_text() for cell in rows[0].strip("|").split("|")[1:]]
    for row in rows[2:]:
        for cell, source in zip(row.strip("|").split("|")[1:], scripts):
            for name in re.findall(r"`([^`]+)`", cell):
                name = name.removeprefix("--").replace("-", "_") if name[0] == "-" else name
                assert re.search(rf"(?<!\w){re.escape(name.split('(')[0])}", source), name


def test_results_are_those_of_the_committed_runs():
    """README's table: mean ± std over seeds of the last evaluation."""
    last: dict[tuple, float] = {}  # a run's rows are in order
    for row in read_csv(RESULTS / "main_job.csv"):
        if row["seed"] in ("1", "2", "3"):
            last[row["env"], "aihf", row["seed"]] = float(row["return_mean"])
    for row in read_csv(RESULTS / "figure3_runs.csv"):
        if row["variant"] == "default" and row["method"] != "aihf":
            last[row["env"], row["method"], row["seed"]] = float(row["final"])
    for world, name in (("movie reviews", "llm.csv"), ("SmolLM2-135M", "smollm2.csv")):
        for row in read_csv(RESULTS / name):
            if row["demonstrations"] == row["preferences"] == "1000":
                last[world, row["method"], row["seed"]] = float(row["gt_score"])
    finals: dict[tuple, list[float]] = {}
    for (world, method, _), value in last.items():
        finals.setdefault((world, method), []).append(value)
    robots = ("aihf", "rlhf", "rlhf-no-kl", "bc", "aihf-dpo", "dpo")
    reviews = ("aihf-ppo", "rlhf", "rlhf-no-kl", "sft", "aihf-dpo", "dpo")
    rows = re.findall(r"^\| (\S+-v4|movie reviews|SmolLM2-135M) \|(.*)\|$", text(README), re.M)
    assert len(rows) == 5
    for world, row in rows:
        methods = robots if world.endswith("v4") else reviews
        for method, cell in zip(methods, row.split("|")):
            digits, values = 0 if world.endswith("v4") else 2, finals.get((world, method))
            found = values and (statistics.mean(values), statistics.pstdev(values))
            expected = "{:.{d}f} ± {:.{d}f}".format(*found, d=digits) if found else ""
            assert cell.strip().replace("−", "-") == expected, (world, method)


TUNED = {  # defaults that the results rest on
    ("aihf_sac_mujoco", "Args"): """preference_weight 10  preference_temperature 5  demo_weight 1
    reward_updates_per_iteration 100  rollout_steps_per_iteration 2000  rollout_memory 10
    reward_learning_rate 1e-3  learning_rate 1e-3  gradient_penalty 1000  return_form mean
    demo_batch_size 2000  preference_batch_size 64  segment_length 50  learning_starts 5000
    policy_steps_per_iteration 5000  batch_size 256  gamma 0.99  tau 0.005""",
    ("rlhf_baseline", "MujocoArgs"): """kl_coefficient 10  critic_warmup_steps 10000
    held_out_share 0.1  bc_updates 7000  bc_learning_rate 1e-3  reward_updates 3000
    bc_batch_size 256  preference_batch_size 64  batch_size 256
    reward_learning_rate 3e-4  learning_rate 1e-4""",
    ("aihf_ppo_llm", "Args"): """demo_weight 1  preference_weight 3  response_memory 10
    reward_penalty 0.3  reward_updates_per_iteration 10  policy_steps_per_iteration 5
    reward_learning_rate 1e-3  learning_rate 1e-4  value_learning_rate 3e-4  ppo_steps 60
    kl_coefficient 0.02  demo_loss linear  batch_size 64  minibatch_size 32  ppo_epochs 2
    reward_batch_size 32  gae_lambda 0.95  clip 0.2""",
    ("aihf_dpo_llm", "Args"): """demo_weight 1  preference_weight 1  beta 0.1  dpo_steps 200
    learning_rate 1e-4  sft_normalisation token  batch_size 32""",
    ("rlhf_baseline", "LlmArgs"): """sft_epochs 3  sft_learning_rate 1e-4  reward_epochs 2
    reward_learning_rate 1e-3  learning_rate 1e-4  value_learning_rate 3e-4  ppo_steps 60
    kl_coefficient 0.05  held_out_share 0.1  sft_batch_size 32  reward_batch_size 32""",
}


@pytest.mark.parametrize("script, kind", TUNED)
def test_defaults_are_the_tuned_ones(script, kind):
    args, words = getattr(importlib.import_module(script), kind)(), TUNED[script, kind].split()
    for name, value in zip(words[::2], words[1::2]):
        default = getattr(args, name)
        assert default == type(default)(value), name


def test_banners_are_the_scripts():
    told = re.search(r"has the banners (.*?);", text(README), re.S)[1]
    banners = re.findall(r"`([A-Z][A-Za-z ]+)`", told)
    assert len(banners) == 5
    for script in ("aihf_sac_mujoco.py", "aihf_ppo_llm.py"):
        for banner in banners:
            assert re.search(rf"# =+ {banner}", text(ROOT / script)), (script, banner)


def test_citation_is_the_papers():
    cited = (ROOT / "CITATION.cff").read_text()
    title, authors = (
        re.search(rf" {key} += {{(.*)}},", text(README))[1] for key in ("title", "author")
    )
    assert title in cited and all(name.split(",")[0] in cited for name in authors.split(" and "))
