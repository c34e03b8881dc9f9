"""The digits of scikit-learn: 1,797 images of 8×8 pixels that come with the package; for smoke tests."""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from m2mkd_ray.data.importers.idx import sources
from m2mkd_ray.data.importers.source import Source
from m2mkd_ray.data.index import ClassName
from m2mkd_ray.errors import DataError


class DigitsOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of the import."""

    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of the images that becomes the test split."""
    seed: int = 0
    """Of the split."""


def is_digits(path: Path) -> bool:
    """Whether the source is named sklearn."""
    return path.name == "sklearn"


def open_digits(path: Path, options: DigitsOptions) -> Source:
    """The images of the installed package, whatever the path."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(options.seed).permutation(len(images))
    num_test = round(options.test_share * len(images))
    rows = {"train": np.sort(order[num_test:]), "test": np.sort(order[:num_test])}
    return Source(
        classes=tuple(ClassName(id=str(digit), name=str(digit)) for digit in range(10)),
        splits=sources({split: (images[of_split], digits.target[of_split]) for split, of_split in rows.items()}),
        licence="CC-BY-4.0",
        origin="scikit-learn load_digits; UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak)",
    )
