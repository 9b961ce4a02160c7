"""data_gen/minari_io.py: episode files to Minari datasets and back, and one line on what cannot be
converted.

python -m pytest tests/test_minari_io.py      (skips itself without `pip install -e '.[minari]'`)
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest

from data_gen import read

gym, minari, _, _ = map(pytest.importorskip, ("gymnasium", "minari", "h5py", "mujoco"))
EpisodeBuffer = minari.data_collector.EpisodeBuffer

SCRIPT = helpers.ROOT / "data_gen" / "minari_io.py"
KEYS = ("observations", "actions", "rewards", "terminations", "truncations")
ENV, ID = "InvertedPendulum-v4", "mujoco/pendulum/test-v0"  # 4 observations, 1 action
BOX = {
    "observation_space": gym.spaces.Box(-9, 9, (4,)),
    "action_space": gym.spaces.Box(-1, 1, (1,)),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of datasets without author, and of v4


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """An empty folder of Minari's."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def cli(tmp_path, store):
    """Runs a subcommand on a.npz, ID and, one way, ENV unless other flags are given."""

    def run(subcommand: str, **flags) -> tuple[int, str, str]:
        given = {"npz": tmp_path / "a.npz", "dataset_id": ID}
        given |= {"env": ENV} if subcommand == "to-minari" else {}
        words = [f"--{k.replace('_', '-')}={value}" for k, value in (given | flags).items()]
        return helpers.run_script(SCRIPT, [subcommand, *words], tmp_path)

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Runs a subcommand and asserts one line of error that has the pattern, and no file made or
    changed."""

    def run(pattern: str, subcommand: str, **flags) -> None:
        before = helpers.files(tmp_path)
        result = cli(subcommand, **flags)
        helpers.assert_one_line_error(result)
        assert re.search(pattern, result[2]), result[2]
        assert helpers.files(tmp_path) == before

    return run


def flat(lengths=(3, 2), terminated=(True, False)) -> dict[str, np.ndarray]:
    """The arrays of an episode file, random but for the end flags."""
    rng, steps, ends = np.random.default_rng(0), sum(lengths), np.cumsum(lengths) - 1
    flags = np.zeros((2, steps), bool)
    flags[0, ends], flags[1, ends] = terminated, np.logical_not(terminated)
    return {
        "observations": rng.normal(size=(steps + len(lengths), 4)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, 1)).astype(np.float32),
        "rewards": rng.normal(size=steps).astype(np.float32),
        "terminations": flags[0],
        "truncations": flags[1],
    }


def episode(length=3, terminated=True, **changes) -> EpisodeBuffer:
    """An episode as Minari takes it, in float64 as robots give it; `changes` replace its fields."""
    fields = flat((length,), (terminated,))
    fields = {key: x.astype(float) if x.dtype != bool else x for key, x in fields.items()}
    return EpisodeBuffer(**{**fields, "infos": {}, **changes})


def assert_same(dataset, arrays: dict, lengths: tuple) -> None:
    """The dataset's episodes, of these lengths, are end to end the file's, rounded to float32."""
    steps = [len(episode.rewards) for episode in dataset]
    assert steps == [len(episode.observations) - 1 for episode in dataset] == [*lengths]
    assert {*arrays} == {*KEYS}
    for key, array in arrays.items():
        assert array.dtype == ("bool" if key in KEYS[3:] else "float32")
        stored = np.concatenate([getattr(episode, key) for episode in dataset])
        np.testing.assert_array_equal(stored.astype(array.dtype), array)


# ------------------------------------------------------------------------------- what must work


def test_file_to_dataset_and_back(cli, tmp_path, store):
    arrays = flat((3, 1, 4), (True, False, True))
    np.savez(tmp_path / "a.npz", **arrays)
    assert cli("to-minari")[0] == 0
    dataset = minari.load_dataset(ID)
    assert_same(dataset, arrays, (3, 1, 4))
    assert dataset.env_spec.id == ENV
    assert dataset.recover_environment().action_space == dataset.action_space
    again = "mujoco/pendulum/again-v0"  # into namespaces that are there
    code, out, err = cli("to-minari", dataset_id=again)
    assert (code, err) == (0, "") and "3 episodes, 8 steps" in out
    assert_same(minari.load_dataset(again), arrays, (3, 1, 4))
    assert "EpisodeData" in repr(dataset[0]) and sorted(minari.list_local_datasets()) == [again, ID]
    assert minari.namespace.list_local_namespaces() == ["mujoco", "mujoco/pendulum"]
    assert [path.name for path in store.iterdir()] == ["mujoco"]  # no scratch folder is left
    assert os.environ["MINARI_DATASETS_PATH"] == str(store)

    code, out, err = cli("from-minari", npz=tmp_path / "b.npz")
    assert (code, err) == (0, "") and "3 episodes, 8 steps" in out
    for key, array in helpers.read_arrays(tmp_path / "b.npz").items():
        assert array.dtype == arrays[key].dtype and np.array_equal(array, arrays[key])


def test_other_types_and_no_namespace(cli, tmp_path):
    """Numbers are stored as float32 and flags as bool, whatever the file has them as."""
    types = dict.fromkeys(KEYS[:3], np.float64) | dict.fromkeys(KEYS[3:], np.int8)
    np.savez(tmp_path / "a.npz", **{key: flat()[key].astype(types[key]) for key in KEYS})
    assert cli("to-minari", dataset_id="test-v0")[0] == 0
    assert_same(minari.load_dataset("test-v0"), flat(), (3, 2))


@pytest.mark.parametrize("cap, episodes", [(0, 3), (2, 2), (9, 3)])
def test_episode_cap_and_overwriting(cap, episodes, cli, tmp_path, store):
    played = [episode(2), episode(3, False), episode(1)]
    minari.create_dataset_from_buffers(ID, played, **BOX)
    (tmp_path / "a.npz").write_text("old")
    assert cli("from-minari", episodes=cap)[0] == 0
    arrays = helpers.read_arrays(tmp_path / "a.npz")
    assert read.check_episodes(arrays, "a.npz").tolist() == [2, 3, 1][:episodes]
    assert {arrays[key].dtype.name for key in KEYS[:3]} == {"float32"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "store"]


def test_both_end_flags_and_integer_rewards_convert(cli, tmp_path, store):
    last = np.array([False, False, True])
    both = episode(terminations=last, truncations=last, rewards=np.array([1, 1, 0]))
    minari.create_dataset_from_buffers(ID, [both], **BOX)
    assert cli("from-minari")[0] == 0
    arrays = helpers.read_arrays(tmp_path / "a.npz")
    assert arrays["terminations"].tolist() == arrays["truncations"].tolist() == last.tolist()
    assert arrays["rewards"].tolist() == [1, 1, 0] and arrays["rewards"].dtype == np.float32


# ------------------------------------------------------------------------- what must be refused
BAD_FILES = {  # more of them in test_read.py
    "missing arrays": ({"truncations": None, "actions": None}, "cannot read .*actions"),
    "no rewards": ({"rewards": None}, "cannot read .*rewards"),
    "objects": ({"rewards": np.array([None] * 5)}, "cannot read .*Object arrays"),
    "a flag more": ({"terminations": flat()["terminations"] | [1, 0, 0, 0, 0]}, "3 ends need 8"),
}


@pytest.mark.parametrize("change, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(change, message, refused, tmp_path):
    np.savez(tmp_path / "a.npz", **flat())
    helpers.save_arrays(tmp_path / "a.npz", **change)
    refused(message, "to-minari")


@pytest.mark.parametrize("content", [None, b"PK\x03\x04 cut off"])
def test_no_file(content, refused, tmp_path):
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    refused(f"cannot read {tmp_path / 'a.npz'}", "to-minari")


@pytest.mark.parametrize(
    "env, message",
    [
        ("Nowhere-v0", "Nowhere"),
        ("nowhere:Nowhere-v0", "nowhere"),
        ("CartPole-v1", "actions of CartPole-v1 are Discrete"),
        ("Blackjack-v1", "observations of Blackjack-v1 are Tuple"),
        ("Hopper-v4", "observations of Hopper-v4 .* not those of"),
    ],
)
def test_bad_environment(env, message, refused, tmp_path):
    np.savez(tmp_path / "a.npz", **flat())
    refused(message, "to-minari", env=env)


@pytest.mark.parametrize(
    "name", ["noversion", "../up-v0", "/up-v0", "aa//bb-v0", "aa//bb/c-v0", ""]
)
def test_bad_id(name, refused, tmp_path):
    np.savez(tmp_path / "a.npz", **flat())
    for subcommand in ("to-minari", "from-minari"):
        refused("is no dataset id", subcommand, dataset_id=name)


def test_dataset_there_already_or_missing_and_negative_cap(refused, cli, tmp_path):
    np.savez(tmp_path / "a.npz", **flat())
    refused(f"cannot convert {ID}", "from-minari")
    assert cli("to-minari")[0] == 0
    refused(f"{ID} is there already", "to-minari")
    refused("--episodes must not be negative", "from-minari", episodes=-1)


BAD_EPISODES = {  # likewise
    "nan": ({"rewards": np.array([0, np.nan, 0])}, "rewards is not finite.* row 1"),
    "early flag": ({"truncations": np.array([True, False, False])}, "2 ends need 5"),
    "width": ({"observations": np.zeros((4, 5))}, "array dimensions"),
}


@pytest.mark.parametrize("change, message", BAD_EPISODES.values(), ids=BAD_EPISODES)
def test_bad_episode(change, message, refused, store):
    minari.create_dataset_from_buffers(ID, [episode(), episode(**change)], **BOX)
    refused(message if "dim" in message else f"episode 1 of {ID}.*{message}", "from-minari")


SPACES = {
    "Dict": ("observation", gym.spaces.Dict({"x": BOX["action_space"]}), {"x": np.zeros((4, 1))}),
    "image": ("observation", gym.spaces.Box(0, 1, (2, 2)), np.zeros((4, 2, 2))),
    "Discrete": ("action", gym.spaces.Discrete(2), np.zeros(3, int)),
}


@pytest.mark.parametrize("kind, space, values", SPACES.values(), ids=SPACES)
def test_bad_space(kind, space, values, refused, store):
    spaces = {**BOX, f"{kind}_space": space}
    minari.create_dataset_from_buffers(ID, [episode(**{f"{kind}s": values})], **spaces)
    refused(f"episode 0 of {ID}: {kind}s must be 2-D of real numbers", "from-minari")


def test_empty_and_damaged_dataset(refused, store):
    minari.create_dataset_from_buffers(ID, [], **BOX)
    refused(f"{ID} is empty", "from-minari")
    shutil.rmtree(store / ID)
    minari.create_dataset_from_buffers(ID, [episode()], **BOX)
    data = store / ID / "data"
    metadata = json.loads((data / "metadata.json").read_text())
    helpers.change_json(data / "metadata.json", minari_version="9.9.9")
    refused("does not support", "from-minari")
    (data / "metadata.json").write_text(json.dumps({**metadata, "total_episodes": 2}))
    refused(f"cannot convert {ID}", "from-minari")
    (data / "metadata.json").write_text(json.dumps(metadata))
    (data / "main_data.hdf5").write_bytes((data / "main_data.hdf5").read_bytes()[:-100])
    refused(f"cannot convert {ID}", "from-minari")
    (data / "metadata.json").write_text("{")
    refused(f"cannot convert {ID}", "from-minari")


def test_failing_rename_leaves_nothing(cli, refused, tmp_path, store, monkeypatch):
    np.savez(tmp_path / "a.npz", **flat())
    minari.create_dataset_from_buffers(ID, [episode()], **BOX)
    before = helpers.files(tmp_path)

    def denied(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", denied)
    refused("Permission denied", "to-minari", dataset_id="mujoco/other/test-v0")
    helpers.assert_one_line_error(cli("from-minari"), "cannot write", code=1)  # as a full disk does
    assert helpers.files(tmp_path) == before


def test_nowhere_to_write(refused, tmp_path, store, monkeypatch):
    np.savez(tmp_path / "a.npz", **flat())
    minari.create_dataset_from_buffers(ID, [episode()], **BOX)
    refused(f"cannot write {store}", "from-minari", npz=store)
    refused("a.npz", "from-minari", npz=tmp_path / "a.npz" / "b.npz")
    for path in (tmp_path / "a.npz", Path("/proc")):  # a file, and a folder of the system
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
        refused("Error", "to-minari")


@pytest.mark.parametrize("module", ["minari", "h5py"])
def test_without_minari(module, refused, tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", **flat())
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    for subcommand in ("to-minari", "from-minari"):
        refused("is not installed; pip install -e '.\\[minari\\]'", subcommand)
