"""The IDX files of the MNIST family (yann.lecun.com/exdb/mnist), plain or gzip."""

import gzip
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from m2mkd_ray.data.importers.source import Sample, Source, SplitSource, png
from m2mkd_ray.data.index import ClassName
from m2mkd_ray.errors import DataError

FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""github.com/zalandoresearch/fashion-mnist, README, "Labels"."""
PREFIXES = {"train": "train", "test": "t10k"}


class IdxOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of the import."""

    classes: str = ""
    """Class names with commas between them; empty: Fashion-MNIST's if the path says so, else the labels."""
    licence: str = "as the source"


def is_idx(path: Path) -> bool:
    """Whether the folder holds the training images of an IDX set."""
    return path.is_dir() and any(path.glob("train-images*idx3-ubyte*"))


def open_idx(path: Path, options: IdxOptions) -> Source:
    """The set in a folder of `train-images-idx3-ubyte[.gz]` and its like."""
    splits = read_arrays(path)
    num_classes = 1 + max(int(labels.max(initial=0)) for _, labels in splits.values())
    names = tuple(options.classes.split(",")) if options.classes else ()
    if not names and "fashion" in str(path.resolve()).lower():
        names = FASHION
    names = names or tuple(map(str, range(num_classes)))
    return Source(
        classes=tuple(ClassName(id=str(label), name=name) for label, name in enumerate(names)),
        splits=sources(splits),
        licence=options.licence,
        origin=f"IDX files of {path.name}",
    )


def sources(splits: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, SplitSource]:
    """Images uint8 (n, H, W[, 3]) and labels (n,) of each split, to be stored as PNG."""
    return {
        split: SplitSource(len(labels), partial(_sample, split, images, labels), needs_every_class=split == "train")
        for split, (images, labels) in splits.items()
    }


def _sample(split: str, images: np.ndarray, labels: np.ndarray, number: int) -> Sample:
    return Sample(f"{split}/{number:06d}.png", int(labels[number]), partial(png, images[number]))


def read_arrays(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 (n, H, W) and labels (n,) of the splits train and test.

    Raises:
        DataError: a file is missing, damaged or has no partner of its length.
    """
    return {split: _arrays(folder, prefix) for split, prefix in PREFIXES.items()}


def _arrays(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(_file(folder, f"{prefix}-images"), 3), read_idx(_file(folder, f"{prefix}-labels"), 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {prefix} has {len(images)} images, but {len(labels)} labels.")
    return images, labels


def _file(folder: Path, prefix: str) -> Path:
    found = sorted(folder.glob(f"{prefix}*ubyte*"))
    if not found:
        raise DataError(f"{folder} has no file {prefix}-idx?-ubyte or {prefix}-idx?-ubyte.gz.")
    return found[0]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file.

    Raises:
        DataError: it is of another form, or its length is not what its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise DataError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions: expected it to begin with "
            f"{bytes([0, 0, 8, dimensions]).hex()}, found {content[:4].hex()}."
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) - header != np.prod(shape):
        raise DataError(f"{path}: expected {np.prod(shape)} bytes for shape {shape}, found {len(content) - header}.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
