"""aihf_sac_mujoco.py as a user runs it: whole runs, kills and resumes, what training may not see, and every bad input.

python -m pytest tests/test_sac_mujoco_run.py

Runs last a few hundred steps. Most happen in this process, through runpy; kills and a few more are real processes.
"""

import contextlib
import copy
import csv
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tqdm import tqdm

import aihf_sac_mujoco as aihf

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "aihf_sac_mujoco.py"
ENV = "InvertedPendulum-v4"  # 4 observations, 1 action between -3 and 3
TIMES = ("charts/SPS", "charts/wall_seconds")
COLUMNS = [
    *("charts/iteration", "charts/sac_steps", "charts/env_steps", *TIMES, "charts/episode_length"),
    *("losses/q", "losses/policy", "losses/entropy", "losses/q_mean", "losses/beta"),
    *("reward/demonstrations", "reward/policy", "reward/gap", "reward/max"),
    *("reward/preference_accuracy", "reward/preference_loss"),
    *("eval/return_mean", "eval/return_std", "eval/length_mean", "eval/reward_correlation"),
]
FLAGS = {  # four iterations of 100 steps; evaluations after 2 and 4, checkpoints after 0, 2 and 4; 350 updates
    "--env": ENV,
    "--total-timesteps": 400,
    "--policy-steps-per-iteration": 100,
    "--learning-starts": 100,
    "--rollout-steps-per-iteration": 30,
    "--batch-size": 16,
    "--hidden": 8,
    "--reward-updates-per-iteration": 3,
    "--reward-learning-rate": 0.01,
    "--preference-batch-size": 8,
    "--penalty-batch-size": 16,
    "--segment-length": 4,
    "--eval-every": 2,
    "--eval-episodes": 2,
    "--checkpoint-every": 2,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's, on v4 environments


def make_data(folder: Path, seed: int, env_id: str = ENV, episodes: int = 6, pairs: int = 40) -> Path:
    """low, medium and high.npz of random policies, the weaker the better, and pairs.csv of segments of 4 steps."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    env = gym.make(env_id, max_episode_steps=25)
    lengths = {}
    for tier, strength in (("low", 0.5), ("medium", 0.3), ("high", 0.1)):
        arrays = {key: [] for key in ("observations", "actions", "rewards", "terminations", "truncations")}
        lengths[tier] = []
        for _ in range(episodes):
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
            arrays["observations"].append(obs)
            done, steps = False, 0
            while not done:
                action = strength * rng.uniform(env.action_space.low, env.action_space.high)
                obs, reward, terminated, truncated, _ = env.step(action)
                done, steps = terminated or truncated, steps + 1
                for key, value in zip(arrays, (obs, action, reward, terminated, truncated and not terminated)):
                    arrays[key].append(value)
            lengths[tier].append(steps)
        kinds = {"terminations": bool, "truncations": bool}
        np.savez(folder / f"{tier}.npz", **{k: np.array(v, kinds.get(k, np.float32)) for k, v in arrays.items()})
    lines = ["tier_a,episode_a,start_a,length_a,tier_b,episode_b,start_b,length_b,label"]
    for i in range(pairs):
        sides = []
        for tier in ("medium", "low"):
            episode = int(rng.integers(episodes))
            sides.append(f"{tier},{episode},{rng.integers(lengths[tier][episode] - 3)},4")
        lines.append(",".join([*(sides if i % 2 else sides[::-1]), str(i % 2)]))
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


def command(data: Path, runs: Path, *flags, **changes) -> list[str]:
    """Arguments of a tiny run named `run`; changes are flags by their Python names, and None leaves one out."""
    given = FLAGS | {"--data-dir": data, "--runs-dir": runs, "--run-name": "run"}
    given |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    pieces = []
    for flag, value in given.items():
        if isinstance(value, tuple):
            pieces += [flag, *map(str, value)]
        elif value is not None:
            pieces.append(f"{flag}={value}")  # = lets the value begin with -
    return [*pieces, "--no-cuda", *(() if "--compile" in flags else ("--no-compile",)), *map(str, flags)]


def execute(cwd: Path, argv: list, script: Path = SCRIPT) -> tuple[int, str, str]:
    """A script in this process, as `python script argv` from the folder cwd: (exit code, out, err)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, os.getcwd(), signal.getsignal(signal.SIGINT), torch.is_grad_enabled(), torch.get_num_threads()
    try:
        sys.argv = [str(script), *map(str, argv)]
        os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        for bar in list(
            getattr(tqdm, "_instances", ())
        ):  # of a run that did not end well; the next would print below it
            bar.close()
        sys.argv = before[0]
        os.chdir(before[1])
        signal.signal(signal.SIGINT, before[2])
        torch.set_grad_enabled(before[3])
        torch.set_num_threads(before[4])
    return code, out.getvalue(), err.getvalue()


def run(cwd: Path, data: Path, *flags, **changes) -> Path:
    """A tiny run that has to end well; returns its folder."""
    code, out, err = execute(cwd, command(data, cwd / "runs", *flags, **changes))
    assert code == 0, (out, err)
    return cwd / "runs" / "run"


def process(cwd: Path, argv: list) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=environment, capture_output=True, text=True)


def rows(folder: Path, without: str = "-") -> list[dict]:
    """metrics.csv as it reads, less the time columns and those that begin with `without`."""
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith(without)} for row in table]


def plain_values(value):
    """Tensors as their shape and bytes, so that == compares every bit and NaN equals NaN."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain_values(v) for key, v in value.items() if key not in ("wall_seconds", "csv_bytes")}
    return [plain_values(v) for v in value] if isinstance(value, (list, tuple)) else value


def checkpoint(folder: Path) -> dict:
    """checkpoint.pt for ==, less what depends on the clock."""
    return plain_values(torch.load(folder / "checkpoint.pt", weights_only=True))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_run(a: Path, b: Path, without: str = "-") -> None:
    assert rows(a, without) == rows(b, without)
    assert checkpoint(a) == checkpoint(b)


def assert_refused(result: tuple[int, str, str], *fragments: str) -> None:
    """Exit code 2 and one line on stderr that begins with error: and names what is wrong."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("WARNING")]  # MuJoCo's
    assert code == 2, (code, out, err)
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for fragment in fragments:
        assert fragment in lines[0], (fragment, lines[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "pendulum", seed=0)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "other", seed=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data) -> Path:
    """The folder of an undisturbed run; read only."""
    return run(tmp_path_factory.mktemp("plain"), data)


@pytest.fixture
def finished(plain, tmp_path) -> Path:
    """A copy of the undisturbed run, to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "finished"))


# ------------------------------------------------------------------------------------------------------- a whole run
def test_smoke_as_a_user(tmp_path, data):
    done = process(tmp_path, [SCRIPT, *command(data, Path("runs"), run_name=None, seed=3)])
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{ENV}__aihf_sac_mujoco__3__\d+", folder.name)
    assert "final true return" in done.stdout

    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 and list(table[0]) == COLUMNS
    for i, row in enumerate(table, start=1):
        assert (row["charts/iteration"], row["charts/sac_steps"]) == (str(i), str(100 * i))
        evaluated = {key for key in COLUMNS if key.startswith("eval/")} if i % 2 == 0 else set()
        assert {key for key in COLUMNS if row[key]} == {k for k in COLUMNS if not k.startswith("eval/")} | evaluated
        assert all(np.isfinite(float(v)) for k, v in row.items() if v and k != "eval/reward_correlation")
        assert int(row["charts/env_steps"]) - 100 * i >= 30 * i

    saved = json.loads((folder / "args.json").read_text())
    assert saved.pop("script") == "aihf_sac_mujoco"
    assert set(saved) == {field.name for field in fields(aihf.Args)}
    assert (saved["seed"], saved["total_timesteps"], saved["hidden"]) == (3, 400, [8])
    assert (saved["data_dir"], saved["gamma"], saved["compile"]) == (str(data), 0.99, False)

    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["sac_steps"] == len(state["replay"]) == 400
    assert state["progress"]["csv_bytes"] == (folder / "metrics.csv").stat().st_size
    assert (folder / "learning_curve.png").is_file() == bool(importlib.util.find_spec("matplotlib"))


def test_copied_alone_to_an_empty_folder(tmp_path, data):
    (tmp_path / "alone").mkdir()
    shutil.copy(SCRIPT, tmp_path / "alone")
    done = process(tmp_path / "alone", [SCRIPT.name, *command(data, Path("runs"), total_timesteps=100)])
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "alone" / "runs" / "run")) == 1


def test_embedded_data(tmp_path):
    """The default environment with its default data, found from the repository's root."""
    (tmp_path / "data_gen").symlink_to(ROOT / "data_gen")
    changes = {"env": None, "data_dir": None, "segment_length": 50, "total_timesteps": 60, "eval_episodes": 1}
    code, out, err = execute(tmp_path, command(Path(), tmp_path / "runs", **changes))
    assert code == 0, (out, err)
    (row,) = rows(tmp_path / "runs" / "run")
    assert row["charts/sac_steps"] == "60" and 0 <= float(row["reward/preference_accuracy"]) <= 1

    env = aihf.make_env("Hopper-v4")
    folder = ROOT / "data_gen/assets/mujoco/Hopper-v4"
    tiers = {tier: aihf.load_trajectories(folder / f"{tier}.npz", env, "") for tier in ("low", "medium", "high")}
    for tier in tiers.values():
        assert len(tier.obs) == len(tier.actions) == tier.lengths.sum() and tier.obs.shape[1] == 11
        assert np.abs(tier.actions).max() <= 1
    pairs = aihf.load_pairs(folder / "pairs.csv", tiers, 50, "")
    assert len(pairs) >= 100 and {side[0] for pair in pairs for side in pair} == {"medium", "low"}


def test_same_seed_same_run_and_another_seed_differs(tmp_path, data, plain):
    assert_same_run(run(tmp_path, data), plain)
    (tmp_path / "second").mkdir()
    second = run(tmp_path / "second", data, seed=2)
    assert rows(second) != rows(plain)
    assert checkpoint(second)["theta"] != checkpoint(plain)["theta"]


def test_no_tracking_unless_asked(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it would raise
    folder = run(tmp_path, data, total_timesteps=100)

    calls = []
    wandb = types.SimpleNamespace(init=lambda **k: calls.append(k), log=lambda row, step: calls.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    shutil.rmtree(folder)
    run(tmp_path, data, "--track", total_timesteps=200, wandb_project_name="there")
    settings, *logged = calls
    assert settings["project"] == "there" and settings["config"]["total_timesteps"] == 200
    assert [step for step, _ in logged] == [100, 200]
    for (_, logged_row), row in zip(logged, rows(folder)):
        assert {k: f"{v:.9g}" for k, v in logged_row.items() if k not in TIMES} == {k: v for k, v in row.items() if v}


@pytest.mark.parametrize("compiler", ["works", "raises"])
def test_compiling_changes_nothing(tmp_path, data, plain, monkeypatch, compiler):
    """Not even its warm-up on copies; and without a compiler the run is eager and says so."""

    def no_compiler(*args):
        raise RuntimeError("no C++ compiler\nat all")

    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compiled.append(f) or (f if compiler == "works" else no_compiler)
    )
    code, out, err = execute(tmp_path, command(data, tmp_path / "runs", "--compile"))
    assert code == 0 and len(compiled) == 1, err
    assert ("failed" in out and "no C++ compiler" in out and "at all" not in out) == (compiler == "raises")
    assert_same_run(tmp_path / "runs" / "run", plain)


# ------------------------------------------------------------------- what is stored, learned from, and hidden from it
class Recorder(gym.Wrapper):
    """Writes down every reset and step."""

    def __init__(self, env):
        super().__init__(env)
        self.events = []

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.events.append(("reset", obs.copy()))
        return obs, info

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.events.append(("step", np.array(action), obs.copy(), rest[1], rest[2]))
        return obs, *rest


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, data):
    """A run with episodes of at most 6 steps, a checkpoint at every iteration, and all it did written down."""
    make, save = gym.make, torch.save
    record = types.SimpleNamespace(envs=[], states=[], batches=[[]])  # batches: a list for each iteration

    def recording_make(*args, **kwargs):
        record.envs.append(Recorder(make(*args, **kwargs, max_episode_steps=6)))
        return record.envs[-1]

    def recording_compile(update, **kwargs):
        def recording_update(sac, *batch):
            fields = batch[-6:]  # obs, action, reward, next_obs, terminated, noise
            if fields[0].any():  # not the warm-up
                record.batches[-1].append([field.clone() for field in fields])
            return update(sac, *batch)

        return recording_update

    def recording_save(state, path):
        if record.states:
            record.batches.append([])
        record.states.append(copy.deepcopy(state))
        save(state, path)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gym, "make", recording_make)
        monkeypatch.setattr(torch, "compile", recording_compile)
        monkeypatch.setattr(torch, "save", recording_save)
        record.folder = run(tmp_path_factory.mktemp("recorded"), data, "--compile", checkpoint_every=1)
    assert len(record.states) == 5 and [len(batches) for batches in record.batches] == [50, 100, 100, 100, 0]
    record.training_env = max(record.envs, key=lambda env: len(env.events))
    return record


def test_everything_learned_moves(recorded):
    first, last = recorded.states[0], recorded.states[-1]
    before, after = aihf.SAC(*first["sac"]), aihf.SAC(*last["sac"])
    for name in ("actor", "critics", "targets", "log_beta"):
        assert not torch.equal(getattr(before, name), getattr(after, name)), name
    assert not torch.equal(before.critics[0], before.critics[1]) and not torch.equal(after.critics[0], after.critics[1])
    assert (after.actor != before.actor).float().mean() > 0.5 and (first["theta"] != last["theta"]).float().mean() > 0.5
    assert (before.updates.item(), after.updates.item()) == (0, 350)
    thetas = [state["theta"] for state in recorded.states]
    assert not any(torch.equal(a, b) for a, b in zip(thetas, thetas[1:]))


def training_steps(recorded) -> tuple[list, list]:
    """Of the environment's events, those that train SAC, as (obs, action, next_obs, terminated, truncated), and the
    numbers of steps that the rollouts in between took, both by the counts in metrics.csv."""
    sac_steps, env_steps = ([int(row[f"charts/{k}_steps"]) for row in rows(recorded.folder)] for k in ("sac", "env"))
    steps, obs = [], None
    for kind, *event in recorded.training_env.events:
        if kind == "step":
            action, next_obs, terminated, truncated = event
            steps.append((obs, action, next_obs, terminated, truncated))
        obs = event[0] if kind == "reset" else next_obs
    assert len(steps) == env_steps[-1]  # nothing uncounted, and evaluation is not among them
    training, rollouts, start, sac_before = [], [], 0, 0
    for sac, end in zip(sac_steps, env_steps):
        middle = start + sac - sac_before
        training += steps[start:middle]
        rollouts.append(steps[middle:end])
        start, sac_before = end, sac
    return training, rollouts


def test_steps_are_counted_and_rollouts_are_whole_episodes(recorded):
    training, rollouts = training_steps(recorded)
    assert len(training) == 400
    for rollout, row in zip(rollouts, rows(recorded.folder)):
        ends = [i for i, (*_, terminated, truncated) in enumerate(rollout) if terminated or truncated]
        assert ends[-1] == len(rollout) - 1 and len(rollout) >= 30
        assert len(rollout) == 30 or ends[-2] < 29  # the last one began before there were enough
        assert float(row["charts/episode_length"]) == pytest.approx(len(rollout) / len(ends), rel=1e-5)


def test_replay_at_time_limits_and_falls(recorded):
    training, _ = training_steps(recorded)
    replay = recorded.states[-1]["replay"].numpy()
    obs, action, next_obs, terminated = np.split(replay, [4, 5, 9], axis=1)
    np.testing.assert_allclose(obs, [step[0] for step in training], rtol=1e-6)
    np.testing.assert_allclose(3 * action, [step[1] for step in training], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(next_obs, [step[2] for step in training], rtol=1e-6)
    assert terminated[:, 0].tolist() == [float(step[3]) for step in training]

    falls = [i for i, step in enumerate(training[:-1]) if step[3]]
    time_limits = [i for i, step in enumerate(training[:-1]) if step[4] and not step[3]]
    assert len(falls) > 3 and len(time_limits) > 3
    for i in falls + time_limits:
        assert terminated[i, 0] == (i in falls)
        assert not np.allclose(next_obs[i], obs[i + 1], atol=1e-3)  # the last observation, not that of the reset
        assert np.abs(obs[i + 1]).max() <= 0.0101  # which is this close to upright and at rest


def test_rewards_are_those_of_the_current_theta(recorded, data):
    env = aihf.make_env(ENV)
    all_obs = np.concatenate(
        [aihf.load_trajectories(data / f"{t}.npz", env, "").obs for t in ("high", "medium", "low")]
    )

    def rewards(theta, obs, action):
        standard = ((obs.numpy() - all_obs.mean(0)) / (all_obs.std(0) + 1e-6)).clip(-10, 10)
        x = torch.cat([torch.from_numpy(standard), action], -1)
        return aihf.reward(theta, x, (5, 8, 1), 0.0, 4.0).detach()

    for iteration, batches in enumerate(recorded.batches[:4]):
        theta = recorded.states[iteration]["theta"]
        errors, old_errors = [], []
        for obs, action, reward, *_ in batches:
            errors.append((rewards(theta, obs, action) - reward).abs().max())
            old_errors += [
                (rewards(older["theta"], obs, action) - reward).abs().max() for older in recorded.states[:iteration]
            ]
        assert max(errors) < 1e-4
        assert not old_errors or min(old_errors) > 10 * max(errors)
        first = torch.stack([batch[0] for batch in batches]).reshape(-1, 1, 4)  # transitions of any age
        ages = (first == recorded.states[iteration + 1]["replay"][:, :4]).all(-1).float().argmax(-1) // 100
        assert set(ages.tolist()) == set(range(iteration + 1))


@pytest.mark.parametrize("lie", ["nan", "garbage"])
def test_training_cannot_see_the_true_reward(tmp_path, data, plain, monkeypatch, lie):
    make, rng = gym.make, np.random.default_rng(7)

    class Liar(gym.Wrapper):
        def step(self, action):
            obs, _, *rest = self.env.step(action)
            return obs, float("nan") if lie == "nan" else 1e6 * rng.standard_normal(), *rest

    monkeypatch.setattr(gym, "make", lambda *args, **kwargs: Liar(make(*args, **kwargs)))
    folder = run(tmp_path, data)
    assert_same_run(folder, plain, without="eval/")
    assert rows(folder)[-1]["eval/return_mean"] != rows(plain)[-1]["eval/return_mean"]  # the lie was told


def change_arrays(path: Path, **arrays) -> None:
    """Rewrite an episode file with these arrays in it, or without those that are None."""
    with np.load(path) as file:
        kept = {**file, **arrays}
    np.savez(path, **{key: value for key, value in kept.items() if value is not None})


def test_rewards_in_the_data_are_not_read(tmp_path, data, plain):
    shutil.copytree(data, tmp_path / "data")
    change_arrays(tmp_path / "data" / "high.npz", rewards=None)
    for tier in ("low", "medium"):
        change_arrays(tmp_path / "data" / f"{tier}.npz", rewards=np.full(3, np.nan))
    assert_same_run(run(tmp_path, tmp_path / "data"), plain)


@pytest.mark.parametrize(
    "flag, names", [("demo_weight", ["high.npz"]), ("preference_weight", ["low.npz", "medium.npz", "pairs.csv"])]
)
def test_weight_zero_needs_no_data(tmp_path, data, other_data, flag, names):
    """Demonstrations, or preferences, of weight 0 may be others or none at all; of weight 1 they count."""
    folders = {}
    for kind in ("given", "others", "absent", "given, weight 1", "others, weight 1"):
        shutil.copytree(data, tmp_path / kind / "data")
        for name in names if kind[:5] != "given" else []:
            (tmp_path / kind / "data" / name).unlink()
            if kind[:6] == "others":
                shutil.copy(other_data / name, tmp_path / kind / "data" / name)
        weight = 1 if kind[-1] == "1" else 0
        folders[kind] = run(tmp_path / kind, tmp_path / kind / "data", total_timesteps=200, **{flag: weight})
    assert_same_run(folders["others"], folders["given"])
    assert_same_run(folders["absent"], folders["given"])
    assert {
        row["reward/gap" if flag == "demo_weight" else "reward/preference_loss"] for row in rows(folders["given"])
    } == {""}
    assert checkpoint(folders["given, weight 1"])["theta"] != checkpoint(folders["others, weight 1"])["theta"]
    assert checkpoint(folders["given, weight 1"])["theta"] != checkpoint(folders["given"])["theta"]


# --------------------------------------------------------------------------------------------- kill, resume, evaluate
# Runs the script with this process ending, or interrupting, itself at one exact moment.
DRIVER = """
import io, os, runpy, signal, sys
import torch
script, moment, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.argv[0] = script
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
calls = dict.fromkeys(["update", "save", "replace", "reward"], 0)
save, replace, reward_step = torch.save, os.replace, torch.optim.Adam.step

def counted(name, stop_at, do):
    calls[name] += 1
    if moment.startswith(name) and calls[name] == stop_at:
        do()

def compile(update, **kwargs):  # calls to the update, the first of them the warm-up
    at, do = (300, kill) if moment == "update" else (230, lambda: os.kill(os.getpid(), signal.SIGINT))
    return lambda *args: (counted("update", at, do), update(*args))[1]

def half_save(state, path):
    def half():
        whole = io.BytesIO()
        save(state, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        kill()
    counted("save", 3, half)
    save(state, path)

def replace_then(a, b):
    replace(a, b)
    if str(b).endswith("checkpoint.pt"):
        counted("replace", 2, kill)

def step(self, *args, **kwargs):
    counted("reward", 5, kill)
    return reward_step(self, *args, **kwargs)

torch.compile, torch.save, os.replace, torch.optim.Adam.step = compile, half_save, replace_then, step
runpy.run_path(script, run_name="__main__")
"""


def drive(moment: str, cwd: Path, data: Path) -> tuple[subprocess.CompletedProcess, Path]:
    (cwd / "driver.py").write_text(DRIVER)
    done = process(cwd, ["driver.py", SCRIPT, moment, *command(data, cwd / "runs", "--compile")])
    return done, cwd / "runs" / "run"


@pytest.mark.parametrize(
    "moment, rows_then",
    [
        ("update", 3),  # inside iteration 4, with a row of iteration 3 that is younger than the checkpoint
        ("save", 4),  # half of the last checkpoint on disk
        ("replace", 2),  # right after the second checkpoint took the first one's place
        ("reward", 1),  # in the upper level of iteration 2, with the checkpoint of iteration 0
    ],
)
def test_kill_and_resume(tmp_path, data, plain, moment, rows_then):
    done, folder = drive(moment, tmp_path, data)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(rows(folder)) == rows_then
    code, out, err = execute(tmp_path, ["--resume", folder, "--no-compile"])
    assert code == 0, (out, err)
    assert_same_run(folder, plain)
    left_over = {path.name for path in folder.iterdir()} - {path.name for path in plain.iterdir()}
    assert not left_over


def test_kill_while_metrics_grow_and_resume_twice(tmp_path, data):
    """The kill comes from outside, when the first row is seen; so does the second, of the resumed run."""
    changes = {"total_timesteps": 1000, "checkpoint_every": 1, "eval_every": 5}
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", data, **changes)
    folder, seen = tmp_path / "runs" / "run", 1
    argv = [SCRIPT, *command(data, tmp_path / "runs", **changes)]
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, *map(str, argv)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while child.poll() is None:
            if (folder / "checkpoint.pt").exists() and (folder / "metrics.csv").read_bytes().count(b"\n") > seen:
                child.kill()
                break
        assert child.wait() in (-signal.SIGKILL, 0)  # 0: it was done before the kill
        argv, seen = [SCRIPT, "--resume", folder], len(rows(folder)) + 1
    assert execute(tmp_path, ["--resume", folder])[0] == 0
    assert_same_run(folder, whole)


def test_interrupt_saves_and_resumes(tmp_path, data, plain):
    done, folder = drive("update, then Ctrl-C", tmp_path, data)
    assert done.returncode == 130, done.stderr
    assert len(rows(folder)) == torch.load(folder / "checkpoint.pt")["progress"]["iteration"] == 3
    assert f"--resume {folder}" in done.stdout
    code, out, err = execute(tmp_path, ["--resume", folder, "--no-compile"])
    assert code == 0, (out, err)
    assert_same_run(folder, plain)


def test_second_interrupt_stops_at_once(tmp_path, data, plain, monkeypatch):
    calls = []

    def compile(update, **kwargs):
        def interrupted_update(*args):
            calls.append(None)
            if len(calls) in (230, 240):
                signal.raise_signal(signal.SIGINT)
            return update(*args)

        return interrupted_update

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", compile)
        with pytest.raises(KeyboardInterrupt):
            execute(tmp_path, command(data, tmp_path / "runs", "--compile"))
    folder = tmp_path / "runs" / "run"
    assert len(calls) == 240 and len(rows(folder)) == 2
    assert execute(tmp_path, ["--resume", folder, "--no-compile"])[0] == 0
    assert_same_run(folder, plain)


def test_resuming_a_finished_run_changes_nothing(tmp_path, finished):
    before = files(finished)
    code, out, err = execute(tmp_path, ["--resume", finished])
    after = files(finished)
    assert code == 0, (out, err)
    assert before.pop("learning_curve.png", b"")[:8] == after.pop("learning_curve.png", b"")[:8]
    assert after == before
    true_return = float(rows(finished)[-1]["eval/return_mean"])
    assert f"final true return {true_return:.0f}" in out  # it has been evaluated, and nothing is trained


def test_resuming_with_more_steps_goes_on(tmp_path, finished, plain):
    code, out, err = execute(tmp_path, ["--resume", finished, "--total-timesteps", 500])
    assert code == 0, (out, err)
    assert rows(finished)[:4] == rows(plain) and rows(finished)[4]["charts/sac_steps"] == "500"
    assert len(torch.load(finished / "checkpoint.pt")["replay"]) == 500


def test_evaluate_prints_the_true_return(tmp_path, finished):
    before = files(finished)
    code, out, err = execute(tmp_path, ["--evaluate", finished])
    assert code == 0, (out, err)
    assert files(finished) == before

    state = torch.load(finished / "checkpoint.pt")
    actor = aihf.SAC(*state["sac"]).actor.detach()
    env, returns = gym.make(ENV), []
    for episode in range(2):
        obs, _ = env.reset(seed=10_000 + episode)
        total, done = 0.0, False
        while not done:
            mean = aihf.mlp(actor, torch.from_numpy(obs).float()[None], (4, 8, 2)).detach().numpy()[0, :1]
            obs, reward, terminated, truncated, _ = env.step(3 * np.tanh(mean))
            total, done = total + reward, terminated or truncated
        returns.append(total)
    assert f"true return {np.mean(returns):.0f} ± {np.std(returns):.0f}" in out
    assert float(rows(finished)[-1]["eval/return_mean"]) == pytest.approx(np.mean(returns))


@pytest.mark.parametrize(
    "flag, value",
    [
        *(("--seed", 9), ("--gamma", 0.5), ("--hidden", 16), ("--env", "Hopper-v4"), ("--data-dir", "elsewhere")),
        *(("--demo-weight", 2), ("--return-form", "sum"), ("--learning-rate", 0.1), ("--run-name", "other")),
    ],
)
def test_a_run_keeps_its_arguments(tmp_path, plain, flag, value):
    before = files(plain)
    assert_refused(execute(tmp_path, ["--resume", plain, flag, value]), flag)
    assert files(plain) == before


# ------------------------------------------------------------------------------------------------------- not a number
def spoil(monkeypatch, spoil_at: int, how) -> None:
    """The SAC update number spoil_at returns how(sac, losses) for its losses."""
    calls = []

    def compile(update, **kwargs):
        def spoiled_update(sac, *batch):
            losses = update(sac, *batch)
            calls.append(None)
            return how(sac, losses) if len(calls) - 1 == spoil_at else losses  # the first call is the warm-up

        return spoiled_update

    monkeypatch.setattr(torch, "compile", compile)


def nan_loss(sac, losses):
    return losses * float("nan")


def nan_critics(sac, losses):
    sac.critics.fill_(float("nan"))
    return losses


def nan_actor(sac, losses):
    sac.actor.fill_(float("nan"))
    return losses


NOT_FINITE = r"error: (\w+) is not finite at step (\d+)"


# Updates 151 to 250 are those of iteration 3, at steps 201 to 300; a block of 50 ends at update 200, step 250.
@pytest.mark.parametrize(
    "how, spoil_at, step, names",
    [
        (nan_loss, 200, 250, "sac_losses"),
        (nan_critics, 170, 250, "sac_losses|critics"),
        (nan_actor, 230, 300, "sac_losses|actor"),
        (nan_critics, 350, 400, "critics"),
        (nan_actor, 350, 400, r"\w+"),
    ],
    ids=["loss", "critics", "actor", "critics at the very last update", "actor at the very last update"],
)
def test_not_finite_sac(tmp_path, data, monkeypatch, how, spoil_at, step, names):
    spoil(monkeypatch, spoil_at, how)
    code, out, err = execute(tmp_path, command(data, tmp_path / "runs", "--compile"))
    assert code == 1, (out, err)
    ((name, at_step),) = re.findall(NOT_FINITE, err)
    assert re.fullmatch(names, name) and int(at_step) == step
    folder = tmp_path / "runs" / "run"
    state = torch.load(folder / "checkpoint.pt")
    assert state["progress"]["iteration"] == 2 and all(tensor.isfinite().all() for tensor in state["sac"])
    monkeypatch.undo()
    assert execute(tmp_path, ["--resume", folder, "--no-compile"])[0] == 0  # and it can go on from there


@pytest.mark.parametrize("spoil_at, name", [(2, "reward_gradient"), (3, "theta")])
def test_not_finite_reward(tmp_path, data, monkeypatch, spoil_at, name):
    calls, adam_step = [], torch.optim.Adam.step

    def spoiled_step(self, *args):
        adam_step(self, *args)
        calls.append(None)
        if len(calls) == spoil_at:  # of the three in an iteration
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", spoiled_step)
    code, out, err = execute(tmp_path, command(data, tmp_path / "runs"))
    assert code == 1, (out, err)
    assert re.findall(NOT_FINITE, err) == [(name, "100")]
    state = torch.load(tmp_path / "runs" / "run" / "checkpoint.pt")
    assert state["progress"]["iteration"] == 0 and state["theta"].isfinite().all()


def test_not_finite_error_has_a_line_of_its_own(tmp_path, data, monkeypatch):
    """Not one that a progress bar has begun."""
    spoil(monkeypatch, 200, nan_loss)
    _, _, err = execute(tmp_path, command(data, tmp_path / "runs", "--compile"))
    assert any(line.startswith("error: ") for line in re.split("[\r\n]", err)), err


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"env": "NoSuchRobot-v4"}, "NoSuchRobot-v4"),
        ({"env": "no spaces please"}, "no spaces please"),
        ({"env": "Hopper-v3"}, "Hopper-v3"),
        ({"env": "nosuchmodule:Hopper-v4"}, "nosuchmodule"),
        ({"env": "CartPole-v1"}, "CartPole-v1"),
        ({"env": "Pendulum-v1"}, "Pendulum-v1"),
        ({"data_dir": "nowhere"}, f"python data_gen/mujoco_data.py --env {ENV}"),
        ({"env": "Hopper-v4"}, "Hopper-v4"),  # with the pendulum's data
        ({"segment_length": 5}, "--segment-length"),  # than which the pairs' 4 steps are shorter
        ({"demo_weight": 0, "preference_weight": 0}, "--demo-weight"),
        ({"gamma": 1}, "--gamma"),
        ({"gamma": 1.5}, "--gamma"),
        ({"tau": 1.5}, "--tau"),
        ({"reward_range": (4, 0)}, "--reward-range"),
        ({"reward_range": (1, 1)}, "--reward-range"),
        ({"reward_range": (0, "nan")}, "--reward-range"),
        ({"reward_range": (0, "inf")}, "--reward-range"),
        ({"hidden": 0}, "--hidden"),
        ({"hidden": -8}, "--hidden"),
        ({"entropy_coefficient": "0"}, "--entropy-coefficient"),
        ({"entropy_coefficient": "-1"}, "--entropy-coefficient"),
        ({"entropy_coefficient": "nan"}, "--entropy-coefficient"),
        ({"entropy_coefficient": "inf"}, "--entropy-coefficient"),
        ({"entropy_coefficient": "automatic"}, "--entropy-coefficient"),
        ({"entropy_coefficient": ""}, "--entropy-coefficient"),
        ({"total_timesteps": 0}, "--total-timesteps"),
        ({"seed": -1}, "--seed"),
        ({"learning_rate": "nan"}, "--learning-rate"),
        ({"total_timesteps": 10**14}, "--total-timesteps"),  # a replay buffer larger than any memory
        ({"total_timesteps": "9" * 400}, "--total-timesteps"),  # no float is that large
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_arguments(tmp_path, data, changes, fragment):
    assert_refused(execute(tmp_path, command(data, tmp_path / "runs", **changes)), fragment)
    assert not (tmp_path / "runs").exists()


GOOD = aihf.Args(total_timesteps=400, data_dir="x", run_name="x", reward_range=(0.0, 4.0))
NUMBERS = {f.name for f in fields(GOOD) if type(getattr(GOOD, f.name)) in (int, float)}
FRACTIONS = {f.name for f in fields(GOOD) if type(getattr(GOOD, f.name)) is float}
ZERO_IS_FINE = {"seed", "demo_weight", "preference_weight", "gradient_penalty"}


def test_good_arguments_pass():
    aihf.check_args(GOOD)
    for name in ZERO_IS_FINE:
        aihf.check_args(replace(GOOD, **{name: 0}))
    for coefficient in ("0.2", "1e-3", "auto"):
        aihf.check_args(replace(GOOD, entropy_coefficient=coefficient))
    assert len(NUMBERS) > 20 and len(FRACTIONS) > 5


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, value) for name in sorted(NUMBERS) for value in (-1, *(() if name in ZERO_IS_FINE else (0,)))),
        *((name, value) for name in sorted(FRACTIONS) for value in (-0.5, float("nan"), float("inf"), -float("inf"))),
    ],
)
def test_numbers_that_make_no_sense(capsys, name, value):
    with pytest.raises(SystemExit) as stop:
        aihf.check_args(replace(GOOD, **{name: value}))
    captured = capsys.readouterr()
    assert_refused((stop.value.code, captured.out, captured.err), f"--{name.replace('_', '-')}")


def damage(path: Path, start: float, length: int) -> None:
    """Turn the bits of some bytes around, from a share of the file on."""
    raw = bytearray(path.read_bytes())
    for i in range(int(start * len(raw)), min(int(start * len(raw)) + length, len(raw))):
        raw[i] ^= 0xFF
    path.write_bytes(bytes(raw))


def broken_stream(path: Path) -> None:
    """A compressed array whose very first bytes are none that a compressor writes."""
    with np.load(path) as file:
        np.savez_compressed(path, **file)
    raw = bytearray(path.read_bytes())
    name, extra = (int.from_bytes(raw[i : i + 2], "little") for i in (26, 28))  # of the first member's header
    raw[30 + name + extra] = 0xFF
    path.write_bytes(bytes(raw))


def with_value(array: np.ndarray, row: int, value: float) -> np.ndarray:
    array = array.astype(np.float64)
    array[row, 0] = value
    return array


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


BAD_EPISODES = {  # id: (what is done to high.npz, what the message has to say)
    "missing": (lambda p: p.unlink(), f"data_gen/mujoco_data.py --env {ENV}"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "high.npz"),
    "no byte": (lambda p: p.write_bytes(b""), "high.npz"),
    "a text": (lambda p: p.write_text("hello"), "high.npz"),
    "a single array": (lambda p: np.save(p.open("wb"), np.zeros(3)), "high.npz"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-500]), "high.npz"),
    "cut off early": (lambda p: p.write_bytes(p.read_bytes()[:100]), "high.npz"),
    "bits turned": (lambda p: damage(p, 0.3, 50), "high.npz"),
    "broken stream": (broken_stream, "high.npz"),
    "no observations": (lambda p: change_arrays(p, observations=None), "observations"),
    "no actions": (lambda p: change_arrays(p, actions=None), "actions"),
    "no terminations": (lambda p: change_arrays(p, terminations=None), "terminations"),
    "no truncations": (lambda p: change_arrays(p, truncations=None), "truncations"),
    "no step": (lambda p: change_arrays(p, **{key: array[:0] for key, array in arrays_of(p).items()}), "empty"),
    "objects": (lambda p: change_arrays(p, actions=np.array([[None]] * 9, object)), "high.npz"),
    "strings": (lambda p: change_arrays(p, actions=np.full(arrays_of(p)["actions"].shape, "a")), "high.npz"),
    "wide observations": (lambda p: change_arrays(p, observations=np.zeros((9, 5))), "does not fit"),
    "flat observations": (lambda p: change_arrays(p, observations=np.zeros(9)), "does not fit"),
    "flat actions": (lambda p: change_arrays(p, actions=arrays_of(p)["actions"][:, 0]), "does not fit"),
    "wide actions": (lambda p: change_arrays(p, actions=np.tile(arrays_of(p)["actions"], 2)), "does not fit"),
    "an action too few": (lambda p: change_arrays(p, actions=arrays_of(p)["actions"][1:]), "does not fit"),
    "an observation too few": (lambda p: change_arrays(p, observations=arrays_of(p)["observations"][1:]), "add up"),
    "an observation too many": (
        lambda p: change_arrays(p, observations=np.tile(arrays_of(p)["observations"], (2, 1))),
        "add up",
    ),
    "no end flag": (
        lambda p: change_arrays(p, **{k: np.zeros_like(arrays_of(p)[k]) for k in ("terminations", "truncations")}),
        "add up",
    ),
    "no end flag on the last step": (
        lambda p: change_arrays(p, **{k: np.roll(arrays_of(p)[k], 1) for k in ("terminations", "truncations")}),
        "add up",
    ),
    "flags of other lengths": (lambda p: change_arrays(p, truncations=np.zeros(3, bool)), "high.npz"),
    "one flag": (lambda p: change_arrays(p, terminations=np.array(True), truncations=np.array(True)), "high.npz"),
    "flags in a column": (lambda p: change_arrays(p, truncations=arrays_of(p)["truncations"][:, None]), "high.npz"),
    "nan observation": (
        lambda p: change_arrays(p, observations=with_value(arrays_of(p)["observations"], 7, np.nan)),
        "observations holds NaN or infinity in row 7",
    ),
    "infinite observation": (
        lambda p: change_arrays(p, observations=with_value(arrays_of(p)["observations"], 8, -np.inf)),
        "in row 8",
    ),
    "nan action": (
        lambda p: change_arrays(p, actions=with_value(arrays_of(p)["actions"], 5, np.nan)),
        "actions holds NaN or infinity in row 5",
    ),
    "infinite action": (lambda p: change_arrays(p, actions=with_value(arrays_of(p)["actions"], 6, np.inf)), "row 6"),
    "infinite as float32": (
        lambda p: change_arrays(p, observations=with_value(arrays_of(p)["observations"], 4, 1e300)),
        "row 4",
    ),
}


@pytest.mark.parametrize("spoil_file, fragment", BAD_EPISODES.values(), ids=BAD_EPISODES)
def test_bad_episode_file(tmp_path, data, pendulum, capsys, spoil_file, fragment):
    path = Path(shutil.copy(data / "high.npz", tmp_path))
    spoil_file(path)
    with pytest.raises(SystemExit) as stop:
        aihf.load_trajectories(path, pendulum, f"python data_gen/mujoco_data.py --env {ENV}")
    captured = capsys.readouterr()
    assert_refused((stop.value.code, captured.out, captured.err), "high.npz", fragment)


HEADER = "tier_a,episode_a,start_a,length_a,tier_b,episode_b,start_b,length_b,label\n"
BAD_PAIRS = {  # id: (pairs.csv, what the message has to say)
    "missing": (None, f"data_gen/mujoco_data.py --env {ENV}"),
    "no byte": ("", "empty"),
    "no pair": (HEADER, "empty"),
    "no such tier": (HEADER + "best,0,0,4,low,0,0,4,1\n", "line 2"),
    "no such episode": (HEADER + "medium,0,0,4,low,0,0,4,1\nmedium,6,0,4,low,0,0,4,1\n", "line 3"),
    "episode below 0": (HEADER + "medium,-1,0,4,low,0,0,4,1\n", "line 2"),
    "start below 0": (HEADER + "medium,0,-1,4,low,0,0,4,1\n", "line 2"),
    "starts too late": (HEADER + "medium,0,900,4,low,0,0,4,1\n", "line 2"),
    "longer than the episode": (HEADER + "medium,0,0,4,low,0,0,400,1\n", "line 2"),
    "shorter than --segment-length": (HEADER + "medium,0,0,4,low,0,0,3,1\n", "--segment-length"),
    "length below 0": (HEADER + "medium,0,0,4,low,0,0,-4,1\n", "line 2"),
    "label 2": (HEADER + "medium,0,0,4,low,0,0,4,2\n", "label"),
    "label 0.5": (HEADER + "medium,0,0,4,low,0,0,4,0.5\n", "label"),
    "no label": (HEADER + "medium,0,0,4,low,0,0,4\n", "label"),
    "no label column": (HEADER.replace(",label", "") + "medium,0,0,4,low,0,0,4\n", "label"),
    "no start column": (HEADER.replace("start_b,", "") + "medium,0,0,4,low,0,4,1\n", "start_b"),
    "a word": (HEADER + "medium,zero,0,4,low,0,0,4,1\n", "pairs.csv"),
    "half a line": (HEADER + "medium,0,0\n", "pairs.csv"),
    "not a text": (HEADER.encode() + b"\xff\xfe\xfa", "pairs.csv"),
    "a field without an end": (HEADER + 200_000 * "m" + ",0,0,4,low,0,0,4,1\n", "pairs.csv"),
}


@pytest.fixture(scope="module")
def pendulum() -> gym.Env:
    return aihf.make_env(ENV)


@pytest.fixture(scope="module")
def tiers(data, pendulum) -> dict:
    return {tier: aihf.load_trajectories(data / f"{tier}.npz", pendulum, "") for tier in ("high", "medium", "low")}


@pytest.mark.parametrize("text, fragment", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs_file(tmp_path, tiers, capsys, text, fragment):
    path = tmp_path / "pairs.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stop:
        aihf.load_pairs(path, tiers, 4, f"python data_gen/mujoco_data.py --env {ENV}")
    captured = capsys.readouterr()
    assert_refused((stop.value.code, captured.out, captured.err), "pairs.csv", fragment)


def test_good_pairs_file(data, tiers):
    """What the bad ones above are made from is accepted, and label 0 prefers b."""
    pairs = aihf.load_pairs(data / "pairs.csv", tiers, 4, "")
    assert len(pairs) == 40 and {(a[0], b[0]) for a, b in pairs} == {("medium", "low")}


@pytest.mark.parametrize("name, cut", [("medium.npz", 300), ("pairs.csv", 3)])
def test_bad_data_leaves_no_run_folder(tmp_path, data, name, cut):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / name
    path.write_bytes(path.read_bytes()[:-cut])
    assert_refused(execute(tmp_path, command(tmp_path / "data", tmp_path / "runs")), name)
    assert not (tmp_path / "runs").exists()


def test_runs_dir_is_a_file(tmp_path, data):
    (tmp_path / "runs").write_text("a file")
    assert_refused(execute(tmp_path, command(data, tmp_path / "runs")), "runs")
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_runs_dir_is_read_only(tmp_path, data):
    (tmp_path / "runs").mkdir(mode=0o500)
    assert_refused(execute(tmp_path, command(data, tmp_path / "runs")), "--runs-dir")
    assert not list((tmp_path / "runs").iterdir())


def test_run_name_is_taken(tmp_path, data, finished):
    before = files(finished)
    result = execute(tmp_path, command(data, finished.parent, run_name=finished.name))
    assert_refused(result, f"--resume {finished}", "--run-name")
    assert files(finished) == before


def test_tracking_without_wandb(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it would raise
    assert_refused(execute(tmp_path, command(data, tmp_path / "runs", "--track")), "wandb")
    assert not (tmp_path / "runs").exists()


def test_resume_and_evaluate_at_once(tmp_path, finished):
    assert_refused(execute(tmp_path, ["--resume", finished, "--evaluate", finished]), "--resume", "--evaluate")


def test_pairs_that_are_no_file(tmp_path, data):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "pairs.csv").write_bytes(b"\xff\xfe\x00")  # no UTF-8
    assert_refused(execute(tmp_path, command(tmp_path / "data", tmp_path / "runs")), "pairs.csv")
    assert not (tmp_path / "runs").exists()


def test_video_without_moviepy(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert_refused(execute(tmp_path, command(data, tmp_path / "runs", "--capture-video")), ".[video]")
    assert not (tmp_path / "runs").exists()


def set_argument(folder: Path, **changes) -> None:
    saved = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**saved, **changes}))


def change_state(folder: Path, change) -> None:
    state = torch.load(folder / "checkpoint.pt")
    change(state)
    torch.save(state, folder / "checkpoint.pt")


BAD_RUNS = {  # id: (what is done to the run folder, what the message has to say)
    "no folder": (lambda f: shutil.rmtree(f), "args.json"),
    "no args.json": (lambda f: (f / "args.json").unlink(), "args.json"),
    "args.json of another script": (lambda f: set_argument(f, script="aihf_pythia"), "args.json"),
    "args.json with a foreign argument": (lambda f: set_argument(f, num_envs=4), "args.json"),
    "args.json is a list": (lambda f: (f / "args.json").write_text("[1, 2]"), "args.json"),
    "args.json is cut off": (lambda f: (f / "args.json").write_text('{"script": "aihf'), "args.json"),
    "other networks": (lambda f: set_argument(f, hidden=[16]), "checkpoint.pt"),
    "no checkpoint": (lambda f: (f / "checkpoint.pt").unlink(), "checkpoint.pt"),
    "empty checkpoint": (lambda f: (f / "checkpoint.pt").write_bytes(b""), "checkpoint.pt"),
    "cut-off checkpoint": (
        lambda f: (f / "checkpoint.pt").write_bytes((f / "checkpoint.pt").read_bytes()[:-3000]),
        "checkpoint.pt",
    ),
    "text for a checkpoint": (lambda f: (f / "checkpoint.pt").write_text("hello"), "checkpoint.pt"),
    "another checkpoint": (lambda f: torch.save({"model": torch.zeros(3)}, f / "checkpoint.pt"), "checkpoint.pt"),
    "checkpoint without its replay": (lambda f: change_state(f, lambda state: state.pop("replay")), "checkpoint.pt"),
}


@pytest.mark.parametrize("spoil_run, fragment", BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_run_folder(tmp_path, finished, spoil_run, fragment):
    spoil_run(finished)
    before = files(finished) if finished.exists() else None
    assert_refused(execute(tmp_path, ["--resume", finished]), fragment)
    assert (files(finished) if finished.exists() else None) == before


def test_evaluate_what_is_not_there(tmp_path, finished):
    assert_refused(execute(tmp_path, ["--evaluate", tmp_path / "nowhere"]), "args.json")
    (finished / "checkpoint.pt").unlink()
    assert_refused(execute(tmp_path, ["--evaluate", finished]), "checkpoint.pt")


def test_resume_without_metrics(tmp_path, finished):
    (finished / "metrics.csv").unlink()
    assert_refused(execute(tmp_path, ["--resume", finished]), "metrics.csv")
    assert not (finished / "metrics.csv").exists()


def test_resume_with_fewer_steps_than_there_are(tmp_path, finished):
    before = files(finished)
    assert_refused(execute(tmp_path, ["--resume", finished, "--total-timesteps", 300]), "--total-timesteps")
    assert files(finished) == before


def flip_labels(folder: Path) -> None:
    lines = (folder / "pairs.csv").read_text().splitlines()
    flipped = [f"{line[:-1]}{1 - int(line[-1])}" for line in lines[1:]]
    (folder / "pairs.csv").write_text("\n".join([lines[0], *flipped]) + "\n")


CHANGED_DATA = {
    "observations": lambda d: change_arrays(
        d / "low.npz", observations=1.01 * arrays_of(d / "low.npz")["observations"]
    ),
    "actions": lambda d: change_arrays(d / "high.npz", actions=0.9 * arrays_of(d / "high.npz")["actions"]),
    "labels": flip_labels,
}


@pytest.mark.parametrize("change", CHANGED_DATA.values(), ids=CHANGED_DATA)
def test_data_changed_since(tmp_path, data, change):
    shutil.copytree(data, tmp_path / "data")
    folder = run(tmp_path, tmp_path / "data", total_timesteps=100)
    before = files(folder)
    change(tmp_path / "data")
    assert_refused(execute(tmp_path, ["--resume", folder]), "data")
    assert files(folder) == before


@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"env": "NoSuchRobot-v4"}, "NoSuchRobot-v4"),
        ({"data_dir": "nowhere"}, f"python data_gen/mujoco_data.py --env {ENV}"),
    ],
    ids=["environment", "data"],
)
def test_bad_input_at_the_real_command_line(tmp_path, data, changes, fragment):
    done = process(tmp_path, [SCRIPT, *command(data, Path("runs"), **changes)])
    assert_refused((done.returncode, done.stdout, done.stderr), fragment)
    assert not done.stdout and not list(tmp_path.iterdir())
