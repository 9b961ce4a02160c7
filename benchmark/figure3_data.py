"""Data with fewer preferences, worse ones, or fewer demonstrations: what if a source is limited or poor?

    python benchmark/figure3_data.py --env Hopper-v4 --share 0.1 --output-dir runs/figure3_data/Hopper-v4__share0.1
    python benchmark/figure3_data.py --env Hopper-v4 --flip 0.3 --output-dir runs/figure3_data/Hopper-v4__flip0.3
    python benchmark/figure3_data.py --env Hopper-v4 --demos 2 --output-dir runs/figure3_data/Hopper-v4__demos2

copies data_gen/assets/mujoco/<env>/ with a share of its pairs, some of them with the wrong label, or its first
demonstrations alone, to a folder that aihf_sac_mujoco.py and rlhf_baseline.py both take as --data-dir. The seed alone
decides which pairs: what a smaller share keeps, a larger one keeps too, and the same for what is flipped. Every variant
in benchmark/ is of seed 1.
"""

import csv
import hashlib
import json
import os
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro


@dataclass
class Args:
    output_dir: str
    """a folder that does not exist yet"""
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "Hopper-v4"
    """the environment whose data it is"""
    data_dir: str = ""
    """the data to vary; default data_gen/assets/mujoco/<env>"""
    share: float = 1.0
    """share of the pairs that is kept"""
    flip: float = 0.0
    """share of these whose label is flipped"""
    demos: int | None = None
    """how many demonstrated episodes are kept, the first ones; default all"""
    seed: int = 1
    """decides which pairs are kept and which flipped"""


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def vary(pairs: list[dict], share: float, flip: float, seed: int) -> list[dict]:
    """round(share · n) of the n rows of pairs.csv in their order, round(flip · these) of them with the other label."""
    keep_order, flip_order = np.random.default_rng(seed).permuted(np.tile(np.arange(len(pairs)), (2, 1)), axis=1)
    kept = np.sort(keep_order[: round(share * len(pairs))])
    flipped = set(flip_order[np.isin(flip_order, kept)][: round(flip * len(kept))].tolist())
    return [{**pairs[i], "label": str(int(pairs[i]["label"]) ^ (i in flipped))} for i in kept.tolist()]


def first_episodes(arrays: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The first `count` episodes of an episode file's arrays (README, Data formats); ValueError if it has fewer."""
    ends = np.flatnonzero(arrays["terminations"] | arrays["truncations"]) + 1
    if count > len(ends):
        raise ValueError(f"high.npz has {len(ends)} episodes, not {count}")
    steps = ends[count - 1]
    return {key: array[: steps + count * (key == "observations")] for key, array in arrays.items()}


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    source, output = Path(args.data_dir or f"data_gen/assets/mujoco/{args.env}"), Path(args.output_dir)
    if not 0 < args.share <= 1 or not 0 <= args.flip <= 1 or args.seed < 0:
        fail("--share must be above 0 and at most 1, --flip between 0 and 1 and --seed not negative")
    if args.demos is not None and args.demos < 1:
        fail("--demos must be at least 1")
    if output.exists():
        fail(f"{output} exists; give another --output-dir")
    names = ("low.npz", "medium.npz", "high.npz", "manifest.json", "pairs.csv")
    if missing := [name for name in names if not (source / name).is_file()]:
        fail(f"no {', '.join(missing)} in {source}")
    try:
        manifest = json.loads((source / "manifest.json").read_text())
        with open(source / "pairs.csv", newline="") as file:
            pairs = vary(list(csv.DictReader(file)), args.share, args.flip, args.seed)
        tiers = manifest["tiers"]
        if args.demos is not None:
            with np.load(source / "high.npz") as file:
                demos = first_episodes(dict(file), args.demos)
            episodes = np.split(demos["rewards"], np.flatnonzero(demos["terminations"] | demos["truncations"])[:-1] + 1)
            returns = np.array([rewards.sum(dtype=float) for rewards in episodes])
            tiers["high"] = {"return_mean": returns.mean(), "return_std": returns.std(), "episodes": len(returns)}
            tiers["high"]["steps"] = len(demos["rewards"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        fail(f"{source} has no such data, or it cannot be read ({error!r})")
    if not pairs:
        fail(f"--share {args.share} leaves no pair")

    half = output.with_name(f".{output.name}.tmp")  # whole or not at all
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for name in names[:3]:
        shutil.copy(source / name, half)
    if args.demos is not None:
        np.savez_compressed(half / "high.npz", **demos)
    with open(half / "pairs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, pairs[0], lineterminator="\n")
        table.writeheader()
        table.writerows(pairs)
    variant = {
        "env_id": manifest.get("env_id", args.env),
        "variant": {
            "share": args.share,
            "flip": args.flip,
            "demos": args.demos,
            "seed": args.seed,
            "of": manifest.get("sha256"),
        },
        "counts": {**manifest.get("counts", {}), "pairs": len(pairs)},
        "tiers": tiers,
        "sha256": {n: hashlib.sha256((half / n).read_bytes()).hexdigest() for n in names if n != "manifest.json"},
    }
    (half / "manifest.json").write_text(json.dumps(variant, indent=2) + "\n")
    os.replace(half, output)
    print(f"{len(pairs)} pairs, {round(args.flip * len(pairs))} of them flipped, in {output}")
