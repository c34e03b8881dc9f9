"""What a data set holds, and where it is found.

    <data_root>/<name>/index.json             written last: its presence is completeness
                       train-00000.parquet    see `shards.py`
                       test-00000.parquet

The index has the sha256 of every shard, so that a data set names its contents
(`Index.fingerprint`, which goes into the keys of what is trained on it) and a
damaged file is found before it is trained on.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ValidationError

from m2mkd_ray.data.catalog import DATASETS
from m2mkd_ray.data.parts import FORM, rows_of, whole
from m2mkd_ray.data.shards import Rows, Shard, sha256
from m2mkd_ray.errors import DataError

INDEX = "index.json"
JOURNAL = ".journal.json"
"""How far an import is; gone when the index is there."""
SHIPPED = Path(__file__).parent / "shipped"


class ClassName(BaseModel, frozen=True, extra="forbid"):
    """A class; its label is its place in `Index.classes`."""

    id: str
    """Name in the source: a folder, a WordNet id."""
    name: str
    """Name for people."""


class Split(BaseModel, frozen=True, extra="forbid"):
    """A part of a data set: training images, test images, a shifted test set."""

    rows: int
    rows_per_class: tuple[int, ...]
    shards: tuple[Shard, ...]
    bad: dict[str, int] = {}
    """Rows of the source that were left out at import, by problem."""


class Index(BaseModel, frozen=True, extra="forbid"):
    """What a data set holds; the content of `index.json`."""

    name: str
    licence: str
    source: str
    """Where the images come from, for people."""
    classes: tuple[ClassName, ...]
    splits: dict[str, Split]
    imported: dict[str, str] = {}
    """Kind and settings of the import."""

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that stand for classes, images and labels, whatever the name or the place."""
        contents = {
            "classes": [label.model_dump() for label in self.classes],
            "splits": {name: [shard.sha256 for shard in split.shards] for name, split in sorted(self.splits.items())},
        }
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class DatasetFolder:
    """A data set on disk."""

    path: Path
    index: Index

    @classmethod
    def open(cls, path: Path) -> "DatasetFolder":
        """The data set in the folder `path`.

        Raises:
            DataError: it has no index, or one that cannot be read.
        """
        file = path / INDEX
        try:
            return cls(path, Index.model_validate_json(file.read_bytes()))
        except FileNotFoundError as error:
            raise DataError(f"{path} holds no data set: {INDEX} is missing. {_unfinished(path)}".strip()) from error
        except ValidationError as error:
            raise DataError(f"{file} is not an index of this version; import the data set again. {error}") from error

    def split(self, name: str) -> Split:
        """What the index says of a split.

        Raises:
            DataError: there is none of that name; the message lists those there are.
        """
        if name not in self.index.splits:
            raise DataError(
                f"Data set {self.index.name} has no split {name!r}, only {', '.join(self.index.splits)} ({self.path})."
            )
        return self.index.splits[name]

    def part(self, split: str) -> range:
        """Row numbers, in the whole split, of a part of it (`train[5000:]`, see `parts.py`), or of all of it.

        Raises:
            DataError: there is no such split, or no row in the part.
        """
        if "[" in split and whole(split) == split:
            raise DataError(f"{split!r} is no split of {self.index.name}: {FORM}.")
        return rows_of(split, self.split(whole(split)).rows)

    def rows(self, split: str, cached_groups: int = 4) -> Rows:
        """The rows of a split or of a part of it; up to `cached_groups` row groups stay in memory.

        Raises:
            DataError: as `part`.
        """
        part = self.part(split)
        return Rows(self.path, self.split(whole(split)).shards, cached_groups, part)

    def verify(self, split: str) -> None:
        """Read every shard of a split and compare it with the index.

        Raises:
            DataError: shards are missing or differ in size or sha256; the message lists all of them.
        """
        problems = [problem for shard in self.split(split).shards if (problem := _problem(self.path, shard))]
        if problems:
            raise DataError(
                f"Data set {self.index.name}, split {split}, in {self.path} is damaged:\n  "
                + "\n  ".join(problems)
                + "\nRemove the folder and import the data set again."
            )


def find(name: str, data_root: str | None = None) -> DatasetFolder:
    """The data set `name` under `data_root`, or else the one of that name that ships with the package.

    Raises:
        DataError: it is in neither place; the message gives the command that imports it.
    """
    folders = [Path(data_root) / name] if data_root else []
    folders.append(SHIPPED / name)
    for folder in folders:
        if (folder / INDEX).exists():
            return DatasetFolder.open(folder)
    raise DataError(f"Data set {name!r} is not in {' or '.join(map(str, folders))}. " + _advice(name, folders[0]))


def rows_of_an_epoch(dataset: str, split: str, max_rows: int | None, data_root: str | None) -> int | None:
    """Rows that an epoch has of a split, or of a part of it; None if they are not there.

    Args:
        max_rows: at most so many; None: all.
        data_root: see `find`.
    """
    try:
        rows = len(find(dataset, data_root).part(split))
    except DataError:
        return None
    return min(rows, max_rows or rows)


def _advice(name: str, folder: Path) -> str:
    if _unfinished(folder):
        return _unfinished(folder)
    if name in DATASETS:
        entry = DATASETS[name]
        return f"Get {entry.title} ({entry.source}), then: {entry.how}"
    return f"Known data sets: {', '.join(DATASETS)}; for images of your own see: m2mkd data import --help"


def _unfinished(folder: Path) -> str:
    if not (folder / JOURNAL).exists():
        return ""
    return f"An import into {folder} was interrupted: give the same command again and it goes on."


def _problem(folder: Path, shard: Shard) -> str | None:
    path = folder / shard.file
    if not path.exists():
        return f"{shard.file}: missing"
    if (size := path.stat().st_size) != shard.bytes:
        return f"{shard.file}: expected {shard.bytes} bytes, found {size}"
    if (digest := sha256(path)) != shard.sha256:
        return f"{shard.file}: expected sha256 {shard.sha256}, found {digest}"
    return None
