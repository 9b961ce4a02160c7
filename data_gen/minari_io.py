"""Episode files to Minari datasets and back: demonstrations from, or for, anyone who uses Minari.

    python data_gen/minari_io.py to-minari --npz data_gen/assets/mujoco/Hopper-v4/high.npz \
        --dataset-id mujoco/hopper/aihf-v0 --env Hopper-v4
    python data_gen/minari_io.py from-minari --dataset-id mujoco/hopper/aihf-v0 --npz hopper.npz

Each takes seconds and prints one line that says what it wrote. Needs `pip install -e '.[minari]'`.
Datasets lie where Minari keeps them ($MINARI_DATASETS_PATH, else ~/.minari/datasets); nothing is
downloaded (`minari download` does that). Episode files: data_gen/README.md. From Minari, numbers
are rounded to float32; infos and seeds are dropped.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import read, write

ARRAYS = (*read.EPISODE_ARRAYS, "rewards")


@dataclass
class ToMinari:
    """Make a Minari dataset of an episode file."""

    npz: Path  # the episode file to read
    dataset_id: str  # the dataset to make, (namespace/)name-v0; it must not be there yet
    env: str  # the Gymnasium environment of the episodes; its spaces go into the dataset


@dataclass
class FromMinari:
    """Make an episode file of a Minari dataset that is on this computer."""

    dataset_id: str  # the dataset to read, (namespace/)name-v0, of float vectors
    npz: Path  # the episode file to write, over one that is there
    episodes: int = 0  # take this many, from the first on; 0: all


def find_dataset(dataset_id: str) -> tuple[Path, Path]:
    """Minari's folder, and the dataset's in it, there or not. ImportError without Minari."""
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
    except (ValueError, TypeError):  # an id without a version is a TypeError to Minari
        example = "write one like mujoco/hopper/aihf-v0"
        raise ValueError(f"{dataset_id!r} is no dataset id; {example}") from None
    return get_dataset_path(), get_dataset_path(dataset_id)


def as_stored(arrays: dict[str, np.ndarray], source) -> dict[str, np.ndarray]:
    """The arrays as an episode file stores them. ValueError if they are not those of one."""
    read.check_episodes(arrays, source)
    flags = ("terminations", "truncations")
    return {key: arrays[key].astype(bool if key in flags else np.float32) for key in ARRAYS}


def to_minari(npz: Path, dataset_id: str, env_id: str) -> str:
    """Make a dataset of an episode file, all of it or nothing; a line that says what was written.

    ValueError or OSError on a file that is missing or no episode file, an environment whose spaces
    are not the file's, an id that is bad or taken, and a folder that cannot be written.
    """
    root, path = find_dataset(dataset_id)
    import minari
    from minari.data_collector import EpisodeBuffer

    if path.exists():
        raise ValueError(f"{dataset_id} is there already; see --dataset-id and `minari delete`")
    try:
        with np.load(npz, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ARRAYS}
    except Exception as error:  # no such array, almost anything on a damaged file
        raise ValueError(f"cannot read {npz} ({read.one_line(error)})") from None
    arrays = as_stored(arrays, npz)
    gym.logger.min_level = gym.logger.ERROR  # v4 is called out of date at every make
    env = gym.make(env_id)
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if space.shape != arrays[key].shape[1:]:
            raise ValueError(f"{key} of {env_id} are {space}, not those of {npz}")

    episodes, start = [], 0
    for end in np.flatnonzero(arrays["terminations"] | arrays["truncations"]) + 1:
        fields = {key: array[start:end] for key, array in arrays.items()}
        shift = len(episodes)  # each episode before this one has an observation more than steps
        fields["observations"] = arrays["observations"][start + shift : end + shift + 1]
        episodes.append(EpisodeBuffer(**fields, infos={}))
        start = end

    # Minari writes several files: here into a scratch folder. One rename then puts the dataset, or
    # the outermost of its namespaces that is new, where it belongs.
    new = next(folder for folder in (*list(path.parents)[::-1], path) if not folder.exists())
    with tempfile.TemporaryDirectory(dir=root, prefix=".") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no author and no link to the code is given
        with mock.patch.dict(os.environ, MINARI_DATASETS_PATH=scratch):
            text = f"made from {npz.name}"
            minari.create_dataset_from_buffers(dataset_id, episodes, env=env, description=text)
        os.replace(scratch / new.relative_to(root), new)
    return f"wrote {dataset_id}: {len(episodes)} episodes, {start} steps, in {path}"


def from_minari(dataset_id: str, npz: Path, episodes: int) -> str:
    """Make an episode file of the dataset's first episodes; a line that says what was written.

    ValueError on a dataset that is missing, damaged, empty or not of float vectors, and on an
    episode that has not T + 1 observations, an end flag on its last step alone, finite values.
    """
    find_dataset(dataset_id)
    import minari

    if episodes < 0:
        raise ValueError(f"--episodes must not be negative, not {episodes}; 0 takes all")
    if npz.is_dir():
        raise ValueError(f"cannot write {npz}: it is a folder")
    try:
        dataset = minari.load_dataset(dataset_id)
        played = list(dataset.iterate_episodes(dataset.episode_indices[: episodes or None]))
    except Exception as error:  # h5py, json and Minari's assertions raise almost anything
        raise ValueError(f"cannot convert {dataset_id} ({read.one_line(error)})") from None
    if not played:
        raise ValueError(f"{dataset_id} is empty: it holds no episode")

    parts = []
    for index, episode in enumerate(played):
        fields = {key: np.asarray(getattr(episode, key)) for key in ARRAYS}
        parts.append(as_stored(fields, f"episode {index} of {dataset_id}"))
    arrays = {key: np.concatenate([fields[key] for fields in parts]) for key in ARRAYS}
    npz.parent.mkdir(parents=True, exist_ok=True)
    write.arrays(npz, arrays)
    return f"wrote {npz}: {len(parts)} episodes, {len(arrays['rewards'])} steps"


if __name__ == "__main__":
    with read.input_errors():
        args = tyro.cli(ToMinari | FromMinari, description=__doc__.split("\n\n")[0])
        if isinstance(args, ToMinari):
            print(to_minari(args.npz, args.dataset_id, args.env))
        else:
            print(from_minari(args.dataset_id, args.npz, args.episodes))
