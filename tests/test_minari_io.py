"""data_gen/minari_io.py: episode files to Minari datasets and back, and one line on what cannot be converted.

python -m pytest tests/test_minari_io.py      (seconds; skips itself without `pip install -e '.[minari]'`)
"""

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

gym, minari, _, _ = (pytest.importorskip(name) for name in ("gymnasium", "minari", "h5py", "mujoco"))
EpisodeBuffer = minari.data_collector.EpisodeBuffer

SCRIPT = Path(__file__).parents[1] / "data_gen" / "minari_io.py"
KEYS = ("observations", "actions", "rewards", "terminations", "truncations")
ENV, ID = "InvertedPendulum-v4", "mujoco/pendulum/test-v0"  # 4 observations, 1 action
BOX = {"observation_space": gym.spaces.Box(-9, 9, (4,)), "action_space": gym.spaces.Box(-1, 1, (1,))}
pytestmark = pytest.mark.filterwarnings("ignore")  # Minari's, on datasets without an author, and Gymnasium's, on v4


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """An empty folder of Minari's."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path, store):
    """Runs the script as the command line does; returns (exit code, stdout, stderr)."""

    def run(*argv) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minari_io.py", *map(str, argv)])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Runs the script and asserts exit code 2, one line of error, no file made or changed; returns the line."""

    def run(*argv) -> str:
        before = snapshot(tmp_path)
        code, out, err = cli(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), (code, out, err)
        assert snapshot(tmp_path) == before
        return err

    return run


def snapshot(folder: Path) -> dict:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


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
    """An episode as Minari takes it, in float64 as MuJoCo environments give it; `changes` replace its fields."""
    fields = {
        key: array.astype(float) if array.dtype != bool else array
        for key, array in flat((length,), (terminated,)).items()
    }
    return EpisodeBuffer(**{**fields, "infos": {}, **changes})


def split(arrays: dict) -> list[dict[str, np.ndarray]]:
    """The episodes of a file, cut up another way than the script does it: step by step."""
    episodes, row = [], 0
    for step in range(len(arrays["rewards"])):
        if step == 0 or arrays["terminations"][step - 1] or arrays["truncations"][step - 1]:
            episodes.append({key: [] for key in KEYS})
            episodes[-1]["observations"].append(arrays["observations"][row])
            row += 1
        episodes[-1]["observations"].append(arrays["observations"][row])
        row += 1
        for key in KEYS[1:]:
            episodes[-1][key].append(arrays[key][step])
    assert row == len(arrays["observations"])
    return [{key: np.array(values) for key, values in fields.items()} for fields in episodes]


def assert_same(dataset, arrays: dict) -> None:
    """Every episode of the dataset, rounded to float32, is that of the file."""
    assert {key: str(array.dtype) for key, array in arrays.items()} == {
        key: "bool" if key.endswith("ations") and key != "observations" else "float32" for key in KEYS
    }
    assert dataset.total_episodes == len(split(arrays)) and dataset.total_steps == len(arrays["rewards"])
    for stored, fields in zip(dataset, split(arrays)):
        for key in KEYS:
            np.testing.assert_array_equal(np.asarray(getattr(stored, key)).astype(fields[key].dtype), fields[key])


def load(path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# ------------------------------------------------------------------------------------------------------- what must work
@pytest.fixture
def collected(store):
    """A dataset recorded from the environment: falls at step 3, cut off at step 8, falls, left at step 4."""
    pytest.importorskip("jax")  # which DataCollector needs: pip install 'minari[create]'
    env = minari.DataCollector(gym.make(ENV, max_episode_steps=8), record_infos=True)
    for seed, (push, steps) in enumerate([(3.0, 9), (0.0, 9), (3.0, 9), (0.0, 4)]):
        env.reset(seed=seed)
        for _ in range(steps):
            *_, terminated, truncated, _ = env.step(np.array([push], np.float32))
            if terminated or truncated:
                break
    return env.create_dataset(ID)


def test_collected_dataset_to_file_and_back(collected, cli, tmp_path):
    code, out, err = cli("from-minari", "--dataset-id", ID, "--npz", tmp_path / "a.npz")
    arrays = load(tmp_path / "a.npz")
    assert (code, err) == (0, "") and "4 episodes, 18 steps" in out
    assert_same(collected, arrays)
    ends = [(len(e["rewards"]), bool(e["terminations"][-1]), bool(e["truncations"][-1])) for e in split(arrays)]
    assert ends == [(3, True, False), (8, False, True), (3, True, False), (4, False, True)]

    back = "mujoco/pendulum/back-v0"  # into namespaces that are there
    code, out, err = cli("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", back, "--env", ENV)
    assert (code, err) == (0, "") and "4 episodes, 18 steps" in out
    assert_same(minari.load_dataset(back), arrays)
    for before, after in zip(collected, minari.load_dataset(back)):
        np.testing.assert_allclose(after.observations, before.observations, rtol=1e-6)
        np.testing.assert_array_equal(after.truncations, before.truncations)
    assert sorted(minari.list_local_datasets()) == [back, ID]


def test_file_to_dataset_and_back(cli, tmp_path, store):
    arrays = flat((3, 1, 4), (True, False, True))
    np.savez(tmp_path / "a.npz", **arrays)
    assert cli("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", ID, "--env", ENV)[0] == 0
    dataset = minari.load_dataset(ID)
    assert_same(dataset, arrays)
    assert dataset.env_spec.id == ENV and dataset.recover_environment().action_space == dataset.action_space
    assert "EpisodeData" in repr(dataset[0]) and list(minari.list_local_datasets()) == [ID]
    assert minari.namespace.list_local_namespaces() == ["mujoco", "mujoco/pendulum"]
    assert sorted(p.name for p in store.iterdir()) == ["mujoco"]  # no scratch folder is left
    assert os.environ["MINARI_DATASETS_PATH"] == str(store)

    assert cli("from-minari", "--dataset-id", ID, "--npz", tmp_path / "b.npz")[0] == 0
    for key, array in load(tmp_path / "b.npz").items():
        assert array.dtype == arrays[key].dtype and np.array_equal(array, arrays[key])


def test_id_without_namespace(cli, tmp_path):
    np.savez(tmp_path / "a.npz", **flat())
    assert cli("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", "test-v0", "--env", ENV)[0] == 0
    assert_same(minari.load_dataset("test-v0"), flat())


@pytest.mark.parametrize("cap, episodes", [(0, 3), (2, 2), (9, 3)])
def test_episode_cap_and_overwriting(cap, episodes, cli, tmp_path, store):
    minari.create_dataset_from_buffers(ID, [episode(2), episode(3, False), episode(1)], **BOX)
    (tmp_path / "a.npz").write_text("old")
    assert cli("from-minari", "--dataset-id", ID, "--npz", tmp_path / "a.npz", "--episodes", cap)[0] == 0
    assert [len(e["rewards"]) for e in split(load(tmp_path / "a.npz"))] == [2, 3, 1][:episodes]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "store"]


def test_both_end_flags_count_as_terminated_and_integer_rewards_convert(cli, tmp_path, store):
    last = np.array([False, False, True])
    both = episode(terminations=last, truncations=last, rewards=np.array([1, 1, 0]))
    minari.create_dataset_from_buffers(ID, [both], **BOX)
    assert cli("from-minari", "--dataset-id", ID, "--npz", tmp_path / "a.npz")[0] == 0
    arrays = load(tmp_path / "a.npz")
    assert arrays["terminations"].tolist() == last.tolist() and not arrays["truncations"].any()
    assert arrays["rewards"].tolist() == [1, 1, 0] and arrays["rewards"].dtype == np.float32


# ----------------------------------------------------------------------------------------------- what must be refused
def put(key, value, index=...):
    """A change to the arrays of a file: `value` at `index` of `key`."""

    def change(arrays: dict) -> None:
        arrays[key] = arrays[key].copy()
        arrays[key][index] = value

    return change


BAD_FILES = {
    "missing keys": (lambda a: (a.pop("rewards"), a.pop("actions")), "has no actions, rewards"),
    "float64": (lambda a: a.update(observations=a["observations"].astype(float)), "observations .* must be float32"),
    "integer flags": (lambda a: a.update(truncations=a["truncations"].astype(np.int8)), "truncations .* must be bool"),
    "objects": (lambda a: a.update(rewards=a["rewards"].astype(object)), "Object arrays cannot be loaded"),
    "dict": (lambda a: a.update(observations=np.array({"x": a["observations"]})), "Object arrays cannot be loaded"),
    "axes": (lambda a: a.update(actions=a["actions"][:, 0]), "actions .* must be float32 with 2 axes"),
    "nan": (put("observations", np.nan, 2), "observations .* has NaN"),
    "inf": (put("rewards", np.inf, 1), "rewards .* has NaN, or too large"),
    "no last flag": (put("truncations", False), "end flags .* are wrong"),
    "both flags": (put("truncations", True, 2), "end flags .* are wrong"),
    "one flag too many": (put("terminations", True, 0), "5 steps and 3 end flags, but 7 observations"),
    "one flag too few": (put("terminations", False, 2), "5 steps and 1 end flags, but 7 observations"),
    "T observations": (lambda a: a.update(observations=a["observations"][:5]), "but 5 observations"),
    "lengths": (lambda a: a.update(actions=a["actions"][1:]), "differ in length"),
    "empty": (lambda a: a.update({key: array[:0] for key, array in a.items()}), "is empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, refused, tmp_path):
    change, message = BAD_FILES[name]
    arrays = flat()
    change(arrays)
    np.savez(tmp_path / "a.npz", **arrays)
    err = refused("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", ID, "--env", ENV)
    assert re.search(message, err), err


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 cut off", b"npy", b"folder"])
def test_no_file(content, refused, tmp_path):
    path = tmp_path / "a.npz"
    if content == b"npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif content == b"folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert f"cannot read {path}" in refused("to-minari", "--npz", path, "--dataset-id", ID, "--env", ENV)


@pytest.mark.parametrize(
    "env, message",
    [
        ("Nowhere-v0", "no environment 'Nowhere-v0'"),
        ("nowhere:Nowhere-v0", "no environment"),
        ("CartPole-v1", "actions of CartPole-v1 are Discrete(2)"),
        ("Blackjack-v1", "observations of Blackjack-v1 are Tuple"),
        ("Hopper-v4", "give the --env that they came from"),
    ],
)
def test_bad_environment(env, message, refused, tmp_path):
    np.savez(tmp_path / "a.npz", **flat())
    assert message in refused("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", ID, "--env", env)


@pytest.mark.parametrize("dataset_id", ["noversion", "../up-v0", "/up-v0", "aa//bb-v0", "aa//bb/cc-v0", ""])
def test_bad_id(dataset_id, refused, tmp_path):
    np.savez(tmp_path / "a.npz", **flat())
    for command in (["to-minari", "--env", ENV], ["from-minari"]):
        assert "is no dataset id" in refused(*command, "--npz", tmp_path / "a.npz", "--dataset-id", dataset_id)


def test_dataset_there_already(refused, cli, tmp_path):
    np.savez(tmp_path / "a.npz", **flat())
    command = ("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", ID, "--env", ENV)
    assert cli(*command)[0] == 0
    assert f"{ID} is there already" in refused(*command)


def test_dataset_missing_and_negative_cap(refused, tmp_path, store):
    assert f"no dataset {ID}" in refused("from-minari", "--dataset-id", ID, "--npz", tmp_path / "a.npz")
    argv = ("from-minari", "--dataset-id", ID, "--npz", tmp_path / "a.npz", "--episodes", "-1")
    assert "--episodes must not be negative" in refused(*argv)


BAD_EPISODES = {
    "nan": (episode(rewards=np.array([0, np.nan, 0])), "rewards of episode 1 of .* has NaN"),
    "beyond float32": (episode(actions=np.full((3, 1), 1e300)), "actions of episode 1 of .* too large"),
    "no flag": (episode(terminations=np.zeros(3, bool)), "end flags of episode 1 .* are wrong"),
    "early flag": (episode(truncations=np.array([True, False, False])), "3 steps and 2 end flags, but 4 observations"),
    "float flags": (episode(truncations=np.zeros(3)), "truncations of episode 1 of .* are float64"),
    "integers": (episode(actions=np.zeros((3, 1), int)), "actions of episode 1 of .* are int64"),
    "T observations": (episode(observations=np.zeros((3, 4))), "3 steps and 1 end flags, but 3 observations"),
    "lengths": (episode(actions=np.zeros((2, 1))), "differ in length"),
    "axes": (episode(observations=np.zeros((4, 2, 2))), "must be float32 with 2 axes"),
    "width": (episode(observations=np.zeros((4, 5))), "array dimensions"),
}


@pytest.mark.parametrize("name", BAD_EPISODES)
def test_bad_episode(name, refused, tmp_path, store):
    bad, message = BAD_EPISODES[name]
    minari.create_dataset_from_buffers(ID, [episode(), bad], **BOX)
    err = refused("from-minari", "--dataset-id", ID, "--npz", tmp_path / "a.npz")
    assert re.search(message, err), err


SPACES = {
    "dict observations": (
        "observation_space",
        gym.spaces.Dict({"x": BOX["observation_space"]}),
        {"x": np.zeros((4, 4))},
    ),
    "images": ("observation_space", gym.spaces.Box(0, 1, (2, 2)), np.zeros((4, 2, 2))),
    "integer vectors": ("observation_space", gym.spaces.Box(0, 255, (4,), np.uint8), np.zeros((4, 4), np.uint8)),
    "discrete actions": ("action_space", gym.spaces.Discrete(2), np.zeros(3, int)),
}


@pytest.mark.parametrize("name", SPACES)
def test_bad_space(name, refused, tmp_path, store):
    key, space, values = SPACES[name]
    field = "observations" if key == "observation_space" else "actions"
    minari.create_dataset_from_buffers(ID, [episode(**{field: values})], **{**BOX, key: space})
    err = refused("from-minari", "--dataset-id", ID, "--npz", tmp_path / "a.npz")
    assert f"{field} are {type(space).__name__}" in err and "not a float Box with one axis" in err


def test_empty_and_damaged_dataset(refused, tmp_path, store):
    argv = ("from-minari", "--dataset-id", ID, "--npz", tmp_path / "a.npz")
    minari.create_dataset_from_buffers(ID, [], **BOX)
    assert f"{ID} is empty" in refused(*argv)
    shutil.rmtree(store / ID)
    minari.create_dataset_from_buffers(ID, [episode()], **BOX)
    data = store / ID / "data"
    metadata = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps({**metadata, "minari_version": "9.9.9"}))
    assert "does not support" in refused(*argv)
    (data / "metadata.json").write_text(json.dumps({**metadata, "total_episodes": 2}))  # episode_1 is not there
    assert f"cannot convert {ID}" in refused(*argv)
    (data / "metadata.json").write_text(json.dumps(metadata))
    (data / "main_data.hdf5").write_bytes((data / "main_data.hdf5").read_bytes()[:-100])
    assert f"cannot convert {ID}" in refused(*argv)
    (data / "metadata.json").write_text("{")
    assert f"cannot convert {ID}" in refused(*argv)


def test_failing_rename_leaves_nothing(refused, tmp_path, store, monkeypatch):
    np.savez(tmp_path / "a.npz", **flat())
    minari.create_dataset_from_buffers(ID, [episode()], **BOX)

    def denied(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", denied)
    err = refused("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", "mujoco/other/test-v0", "--env", ENV)
    assert "cannot write" in err and "set MINARI_DATASETS_PATH" in err
    assert "cannot write" in refused("from-minari", "--dataset-id", ID, "--npz", tmp_path / "b.npz")


def test_nowhere_to_write(refused, tmp_path, store, monkeypatch):
    np.savez(tmp_path / "a.npz", **flat())
    minari.create_dataset_from_buffers(ID, [episode()], **BOX)
    for path in (tmp_path / "missing" / "b.npz", tmp_path / "a.npz" / "b.npz", tmp_path / "store"):
        assert f"cannot write {path}" in refused("from-minari", "--dataset-id", ID, "--npz", path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "a.npz"))  # a file
    err = refused("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", ID, "--env", ENV)
    assert "cannot use Minari's folder" in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user who has not all rights")
def test_no_rights_to_write(refused, tmp_path, store):
    np.savez(tmp_path / "a.npz", **flat())
    minari.create_dataset_from_buffers(ID, [episode()], **BOX)
    folders = (store, store / "mujoco", tmp_path)
    for folder in folders:
        folder.chmod(0o500)
    try:
        for dataset_id in ("other/test-v0", "mujoco/other-v0"):
            err = refused("to-minari", "--npz", tmp_path / "a.npz", "--dataset-id", dataset_id, "--env", ENV)
            assert "cannot write" in err
        assert "cannot write" in refused("from-minari", "--dataset-id", ID, "--npz", tmp_path / "b.npz")
    finally:
        for folder in folders:
            folder.chmod(0o700)


@pytest.mark.parametrize("module", ["minari", "h5py"])
def test_without_minari(module, refused, tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", **flat())
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    for command in (["to-minari", "--env", ENV], ["from-minari"]):
        err = refused(*command, "--npz", tmp_path / "a.npz", "--dataset-id", ID)
        assert "is not installed; pip install -e '.[minari]'" in err
