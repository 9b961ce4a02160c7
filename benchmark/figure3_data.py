"""Data with fewer preferences, worse ones, or fewer demonstrations: what if a source is limited or
poor?

    python benchmark/figure3_data.py --env Hopper-v4 --share 0.1 --output-dir runs/tenth
    python benchmark/figure3_data.py --env Hopper-v4 --flip 0.3 --output-dir runs/flipped
    python benchmark/figure3_data.py --env Hopper-v4 --demos 2 --output-dir runs/two_demos

copies data_gen/assets/mujoco/<env>/ with a share of its pairs, some of them with the wrong label,
or its first demonstrations alone, to a folder that aihf_sac_mujoco.py and rlhf_baseline.py both
take as --data-dir. The seed alone decides which pairs: what a smaller share keeps, a larger one
keeps too, and the same for what is flipped. Every variant in benchmark/ is of seed 1.
"""

import csv
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import read, write

FILES = ("low.npz", "medium.npz", "high.npz")


@dataclass
class Args:
    output_dir: Path  # a folder that does not exist yet
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "Hopper-v4"  # whose data it is
    data_dir: str = ""  # what mujoco_data.py made; "": data_gen/assets/mujoco/<env>
    share: float = 1.0  # of the pairs that are kept
    flip: float = 0.0  # share of these whose label is flipped
    demos: int | None = None  # how many demonstrated episodes are kept, the first ones
    seed: int = 1  # decides which pairs are kept and which flipped


def vary(pairs: list[dict], share: float, flip: float, seed: int) -> list[dict]:
    """round(share · n) of the n rows of pairs.csv in their order, round(flip · these) of them with
    the other label."""
    both = np.tile(np.arange(len(pairs)), (2, 1))
    keep_order, flip_order = np.random.default_rng(seed).permuted(both, axis=1)
    kept = np.sort(keep_order[: round(share * len(pairs))])
    flipped = set(flip_order[np.isin(flip_order, kept)][: round(flip * len(kept))].tolist())
    return [
        {**pairs[i], "label": str(int(pairs[i]["label"]) ^ (i in flipped))} for i in kept.tolist()
    ]


def first_episodes(path: Path, count: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The first `count` episodes of an episode file, as arrays (data_gen/README.md has their
    shapes) and as the manifest describes them."""
    with np.load(path) as file:
        arrays = dict(file)
    lengths = read.check_episodes(arrays, path)
    if count > len(lengths):
        raise ValueError(f"{path} has {len(lengths)} episodes, not {count}")
    ends = np.cumsum(lengths[:count])
    returns = [part.sum(dtype=float) for part in np.split(arrays["rewards"], ends)[:count]]
    tier = {"return_mean": np.mean(returns), "return_std": np.std(returns)}
    tier |= {"episodes": count, "steps": int(ends[-1])}
    steps = {"observations": ends[-1] + count}
    return {key: array[: steps.get(key, ends[-1])] for key, array in arrays.items()}, tier


if __name__ == "__main__":
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        read.check_numbers(args, "flip seed")
        source = Path(args.data_dir or f"data_gen/assets/mujoco/{args.env}")
        if args.share > 1 or args.flip > 1:
            raise ValueError("--share and --flip are at most 1")
        if args.output_dir.exists():
            raise ValueError(f"{args.output_dir} exists; give another --output-dir")
        manifest = json.loads((source / "manifest.json").read_text())
        with open(source / "pairs.csv", newline="") as file:
            pairs = vary(list(csv.DictReader(file)), args.share, args.flip, args.seed)
        if not pairs:
            raise ValueError(f"--share {args.share} leaves no pair")
        if args.demos:
            demos, manifest["tiers"]["high"] = first_episodes(source / "high.npz", args.demos)
        missing = [name for name in FILES if not (source / name).is_file()]
        if missing:
            raise ValueError(f"no {', '.join(missing)} in {source}")

    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in FILES:
            shutil.copy(source / name, folder)
        if args.demos:
            write.arrays(folder / "high.npz", demos)
        lines = [",".join(pairs[0]), *(",".join(pair.values()) for pair in pairs), ""]
        (folder / "pairs.csv").write_text("\n".join(lines))
        found = {"env_id": manifest.get("env_id", args.env), "variant_of": manifest.get("sha256")}
        found["counts"] = {**manifest.get("counts", {}), "pairs": len(pairs)}
        found["tiers"] = manifest["tiers"]
        write.manifest(folder, [*FILES, "pairs.csv"], args, "", found)

    read.write_whole(args.output_dir, save)
    print(f"{len(pairs)} pairs, {round(args.flip * len(pairs))} flipped, in {args.output_dir}")
