"""Episode files to Minari datasets and back, so that demonstrations can come from, or go to, anyone who uses Minari.

    python data_gen/minari_io.py to-minari --npz data_gen/assets/mujoco/Hopper-v4/high.npz \
        --dataset-id mujoco/hopper/aihf-v0 --env Hopper-v4
    python data_gen/minari_io.py from-minari --dataset-id mujoco/hopper/aihf-v0 --npz hopper.npz --episodes 10

Each takes seconds and prints one line that says what it wrote. Needs `pip install -e '.[minari]'`. Datasets lie where
Minari keeps them ($MINARI_DATASETS_PATH, else ~/.minari/datasets); nothing is downloaded (`minari download` does that).

An episode file holds flat arrays over E episodes of N steps in all: observations (N + E, obs_dim), T + 1 an episode;
actions (N, act_dim); rewards (N,); terminations (N,) and truncations (N,), one of which is set on the last step of
each episode and nowhere else. The first three are float32, the flags bool. From Minari, float64 is rounded to float32,
and an episode that ends with both flags (a fall at the time limit) counts as terminated; infos and seeds are dropped.
"""

import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import tyro

AXES = {"observations": 2, "actions": 2, "rewards": 1, "terminations": 1, "truncations": 1}


@dataclass
class ToMinari:
    """Make a Minari dataset of an episode file."""

    npz: Path
    """the episode file to read"""
    dataset_id: str
    """the dataset to make, (namespace/)name-v0; it must not be there yet"""
    env: str
    """the Gymnasium environment that the episodes were played in; its spaces go into the dataset"""


@dataclass
class FromMinari:
    """Make an episode file of a Minari dataset that is on this computer."""

    dataset_id: str
    """the dataset to read, (namespace/)name-v0; its observations and actions must be float vectors"""
    npz: Path
    """the episode file to write, over one that is there"""
    episodes: int = 0
    """take this many, from the first on; 0 takes all"""


def fail(message: str):
    """One line to stderr, exit code 2: the caller's input was wrong and nothing has been written."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def find_dataset(dataset_id: str) -> tuple[Path, Path]:
    """Minari's folder, and the dataset's in it, there or not; raises ImportError without Minari, ValueError on a bad id
    or a folder that cannot be used."""
    try:
        import h5py  # noqa: F401  the format of Minari's files, which Minari itself does not require
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage import get_dataset_path
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed; pip install -e '.[minari]'") from None
    try:
        if "//" in dataset_id:  # Minari would take it, and not find it again
            raise ValueError
        parse_dataset_id(dataset_id)
        return get_dataset_path(), get_dataset_path(dataset_id)
    except (ValueError, TypeError):  # an id without a version is a TypeError to Minari
        raise ValueError(f"{dataset_id!r} is no dataset id; write one like mujoco/hopper/aihf-v0") from None
    except OSError as error:
        raise ValueError(f"cannot use Minari's folder ({error}); set MINARI_DATASETS_PATH to one of yours") from None


def check_episodes(arrays: dict[str, np.ndarray], source) -> None:
    """Raises ValueError, naming `source`, unless the arrays are those of an episode file (shapes: top of this file)."""
    if missing := [key for key in AXES if key not in arrays]:
        raise ValueError(f"{source} has no {', '.join(missing)}; an episode file holds {', '.join(AXES)}")
    for key, axes in AXES.items():
        shape, dtype = arrays[key].shape, "bool" if key in ("terminations", "truncations") else "float32"
        if arrays[key].dtype != dtype or len(shape) != axes:
            raise ValueError(f"{key} of {source} must be {dtype} with {axes} axes, not {arrays[key].dtype} {shape}")
        if not np.isfinite(arrays[key]).all():
            raise ValueError(f"{key} of {source} has NaN, or too large values; leave such episodes out")
    terminated, truncated, steps = arrays["terminations"], arrays["truncations"], len(arrays["rewards"])
    if steps == 0:
        raise ValueError(f"{source} is empty; give one with at least one episode")
    if not len(arrays["actions"]) == len(terminated) == len(truncated) == steps:
        raise ValueError(f"actions, rewards and end flags of {source} differ in length; record it anew")
    if (terminated & truncated).any() or not (terminated | truncated)[-1]:
        raise ValueError(f"end flags of {source} are wrong; set exactly one on the last step of each episode")
    found, episodes = len(arrays["observations"]), int((terminated | truncated).sum())
    if found != steps + episodes:
        counts = f"{steps} steps and {episodes} end flags, but {found} observations"
        raise ValueError(f"{source} has {counts}; an episode of T steps has one flag, on its last, and T + 1")


def to_minari(npz: Path, dataset_id: str, env_id: str) -> str:
    """Make a dataset of an episode file, all of it or nothing; returns a line that says what was written.

    Raises ImportError without Minari, and ValueError when the file is missing or no episode file, when the environment
    is unknown or its spaces are not Box (obs_dim,) and (act_dim,), and when the id is bad, taken or not writable.
    """
    root, path = find_dataset(dataset_id)
    import minari
    from minari.data_collector import EpisodeBuffer

    try:
        with np.load(npz, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in AXES if key in file}
    except Exception as error:  # noqa: BLE001  damaged zip files, object arrays and folders raise all kinds
        raise ValueError(f"cannot read {npz} ({error}); give an episode file (.npz)") from None
    check_episodes(arrays, npz)
    if os.path.exists(path):
        raise ValueError(f"{dataset_id} is there already; give another --dataset-id or `minari delete` it")
    gym.logger.min_level = gym.logger.ERROR  # the paper's v4 environments are called out of date at every make
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"no environment {env_id!r} ({error}); try Hopper-v4") from None
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        width = arrays[key].shape[1:]
        if not isinstance(space, gym.spaces.Box) or space.shape != width:
            raise ValueError(f"{key} of {env_id} are {space}, of {npz} {width}; give the --env that they came from")

    episodes, start = [], 0
    for end in np.flatnonzero(arrays["terminations"] | arrays["truncations"]) + 1:
        fields = {key: arrays[key][start:end] for key in AXES}
        fields["observations"] = arrays["observations"][start + len(episodes) : end + len(episodes) + 1]
        episodes.append(EpisodeBuffer(**fields, infos={}))
        start = end

    # Minari writes several files. It does so in a scratch folder, of which one rename then puts the dataset, or the
    # outermost of its namespaces that is new, where it belongs.
    new = next(folder for folder in (*list(path.parents)[::-1], path) if not os.path.exists(folder))
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".") as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no author and no link to the code is given
            with mock.patch.dict(os.environ, MINARI_DATASETS_PATH=scratch):
                minari.create_dataset_from_buffers(dataset_id, episodes, env=env, description=f"made from {npz.name}")
            os.replace(scratch / new.relative_to(root), new)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error}); set MINARI_DATASETS_PATH to a folder of yours") from None
    return f"wrote {dataset_id}: {len(episodes)} episodes, {start} steps, in {path}"


def from_minari(dataset_id: str, npz: Path, episodes: int = 0) -> str:
    """Make an episode file of the dataset's first `episodes` (0: all); returns a line that says what was written.

    Raises ImportError without Minari, and ValueError when the dataset is missing, damaged or empty, when its spaces are
    not float Box (obs_dim,) and (act_dim,), when an episode has not T + 1 observations, an end flag on its last step
    alone and values that are finite in float32, and when the file cannot be written.
    """
    _, path = find_dataset(dataset_id)
    import minari

    if episodes < 0:
        raise ValueError(f"--episodes must not be negative, not {episodes}; 0 takes all")
    if not os.path.exists(path / "data"):
        raise ValueError(f"no dataset {dataset_id} on this computer; see `minari list local` and `minari download`")
    try:
        dataset = minari.load_dataset(dataset_id)
        for key, space in (("observations", dataset.observation_space), ("actions", dataset.action_space)):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
                raise ValueError(f"{key} are {space}, not a float Box with one axis")
        played = list(dataset.iterate_episodes(dataset.episode_indices[: episodes or None]))
    except Exception as error:  # noqa: BLE001  h5py, json and Minari's assertions raise all kinds
        raise ValueError(f"cannot convert {dataset_id} ({error}); give another dataset") from None
    if not played:
        raise ValueError(f"{dataset_id} is empty; give one with at least one episode")

    parts = []
    for index, episode in enumerate(played):
        fields = {key: np.asarray(getattr(episode, key)) for key in AXES}
        for (key, field), kinds in zip(fields.items(), ("f", "f", "fiu", "b", "b")):  # some rewards are integers
            if field.dtype.kind not in kinds:
                raise ValueError(f"{key} of episode {index} of {dataset_id} are {field.dtype}; give another dataset")
            with np.errstate(over="ignore"):  # becomes infinite, which the check below finds
                fields[key] = field if kinds == "b" else field.astype(np.float32)
        fields["truncations"] = fields["truncations"] & ~fields["terminations"]
        check_episodes(fields, f"episode {index} of {dataset_id}")
        parts.append(fields)
    arrays = {key: np.concatenate([fields[key] for fields in parts]) for key in AXES}
    try:
        with tempfile.TemporaryDirectory(dir=npz.parent, prefix=".") as scratch:
            np.savez_compressed(f"{scratch}/episodes.npz", **arrays)
            os.replace(f"{scratch}/episodes.npz", npz)
    except OSError as error:
        raise ValueError(f"cannot write {npz} ({error}); give a path in a folder of yours") from None
    return f"wrote {npz}: {len(parts)} episodes, {len(arrays['rewards'])} steps"


if __name__ == "__main__":
    args = tyro.cli(ToMinari | FromMinari, description=__doc__.split("\n\n")[0])
    try:
        if isinstance(args, ToMinari):
            print(to_minari(args.npz, args.dataset_id, args.env))
        else:
            print(from_minari(args.dataset_id, args.npz, args.episodes))
    except (ImportError, ValueError) as error:
        fail(" ".join(str(error).split()))
