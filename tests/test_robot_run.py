"""Whole runs of the robots' two scripts: as a user starts, stops, kills and carries them on, what
they leave on disk, and bad input. Mathematics: test_sac_mujoco.py and test_rlhf_mujoco.py.

python -m pytest tests/test_robot_run.py
"""

import copy
import functools
import json
import math
import re
import shutil
import signal
import sys
import types
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    assert_one_line_error,
    assert_same_run,
    files,
    killed_at,
    load,
    metrics,
    run_process,
    run_script,
    save_arrays,
)
from torch.optim.swa_utils import AveragedModel

import aihf_sac_mujoco as aihf
import rlhf_baseline as rlhf
from data_gen import read

pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's, on v4 robots


class Script(NamedTuple):
    module: types.ModuleType
    args: type
    command: str  # its name, and what comes before the flags
    flags: str  # of a run of a second, beside COMMON


COMMON = """--env helpers:Drift-v0 --total-timesteps 120 --policy-steps-per-iteration 30 --hidden 8
    --segment-length 4 --eval-every 2 --eval-episodes 2 --checkpoint-every 2 --run-name run
    --no-compile --no-cuda"""
SMALL = "--batch-size 16 --reward-learning-rate 0.01 --preference-batch-size 8"
AIHF_FLAGS = f"""{SMALL} --learning-starts 30 --rollout-steps-per-iteration 20
    --reward-updates-per-iteration 3"""
RLHF_FLAGS = f"""{SMALL} --bc-updates 17 --bc-batch-size 9 --reward-updates 13
    --held-out-share 0.3 --critic-warmup-steps 40"""
AIHF = Script(aihf, aihf.Args, "aihf_sac_mujoco.py", AIHF_FLAGS)
RLHF = Script(rlhf, rlhf.MujocoArgs, "rlhf_baseline.py mujoco", RLHF_FLAGS)
both = pytest.mark.parametrize("script", [AIHF, RLHF], ids=["aihf", "rlhf"])


def execute(script: Script, cwd: Path, data: Path, *flags) -> tuple[int, str, str]:
    return run_script(script.module, arguments(script, data, *flags), cwd)


def arguments(script: Script, data: Path, *flags) -> list:
    own = [*script.command.split()[1:], *COMMON.split(), *script.flags.split()]
    return [*own, "--data-dir", data, *flags]


def run(script: Script, cwd: Path, data: Path, *flags) -> Path:
    """Four iterations of 30 steps, checkpoints after 2 and 4, that have to end well: the folder."""
    code, out, err = execute(script, cwd, data, *flags)
    assert code == 0, (out, err)
    return cwd / "runs" / "run"


def carry_on(script: Script, folder: Path, *flags, flag="--resume") -> tuple[int, str, str]:
    argv = [*script.command.split()[1:], flag, folder, *flags]
    return run_script(script.module, argv, folder.parent)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return helpers.falling_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data):
    """plain(script): the folder of an undisturbed run; read only."""
    return functools.cache(lambda script: run(script, tmp_path_factory.mktemp("plain"), data))


@pytest.fixture
def finished(plain, tmp_path):
    """finished(script): a copy of it, to spoil."""
    return lambda script: Path(shutil.copytree(plain(script), tmp_path / "finished"))


@both
def test_as_a_user_with_the_script_and_read_copied_away(tmp_path, script):
    """The data of the default robot, found from the repository's root."""
    (tmp_path / "data_gen").mkdir()
    shutil.copy(script.module.__file__, tmp_path / "fork.py")
    shutil.copy(ROOT / "data_gen" / "read.py", tmp_path / "data_gen")
    (tmp_path / "data_gen" / "assets").symlink_to(ROOT / "data_gen" / "assets")
    flags = """--seed 3 --total-timesteps 100 --policy-steps-per-iteration 50 --eval-every 1
    --eval-episodes 1 --no-compile"""
    _, *command = script.command.split()
    argv = ["fork.py", *command, *script.flags.split(), *flags.split()]
    code, out, err = run_process(argv, tmp_path, PYTHONPATH="")
    assert code == 0 and "final true return" in out, (out, err)
    assert (script is RLHF) == ("cloned policy:" in out and "reward model:" in out)
    (folder,) = (tmp_path / "runs").iterdir()
    method = "aihf" if script is AIHF else "rlhf"
    assert re.fullmatch(rf"Hopper-v4__{method}__3__\d+", folder.name)
    assert f"python benchmark/plot.py runs/{folder.name}" in out
    assert set(files(folder)) == {"args.json", "checkpoint.pt", "metrics.csv"}
    table, state = metrics(folder), load(folder)
    assert [row["charts/sac_steps"] for row in table[-2:]] == ["50", "100"]
    assert all(math.isfinite(float(x)) for x in table[-1].values() if x)
    saved = json.loads((folder / "args.json").read_text())
    assert saved.pop("script") == state["script"] == " ".join(["fork.py", *command])
    assert set(saved) == set(state["args"]) == {field.name for field in fields(script.args)}
    assert (saved["seed"], state["args"]["hidden"], saved["run_name"]) == (3, (64, 64), folder.name)


@pytest.mark.parametrize("script, compiler", [(AIHF, "works"), (AIHF, "raises"), (RLHF, "works")])
def test_compiling_changes_nothing(tmp_path, data, plain, monkeypatch, script, compiler):
    """Not even its warm-up on copies; without a compiler the run is eager and says so."""
    compiled, sizes = [], set()

    def compile(update, **options):
        compiled.append(update)

        def checked(sac, learning_rate, obs, *batch):
            if compiler == "raises":
                raise RuntimeError("no C++ compiler\nat all")
            sizes.add(len(obs))
            return update(sac, learning_rate, obs, *batch)

        return checked

    monkeypatch.setattr(torch, "compile", compile)
    code, out, err = execute(script, tmp_path, data, "--compile")
    assert code == 0 and len(compiled) == 1 and "compiling" in out, err
    assert sizes == ({16} if compiler == "works" else set())  # of the trial and of all batches
    failed = re.search("torch.compile failed .*no C.. compiler at all.* eager", out)
    assert (failed is not None) == (compiler == "raises")
    assert_same_run(tmp_path / "runs" / "run", plain(script))


@both
def test_tracking_is_asked_for(tmp_path, data, monkeypatch, script):
    """Every row but AIHF's row of zeros, at its SAC step; of stages 1 and 2 in their order."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it would raise
    assert_one_line_error(execute(script, tmp_path, data, "--track"), "wandb")
    assert [path.name for path in (tmp_path / "runs/run").iterdir()] == ["lock"]
    calls = []
    wandb = types.SimpleNamespace(init=lambda **k: calls.append(k))
    wandb.log = lambda row, step: calls.append((step, row))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    table = metrics(run(script, tmp_path, data, "--track"))[script is AIHF :]
    result = execute(script, tmp_path, data, "--track")  # again: not begun anew at wandb's
    assert_one_line_error(result, "exists; carry it on with --resume")
    settings, *logged = calls
    assert settings["id"] == "run" and settings["config"]["total_timesteps"] == 120
    assert [step for step, _ in logged[:2]] == ([30, 60] if script is AIHF else [0, 1])
    for i, ((step, row), written) in enumerate(zip(logged, table, strict=True)):
        assert str(step) == written["charts/sac_steps"] or i == 1 and script is RLHF
        assert {k: f"{v:.9g}" for k, v in row.items()} == {k: v for k, v in written.items() if v}


@both
def test_training_cannot_see_the_true_reward(tmp_path, data, plain, monkeypatch, script):
    """Neither the robot's nor that of the data."""
    helpers.lie(monkeypatch)
    shutil.copytree(data, tmp_path / "data")
    for tier in ("low", "medium", "high"):
        save_arrays(tmp_path / "data" / f"{tier}.npz", rewards=None)
    folder = run(script, tmp_path, tmp_path / "data")
    assert_same_run(folder, plain(script), without="eval/")
    assert metrics(folder)[-1]["eval/return_mean"] == "nan"


# ------------------------------------------------------------------------- kill, resume, evaluate
KILLS = [  # before which call of a function, how, and how many rows metrics.csv has by then
    # AIHF: an iteration has 3 steps of the reward's Adam;
    # os.replace: args.json, metrics.csv of 1, 2, checkpoint of 2, metrics.csv of 3, 4, checkpoint
    (AIHF, "torch.optim:Adam.step", 2, signal.SIGINT, 0),
    (AIHF, "torch.optim:Adam.step", 8, signal.SIGTERM, 3),
    (AIHF, "os.replace", 7, signal.SIGKILL, 5),
    # RLHF: 17 and 13 steps of Adam and a check each in stages 1 and 2, a check an iteration
    (RLHF, "torch.optim:Adam.step", 7, signal.SIGINT, 0),
    (RLHF, "torch.optim:Adam.step", 24, signal.SIGKILL, 1),
    (RLHF, "torch.corrcoef", 2, signal.SIGKILL, 3),  # in the evaluation after iteration 2
    (RLHF, "data_gen.read.check_finite", 6, signal.SIGINT, 5),
    (RLHF, "torch.save", 4, signal.SIGKILL, 6),
]


@pytest.mark.parametrize("script, function, call, by, rows", KILLS)
def test_kill_and_resume(tmp_path, data, plain, script, function, call, by, rows):
    """An unfinished run can be evaluated too: RLHF's in stage 2 has its clone."""
    name, folder = script.command.split()[0], tmp_path / "runs" / "run"
    code, out, err = killed_at(function, call, ROOT / name, arguments(script, data), tmp_path, by)
    code_of = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert code == code_of[by] and "Traceback" not in err, (out, err)
    how = f"{script.command} --resume runs/run" if rows else "nothing is saved"
    assert by == signal.SIGKILL or how in out
    assert rows == len(metrics(folder)) if rows else not (folder / "metrics.csv").exists()
    if not rows:  # no checkpoint: the run may begin again under its name
        assert_one_line_error(carry_on(script, folder), "no checkpoint")
        run(script, tmp_path, data)
    else:
        before, log = files(folder), load(folder)["log"]
        mean = next(x["eval/return_mean"] for x in log[::-1] if "eval/return_mean" in x)
        code, out, err = carry_on(script, folder, flag="--evaluate")
        assert code == 0 and f"final true return {mean:.0f} ±" in out, (out, err)
        assert files(folder) == before
        assert_one_line_error(execute(script, tmp_path, data), "--resume runs/run")
        code, out, err = carry_on(script, folder)
        assert code == 0 and "120/120" in err, (out, err)
    assert_same_run(folder, plain(script))
    assert files(folder).keys() == files(plain(script)).keys()


@both
def test_iterations_with_more_falls_are_not_averaged(tmp_path, data, monkeypatch, script):
    """Than the fewest in ten, by step: of one, the last before the run is carried on, 11 steps.
    Iterations with random actions are kept whatever they did. With these seeds nine or eleven would
    not do."""
    seed = 15 if script is RLHF else 13
    flags = ["--policy-steps-per-iteration", 20, "--eval-every", 100, "--seed", seed]
    policies, update = [], AveragedModel.update_parameters

    def noting_update(averaged, actor):
        policies.append(copy.deepcopy(actor).double())
        update(averaged, actor)

    monkeypatch.setattr(AveragedModel, "update_parameters", noting_update)
    monkeypatch.setattr(script.module, "BLOCK", 10)  # two policies an iteration
    folder = run(script, tmp_path, data, *flags, "--total-timesteps", 311)
    code, out, err = carry_on(script, folder, "--total-timesteps", 900)
    assert code == 0, (out, err)
    state = load(folder)
    ends = sorted({int(row["charts/sac_steps"]) for row in state["log"]})
    assert ends[15:18] == [300, 311, 331]
    fell = state["replay"][:, -1].double()
    falls = [fell[i:j].mean().item() for i, j in zip(ends, ends[1:])]
    known, falls = (2, falls[2:]) if script is AIHF else (1, falls)

    def kept(window: int) -> list:
        """The policies of iterations with no more falls than any in the window."""
        found, learned = policies[:known], iter(policies[known:])
        for i in range(len(falls)):
            its = list(islice(learned, 2))
            found = found + its * (falls[i] == min(falls[: i + 1][-window:]))
        assert not list(learned)
        return found

    one, nine, ten, eleven = (len(kept(window)) for window in (1, 9, 10, 11))
    averaged = state["averaged"]
    assert averaged["n_averaged"] == ten and ten not in (one, nine, eleven), falls
    for name, p in helpers.mean_policy(kept(10)).named_parameters():
        assert averaged[f"module.{name}"].numpy() == pytest.approx(p.detach().numpy(), abs=1e-5)
    logged = [row["charts/fall_rate"] for row in state["log"] if "charts/fall_rate" in row]
    assert logged == pytest.approx(falls)
    where_an_end_is_no_fall = ["--reward-range", -2, 2, "--run-name", "run2"]
    run(script, tmp_path, data, *flags, *where_an_end_is_no_fall, "--total-timesteps", 100)
    state = load(tmp_path / "runs/run2")
    falls = [row["charts/fall_rate"] for row in state["log"] if "charts/fall_rate" in row]
    assert any(b > a for a, b in zip(falls, falls[1:]))
    assert state["averaged"]["n_averaged"] == (8 if script is AIHF else 11)


@both
def test_a_finished_run_is_evaluated_and_resumed(finished, script):
    """Which changes nothing but, by the latter, its arguments; the mean policy plays."""
    folder = finished(script)
    before, row, averaged = files(folder), metrics(folder)[-1], load(folder)["averaged"]
    mean, std = (float(row[f"eval/return_{name}"]) for name in ("mean", "std"))
    for flag, changed in (("--evaluate", set()), ("--resume", {"args.json"})):
        with mock.patch.object(script.module, "evaluate", wraps=script.module.evaluate) as evaluate:
            code, out, err = carry_on(script, folder, flag=flag)
        assert code == 0 and f"final true return {mean:.0f} ± {std:.0f};" in out, (out, err)
        played, after = evaluate.call_args.args[1].state_dict(), files(folder)
        assert all((averaged[f"module.{name}"] == p).all() for name, p in played.items())
        assert {name for name in before | after if before[name] != after[name]} == changed
        assert not (folder.parent / "runs").exists()


@both
def test_flags_beside_resume_win(finished, plain, script):
    """But what a run is does not change, nor β, which the checkpoint has."""
    folder, fixed = finished(script), "--seed --run-name --runs-dir".split()
    rlhf = "--held-out-share --kl-coefficient --bc-updates --reward-updates".split()
    own = ["--entropy-coefficient"] if script is AIHF else rlhf
    for flag, value in zip([*fixed, *own], (2, "x", "y", 0.2, 0.3, 5, 5)):
        result = carry_on(script, folder, "--total-timesteps", 150, flag, value)
        assert_one_line_error(result, f"--resume cannot change {flag}, which is")
    result = carry_on(script, folder, "--total-timesteps", 150, "--reward-range", -1, 1)
    assert_one_line_error(result, "--resume cannot change --reward-range, which is [")
    result = carry_on(script, folder, "--total-timesteps", 100)
    assert_one_line_error(result, "has done 120 steps, more than --total-timesteps")
    flags, state = ["--total-timesteps", 150, "--learning-rate", 0.003], load(folder)
    state["log"][-1]["charts/wall_seconds"] = 1000.0
    torch.save(state, folder / "checkpoint.pt")
    with mock.patch.object(read, "check_finite", side_effect=SystemExit(1)):
        assert carry_on(script, folder, *flags)[0] == 1  # before another checkpoint
    code, out, err = carry_on(script, folder)
    assert code == 0, (out, err)
    state, table = load(folder), metrics(folder)
    before = metrics(plain(script))
    before[-1]["charts/wall_seconds"] = "1000"
    assert len(state["replay"]) == 150 and table[:-1] == before
    assert 1000 < state["log"][-1]["charts/wall_seconds"] < 1300  # the clock goes on
    kept = {"gamma": 0.99, "segment_length": 4, "learning_rate": 0.003}
    assert {name: state["args"][name] for name in kept} == kept


@both
def test_other_data_is_refused(tmp_path, data, finished, script):
    folder, other = finished(script), Path(shutil.copytree(data, tmp_path / "data"))
    before, pairs = files(folder), other / "pairs.csv"

    def assert_refused():
        result = carry_on(script, folder, "--data-dir", other)
        assert_one_line_error(result, "other data")

    text = pairs.read_text()
    pairs.write_text(text[:-2] + ("1" if text[-2] == "0" else "0"))
    assert_refused()
    pairs.write_text(text)
    for tier, name in (("low", "observations"), ("medium", "actions"), ("high", "actions")):
        path = other / f"{tier}.npz"
        array = np.load(path)[name]
        save_arrays(path, **{name: 0.99 * array})
        assert_refused()
        save_arrays(path, **{name: array})
    ends = helpers.read_arrays(other / "high.npz")
    ends = {"terminations": ends["truncations"], "truncations": ends["terminations"]}
    save_arrays(other / "high.npz", **ends)
    assert_refused()
    assert files(folder) == before


# --------------------------------------------------------------------- not a number, and bad input
@pytest.mark.parametrize(
    "script, owner, function, at, step, names",
    [  # updates 61 to 90 of SAC, of 3 or 2 calls of adam_, are iteration 3's; the reward's 7 to 9
        (AIHF, aihf, "adam_", 3 * 88 + 1, 90, "sac_losses"),  # the critics, in update 89
        (AIHF, aihf, "adam_", 3 * 119 + 2, 120, r"net\..*"),  # the policy, in update 120
        (AIHF, torch.optim.Adam, "step", 8, 90, "objective"),
        (AIHF, torch.optim.Adam, "step", 9, 90, "reward"),
        (RLHF, rlhf, "adam_", 2 * 88 + 1, 90, "sac_losses"),
        (RLHF, rlhf, "adam_", 2 * 119 + 2, 120, r"net\..*"),
    ],
)
def test_not_finite(tmp_path, data, monkeypatch, script, owner, function, at, step, names):
    """The last checkpoint is from before a step of Adam that ended in nan."""
    original, calls = getattr(owner, function), []

    def spoiled(state, *args):  # all that SAC changes and the name of a network, or an optimiser
        original(state, *args)
        calls.append(1)
        if len(calls) == at:
            learned = state[args[0]].values() if args else state.param_groups[0]["params"]
            for parameter in learned:
                parameter.data.fill_(math.nan)

    monkeypatch.setattr(owner, function, spoiled)
    code, out, err = execute(script, tmp_path, data)
    ((name, at_step),) = re.findall(r"(?m)^error: (\S+) is not finite at step (\d+)", err)
    assert code == 1 and re.fullmatch(names, name) and int(at_step) == step
    state = load(tmp_path / "runs" / "run")
    kept = helpers.leaves([state["sac"], state["reward"]])
    assert all(value.isfinite().all() for value in kept.values())


def register(name, **attributes):
    def make(render_mode=None):
        robot = helpers.Drift()
        for attribute, value in attributes.items():
            setattr(robot, attribute, value)
        return robot

    limit = None if name == "Endless" else 12
    gym.register(f"{name}-v0", make, max_episode_steps=limit)


class Reuses(helpers.Drift):
    """Changes one array of observations in place."""

    def __init__(self):
        super().__init__()
        self.buffer = np.zeros(3)

    def reset(self, **options):
        self.buffer[:] = super().reset(**options)[0]
        return self.buffer, {}

    def step(self, action):
        self.buffer[:], *rest = super().step(action)
        return self.buffer, *rest


gym.register("Reuses-v0", Reuses, max_episode_steps=12)


@both
def test_rows_stay_where_a_robot_reuses_its_observations(tmp_path, data, plain, script):
    run(script, tmp_path, data, "--env", "Reuses-v0")
    assert_same_run(tmp_path / "runs" / "run", plain(script), without="args")


def rescaled():
    return gym.wrappers.RescaleAction(helpers.Drift(), np.float32(-1), np.float32(1))


gym.register("Rescaled-v0", rescaled, max_episode_steps=12)


@both
def test_actions_are_read_in_the_bounds_that_a_user_sees(tmp_path, data, monkeypatch, script):
    halves = Path(shutil.copytree(data, tmp_path / "halves"))
    for path in halves.glob("*.npz"):
        save_arrays(path, actions=np.load(path)["actions"] / 2)
    found, episodes = [], read.episodes
    monkeypatch.setattr(read, "episodes", lambda *x: found.append(episodes(*x)) or found[-1])
    run(script, tmp_path, halves, "--env", "Rescaled-v0")
    expected = np.load(halves / "high.npz")["actions"]
    np.testing.assert_allclose(found[0].actions, expected, atol=1e-6)


@both
def test_sac_gets_float32_from_any_reward(tmp_path, data, monkeypatch, script):
    """The compiled update has no guards: it would read the bytes of another type as float32."""
    make, forward, types = script.module.make_sac_update, script.module.Reward.forward, set()

    def spied(*args):
        update = make(*args)

        def spy(*inputs):
            types.update(x.dtype for x in inputs[1:])
            return update(*inputs)

        return spy

    monkeypatch.setattr(script.module, "make_sac_update", spied)
    monkeypatch.setattr(script.module.Reward, "forward", lambda *x: forward(*x).double())
    run(script, tmp_path, data)
    assert types == {torch.float32}


BOX = gym.spaces.Box
register("Half", action_space=BOX(np.zeros(2, np.float32), np.float32([1, np.inf])))
register("Dict", observation_space=gym.spaces.Dict(observation=BOX(-1, 1, (3,))))
register("Pixels", observation_space=BOX(0, 255, (8, 8, 3), np.uint8))
register("Discrete", action_space=gym.spaces.Discrete(3))
register("Whole", action_space=BOX(0, 10, (1,), np.int64))
register("Endless")

BAD = {  # flags, and what the message has to say
    "--env Pendulum-v1 --data-dir nowhere": "cannot read nowhere/high.npz",
    "--env NoSuchRobot-v4": "NoSuchRobot",
    "--env InvertedPendulum-v4": "another robot",
    "--data-dir nowhere": "data_gen/README.md has the format",
    "--segment-length 7": "--segment-length 7",
    "--runs-dir a_file": "a_file",
    "--gamma 1": "--gamma",
    "--tau 1.5": "--tau",
    "--reward-range 4 0": "--reward-range",
    "--reward-range 1 1": "--reward-range",
    "--reward-range 0 nan": "--reward-range",
    "--reward-range -inf 0": "--reward-range",
    "--threads 100000000000": "Overflow",
    "--total-timesteps 100000000000000": "allocate",
}
CASES = [(script, *case) for script in (AIHF, RLHF) for case in BAD.items()]
CASES += [  # make_env is the same in both
    (AIHF, f"--env {name}-v0 --env-id {name}-v0", f"{name}-v0 needs a time limit")
    for name in ("Half", "Dict", "Pixels", "Discrete", "Whole", "Endless")
]
CASES += [
    (AIHF, "--demo-weight 0 --preference-weight 0", "nothing to learn"),
    (AIHF, "--entropy-coefficient 0", "--entropy-coefficient"),
    (RLHF, "--held-out-share 1", "--held-out-share"),
]


@pytest.mark.parametrize("script, flags, fragment", CASES)
def test_bad_input(tmp_path, data, script, flags, fragment):
    """One line, exit code 2, and nothing written."""
    (tmp_path / "a_file").write_text("a file")
    assert_one_line_error(execute(script, tmp_path, data, *flags.split()), fragment)
    assert files(tmp_path) == {"a_file": b"a file"} and len(list(tmp_path.iterdir())) == 1


BAD_RUNS = {  # a change of its checkpoint, flags, and what the message has to say
    "another script's": (lambda s: s.update(script="x.py"), "", "no checkpoint of"),
    "without its replay": (lambda s: s.pop("replay"), "", "replay"),
    "without a network": (lambda s: s["reward"].clear(), "", "Reward"),
    "of a foreign argument": (lambda s: s["args"].update(x=1), "", "'x'"),
    "of other networks": (lambda s: None, "--hidden 9", "size"),
    "of more steps": (lambda s: None, "--total-timesteps 100", "more than --total-timesteps"),
    "of other data": (lambda s: s.update(data_hash="0"), "", "other data"),
}


@both
@pytest.mark.parametrize("change, flags, fragment", BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_run_folder(finished, script, change, flags, fragment):
    folder = finished(script)
    state = load(folder)
    change(state)
    torch.save(state, folder / "checkpoint.pt")
    (folder / "args.json").write_text(json.dumps(state["args"]))
    before = files(folder)
    for flag in ("--resume", "--evaluate"):
        result = carry_on(script, folder, *flags.split(), flag=flag)
        assert_one_line_error(result, fragment)
    assert files(folder) == before
