"""What an importer makes of a folder or an archive: rows that can be asked for by number."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from m2mkd_ray.data.index import ClassName


@dataclass(frozen=True)
class Sample:
    """A row of a source."""

    path: str
    """Its name in the source: a file, or where in a file."""
    label: int | str
    """A label, or what stands in its place and is no class of the source."""
    read: Callable[[], bytes]
    """The encoded image; called in a thread."""


@dataclass(frozen=True)
class SplitSource:
    """The rows of a split."""

    rows: int
    sample: Callable[[int], Sample]
    """The row of that number, below `rows`; cheap but for `Sample.read`."""
    shuffle: bool = True
    """Whether rows may be taken in any order; if not, they are imported as they come."""
    needs_every_class: bool = False
    """Whether a class without a row is a problem."""


@dataclass(frozen=True)
class Source:
    """A data set that can be imported."""

    classes: tuple[ClassName, ...]
    splits: Mapping[str, SplitSource]
    licence: str
    origin: str
    """Where the images come from, for people."""


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W), (H, W, 1) or (H, W, 3) without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(file, "PNG")
    return file.getvalue()
