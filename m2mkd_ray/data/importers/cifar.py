"""CIFAR-10 and CIFAR-100 (cs.toronto.edu/~kriz/cifar.html), python and binary version."""

import io
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from m2mkd_ray.data.importers.idx import sources
from m2mkd_ray.data.importers.source import Source
from m2mkd_ray.data.index import ClassName
from m2mkd_ray.errors import DataError

PIXELS = 3 * 32 * 32
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "cifar-10 python": {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    "cifar-10 binary": {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    "cifar-100 python": {"train": ("train",), "test": ("test",)},
    "cifar-100 binary": {"train": ("train.bin",), "test": ("test.bin",)},
}
CLASS_FILES = {
    "cifar-10 python": "batches.meta",
    "cifar-10 binary": "batches.meta.txt",
    "cifar-100 python": "meta",
    "cifar-100 binary": "fine_label_names.txt",
}
_KNOWN_FILES = {file for layout in LAYOUTS.values() for files in layout.values() for file in files} | {
    *CLASS_FILES.values()
}
Images = tuple[np.ndarray, np.ndarray]
"""uint8 (n, 32, 32, 3) and labels (n,)."""


class CifarOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of the import."""

    licence: str = "none stated"


def is_cifar(path: Path) -> bool:
    """Whether the path looks like one of the archives, packed or not."""
    if path.is_dir():
        return any((path / file).is_file() for file in CLASS_FILES.values())
    return path.name.startswith("cifar-") and path.name.endswith((".tar.gz", ".tgz", ".tar"))


def open_cifar(path: Path, options: CifarOptions) -> Source:
    """The data set in an archive or in the folder that it unpacks to."""
    files = _unpacked(path)
    layout = next((name for name, file in CLASS_FILES.items() if file in files), None)
    if layout is None:
        raise DataError(f"{path} is no CIFAR archive: expected one of {', '.join(CLASS_FILES.values())} in it.")
    missing = [file for split in LAYOUTS[layout].values() for file in split if file not in files]
    if missing:
        raise DataError(f"{path} is {layout}, but lacks {', '.join(missing)}.")
    splits = {
        split: _joined([_images(layout, f"{path}: {name}", files[name]) for name in names])
        for split, names in LAYOUTS[layout].items()
    }
    names = _class_names(layout, files[CLASS_FILES[layout]])
    return Source(
        classes=tuple(ClassName(id=name, name=name) for name in names),
        splits=sources(splits),
        licence=options.licence,
        origin=f"{layout} version of {path.name}",
    )


def _unpacked(path: Path) -> dict[str, bytes]:
    """Content of the known files by name, wherever they lie in the folder or archive."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir() if file.name in _KNOWN_FILES}
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive if m.isfile() and Path(m.name).name in _KNOWN_FILES]
            opened = {Path(member.name).name: archive.extractfile(member) for member in members}
            return {name: file.read() for name, file in opened.items() if file is not None}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}. Get it again.") from error


def _images(layout: str, name: str, content: bytes) -> Images:
    if layout.endswith("python"):
        batch = unpickle(content, name)
        labels = np.asarray(batch.get(b"labels", batch.get(b"fine_labels", [])))
        data = np.asarray(batch.get(b"data"))
        if labels.dtype.kind != "i" or data.dtype != np.uint8 or data.shape != (len(labels), PIXELS):
            raise DataError(f"{name}: expected uint8 data of {PIXELS} values a row and labels, found {sorted(batch)}.")
        return _as_pictures(data), labels
    label_bytes = 2 if "100" in layout else 1  # CIFAR-100: coarse, then fine
    rows, rest = divmod(len(content), label_bytes + PIXELS)
    if rest:
        raise DataError(
            f"{name}: expected a multiple of {label_bytes + PIXELS} bytes, found {len(content)}. Get it again."
        )
    table = np.frombuffer(content, np.uint8).reshape(rows, -1)
    return _as_pictures(table[:, label_bytes:]), table[:, label_bytes - 1].astype(np.int64)


def _as_pictures(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _joined(parts: list[Images]) -> Images:
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _class_names(layout: str, content: bytes) -> list[str]:
    if layout.endswith("binary"):
        return content.decode().split()
    meta = unpickle(content, CLASS_FILES[layout])
    names = meta.get(b"label_names", meta.get(b"fine_label_names"))
    if not isinstance(names, list):
        raise DataError(f"{CLASS_FILES[layout]}: expected label_names or fine_label_names, found {sorted(meta)}.")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


class _PlainUnpickler(pickle.Unpickler):
    """Arrays and plain values only: a pickle may otherwise run any code."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return super().find_class("numpy._core.multiarray" if module == "numpy.core.multiarray" else module, name)


def unpickle(content: bytes, name: str) -> Mapping[bytes, object]:
    """The dictionary in a pickle of arrays and plain values.

    Raises:
        DataError: it holds anything else.
    """
    try:
        loaded = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise DataError(f"{name} cannot be unpickled safely: {error}. Get it again from its source.") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{name}: expected a dictionary, found {type(loaded).__name__}.")
    return loaded
