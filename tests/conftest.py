"""What every test has: one thread and a fixed seed, so that numbers repeat on any machine; and the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test that draws without a generator of its own draws the same, alone or after others."""
    torch.manual_seed(0)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def m2mkd(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The command line, in this process."""
    from m2mkd_ray.cli import main

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, said.out, said.err)

    return call


TINY = """
from: demo
data: {max_rows: 160, validation: {max_rows: 40}}
blueprint:
  teacher: {width: 16, depth: 2, num_heads: 2}
  teacher_depths: [1, 1]
  student: {vit: {width: 16, depth: 2, num_heads: 2}, moe: {num_experts: 2, top_k: 1}}
  student_depths: [1, 1]
meta: {epochs: 0.2, warmup_epochs: 0, batch_size: 32}
teacher: {source: trained, incubation: null, phase: {epochs: 0.2, warmup_epochs: 0, batch_size: 32}}
pairs: {epochs: 0.2, warmup_epochs: 0, batch_size: 32}
finetune: {epochs: 0.2, warmup_epochs: 0, batch_size: 32}
placement: {finetune: {engine: torch}}
"""
"""The demo's flow with models of width 16 and two pairs, on 160 images, for one step of each training."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file whose whole run takes seconds."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(TINY)
    return file
