"""data_gen/mujoco_data.py: tiny data sets made by the real command, its training against a slow
reference, kills and bad arguments; and the sets in the repository.

python -m pytest tests/test_mujoco_data.py
"""

import hashlib
import json
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import helpers
import mujoco_data
import numpy as np
import pytest
import slow_robot as slow
import torch

import aihf_sac_mujoco as aihf
from data_gen import read

SCRIPT = helpers.ROOT / "data_gen" / "mujoco_data.py"
ASSETS = helpers.ROOT / "data_gen" / "assets" / "mujoco"
ENV = "helpers:Drift-v0"  # 3 observations, 2 actions, 12 steps, negative returns
TIERS = ["low", "medium", "high"]
FLAGS = {  # six candidates, the state is saved at steps 250 and 300; 150 updates
    "env": ENV,
    "total_timesteps": 300,
    "checkpoint_every": 50,
    "learning_starts": 200,
    "batch_size": 16,
    "hidden": 8,
    "episodes_per_tier": 3,
    "segment_length": 3,
    "num_pairs": 60,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's, on v4 environments


def command(folder: Path, **changes) -> list[str]:
    """Arguments that write a tiny data set into folder/data."""
    words = []
    given = FLAGS | {"output_dir": folder / "data", "work_dir": folder / "work"}
    for name, value in (given | changes).items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return [*words, "--no-compile"]


def execute(folder: Path, **changes) -> tuple[int, str, str]:
    return helpers.run_script(mujoco_data, command(folder, **changes), folder)


def make(folder: Path, **changes) -> Path:
    """A tiny data set; returns its folder."""
    folder.mkdir(exist_ok=True)
    result = execute(folder, **changes)
    assert result[0] == 0, result
    return folder / "data"


def lengths_of(arrays: dict) -> np.ndarray:
    ends = np.flatnonzero(arrays["terminations"] | arrays["truncations"])
    return np.diff(ends, prepend=-1)


def data_files(folder: Path) -> dict[str, bytes]:
    return {k: raw for k, raw in helpers.files(folder).items() if k != "manifest.json"}


def medium_wins(pairs: list[dict]) -> np.ndarray:
    """Whether the label of each pair prefers the segment of the medium episode."""
    return np.array([(str(p["label"]) == "1") == (p["tier_a"] == "medium") for p in pairs])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set made without disturbance; read only."""
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def updates(monkeypatch) -> list:
    """An entry for each SAC update from here on."""
    calls, original = [], mujoco_data.make_sac_update

    def counting(*args):
        update = original(*args)
        return lambda *batch: calls.append(None) or update(*batch)

    monkeypatch.setattr(mujoco_data, "make_sac_update", counting)
    return calls


@pytest.fixture
def no_training(monkeypatch) -> None:
    def begin(*args, **kwargs):
        raise AssertionError("accepted: training begins")

    monkeypatch.setattr(gym.wrappers.RescaleAction, "reset", begin, raising=False)


# ---------------------------------------------------------------------------- what it writes
def test_schema(data):
    names = ["high.npz", "low.npz", "manifest.json", "medium.npz", "pairs.csv"]
    assert sorted(path.name for path in data.iterdir()) == names
    for tier in TIERS:
        arrays = helpers.read_arrays(data / f"{tier}.npz")
        steps, lengths = len(arrays["rewards"]), lengths_of(arrays)
        assert {key: (x.dtype.name, x.shape) for key, x in arrays.items()} == {
            "observations": ("float32", (steps + 3, 3)),
            "actions": ("float32", (steps, 2)),
            "rewards": ("float32", (steps,)),
            "terminations": ("bool", (steps,)),
            "truncations": ("bool", (steps,)),
        }
        np.testing.assert_array_equal(read.check_episodes(arrays, tier), lengths)
        assert len(lengths) == 3 and lengths.sum() == steps
        assert (arrays["truncations"][lengths.cumsum() - 1] <= (lengths == 12)).all()
        starts = np.cumsum(lengths + 1) - lengths - 1
        assert np.abs(arrays["observations"][starts, :2]).max() <= 0.1001  # as reset begins
        assert arrays["actions"].min() < -1  # in the environment's units


def test_episodes_replay_in_the_environment(data):
    """Each step's observation, action and next observation are a step of the robot's, with that
    reward and end."""
    robot = helpers.Drift()
    for tier in TIERS:
        arrays = helpers.read_arrays(data / f"{tier}.npz")
        ends = arrays["terminations"] | arrays["truncations"]
        rows = np.arange(len(ends)) + np.concatenate([[0], np.cumsum(ends)[:-1]])
        for step, row in enumerate(rows):
            robot.position = arrays["observations"][row, :2]
            obs, reward, terminated, *_ = robot.step(arrays["actions"][step])
            np.testing.assert_allclose(obs, arrays["observations"][row + 1], rtol=1e-4, atol=1e-6)
            assert reward == pytest.approx(arrays["rewards"][step], rel=1e-4, abs=1e-6)
            assert terminated == arrays["terminations"][step]


def check_manifest(folder: Path, env_id: str) -> dict:
    """The manifest, if the files are as it says."""
    manifest = json.loads((folder / "manifest.json").read_text())
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in data_files(folder).items()}
    assert manifest["env_id"] == env_id and manifest["sha256"] == hashes
    assert list(manifest["tiers"]) == list(manifest["checkpoint_steps"]) == TIERS
    for tier, row in manifest["tiers"].items():
        arrays = helpers.read_arrays(folder / f"{tier}.npz")
        ends = lengths_of(arrays).cumsum()
        returns = [part.sum() for part in np.split(arrays["rewards"].astype(float), ends[:-1])]
        assert (row["episodes"], row["steps"]) == (len(ends), ends[-1])
        assert row["return_mean"] == pytest.approx(np.mean(returns), rel=1e-4)
        assert row["return_std"] == pytest.approx(np.std(returns), rel=1e-4)
    low, medium, high = (row["return_mean"] for row in manifest["tiers"].values())
    assert low < medium <= high
    return manifest


def test_manifest(data):
    manifest = check_manifest(data, ENV)
    assert manifest["command"].startswith("python ") and f"--env {ENV}" in manifest["command"]
    assert manifest["arguments"]["num_pairs"] == 60 and manifest["arguments"]["hidden"] == [8]
    assert manifest["seed"] == 1 and manifest["counts"] == {"pairs": 60, "segment_length": 3}
    assert set(manifest["versions"]) == {"python", "gymnasium", "mujoco", "numpy", "torch"}
    assert set(manifest["checkpoint_steps"].values()) <= set(range(50, 301, 50))
    assert manifest["random_return"] < -1 and manifest["tiers"]["high"]["return_mean"] < 0


def test_pairs_lie_inside_episodes_and_the_learner_reads_them(data):
    rows = helpers.read_csv(data / "pairs.csv")
    columns = [f"{key}_{side}" for side in "ab" for key in ("tier", "episode", "start", "length")]
    assert list(rows[0]) == [*columns, "label"] and len(rows) == 60
    assert medium_wins(rows).all() and 15 <= sum(row["label"] == "1" for row in rows) <= 45
    env = aihf.make_env(ENV)
    tiers = {tier: read.episodes(data / f"{tier}.npz", env.env) for tier in TIERS}
    actions = env.unwrapped.action_space.low + (tiers["high"].actions + 1) * [0.75, 1.5]
    np.testing.assert_allclose(
        actions, helpers.read_arrays(data / "high.npz")["actions"], atol=1e-6
    )
    pairs = read.pairs(data, tiers, 3)  # checks that they lie inside episodes
    assert len(pairs) == 60 and {(a[0], b[0]) for a, b in pairs} == {("medium", "low")}
    lengths, rng = {tier: tiers[tier].lengths for tier in TIERS}, np.random.default_rng([1, 3])
    drawn = mujoco_data.draw_pairs(lengths, 3, 60, rng)
    assert rows == [{key: str(x) for key, x in pair.items()} for pair in drawn]


def test_labels():
    """The medium segment is preferred; which side that is on is a coin's throw; every start there
    is, and no other, is drawn, all alike."""
    rng, lengths = np.random.default_rng(0), {"medium": [9, 30], "low": [5, 4, 12]}
    pairs = mujoco_data.draw_pairs(lengths, 5, 4000, rng)
    assert medium_wins(pairs).all()
    assert 0.47 < np.mean([pair["tier_a"] == "medium" for pair in pairs]) < 0.53
    assert 0.47 < np.mean([pair["label"] for pair in pairs]) < 0.53
    keys = ("tier", "episode", "start")
    found = Counter(tuple(p[f"{key}_{side}"] for key in keys) for p in pairs for side in "ab")
    starts = {("medium", 0): 5, ("medium", 1): 26, ("low", 0): 1, ("low", 2): 8}  # low 1: too short
    assert set(found) == {(*key, start) for key, count in starts.items() for start in range(count)}
    for (tier, *_), count in found.items():
        assert count == pytest.approx(4000 / {"medium": 31, "low": 9}[tier], rel=0.3)


def test_same_seed_same_bytes_and_another_seed_differs(tmp_path, data):
    assert data_files(make(tmp_path / "first")) == data_files(data)
    second = data_files(make(tmp_path / "second", seed=2))
    assert all(second[name] != raw for name, raw in data_files(data).items())


def test_random_actions_and_a_fall_at_the_time_limit():
    env = SimpleNamespace(action_space=SimpleNamespace(shape=(1000,)), action=np.array)
    env.reset = lambda seed: (np.zeros(2), {})
    env.step = lambda action: (np.ones(2), 1.0, True, True, {})
    episode = mujoco_data.record(env, None, np.random.default_rng(0))
    assert -1 < episode["actions"].min() < -0.99 < 0.99 < episode["actions"].max() < 1
    assert episode["terminations"].tolist() == [True]
    assert episode["truncations"].tolist() == [False]


# ------------------------------------------------------------------- the training, step by step
def slow_train(a) -> dict:
    """SAC on the true reward in float64: what is in the last checkpoint."""
    torch.manual_seed(10**6 + a.seed)
    actor, *critics = (slow.network(n, *a.hidden, out) for n, out in ((3, 4), (5, 1), (5, 1)))
    sac, robot = slow.SAC(actor, critics, 1.0, True, 0.9, 0.05), slow.Robot()
    rng, replay, candidates = np.random.default_rng([a.seed, 4]), [], []
    draw = lambda: rng.standard_normal(2, np.float32)  # noqa: E731
    for step in range(1, a.total_timesteps + 1):
        if step % a.checkpoint_every == 1:
            obs = robot.reset(seed=int(rng.integers(2**31)))
        random = step <= a.learning_starts
        action = rng.uniform(-1, 1, 2) if random else slow.act(actor, obs, draw())
        next_obs, reward, terminated, truncated = robot.step(action)
        replay.append([*obs, *action, reward, *next_obs, terminated])
        obs = robot.reset() if terminated or truncated else next_obs
        if step >= a.learning_starts and step % 50 == 0:
            index = rng.integers(step, size=(50, a.batch_size))
            noise = rng.standard_normal((50, 2, a.batch_size, 2), np.float32)
            batches = torch.from_numpy(np.array(replay)[index]).split([3, 2, 1, 3, 1], -1)
            for s, action, r, next_s, ended, z in zip(*batches, torch.from_numpy(noise).double()):
                sac.update(a.learning_rate, s, action, r[:, 0], next_s, ended[:, 0], z)
        if step % a.checkpoint_every == 0:
            played = [robot.episode(actor, rng.integers(2**31), draw)[2] for _ in range(3)]
            policy = {f"net.{key}": p.clone() for key, p in actor.state_dict().items()}
            candidates.append((step, np.concatenate(played).sum() / 3, policy))
    state = {"sac": sac.state(), "replay": np.array(replay), "candidates": candidates}
    return state | {"step": step, "rng": rng.bit_generator.state}


def test_training_equals_a_slow_reference(tmp_path, monkeypatch):
    """In float64. And it learns: Drift pays its second position, at most 4.7 in an episode, which
    actions push up. Compiled is the update of a robot of Drift's sizes."""
    sizes = []
    spy = lambda update, sac, *its_sizes: sizes.append(its_sizes) or update  # noqa: E731
    monkeypatch.setattr(mujoco_data, "compile_update", spy)
    monkeypatch.setattr(mujoco_data, "GAMMA", 0.9)
    monkeypatch.setattr(mujoco_data, "TAU", 0.05)
    changes = {"total_timesteps": 300, "checkpoint_every": 100, "learning_starts": 50, "seed": 3}
    changes |= {"hidden": (8, 7), "learning_rate": 0.01}
    argv = [*command(tmp_path, **changes), "--compile"]
    code, _, err = helpers.run_script(mujoco_data, argv, tmp_path)
    assert code == 0 and sizes == [(3, 2, 16)], err
    not_of_it = ("episodes_per_tier", "segment_length", "num_pairs")
    recipe = {key: x for key, x in (FLAGS | changes).items() if key not in not_of_it}
    actual, expected = helpers.load(tmp_path / "work"), slow_train(SimpleNamespace(**recipe))
    del recipe["total_timesteps"]
    assert (actual.pop("recipe"), actual.pop("rng")) == (recipe, expected.pop("rng"))
    actual, expected = helpers.leaves(actual), helpers.leaves(expected)
    assert actual.keys() == {"script", *expected}
    for name, value in expected.items():
        slow.close(actual[name], value, 1e-3, name)  # 15 times float32's error
    assert 3 < expected["replay"][:, -1].sum() < 300 / 12  # falls, and ends by the time limit
    assert expected["candidates.2.1"] > 3.5


def test_not_finite(tmp_path, monkeypatch):
    helpers.lie(monkeypatch)
    helpers.assert_one_line_error(execute(tmp_path), "sac_losses is not finite", code=1)


# ----------------------------------------------------------------------------------- the tiers
def pick(monkeypatch, env: str, random: float, planted: list[tuple], std={}, **flags) -> dict:
    """Mean returns of the tiers picked from planted candidates: (three-episode return, the mean
    return of further episodes, whose std is {mean: std}'s, else 0)."""
    signs = 50 * [1, -1]

    def record(env, actor, rng):
        true = random if actor is None else actor.true
        return {"rewards": np.array([true + signs.pop() * std.get(true, 0)]), "actions": [0]}

    actor = SimpleNamespace()
    actor.load_state_dict = lambda policy: setattr(actor, "true", policy)
    monkeypatch.setattr(mujoco_data, "record", record)
    candidates = [(step, score, true) for step, (score, true) in enumerate(planted)]
    args = mujoco_data.Args(env=env, episodes_per_tier=2, **flags)
    tiers, steps, random_return = mujoco_data.pick_tiers(args, None, actor, candidates)
    assert list(tiers) == list(steps) == TIERS and random_return == pytest.approx(random)
    means = {tier: mujoco_data.returns(tiers[tier]).mean() for tier in TIERS}
    assert means == {tier: planted[step][1] for tier, step in steps.items()}
    return means


@pytest.mark.parametrize(
    "env, random, best, wanted, steps",
    [
        ("Hopper-v4", 15, 4000, (0.66 * 3560, 0.85 * 3560, 3560), 400_000),  # Table 1's
        ("HalfCheetah-v4", -280, 12_000, (0.62 * 11635, 0.81 * 11635, 11635), 1_200_000),
        ("Walker2d-v4", 2, 4300, (0.72 * 4300, 0.93 * 4300, 4300), 2_000_000),  # below the paper's
        ("Reacher-v5", -43, -3, (-43 + 0.66 * 40, -43 + 0.85 * 40, -3), 1_000_000),
        ("Pusher-v5", -150, -30, (-150 + 0.66 * 120, -150 + 0.85 * 120, -30), 1_000_000),
    ],
)
def test_tiers_are_shares_of_the_way(monkeypatch, env, random, best, wanted, steps):
    planted = [(x, x) for x in np.linspace(random, best, 1001)]
    means = pick(monkeypatch, env, random, planted)
    assert list(means.values()) == pytest.approx(wanted, abs=0.011 * (best - random))
    assert mujoco_data.robot(mujoco_data.Args(env=env))[-1] == steps


def test_shares_are_of_what_high_reached(monkeypatch):
    """The best return of three episodes was luck."""
    planted = [*((x, x) for x in np.linspace(-43, -13, 301)), (-3, -13)]
    means = pick(monkeypatch, "Reacher-v5", -43, planted)
    wanted = {"low": -43 + 0.66 * 30, "medium": -43 + 0.85 * 30, "high": -13}
    assert means == pytest.approx(wanted, abs=0.2)


def test_targets_given(monkeypatch):
    """A quarter of the standard deviation counts as distance: 2 of the nearest to medium, 0.5 of
    the nearest to high."""
    planted, targets = [(x, x) for x in range(-50, 0)], (-30.2, -20.0, -9.9)
    std = {-20: 8, -10: 2}
    means = pick(monkeypatch, "Reacher-v5", -43.0, planted, std, tier_targets=targets)
    assert means == {"low": -30, "medium": -21, "high": -10}


def test_tiers_are_in_order_or_an_error(monkeypatch):
    """Three-episode returns promise an order that the tiers' own episodes do not keep."""
    planted = [(-31, -31), (-33, -32), (-35, -29)]  # high, medium and, better than both, low
    with pytest.raises(ValueError, match="no policy for the low tier"):
        pick(monkeypatch, "Reacher-v5", -43.0, planted)
    means = pick(monkeypatch, "Reacher-v5", -43.0, [*planted, (-40, -35)])
    assert means == {"low": -35, "medium": -32, "high": -31}
    equal = pick(monkeypatch, "Reacher-v5", -43.0, [(-31, -31), (-40, -35)])
    assert equal == {"low": -35, "medium": -31, "high": -31}


def test_low_and_medium_are_of_two_policies(monkeypatch):
    """Though the episodes of one, by luck, get worse: labels between them would be noise."""
    luck = iter(range(100, 0, -1))
    episode = {"actions": [0]}
    monkeypatch.setattr(
        mujoco_data, "record", lambda *_: episode | {"rewards": np.array([float(next(luck))])}
    )
    actor, args = SimpleNamespace(load_state_dict=id), mujoco_data.Args(episodes_per_tier=2)
    with pytest.raises(ValueError, match="no policy for the low tier"):
        mujoco_data.pick_tiers(args, None, actor, [(50, 60.0, 0)])


def test_tiers_out_of_order_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(mujoco_data, "returns", lambda episodes: np.full(len(episodes), -1.0))
    result = execute(tmp_path)
    helpers.assert_one_line_error(result, "no policy for the low tier", "--tier-targets")
    assert not list((tmp_path / "data").iterdir())


# ------------------------------------------------------------------- interrupted and carried on
@pytest.mark.parametrize(
    "function, call, updates_left",
    [
        ("torch.func.functional_call", 600, 50),  # an update between the two checkpoints
        ("os.replace", 1, 150),  # with the first checkpoint not yet in place
        ("os.replace", 4, 0),  # with a part of the data
    ],
)
def test_kill_and_run_again(tmp_path, data, updates, function, call, updates_left):
    result = helpers.killed_at(function, call, SCRIPT, command(tmp_path), tmp_path)
    assert result[0] == -signal.SIGKILL, result
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert data_files(make(tmp_path)) == data_files(data) and len(updates) == updates_left
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["checkpoint.pt"]


def test_a_longer_training_carries_on(tmp_path, data, updates):
    """The remedy for tiers that are not found."""
    execute(tmp_path, total_timesteps=250)
    assert len(updates) == 100
    assert data_files(make(tmp_path)) == data_files(data) and len(updates) == 150
    result = execute(tmp_path, total_timesteps=250)
    helpers.assert_one_line_error(result, "a longer training", "--work-dir")


@pytest.mark.parametrize(
    "every, saves", [(10_000, 5), (20_000, 2), (50_000, 1), (100_000, 1), (500, 5)]
)
def test_no_more_than_50_000_steps_are_lost(tmp_path, monkeypatch, every, saves):
    """Whatever there is between candidates; of the first ten, those after which it is saved."""
    written = []
    monkeypatch.setattr(mujoco_data, "BLOCK", every)
    monkeypatch.setattr(read, "write_whole", lambda path, write: written.append(len(scores)))
    monkeypatch.setattr(mujoco_data, "record", lambda *_: scores.append(0) or {"rewards": [0.0]})
    monkeypatch.setattr(mujoco_data, "returns", lambda episodes: np.zeros(3))
    scores, env = [], mujoco_data.make_env(ENV)
    env.step = lambda action: (np.zeros(3, np.float32), 0.0, False, False, {})
    args = mujoco_data.Args(env=ENV, checkpoint_every=every, hidden=(4,), compile=False)
    args.total_timesteps, args.learning_starts = 10 * every, 10**9
    mujoco_data.train(args, env, mujoco_data.Actor(3, 2, (4,)), tmp_path, {})
    assert [n // 3 for n in written] == [n for n in range(1, 11) if n % saves == 0]


def test_other_tiers_and_pairs_need_no_new_training(tmp_path, data, updates):
    """A segment longer than every episode is known after the training; its remedy is at once."""
    result = execute(tmp_path, segment_length=50)
    helpers.assert_one_line_error(result, "12 steps", "smaller --segment-length than 50")
    assert len(updates) == 150 and not list((tmp_path / "data").iterdir())
    assert data_files(make(tmp_path)) == data_files(data)
    changed = {"segment_length": 2, "num_pairs": 9}
    make(tmp_path, output_dir=tmp_path / "other", **changed)
    pairs = helpers.read_csv(tmp_path / "other/pairs.csv")
    assert len(pairs) == 9 and medium_wins(pairs).all() and pairs[0]["length_a"] == "2"
    for tier in TIERS:
        name = f"{tier}.npz"
        assert (tmp_path / "other" / name).read_bytes() == (data / name).read_bytes()
    make(tmp_path, episodes_per_tier=2, tier_targets=(-2.0, -1.0, 0.0))
    assert len(updates) == 150


# ------------------------------------------------------------------------------------ bad input
POSITIVE = "episodes_per_tier segment_length num_pairs checkpoint_every "
POSITIVE += "batch_size threads learning_starts hidden"


@pytest.mark.parametrize(
    "changes, fragment",
    [
        *(({name: 0}, f"--{name.replace('_', '-')}") for name in POSITIVE.split()),
        *(({"learning_rate": value}, "--learning-rate") for value in (0, -1, "nan", "inf")),
        *(
            ({"tier_targets": value}, "--tier-targets")
            for value in ((1, 2), (3, 2, 1), (1, 1, 2), (1, 2, 3, 4), (1, "nan", 3))
        ),
        ({"total_timesteps": -50}, "--total-timesteps"),
        ({"total_timesteps": 325}, "--total-timesteps"),
        ({"checkpoint_every": 300}, "twice"),  # low and medium are of two policies
        ({"total_timesteps": 10**15}, "Memory"),
        ({"checkpoint_every": 75}, "--checkpoint-every"),
        ({"learning_starts": 75}, "--learning-starts"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**64}, "--seed"),
        ({"env": "NoSuchRobot-v4"}, "NoSuchRobot"),
        # The default for Hopper is 400,000 steps, which is no multiple of 30,000.
        ({"env": "Hopper-v4", "total_timesteps": 0, "checkpoint_every": 30_000}, "--checkpoint-"),
        ({"output_dir": "file"}, "file"),
        ({"work_dir": "file"}, "file"),
        ({"output_dir": "file/below"}, "file"),
        ({"output_dir": "/proc"}, "Error"),  # there, but not even root can write into it
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, no_training, changes, fragment):
    """Known before the training, not after it."""
    (tmp_path / "file").write_text("a file")
    helpers.assert_one_line_error(execute(tmp_path, **changes), fragment)
    assert [name for name in helpers.files(tmp_path)] == ["file"]


@pytest.mark.parametrize("content", [b"", b"hello", {"model": torch.zeros(3)}, None], ids=str)
def test_work_folder_damaged_or_of_another_run(tmp_path, no_training, content):
    (tmp_path / "work").mkdir()
    if isinstance(content, bytes):
        (tmp_path / "work" / "checkpoint.pt").write_bytes(content)
    else:
        args = mujoco_data.Args(env=ENV)
        other = {"script": mujoco_data.SCRIPT, "recipe": mujoco_data.recipe(args)}
        torch.save(content or other, tmp_path / "work" / "checkpoint.pt")
    helpers.assert_one_line_error(execute(tmp_path), "work")
    assert not (tmp_path / "data").exists()


# --------------------------------------------------------------------- what the repository holds
FOLDERS = sorted(path.name for path in ASSETS.iterdir())


@pytest.mark.parametrize("name", FOLDERS)
def test_embedded_data_set(name):
    assert "Hopper-v4" in FOLDERS
    folder, env = ASSETS / name, aihf.make_env(name)
    manifest = check_manifest(folder, name)
    assert manifest["tiers"]["medium"]["return_mean"] < manifest["tiers"]["high"]["return_mean"]
    assert manifest["counts"]["segment_length"] == aihf.Args().segment_length
    tiers = {tier: read.episodes(folder / f"{tier}.npz", env.env) for tier in TIERS}
    pairs = read.pairs(folder, tiers, aihf.Args().segment_length)
    assert len(pairs) == manifest["counts"]["pairs"]
    assert {(preferred[0], other[0]) for preferred, other in pairs} == {("medium", "low")}
