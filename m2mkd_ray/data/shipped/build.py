"""Make the data set that ships with the package from the files of Fashion-MNIST.

    python -m m2mkd_ray.data.shipped.build --source FOLDER

FOLDER holds the four IDX files (github.com/zalandoresearch/fashion-mnist; Debian's
package dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist). The
same files give the same bytes.

- train: 8,000 of the 60,000 training images, 800 a class, drawn with a seed
- validation: 2,000 others of them, 200 a class: to choose settings on
- test: 2,000 of the 10,000 test images, 200 a class
- corrupted: those 2,000 again, each with one of eight corruptions at severity 3,
  25 of each corruption a class; `path` says which
"""

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from m2mkd_ray.data.corruptions import corrupt
from m2mkd_ray.data.importers.idx import FASHION, read_arrays
from m2mkd_ray.data.importers.source import Sample, Source, SplitSource, png
from m2mkd_ray.data.importers.write import WriteConfig, write
from m2mkd_ray.data.index import SHIPPED, ClassName, Index
from m2mkd_ray.data.lanes import balanced

NAME = "fashion-mnist-small"
SHIFTS = (
    "gaussian_noise",
    "impulse_noise",
    "gaussian_blur",
    "pixelate",
    "contrast",
    "rotate",
    "translate",
    "invert",
)
SEVERITY = 3
SEED = 2017


def build(
    source: Path, out: Path, *, train_rows: int = 8000, validation_rows: int = 2000, test_rows: int = 2000
) -> Index:
    """Write the data set to `out/fashion-mnist-small`, anew.

    Raises:
        DataError: the files in `source` are missing or damaged.
    """
    folder = out / NAME
    if folder.exists():
        shutil.rmtree(folder)
    arrays = read_arrays(source)
    train, test = arrays["train"], arrays["test"]
    train_kept = balanced(train[1], train_rows, SEED)
    train_drawn = np.random.default_rng(SEED).permutation(train_kept)
    # With the same seed a larger draw holds the smaller one.
    validation_drawn = np.setdiff1d(balanced(train[1], train_rows + validation_rows, SEED), train_kept)
    test_drawn = balanced(test[1], test_rows, SEED)
    splits = {
        "train": SplitSource(train_rows, partial(_sample, "train", *train, train_drawn), shuffle=False),
        "validation": SplitSource(validation_rows, partial(_sample, "train", *train, validation_drawn), shuffle=False),
        "test": SplitSource(test_rows, partial(_sample, "test", *test, test_drawn), shuffle=False),
        "corrupted": SplitSource(
            test_rows, partial(_shifted, *test, test_drawn, _deal(test[1][test_drawn])), shuffle=False
        ),
    }
    fashion = Source(
        classes=tuple(ClassName(id=str(label), name=name) for label, name in enumerate(FASHION)),
        splits=splits,
        licence="MIT",
        origin="Fashion-MNIST, Zalando SE, github.com/zalandoresearch/fashion-mnist (see NOTICE.md)",
    )
    return write(fashion, out, WriteConfig(name=NAME, imported={"kind": "m2mkd_ray.data.shipped.build"}))


def _deal(labels: np.ndarray) -> np.ndarray:
    """A corruption for every row, so that every class has as many of each."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return turn % len(SHIFTS)


def _sample(split: str, images: np.ndarray, labels: np.ndarray, drawn: np.ndarray, row: int) -> Sample:
    number = int(drawn[row])
    return Sample(f"{split}/{number:05d}.png", int(labels[number]), partial(png, images[number]))


def _shifted(images: np.ndarray, labels: np.ndarray, drawn: np.ndarray, shifts: np.ndarray, row: int) -> Sample:
    number, shift = int(drawn[row]), SHIFTS[shifts[row]]
    path = f"corrupted/{shift}-{SEVERITY}/{number:05d}.png"
    return Sample(path, int(labels[number]), lambda: png(corrupt(images[number][..., None], shift, SEVERITY, number)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the data set in its place in the package, or in another folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder for the data set (default: the package's)")
    options = parser.parse_args(arguments)
    build(options.source, options.out)


if __name__ == "__main__":
    main()
