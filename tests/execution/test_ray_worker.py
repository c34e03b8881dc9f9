"""The worker's actor as a plain object; with Ray it is tested in `test_pool.py`."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray.cloudpickle

from m2mkd_ray.execution.ray_worker import Worker
from m2mkd_ray.execution.reports import Failed
from m2mkd_ray.execution.store import Store

collects = []


def unpickled() -> None:
    """As a stage's file that ends the process when it is imported."""
    collects.append(gc.isenabled())
    raise SystemExit("no GPU here")


class Jobs:
    def __reduce__(self) -> tuple[object, ...]:
        return unpickled, ()


@pytest.fixture(params=[True, False], ids=["collecting", "not_collecting"])
def is_collecting(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the process looks for garbage."""
    if not request.param:
        gc.disable()
    yield request.param
    gc.enable()


def test_nothing_is_looked_through_for_garbage_while_a_seat_is_imported(
    is_collecting: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    worker, around = Worker(cpus=1, gpus=0), None
    collects.clear()
    (end,) = worker._run(ray.cloudpickle.dumps(Jobs()), ["a-1"], Store(str(tmp_path)), around)  # type: ignore[arg-type]
    assert isinstance(end, Failed)
    assert "no GPU here" in str(end)
    assert collects == [False]
    assert gc.isenabled() == is_collecting, "as it was before"
