"""What the scripts of data_gen share: folders to write into, arrays, rows of text, manifests."""

import hashlib
import json
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_gen import read


def open_folders(*folders: Path) -> None:
    """Makes folders, which must be writable now, not when a training is over; OSError if not."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for left_over in folder.glob(".*.[0-9]*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
            left_over.unlink(missing_ok=True)


def arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file .npz of these."""

    def save(path: Path) -> None:
        with open(path, "wb") as file:  # given a path, NumPy would append .npz
            np.savez_compressed(file, **arrays)

    read.write_whole(path, save)


def rows(path: Path, rows: list[dict]) -> None:
    """A file .jsonl of these."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    read.write_whole(path, lambda path: path.write_text(text, encoding="utf-8"))


def manifest(folder: Path, files: list[str], args, packages: str, found: dict) -> None:
    """manifest.json: what made these files of the folder, what was found, and their SHA-256."""
    names = ["numpy", "torch", *packages.split()]
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in names}
    about = {"command": shlex.join(["python", *sys.argv]), "seed": args.seed}
    about |= {"arguments": asdict(args), "versions": versions}
    about |= {"created": time.strftime("%Y-%m-%d"), **found}
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    text = json.dumps(about | {"sha256": hashes}, indent=2, ensure_ascii=False, default=str) + "\n"
    path = folder / "manifest.json"
    read.write_whole(path, lambda path: path.write_text(text, encoding="utf-8"))
