"""Images and labels as NumPy arrays in a .npz file."""

import zipfile
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from m2mkd_ray.data.importers.idx import sources
from m2mkd_ray.data.importers.options import pairs
from m2mkd_ray.data.importers.source import Source
from m2mkd_ray.data.index import ClassName
from m2mkd_ray.errors import DataError


class NpzOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of the import."""

    splits: str = "train=images:labels"
    """Arrays of each split, `train=x_train:y_train,test=x_test:y_test`.

    Images are uint8 (n, H, W), (n, H, W, 1) or (n, H, W, 3), labels integers (n,).
    """
    classes: str = "classes"
    """Array of class names; if there is none, labels are their own names."""
    licence: str = "as the source"


def is_npz(path: Path) -> bool:
    """Whether it is a .npz file."""
    return path.is_file() and path.suffix == ".npz"


def open_npz(path: Path, options: NpzOptions) -> Source:
    """The arrays that the options name."""
    named = {
        split: arrays.partition(":")[::2]
        for split, arrays in pairs(options.splits, "train=IMAGES:LABELS,test=IMAGES:LABELS").items()
    }
    content = load_npz(path, [name for both in named.values() for name in both])
    splits = {split: (content[images], content[labels]) for split, (images, labels) in named.items()}
    for split, (images, labels) in splits.items():
        _check(f"{path}, split {split}", images, labels)
    names = content.get(options.classes)
    if names is None:
        names = np.arange(1 + max(int(labels.max(initial=0)) for _, labels in splits.values()))
    return Source(
        classes=tuple(ClassName(id=str(name), name=str(name)) for name in names.tolist()),
        splits=sources(splits),
        licence=options.licence,
        origin=path.name,
    )


def load_npz(path: Path, needed: list[str]) -> dict[str, np.ndarray]:
    """All arrays of a file, by name.

    Raises:
        DataError: it cannot be read, or lacks some of `needed`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in needed if name not in file]
            if missing:
                raise DataError(f"{path} has no array {', '.join(missing)}; it has {', '.join(file)}.")
            return {name: file[name] for name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a .npz file: {error}") from error


def _check(where: str, images: np.ndarray, labels: np.ndarray) -> None:
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
    if images.dtype != np.uint8 or not fits:
        raise DataError(
            f"{where}: expected images uint8 (n, H, W), (n, H, W, 1) or (n, H, W, 3), "
            f"found {images.dtype} {images.shape}."
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(f"{where}: expected {len(images)} integer labels, found {labels.dtype} {labels.shape}.")
