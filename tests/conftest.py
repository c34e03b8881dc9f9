"""What every test has: one thread and a fixed seed, so that numbers repeat on any machine."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test that draws without a generator of its own draws the same, alone or after others."""
    torch.manual_seed(0)
