"""What the tests of several scripts share: running them, killing them, comparing what they wrote.

run_script, run_process       a script in this process, or in a process of its own
killed_at                     a process that ends at an exact moment of its work
assert_one_line_error         bad input: one line on stderr, exit code 2
compare_checkpoints           names of the tensors in which two checkpoints differ
assert_same_run               two runs ended with the same bits
Drift                         a toy robot, env id helpers:Drift-v0; make_robot_data plays it
"""

import contextlib
import copy
import csv
import fcntl
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco import MujocoEnv
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
CLOCK = ("charts/SPS", "charts/wall_seconds")  # metrics that no two runs share


# -------------------------------------------------------------------------------- running a script
def run_script(script: Path | ModuleType, argv: list, cwd: Path) -> tuple[int, str, str]:
    """`python script argv` in the folder cwd but in this process: (exit code, stdout, stderr).

    An imported module's main() is called instead, so that a test may patch its names. Whatever
    else it raises goes on. The run's lock, signal handlers and excepthook are given
    back.
    """
    out, err, code, locks = io.StringIO(), io.StringIO(), 0, []
    flock, folder, excepthook = fcntl.flock, os.getcwd(), sys.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, name = torch.get_num_threads(), getattr(script, "__file__", str(script))

    def recording_flock(lock, operation):
        locks.append(lock)
        flock(lock, operation)

    try:
        os.chdir(cwd)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(sys, "argv", [name, *map(str, argv)]))
            stack.enter_context(mock.patch.object(fcntl, "flock", recording_flock))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            if isinstance(script, ModuleType):
                script.main()
            else:
                runpy.run_path(name, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            err.write(code + "\n")
            code = 1
    finally:
        for lock in locks:
            os.close(lock)
        for bar in list(getattr(tqdm, "_instances", ())):  # of a run that did not end well
            bar.close()
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.excepthook = excepthook
        torch.set_num_threads(threads)
    return code, out.getvalue(), err.getvalue()


def start_process(argv: list, cwd: Path, **environment: str) -> subprocess.Popen:
    """`python argv` in the folder cwd, able to import helpers (for its robot) but nothing else."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, env=environment, **pipes)


def run_process(argv: list, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """The same to its end: (exit code, stdout, stderr); a signal gives minus its number."""
    process = start_process(argv, cwd, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


DRIVER = """
import os, pkgutil, runpy, sys
script, function, call, number = sys.argv[1:5]
sys.path.insert(0, os.path.dirname(script))
owner, _, name = function.rpartition(".")
owner, calls = pkgutil.resolve_name(owner), 0
original = getattr(owner, name)
def counting(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(call) and os.environ.get("RANK") == os.environ.get("DIES"):  # none: one process
        os.kill(os.getpid(), int(number))
    return original(*args, **kwargs)
setattr(owner, name, counting)
sys.argv = [script, *sys.argv[5:]]
runpy.run_path(script, run_name="__main__")
"""


def killed_at(
    function: str, call: int, script: Path, argv: list, cwd: Path, by: int = signal.SIGKILL
) -> tuple[int, str, str]:
    """run_process of a script that gets the signal right before call number `call` of a function,
    given as `os.replace` or `torch.optim:Adam.step` (module, colon, class)."""
    return run_process(["-c", DRIVER, script, function, call, int(by), *argv], cwd)


# -------------------------------------------------------------------------------- what came of it
def assert_one_line_error(result: tuple[int, str, str], *fragments: str, code: int = 2) -> None:
    """The exit code, and one line on stderr that begins with `error: ` and names what is wrong."""
    returned, out, err = result
    lines = [line for line in re.split("[\r\n]", err) if line.strip()]
    lines = [line for line in lines if not re.search(r"\d+%\|[^|]*\|[^|]*$", line)]  # tqdm's bar
    assert returned == code, (returned, out, err)
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 500, err
    for fragment in fragments:
        assert str(fragment) in lines[0], (fragment, lines[0])


def metrics(folder: Path) -> list[dict]:
    """metrics.csv as it reads."""
    return read_csv(folder / "metrics.csv")


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def files(folder: Path) -> dict[str, bytes]:
    """All files under a folder but for the lock."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def load(folder: Path) -> dict:
    """A run's checkpoint; what its files hold is not mapped, so that they may be overwritten."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    parts = state.get("files", {}).items()
    return state | {x: torch.load(folder / file, weights_only=True) for x, file in parts}


def leaves(value, name: str = "") -> dict[str, object]:
    """{"sac.actor.net.0.weight": tensor, ...} of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    else:
        return {name: value}
    named = (leaves(part, f"{name}.{key}" if name else str(key)) for key, part in parts)
    return {key: leaf for part in named for key, leaf in part.items()}


def compare_checkpoints(a: Path | dict, b: Path | dict, without: tuple = ("args",)) -> list[str]:
    """Names of what differs by a bit (nan equals nan), but for the clock's metrics and for names
    that begin with one of `without`."""
    a, b = (leaves(load(state) if isinstance(state, Path) else state) for state in (a, b))

    def bits(value):
        if isinstance(value, torch.Tensor):
            return value.shape, value.dtype, value.detach().cpu().numpy().tobytes()
        return repr(value)

    return [
        name
        for name in {**a, **b}
        if not name.startswith(without) and not name.endswith(CLOCK)
        if name not in a or name not in b or bits(a[name]) != bits(b[name])
    ]


def assert_same_run(a: Path, b: Path, without: str = "-") -> None:
    """The same checkpoint bit by bit and the same metrics, but for those that begin so."""
    tables = [
        [{k: v for k, v in row.items() if not k.startswith((*CLOCK, without))} for row in table]
        for table in map(metrics, (a, b))
    ]
    assert tables[0] == tables[1]
    differ = compare_checkpoints(a, b)
    assert not [name for name in differ if f".{without}" not in name], differ


# ------------------------------------------------------------------------------------ a toy robot
class Drift(MujocoEnv):
    """Two positions that actions push and that decay, and a constant. An episode ends by a fall
    where the first gets below -0.2; the true reward is the second."""

    def __init__(self):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        low, high = np.array([-1.0, -2.0], np.float32), np.array([0.5, 1.0], np.float32)
        self.action_space = gym.spaces.Box(low, high)

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.position = self.np_random.uniform(-0.1, 0.1, 2)
        return np.append(self.position, 0.5), {}

    def step(self, action):
        self.position = 0.9 * self.position + 0.1 * np.asarray(action, np.float64)
        fell = bool(self.position[0] < -0.2)
        return np.append(self.position, 0.5), float(self.position[1]), fell, False, {}


gym.register("Drift-v0", Drift, max_episode_steps=12)


def lie(monkeypatch) -> None:
    """From here on the true reward of every step is nan."""
    step = Drift.step

    def lying_step(self, action):
        obs, _, *rest = step(self, action)
        return obs, math.nan, *rest

    monkeypatch.setattr(Drift, "step", lying_step)


def save_arrays(path: Path, **arrays) -> None:
    """Rewrite an episode file with these arrays in it, or without those that are None."""
    arrays = read_arrays(path) | arrays
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def falling_data(folder: Path) -> Path:
    """make_robot_data's, but with demonstrations that fall, so that a clone does."""
    falling, drift = (make_robot_data(folder / f"seed{seed}", seed) for seed in (1, 0))
    return Path(shutil.copy(falling / "low.npz", drift / "high.npz")).parent


def make_robot_data(folder: Path, seed: int) -> Path:
    """low, medium and high.npz of half-random policies, the latter pushing up the more, and
    pairs.csv of 40 segments of 6 steps, medium preferred."""
    folder.mkdir(parents=True)
    env = gym.make("helpers:Drift-v0", max_episode_steps=14, disable_env_checker=True)
    rng, lengths = np.random.default_rng(seed), {}
    middle, half = (env.action_space.high + x * env.action_space.low for x in (1, -1))
    for tier, push in (("low", -0.5), ("medium", 0.2), ("high", 0.6)):
        arrays = {name: [] for name in ("observations", "actions", "rewards")}
        arrays |= {"terminations": [], "truncations": []}
        lengths[tier] = []
        while len(lengths[tier]) < 6:
            episode = {name: [] for name in arrays}
            obs, done = env.reset(seed=int(rng.integers(2**31)))[0], False
            episode["observations"].append(obs)
            while not done:
                unit = np.clip(push + rng.uniform(-0.7, 0.7, len(half)), -1, 1)
                action = (middle + half * unit) / 2
                obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
                done, truncated = terminated or truncated, truncated and not terminated
                for name, value in zip(arrays, (obs, action, reward, terminated, truncated)):
                    episode[name].append(value)
            if len(episode["actions"]) >= 6:
                lengths[tier].append(len(episode["actions"]))
                arrays = {name: arrays[name] + episode[name] for name in arrays}
        flags = {"terminations": bool, "truncations": bool}
        arrays = {name: np.array(x, flags.get(name, np.float32)) for name, x in arrays.items()}
        np.savez(folder / f"{tier}.npz", **arrays)
    lines = ["tier_a,episode_a,start_a,length_a,tier_b,episode_b,start_b,length_b,label"]
    for number in range(40):
        sides = []
        for tier in ("medium", "low"):
            episode = int(rng.integers(6))
            start = rng.integers(lengths[tier][episode] - 5)
            sides.append(f"{tier},{episode},{start},6")
        lines.append(",".join([*(sides if number % 2 else sides[::-1]), str(number % 2)]))
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def mean_policy(networks):
    """What SAC's scripts evaluate: of n networks number j, from 0, counts in proportion to
    (j + 1) ... (j + 9), polynomial-decay averaging (Shamir and Zhang 2013)."""
    weights, mean = [math.comb(j + 9, 9) for j in range(len(networks))], copy.deepcopy(networks[0])
    for p, *parameters in zip(mean.parameters(), *(net.parameters() for net in networks)):
        p.data = sum(w * q.data for w, q in zip(weights, parameters)) / sum(weights)
    return mean
