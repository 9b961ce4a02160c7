"""data_gen/mujoco_data.py: tiny data sets made by the real command, kills and bad arguments; and the sets in the repo.

python -m pytest tests/test_mujoco_data.py
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import mujoco_data
import numpy as np
import pytest
import torch

import aihf_sac_mujoco as aihf

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "data_gen" / "mujoco_data.py"
ASSETS = ROOT / "data_gen" / "assets" / "mujoco"
ENV = "InvertedPendulum-v4"  # 4 observations, 1 action between -3 and 3
TIERS = ["low", "medium", "high"]
FLAGS = {  # six checkpoints, of which the state is kept at steps 250 and 300; 251 updates, the warm-up's among them
    "--env": ENV,
    "--total-timesteps": 300,
    "--checkpoint-every": 50,
    "--learning-starts": 100,
    "--batch-size": 16,
    "--hidden": 8,
    "--episodes-per-tier": 3,
    "--segment-length": 3,
    "--num-pairs": 60,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's, on v4 environments


def command(folder: Path, *flags, **changes) -> list[str]:
    """Arguments that write a tiny data set into folder/data; changes are flags by their Python names."""
    given = FLAGS | {"--output-dir": folder / "data", "--work-dir": folder / "work"}
    given |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    pieces = []
    for flag, value in given.items():
        pieces += [flag, *map(str, value)] if isinstance(value, tuple) else [f"{flag}={value}"]
    return [*pieces, *(() if "--compile" in flags else ("--no-compile",)), *map(str, flags)]


def execute(cwd: Path, argv: list) -> tuple[int, str, str]:
    """The script in this process, as `python mujoco_data.py argv` from the folder cwd: (exit code, out, err)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, os.getcwd(), torch.is_grad_enabled(), torch.get_num_threads()
    try:
        sys.argv = [str(SCRIPT), *map(str, argv)]
        os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        torch.set_grad_enabled(before[2])
        torch.set_num_threads(before[3])
    return code, out.getvalue(), err.getvalue()


def make(folder: Path, *flags, **changes) -> Path:
    """A tiny data set; returns its folder."""
    code, out, err = execute(folder, command(folder, *flags, **changes))
    assert code == 0, (out, err)
    return folder / "data"


def data_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}


def read_pairs(folder: Path) -> list[dict]:
    with open(folder / "pairs.csv", newline="") as file:
        return list(csv.DictReader(file))


def medium_wins(pairs: list[dict]) -> np.ndarray:
    """Whether the label of each pair prefers the segment of the medium episode."""
    return np.array([(str(pair["label"]) == "1") == (pair["tier_a"] == "medium") for pair in pairs])


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
    """A data set made without disturbance; read only."""
    return make(tmp_path_factory.mktemp("whole"))


def test_schema(data):
    assert sorted(p.name for p in data.iterdir()) == ["high.npz", "low.npz", "manifest.json", "medium.npz", "pairs.csv"]
    for tier in TIERS:
        with np.load(data / f"{tier}.npz", allow_pickle=False) as file:
            arrays = dict(file)
        ends = arrays["terminations"] | arrays["truncations"]
        steps, episodes = len(ends), int(ends.sum())
        assert episodes == 3 and ends[-1] and not (arrays["terminations"] & arrays["truncations"]).any()
        assert {key: (array.dtype.name, array.shape) for key, array in arrays.items()} == {
            "observations": ("float32", (steps + 3, 4)),
            "actions": ("float32", (steps, 1)),
            "rewards": ("float32", (steps,)),
            "terminations": ("bool", (steps,)),
            "truncations": ("bool", (steps,)),
        }
        assert np.abs(arrays["actions"]).max() <= 3  # in the environment's units ...
        assert all(np.isfinite(array).all() for array in arrays.values())
        starts = np.cumsum([0, *(np.diff(np.flatnonzero(ends), prepend=-1) + 1)])[:-1]
        assert np.abs(arrays["observations"][starts]).max() <= 0.0101  # ... which begins this close to upright


def test_episodes_replay_in_the_environment(data):
    """Each step's observation, action and next observation are a step of MuJoCo's, with that reward and end."""
    env = gym.make(ENV).unwrapped
    env.reset(seed=0)
    for tier in TIERS:
        with np.load(data / f"{tier}.npz") as file:
            arrays = dict(file)
        ends = arrays["terminations"] | arrays["truncations"]
        row = np.arange(len(ends)) + np.concatenate([[0], np.cumsum(ends)[:-1]])  # of each step's observation
        for step in np.linspace(0, len(ends) - 1, 20).astype(int):
            obs, next_obs = arrays["observations"][row[step]], arrays["observations"][row[step] + 1]
            env.set_state(obs[:2], obs[2:])
            seen, reward, terminated, _, _ = env.step(arrays["actions"][step])
            np.testing.assert_allclose(seen, next_obs, rtol=1e-3, atol=1e-4)
            assert reward == arrays["rewards"][step] and terminated == arrays["terminations"][step]


def test_manifest(data):
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["env_id"] == ENV and manifest["seed"] == 1
    assert manifest["command"].startswith("python ") and f"--env={ENV}" in manifest["command"]
    assert manifest["arguments"]["num_pairs"] == 60 and manifest["arguments"]["hidden"] == [8]
    assert manifest["counts"] == {"pairs": 60, "segment_length": 3}
    assert set(manifest["versions"]) == {"python", "gymnasium", "mujoco", "numpy", "torch"}
    assert list(manifest["tiers"]) == list(manifest["checkpoint_steps"]) == TIERS
    assert set(manifest["checkpoint_steps"].values()) <= set(range(50, 301, 50))
    assert manifest["sha256"] == {name: hashlib.sha256(raw).hexdigest() for name, raw in data_files(data).items()}
    for tier, row in manifest["tiers"].items():
        with np.load(data / f"{tier}.npz") as file:
            ends = np.flatnonzero(file["terminations"] | file["truncations"])
            returns = [part.sum() for part in np.split(file["rewards"].astype(float), ends[:-1] + 1)]
        assert (row["episodes"], row["steps"]) == (len(ends), ends[-1] + 1)
        assert (row["return_mean"], row["return_std"]) == pytest.approx((np.mean(returns), np.std(returns)))


def test_pairs_lie_inside_episodes(data):
    pairs = read_pairs(data)
    assert len(pairs) == 60
    columns = [f"{key}_{side}" for side in "ab" for key in ("tier", "episode", "start", "length")]
    assert list(pairs[0]) == [*columns, "label"]
    lengths = {}
    for tier in ("low", "medium"):
        with np.load(data / f"{tier}.npz") as file:
            lengths[tier] = np.diff(np.flatnonzero(file["terminations"] | file["truncations"]), prepend=-1)
    for pair in pairs:
        assert {pair["tier_a"], pair["tier_b"]} == {"medium", "low"}
        for side in "ab":
            start, length = int(pair[f"start_{side}"]), int(pair[f"length_{side}"])
            assert length == 3
            assert 0 <= start <= lengths[pair[f"tier_{side}"]][int(pair[f"episode_{side}"])] - length
    assert medium_wins(pairs).all()
    assert 15 <= sum(pair["label"] == "1" for pair in pairs) <= 45  # either side, at random


def test_the_learner_reads_it(data):
    env = aihf.make_env(ENV)
    tiers = {tier: aihf.load_trajectories(data / f"{tier}.npz", env, "") for tier in TIERS}
    with np.load(data / "high.npz") as file:
        np.testing.assert_allclose(3 * tiers["high"].actions, file["actions"], atol=1e-6)
    pairs = aihf.load_pairs(data / "pairs.csv", tiers, 3, "")
    assert len(pairs) == 60 and {(preferred[0], other[0]) for preferred, other in pairs} == {("medium", "low")}


def episodes_of(lengths: list[int]) -> list:
    return [
        mujoco_data.Episode(np.zeros((n + 1, 4)), np.zeros((n, 1)), np.ones(n), terminated=n % 2 == 0) for n in lengths
    ]


@pytest.mark.parametrize("noise, low, high", [(0.0, 0.0, 0.0), (0.25, 0.22, 0.28), (1.0, 1.0, 1.0)])
def test_labels(noise, low, high):
    """The share of labels against the medium segment is the noise; which side that is on is a coin's throw."""
    rng = np.random.default_rng(0)
    pairs = mujoco_data.draw_pairs(episodes_of([9, 30]), episodes_of([5, 4, 12]), 5, 4000, noise, rng)
    assert low <= 1 - medium_wins(pairs).mean() <= high
    assert 0.47 < np.mean([pair["tier_a"] == "medium" for pair in pairs]) < 0.53
    assert 0.47 < np.mean([pair["label"] for pair in pairs]) < 0.53
    starts = {(tier, episode): set() for tier, episode in (("medium", 0), ("medium", 1), ("low", 0), ("low", 2))}
    for pair in pairs:
        for side in "ab":
            starts[pair[f"tier_{side}"], pair[f"episode_{side}"]].add(pair[f"start_{side}"])  # never low 1: too short
    expected = {("medium", 0): 5, ("medium", 1): 26, ("low", 0): 1, ("low", 2): 8}  # every start, and no other
    assert starts == {key: set(range(count)) for key, count in expected.items()}


def test_label_noise_reaches_the_file(tmp_path, data):
    noisy = make(tmp_path, label_noise=1)
    assert not medium_wins(read_pairs(noisy)).any()
    assert (noisy / "low.npz").read_bytes() == (data / "low.npz").read_bytes()


def test_same_seed_same_bytes_and_another_seed_differs(tmp_path, data):
    assert data_files(make(tmp_path)) == data_files(data)
    assert data_files(make(tmp_path)) == data_files(data)  # once more, of the finished training
    (tmp_path / "second").mkdir()
    second = data_files(make(tmp_path / "second", seed=2))
    assert all(second[name] != raw for name, raw in data_files(data).items())


def test_step_limit(tmp_path):
    """No episode is begun in a tier that has its steps."""
    folder = make(tmp_path, episodes_per_tier=50, max_steps_per_tier=20)
    for tier in TIERS:
        with np.load(folder / f"{tier}.npz") as file:
            lengths = np.diff(np.flatnonzero(file["terminations"] | file["truncations"]), prepend=-1)
        assert lengths.sum() >= 20 > lengths[:-1].sum()


# Runs the script and kills this very process at one exact moment.
DRIVER = """
import io, os, runpy, signal, sys
import numpy, torch
script, moment, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.argv[0] = script
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
calls = dict.fromkeys(["update", "save", "write"], 0)
save, savez = torch.save, numpy.savez_compressed

def counted(name, stop_at, do):
    calls[name] += 1
    if moment == name and calls[name] == stop_at:
        do()

def half_save(state, path):
    def half():
        whole = io.BytesIO()
        save(state, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        kill()
    counted("save", 2, half)
    save(state, path)

def half_savez(file, **arrays):
    def half():
        file.write(b"PK")
        file.flush()
        kill()
    counted("write", 2, half)
    savez(file, **arrays)

torch.compile = lambda update, **kwargs: lambda *args: (counted("update", 230, kill), update(*args))[1]
torch.save, numpy.savez_compressed = half_save, half_savez
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("moment, updates_left", [("update", 50), ("save", 50), ("write", 0)])
def test_kill_and_run_again(tmp_path, data, monkeypatch, moment, updates_left):
    """Killed between two states, with half a state on disk, or with half a data set: the same command carries on."""
    (tmp_path / "driver.py").write_text(DRIVER)
    argv = [sys.executable, "driver.py", SCRIPT, moment, *command(tmp_path, "--compile")]
    done = subprocess.run(list(map(str, argv)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "data" / "manifest.json").exists() and (tmp_path / "work" / "state.pt").exists()
    assert not any((tmp_path / "data" / f"{tier}.npz").exists() for tier in TIERS)

    calls = []
    monkeypatch.setattr(torch, "compile", lambda update, **_: lambda *args: calls.append(None) or update(*args))
    assert data_files(make(tmp_path, "--compile")) == data_files(data)
    assert len(calls) == 1 + updates_left  # the warm-up, and what the last state had not seen


@pytest.mark.parametrize(
    "changes, fragment",
    [
        *(({name: 0}, f"--{name.replace('_', '-')}") for name in ("episodes_per_tier", "max_steps_per_tier")),
        *(({name: 0}, f"--{name.replace('_', '-')}") for name in ("segment_length", "num_pairs", "checkpoint_every")),
        *(
            ({name: 0}, f"--{name.replace('_', '-')}")
            for name in ("batch_size", "threads", "learning_starts", "hidden")
        ),
        *(({name: value}, "--learning-rate") for name in ("learning_rate",) for value in (0, -1, "nan", "inf")),
        *(({"label_noise": value}, "--label-noise") for value in (-0.1, 1.1, "nan")),
        *(({"gamma": value}, "--gamma") for value in (-0.1, 1.1, "nan")),
        *(({"tau": value}, "--tau") for value in (0, 1.1, "nan")),
        *(({"tier_targets": value}, "--tier-targets") for value in ((1, 2), (3, 2, 1), (1, 2, 3, 4), (1, "nan", 3))),
        ({"total_timesteps": -50}, "--total-timesteps"),
        ({"total_timesteps": 325}, "--total-timesteps"),
        ({"checkpoint_every": 75}, "--checkpoint-every"),
        ({"learning_starts": 75}, "--learning-starts"),
        ({"seed": -1}, "--seed"),
        ({"env": "NoSuchRobot-v4"}, "NoSuchRobot-v4"),
        ({"env": "Hopper-v3"}, "Hopper-v3"),
        ({"env": "CartPole-v1"}, "CartPole-v1"),
        ({"env": "Pendulum-v1"}, "Pendulum-v1"),
        # The default for Hopper is 400,000 steps, which is no multiple of 30,000.
        ({"env": "Hopper-v4", "total_timesteps": 0, "checkpoint_every": 30_000}, "--checkpoint-every"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_arguments(tmp_path, monkeypatch, changes, fragment):
    def no_training(*args, **kwargs):
        raise AssertionError("accepted: training begins")

    monkeypatch.setattr(gym.wrappers.RescaleAction, "reset", no_training, raising=False)
    assert_refused(execute(tmp_path, command(tmp_path, **changes)), fragment)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["work", "data"])
def test_folder_is_a_file(tmp_path, monkeypatch, name):
    """Known before the training, not after it."""

    def no_training(*args, **kwargs):
        raise AssertionError("accepted: training begins")

    monkeypatch.setattr(gym.wrappers.RescaleAction, "reset", no_training, raising=False)
    (tmp_path / name).write_text("a file")
    assert_refused(execute(tmp_path, command(tmp_path)), name)


def test_segment_longer_than_every_episode(tmp_path, data):
    make(tmp_path)  # so that only the pairs are left to do
    before = data_files(tmp_path / "data")
    code, _, err = execute(tmp_path, command(tmp_path, segment_length=5000))
    assert code == 2 and "error: " in err  # of other arguments than the work folder's, at the latest
    (tmp_path / "second").mkdir()
    code, _, err = execute(tmp_path, command(tmp_path / "second", segment_length=5000))
    assert code == 2 and "--segment-length" in err.splitlines()[-1]
    assert not (tmp_path / "second" / "data").exists()
    assert data_files(tmp_path / "data") == before


def test_work_folder_of_another_run(tmp_path):
    make(tmp_path)
    before = data_files(tmp_path / "data")
    assert_refused(execute(tmp_path, command(tmp_path, learning_rate=0.002)), "state.pt", "--work-dir")
    assert data_files(tmp_path / "data") == before


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "other"])
def test_damaged_state(tmp_path, content):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.pt").write_bytes(content or b"")
    if content is None:
        torch.save({"model": torch.zeros(3)}, tmp_path / "work" / "state.pt")
    assert_refused(execute(tmp_path, command(tmp_path)), "state.pt")
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------- what the repository holds
FOLDERS = sorted(path.name for path in ASSETS.iterdir() if path.is_dir()) if ASSETS.is_dir() else []


def test_there_are_embedded_data_sets():
    assert "Hopper-v4" in FOLDERS


@pytest.mark.parametrize("name", FOLDERS)
def test_embedded_data_set(name):
    folder = ASSETS / name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["env_id"] == name
    assert manifest["sha256"] == {file: hashlib.sha256(raw).hexdigest() for file, raw in data_files(folder).items()}
    assert list(manifest["tiers"]) == TIERS
    low, medium, high = (manifest["tiers"][tier]["return_mean"] for tier in TIERS)
    assert low < medium < high

    env = aihf.make_env(name)
    tiers = {tier: aihf.load_trajectories(folder / f"{tier}.npz", env, "") for tier in TIERS}
    for tier, row in manifest["tiers"].items():
        assert (row["episodes"], row["steps"]) == (len(tiers[tier].lengths), tiers[tier].lengths.sum())
        assert np.abs(tiers[tier].actions).max() <= 1
        with np.load(folder / f"{tier}.npz", allow_pickle=False) as file:
            assert file["rewards"].sum(dtype=float) / row["episodes"] == pytest.approx(row["return_mean"], rel=1e-4)
    pairs = aihf.load_pairs(folder / "pairs.csv", tiers, manifest["counts"]["segment_length"], "")
    assert len(pairs) == manifest["counts"]["pairs"]
    if manifest["arguments"]["label_noise"] == 0:
        assert {(preferred[0], other[0]) for preferred, other in pairs} == {("medium", "low")}
    aihf.load_pairs(folder / "pairs.csv", tiers, aihf.Args().segment_length, "")  # long enough for the default
