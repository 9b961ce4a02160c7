"""The scripts are no package: put their folders on sys.path, and leave torch as each test expects it."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data_gen")]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def gradients_enabled():
    """The scripts switch autograd off when they run; no test may pass that on to the next."""
    torch.set_grad_enabled(True)
    yield
    torch.set_grad_enabled(True)
