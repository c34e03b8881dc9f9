"""Image files in folders by split and class.

ImageNet's layout is `train/<wnid>/*.JPEG`, `val/<wnid>/*.JPEG`; Tiny-ImageNet's is
`train/<wnid>/images/*.JPEG` and `val/images/*.JPEG` with `val/val_annotations.txt`.
Files are stored as they are; only their names are held in memory.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from m2mkd_ray.data.importers.options import pairs
from m2mkd_ray.data.importers.source import Sample, Source, SplitSource
from m2mkd_ray.data.index import ClassName
from m2mkd_ray.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
SPLITS = ("train", "val", "validation", "test")
ANNOTATIONS = "val_annotations.txt"


class ImageFolderOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of the import."""

    splits: str = ""
    """Folder of each split, `train=train,val=val`; empty: those of train, val, validation and test with labels."""
    licence: str = "as the source"


def is_image_folder(path: Path) -> bool:
    """Whether the path holds a folder of a split with folders of classes."""
    return path.is_dir() and any(_has_labels(path / split) for split in SPLITS)


def open_image_folder(path: Path, options: ImageFolderOptions) -> Source:
    """The images below a folder; class names are those of the first split's folders, or of `wnids.txt`."""
    folders = _split_folders(path, options.splits)
    first = next(iter(folders.values()))
    ids = sorted(_lines(path / "wnids.txt")) or _class_folders(first)
    names = _names(path)
    labels = {id_: label for label, id_ in enumerate(ids)}
    splits = {}
    for split, folder in folders.items():
        files = list(_annotated(folder) if (folder / ANNOTATIONS).exists() else _in_class_folders(folder))
        if not files:
            raise DataError(f"{folder} (split {split}) has no image files ({', '.join(sorted(SUFFIXES))}).")
        splits[split] = SplitSource(
            len(files), partial(_sample, path, labels, files), needs_every_class=folder == first
        )
    return Source(
        classes=tuple(ClassName(id=id_, name=names.get(id_, id_)) for id_ in ids),
        splits=splits,
        licence=options.licence,
        origin=f"image folder {path.resolve().name}",
    )


def _split_folders(path: Path, splits: str) -> dict[str, Path]:
    chosen = {split: path / folder for split, folder in pairs(splits, "train=FOLDER,val=FOLDER").items()}
    folders = chosen or {split: path / split for split in SPLITS if _has_labels(path / split)}
    if not folders:
        raise DataError(
            f"{path} has no folder of a split ({', '.join(SPLITS)}) with a folder for each class. "
            "Name the folders with --option splits=train=FOLDER,val=FOLDER; files that lie in one heap "
            "have to be moved to folders of their classes first."
        )
    if without := [str(folder) for folder in folders.values() if not _has_labels(folder)]:
        raise DataError(f"No folders of classes and no {ANNOTATIONS} in {', '.join(without)}.")
    return folders


def _has_labels(folder: Path) -> bool:
    # A lone folder `images` is Tiny-ImageNet's heap of test images, which have no labels.
    return (folder / ANNOTATIONS).exists() or _class_folders(folder) not in ([], ["images"])


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _in_class_folders(folder: Path) -> Iterator[tuple[str, str]]:
    """File and class of every image, sorted."""
    for class_folder in _class_folders(folder):
        for where, below, files in os.walk(folder / class_folder):
            below.sort()
            yield from ((f"{where}/{file}", class_folder) for file in sorted(files) if _is_image(file))


def _annotated(folder: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(folder / ANNOTATIONS), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise DataError(f"{folder / ANNOTATIONS}, line {number}: expected file, tab, class; found {line!r}.")
        yield str(folder / "images" / fields[0]), fields[1]


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in SUFFIXES


def _sample(root: Path, labels: dict[str, int], files: list[tuple[str, str]], number: int) -> Sample:
    file, class_id = files[number]
    return Sample(os.path.relpath(file, root), labels.get(class_id, class_id), Path(file).read_bytes)


def _names(path: Path) -> dict[str, str]:
    """Names by WordNet id, from Tiny-ImageNet's `words.txt` or Kaggle's `LOC_synset_mapping.txt`."""
    words = [line.partition("\t") for line in _lines(path / "words.txt")]
    mapping = [line.partition(" ") for line in _lines(path / "LOC_synset_mapping.txt")]
    return {id_: name for id_, _, name in words + mapping}


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.strip()] if file.exists() else []
