"""Parquet files as the Hugging Face Hub has them: `image: struct<bytes, path>`, `label: int64`.

Class names are read from the schema's metadata: `classes` (a JSON list of names, or of
objects with `wnid` and `name`), or the features that the `datasets` library writes
under `huggingface`. Rows are taken in their order, a row group at a time.
"""

import json
import logging
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from m2mkd_ray.data.importers.options import pairs
from m2mkd_ray.data.importers.source import Sample, Source, SplitSource
from m2mkd_ray.data.index import ClassName
from m2mkd_ray.errors import DataError

logger = logging.getLogger(__name__)


class HubParquetOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of the import."""

    splits: str = ""
    """Files of each split, `train=train*.parquet,val=val.parquet`; empty: by the file name up to its first `-`."""
    image: str = "image"
    """Column of the images."""
    label: str = "label"
    """Column of the labels."""
    licence: str = "as the source"


def is_hub_parquet(path: Path) -> bool:
    """Whether it is a Parquet file, or a folder with some."""
    return (path.is_file() and path.suffix == ".parquet") or (path.is_dir() and bool(_all_files(path)))


def open_hub_parquet(path: Path, options: HubParquetOptions) -> Source:
    """The rows of a file or of the files in a folder."""
    files = _files(path, options.splits)
    every = [file for of_split in files.values() for file in of_split]
    for file in every:
        _check_columns(file, options)
    classes = _classes(every, options.label)
    first = next(iter(files))
    return Source(
        classes=classes,
        splits={
            split: _split(path, of_split, options, len(classes), needs_every_class=split == first)
            for split, of_split in files.items()
        },
        licence=options.licence,
        origin=f"Parquet files of {path.resolve().name}",
    )


def _files(path: Path, splits: str) -> dict[str, list[Path]]:
    if path.is_file():
        return {path.stem.partition("-")[0]: [path]}
    chosen = pairs(splits, "train=PATTERN,val=PATTERN")
    files = {split: sorted(path.glob(pattern)) for split, pattern in chosen.items()}
    if not chosen:
        for file in _all_files(path):
            files.setdefault(file.stem.partition("-")[0], []).append(file)
        # train first: the split that needs every class
        files = dict(sorted(files.items(), key=lambda item: (item[0] != "train", item[0])))
    if not files or not all(files.values()):
        missing = [pattern for split, pattern in chosen.items() if not files[split]] or ["*.parquet"]
        raise DataError(f"{path} has no files {', '.join(missing)}.")
    return files


def _all_files(path: Path) -> list[Path]:
    return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _check_columns(file: Path, options: HubParquetOptions) -> None:
    schema = _schema(file)
    problems = [
        f"column {name} ({wanted}) is missing"
        for name, wanted in ((options.image, "images"), (options.label, "labels"))
        if name not in schema.names
    ]
    if options.image in schema.names:
        kind = schema.field(options.image).type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            problems.append(f"column {options.image} is {kind}, expected a struct with bytes")
    if options.label in schema.names and not pa.types.is_integer(schema.field(options.label).type):
        problems.append(f"column {options.label} is {schema.field(options.label).type}, expected integers")
    if problems:
        raise DataError(
            f"{file}: {'; '.join(problems)}. Its columns are {', '.join(schema.names)}; "
            "name others with --option image=COLUMN --option label=COLUMN."
        )


def _classes(files: Sequence[Path], label: str) -> tuple[ClassName, ...]:
    metadata = _schema(files[0]).metadata or {}
    if b"classes" in metadata:
        entries = json.loads(metadata[b"classes"])
        return tuple(
            ClassName(id=entry, name=entry)
            if isinstance(entry, str)
            else ClassName(id=entry.get("wnid", entry["name"]), name=entry["name"])
            for entry in entries
        )
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    if names := features.get(label, {}).get("names"):
        return tuple(ClassName(id=name, name=name) for name in names)
    largest = max(pc.max(pq.read_table(file, columns=[label])[label]).as_py() or 0 for file in files)
    return tuple(ClassName(id=str(number), name=str(number)) for number in range(largest + 1))


def _split(
    root: Path, files: list[Path], options: HubParquetOptions, num_classes: int, *, needs_every_class: bool
) -> SplitSource:
    groups = _Groups(root, files, options)
    if groups.is_sorted(num_classes):
        logger.warning(
            "%s is sorted by label and keeps its order: batches will be of few classes. Shuffle it first.", files[0]
        )
    return SplitSource(len(groups), groups.sample, shuffle=False, needs_every_class=needs_every_class)


class _Groups:
    """The rows of several files by number, with the last row group in memory."""

    def __init__(self, root: Path, files: list[Path], options: HubParquetOptions) -> None:
        self._root, self._options = root if root.is_dir() else root.parent, options
        counted = [(file, pq.read_metadata(file)) for file in files]
        self._places = [(file, group) for file, meta in counted for group in range(meta.num_row_groups)]
        sizes = [meta.row_group(group).num_rows for _, meta in counted for group in range(meta.num_row_groups)]
        self._starts = np.array([0, *accumulate(sizes)])
        self._loaded: tuple[int, list[dict]] = (-1, [])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def is_sorted(self, num_classes: int) -> bool:
        """Whether the labels change only about as often as there are classes."""
        label = self._options.label
        files = dict.fromkeys(file for file, _ in self._places)
        labels = np.concatenate([pq.read_table(file, columns=[label])[label].to_numpy() for file in files])
        return len(labels) > 4 * num_classes and int(np.count_nonzero(np.diff(labels))) < 2 * num_classes

    def sample(self, number: int) -> Sample:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        if self._loaded[0] != group:
            file, place = self._places[group]
            columns = [self._options.image, self._options.label]
            with pq.ParquetFile(file) as opened:
                self._loaded = group, opened.read_row_group(place, columns).to_pylist()
        row = self._loaded[1][number - self._starts[group]]
        image, label = row[self._options.image] or {}, row[self._options.label]
        where = f"{self._places[group][0].relative_to(self._root)} row {number}"
        path = image.get("path") or where
        return Sample(path, label if label is not None else "null", partial(_bytes, image.get("bytes"), where))


def _bytes(image: bytes | None, where: str) -> bytes:
    if image is None:
        raise ValueError(f"{where} has no bytes, only a path to a file elsewhere")
    return image
