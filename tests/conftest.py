"""The scripts are no package: their folders go on sys.path. No GPU, and torch has one thread."""

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / name) for name in ("data_gen", "tests", "benchmark"))]
torch.set_num_threads(1)
