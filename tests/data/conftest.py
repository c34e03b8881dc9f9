"""Small data sets of real PNG files in Parquet, made by the writer under test."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from m2mkd_ray.data.importers.source import Sample, Source, SplitSource, png
from m2mkd_ray.data.importers.write import WriteConfig, write
from m2mkd_ray.data.index import ClassName, DatasetFolder

CLASSES = ("ant", "bee", "cat")
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def pictures(num_rows: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random uint8 pictures, of which the first two values are the row number."""
    images = np.random.default_rng(seed).integers(0, 256, (num_rows, *shape), dtype=np.uint8)
    flat = images.reshape(num_rows, -1)
    flat[:, 0], flat[:, 1] = np.arange(num_rows) // 256, np.arange(num_rows) % 256
    return images


def array_source(images: np.ndarray, labels: np.ndarray, split: str = "train") -> Source:
    """A source of one split that keeps the order of its arrays."""

    def sample(number: int) -> Sample:
        return Sample(f"{number}.png", int(labels[number]), partial(png, images[number]))

    return Source(
        classes=tuple(ClassName(id=name, name=name) for name in CLASSES),
        splits={split: SplitSource(len(labels), sample, shuffle=False)},
        licence="MIT",
        origin="a test",
    )


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., DatasetFolder]:
    """Make a data set of one split `train`; row i has label i modulo 3."""

    def make(
        num_rows: int = 100, shape: tuple[int, ...] = (8, 8), rows_per_group: int = 8, name: str = "small"
    ) -> DatasetFolder:
        source = array_source(pictures(num_rows, shape), np.arange(num_rows) % 3)
        config = WriteConfig(name=name, rows_per_group=rows_per_group, groups_per_shard=4)
        write(source, tmp_path / "data", config)
        return DatasetFolder.open(tmp_path / "data" / name)

    return make


@pytest.fixture
def shared() -> Path:
    """The folder of larger data sets beside the project, where there is one."""
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not on this machine")
    return SHARED
