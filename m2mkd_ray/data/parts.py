"""Parts of a split, written as TensorFlow Datasets and Hugging Face's `datasets` do: `train[5000:]`, `train[:10%]`.

Rows are counted in their stored order, which importers shuffle, from zero; negative
numbers count from the end, as in Python, and percentages are of all rows, rounded down.
So `train[:5000]` and `train[5000:]` have no row in common, and all of them together:
settings can be chosen on images that neither are trained on nor are a test's.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from m2mkd_ray.errors import DataError

if TYPE_CHECKING:
    from m2mkd_ray.data.index import DatasetFolder

_PART = re.compile(r"(?P<split>[^\[\]]+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")
FORM = "a part of a split is written train[5000:], train[:5000] or train[:10%]"


def whole(split: str) -> str:
    """The split that it is a part of (`train` of `train[5000:]`); itself if it is none."""
    found = _PART.fullmatch(split)
    return split if found is None else found["split"]


def rows_of(split: str, num_rows: int) -> range:
    """Numbers of its rows among the `num_rows` of the whole split.

    Raises:
        DataError: there are none.
    """
    found = _PART.fullmatch(split)
    if found is None:
        return range(num_rows)
    rows = range(num_rows)[slice(_bound(found["start"], num_rows), _bound(found["stop"], num_rows))]
    if not rows:
        raise DataError(f"There is no row in {split!r}: {found['split']!r} has {num_rows:,} rows.")
    return rows


def parts_problems(folder: "DatasetFolder", trained: str, watched: str) -> Iterator[str]:
    """What is wrong with parts of a split of which one is trained on and one is validated on, in sentences.

    They have to be apart, and rows of a part have to be like the others.

    Raises:
        DataError: one of the two is not there.
    """
    parts = {name: folder.part(name) for name in (trained, watched) if name != whole(name)}
    if parts and whole(trained) == whole(watched):
        first, second = folder.part(trained), folder.part(watched)
        common = min(first.stop, second.stop) - max(first.start, second.start)
        if common > 0:
            yield (
                f"data.validation.split {watched!r} has {common:,} of the rows that are trained on (data.split "
                f"{trained!r}). Set both so that they have none in common, such as data.split={whole(trained)}[5000:] "
                f"and data.validation.split={whole(trained)}[:5000]."
            )
    for name, part in parts.items():
        labels = folder.rows(whole(name)).labels
        found = len(np.unique(labels[part.start : part.stop]))
        drawn = len(np.unique(np.random.default_rng(0).choice(labels, len(part), replace=False)))
        if found < drawn / 2:
            yield (
                f"{name!r} of {folder.index.name!r} has images of {found} classes, where as many of its rows in any "
                f"order have about {drawn}: they lie sorted by class. Use another split, or import the images in "
                f"another order."
            )


def _bound(text: str | None, num_rows: int) -> int | None:
    if text is None or not text.endswith("%"):
        return None if text is None else int(text)
    share = int(text[:-1])
    return int(share * num_rows / 100) if share >= 0 else -int(-share * num_rows / 100)
