"""The scripts are no package: put their folders on sys.path; leave torch as a test expects it."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data_gen"), str(ROOT / "tests")]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def gradients_enabled():
    """A script may switch autograd off when it runs; no test may pass that on to the next."""
    torch.set_grad_enabled(True)
    yield
    torch.set_grad_enabled(True)
