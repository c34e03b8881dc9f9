"""Parquet shards: the rows of a split, written once and read in row groups.

Columns are `image: struct<bytes, path>` and `label: int64`, as image sets on the
Hugging Face Hub have them, so that any Parquet reader opens a shard; images stay
encoded (PNG, JPEG). A row group is what is read at once: small enough to hold
several in memory, large enough for one request to an object store.

A shard is written under a temporary name and renamed when it is whole; its bytes
depend only on its rows, so an import that was killed and goes on ends with the
same files. WebDataset tar files were turned down: they have no row groups, so a
row cannot be reached without reading all before it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from m2mkd_ray.errors import DataError

SCHEMA = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])


class Shard(BaseModel, frozen=True, extra="forbid"):
    """A Parquet file."""

    file: str
    """Name beside the index."""
    rows: int
    row_groups: tuple[int, ...]
    """Rows of each row group, so that no footer need be read to plan an epoch."""
    bytes: int
    """Size of the file."""
    sha256: str


@dataclass(frozen=True)
class Row:
    """An image as it is stored."""

    image: bytes
    """PNG, JPEG or another format that Pillow reads."""
    path: str
    """Its name in the source."""
    label: int


class Rows:
    """Encoded images and labels of a split, by row number; row groups are read when asked for.

    Pickles small (for loader workers): what was read stays behind.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], cached_groups: int = 4, part: range | None = None
    ) -> None:
        """`part`: only these consecutive rows of the shards, numbered from zero; None: all."""
        self._folder = folder
        self._shards = tuple(shards)
        self._places = [(shard, i) for shard in self._shards for i in range(len(shard.row_groups))]
        sizes = (size for shard in self._shards for size in shard.row_groups)
        self._starts = np.array([0, *accumulate(sizes)])
        self._part = range(int(self._starts[-1])) if part is None else part
        """Row numbers in the shards."""
        bounds = np.unique(np.clip(self._starts, self._part.start, self._part.stop)) - self._part.start
        self.row_groups = [range(start, stop) for start, stop in pairwise(bounds.tolist())]
        """Row numbers of each row group; of those at the ends of a part, of what is in it."""
        self.cached_groups = cached_groups
        """Row groups kept in memory; the least recently used one goes."""
        self._cache: OrderedDict[int, list[bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._part)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": OrderedDict()}

    @property
    def encoded_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self._shards)

    @cached_property
    def labels(self) -> np.ndarray:
        """Label of every row, int64."""
        chunks = [chunk for shard in self._shards for chunk in self._read(shard, None, "label").column(0).chunks]
        # Not by `to_numpy`, which imports pandas: 0.2 s of every new worker.
        labels = np.concatenate([np.zeros(0, np.int64), *map(np.from_dlpack, chunks)])
        return labels[self._part.start : self._part.stop]

    @cached_property
    def paths(self) -> list[str]:
        """Name of every row's image in its source."""
        tables = [self._read(shard, None, "image.path") for shard in self._shards]
        paths = [path for table in tables for path in table.flatten().column(0).to_pylist()]
        return paths[self._part.start : self._part.stop]

    def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The encoded images of these rows, in this order.

        Raises:
            DataError: a shard is missing or cannot be read.
        """
        wanted = np.asarray(indices, dtype=np.int64) + self._part.start
        groups = np.searchsorted(self._starts, wanted, side="right") - 1
        images = [b""] * len(wanted)
        for group in np.unique(groups).tolist():
            in_group = self._group(group)
            for place in np.flatnonzero(groups == group).tolist():
                images[place] = in_group[wanted[place] - self._starts[group]]
        return images

    def _group(self, group: int) -> list[bytes]:
        if group not in self._cache:
            shard, row_group = self._places[group]
            table = self._read(shard, row_group, "image.bytes")
            self._cache[group] = table.flatten().column(0).to_pylist()
        self._cache.move_to_end(group)
        while len(self._cache) > max(1, self.cached_groups):
            self._cache.popitem(last=False)
        return self._cache[group]

    def _read(self, shard: Shard, row_group: int | None, column: str) -> pa.Table:
        path = self._folder / shard.file
        try:
            with pq.ParquetFile(path) as file:
                found = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
                if found == shard.row_groups:
                    return file.read([column]) if row_group is None else file.read_row_group(row_group, [column])
        except (OSError, pa.ArrowException) as error:
            size = path.stat().st_size if path.exists() else 0
            raise DataError(
                f"Shard {path} cannot be read: expected {shard.rows} rows in {shard.bytes} bytes, found {size} bytes "
                f"({error}). Remove the folder and import the data set again."
            ) from error
        raise DataError(
            f"Shard {path} is not the one in the index: expected row groups of {_brief(shard.row_groups)} rows, "
            f"found {_brief(found)}. Remove the folder and import the data set again."
        )


def _brief(sizes: Sequence[int]) -> str:
    return ", ".join(str(size) for size in sizes[:4]) + (f", ... ({len(sizes)} groups)" if len(sizes) > 4 else "")


class ShardWriter:
    """Writes the rows of a split to shards `<split>-00000.parquet`, ... in the order they are added.

    `shards` are the whole ones so far. A writer that starts with the `shards` of
    one that was killed, and is given the rows after theirs, ends with the same files.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        rows_per_group: int = 256,
        groups_per_shard: int = 16,
        shards: Sequence[Shard] = (),
    ) -> None:
        self._folder, self._split = folder, split
        self._rows_per_group, self._groups_per_shard = rows_per_group, groups_per_shard
        self.shards = list(shards)
        self._rows: list[Row] = []
        self._groups: list[int] = []
        self._file: pq.ParquetWriter | None = None

    def add(self, row: Row) -> bool:
        """Add a row; True if a shard became whole by it."""
        self._rows.append(row)
        if len(self._rows) == self._rows_per_group:
            self._end_group()
            if len(self._groups) == self._groups_per_shard:
                self._end_shard()
                return True
        return False

    def close(self) -> None:
        """Write what is left; the last shard and the last row group may be smaller."""
        if self._rows:
            self._end_group()
        if self._groups:
            self._end_shard()

    def abort(self) -> None:
        """Drop the shard that is not whole."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._temporary.unlink()

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}.parquet"

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{self._name}.tmp"

    def _end_group(self) -> None:
        if self._file is None:
            # Images are compressed already: dictionaries and statistics of them would only double the size.
            self._file = pq.ParquetWriter(
                self._temporary, SCHEMA, compression="zstd", use_dictionary=False, write_statistics=False
            )
        images = [{"bytes": row.image, "path": row.path} for row in self._rows]
        table = pa.table({"image": images, "label": [row.label for row in self._rows]}, schema=SCHEMA)
        self._file.write_table(table, row_group_size=len(table))
        self._groups.append(len(table))
        self._rows = []

    def _end_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        shard = Shard(
            file=self._name,
            rows=sum(self._groups),
            row_groups=tuple(self._groups),
            bytes=self._temporary.stat().st_size,
            sha256=sha256(self._temporary),
        )
        self._temporary.rename(self._folder / shard.file)
        self.shards.append(shard)
        self._groups, self._file = [], None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
