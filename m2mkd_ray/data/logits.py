"""A teacher's logits for the batches of a feed, kept as Parquet.

B = images of a batch, K = classes, k = top classes.

With cycled views (`FeedConfig.views`) batches repeat, so what a frozen teacher says of
them can be kept and read by later epochs, retries and other trials. A file holds
whole batches in order of (step, place): which rows each image was made from and
with which lambda, so that a reader finds out if its batches are other ones, and the
logits as float32 (the same bits), float16 (rounded), or as the k most probable classes
with their log-probabilities and the log of the mass of all others, which a reader
spreads evenly over these. The seeds and settings of the feed are in the file's
schema: from them every image can be made again.

A row group is a few whole steps, so a step is one read, and the next row group is
read while this one is used: two are in memory.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from m2mkd_ray.data.feed import FeedConfig
from m2mkd_ray.data.logit_formats import Columns, LogitsFormat, class_type, decoded, encoded, error_of, together
from m2mkd_ray.errors import DataError

_ABOUT = b"m2mkd_ray.logits"
_GROUP_BYTES = 8 * 2**20
"""Of a row group, about; at least one step."""


class LogitsAbout(BaseModel, frozen=True, extra="forbid"):
    """What a file of logits is of; in its schema."""

    feed: FeedConfig
    num_classes: int
    format: LogitsFormat
    teacher: str
    """Stands for the weights that gave the logits: the key of an artifact."""
    steps: int


class Made(Protocol):
    """What of a batch says how it was made: see `Batch`."""

    @property
    def rows(self) -> Tensor:
        """int64 (B,)."""

    @property
    def partners(self) -> Tensor:
        """int64 (B,)."""

    @property
    def lam(self) -> Tensor:
        """float32 (B,)."""


class LogitsWriter:
    """Writes the logits of the steps 0 to `about.steps`, in order; the file appears when it is whole.

    Or a part of them, to be put together by `join`: from `first` (inclusive) to `stop`.
    """

    def __init__(self, file: Path, about: LogitsAbout, first: int = 0, stop: int | None = None) -> None:
        """
        Raises:
            UsageError: the format keeps more classes than there are.
        """
        about.format.check(about.num_classes)
        self._file, self._about = file, about
        self._temporary = file.with_name(f".{file.name}.tmp")
        self._schema = _schema(about)
        self._writer = pq.ParquetWriter(
            self._temporary, self._schema, compression="none", use_dictionary=False, write_statistics=False
        )
        self._waiting: list[Columns] = []
        self._next, self._stop = first, about.steps if stop is None else stop
        self._errors: list[Mapping[str, float]] = []

    def add(self, step: int, batch: Made, logits: Tensor) -> None:
        """The logits float (B, K) of the whole batch of `step`.

        Raises:
            DataError: it is not the next step, not a whole batch, or the format cannot hold a value.
        """
        about = self._about
        shape = (about.feed.batch_size, about.num_classes)
        if step != self._next or tuple(logits.shape) != shape or len(batch.rows) != shape[0]:
            raise DataError(
                f"Writing logits to {self._file}: expected step {self._next} with logits of shape {shape}, found "
                f"step {step}, {tuple(logits.shape)} and {len(batch.rows)} rows. "
                f"Whole batches are written, one after the other."
            )
        values = logits.detach().float().cpu()
        columns = {
            "step": np.full(shape[0], step, np.int32),
            "row": batch.rows.numpy(),
            "partner": batch.partners.numpy(),
            "lam": batch.lam.numpy(),
            **encoded(values, about.format),
        }
        if about.format.kind != "float32":
            self._errors.append(error_of(values, about.format))
        self._waiting.append(columns)
        self._next += 1
        if sum(array.nbytes for waiting in self._waiting for array in waiting.values()) >= _GROUP_BYTES:
            self._end_group()

    def close(self) -> dict[str, float]:
        """Make the file whole; returns its size in bytes and, of a format that loses something, its errors.

        Raises:
            DataError: steps are missing.
        """
        if self._next != self._stop:
            self.abort()
            raise DataError(
                f"Logits in {self._file} would end before step {self._next}, expected {self._stop}: "
                f"nothing is kept. Write all steps of the cycle."
            )
        if self._waiting:
            self._end_group()
        self._writer.close()
        self._temporary.rename(self._file)
        return {"bytes": self._file.stat().st_size, **together(self._errors)}

    def close_here(self) -> dict[str, float]:
        """Make what was written so far, at least a step, the whole part; see `close`."""
        self._stop = self._next
        return self.close()

    def abort(self) -> None:
        """Drop what was written."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def _end_group(self) -> None:
        columns = {name: np.concatenate([one[name] for one in self._waiting]) for name in self._waiting[0]}
        arrays = [_to_arrow(columns[field.name], field.type) for field in self._schema]
        self._writer.write_table(pa.table(arrays, schema=self._schema), row_group_size=len(columns["row"]))
        self._waiting = []


def join(parts: Sequence[Path], file: Path) -> None:
    """Put parts, which follow each other from step 0 to the last, together; the file appears when it is whole.

    Raises:
        DataError: a part cannot be read, is of something else than the first, or steps are missing.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    schema = pq.read_schema(parts[0])
    with pq.ParquetWriter(
        temporary, schema, compression="none", use_dictionary=False, write_statistics=False
    ) as writer:
        for part in parts:
            try:
                with pq.ParquetFile(part) as parquet:
                    if not parquet.schema_arrow.equals(schema, check_metadata=True):
                        raise DataError(f"{part} holds other logits than {parts[0]}. Remove it; they are made again.")
                    for group in range(parquet.num_row_groups):
                        table = parquet.read_row_group(group)
                        writer.write_table(table, row_group_size=len(table))
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"Logits in {part} cannot be read: {error}. Remove the file.") from error
    _about(temporary)  # all steps are there
    temporary.rename(file)


class Logits:
    """Reads them: `logits(step, batch)` for a rank's part of the batch."""

    def __init__(self, file: Path, feed: FeedConfig, *, teacher: str, rank: int = 0, world: int = 1) -> None:
        """
        Args:
            feed: of the batches that logits are read for.
            teacher: the key that the file must have been written with.
            rank: has the lanes rank, rank + world, ... of every batch, as in `Batches`.

        Raises:
            DataError: the file cannot be read, or holds the logits of other batches or of another teacher.
        """
        self._file, self._feed = file, feed
        self.about = _about(file)
        problems = [
            f"{what}: expected {expected}, found {found}"
            for what, expected, found in (
                *_differences(feed, self.about.feed),
                ("teacher", teacher, self.about.teacher),
            )
            if expected != found
        ]
        if problems:
            raise DataError(
                f"{file} holds logits of other batches or another teacher. "
                + "; ".join(problems)
                + ". Remove it, and they are made again."
            )
        places = np.arange(feed.batch_size).reshape(feed.lanes, feed.rows_per_lane)
        self._mine = places[rank::world].ravel()
        with pq.ParquetFile(file) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        self._starts = np.cumsum([0, *sizes]) // feed.batch_size
        self._thread = ThreadPoolExecutor(1)
        self._coming: tuple[int, Future[Columns]] | None = None
        self._here: tuple[int, Columns] | None = None

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._file.stat().st_size

    def __call__(self, step: int, batch: Made | None = None) -> Tensor:
        """float32 (B, K) of a step; steps after the last one begin again.

        Args:
            batch: whose logits these should be; None does not check that.

        Raises:
            DataError: the batch is another one than the logits were written for, or the file is damaged.
        """
        step %= self.about.steps
        group = int(np.searchsorted(self._starts, step, side="right")) - 1
        columns = self._group(group)
        chosen = (step - self._starts[group]) * self._feed.batch_size + self._mine
        mine = {name: column[chosen] for name, column in columns.items()}
        if batch is not None:
            _require_same(mine, batch, step, self._file)
        return torch.from_numpy(decoded(mine, self.about.format, self.about.num_classes))

    def _group(self, group: int) -> Columns:
        if self._here is None or self._here[0] != group:
            if self._coming is None or self._coming[0] != group:
                self._coming = group, self._thread.submit(self._read, group)
            self._here = group, self._coming[1].result()
            following = (group + 1) % (len(self._starts) - 1)
            self._coming = following, self._thread.submit(self._read, following)
        return self._here[1]

    def _read(self, group: int) -> Columns:
        try:
            with pq.ParquetFile(self._file) as parquet:
                table = parquet.read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"Logits in {self._file} cannot be read: {error}. Remove the file.") from error
        return {name: _to_numpy(table.column(name)) for name in table.column_names}


def _schema(about: LogitsAbout) -> pa.Schema:
    k = about.format.top_k
    if k is None:
        values = [("logits", pa.list_(pa.from_numpy_dtype(np.dtype(about.format.kind)), about.num_classes))]
    else:
        ids = pa.from_numpy_dtype(np.dtype(class_type(about.num_classes)))
        values = [("classes", pa.list_(ids, k)), ("log_probs", pa.list_(pa.float16(), k)), ("rest", pa.float16())]
    made = [("step", pa.int32()), ("row", pa.int64()), ("partner", pa.int64()), ("lam", pa.float32())]
    return pa.schema([*made, *values], metadata={_ABOUT: about.model_dump_json().encode()})


def _to_arrow(array: np.ndarray, kind: pa.DataType) -> pa.Array:
    if array.ndim == 1:
        return pa.array(array, kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel(), kind.value_type), array.shape[1])


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if not pa.types.is_fixed_size_list(array.type):
        return array.to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def _about(file: Path) -> LogitsAbout:
    try:
        metadata = pq.read_schema(file).metadata or {}
        about = LogitsAbout.model_validate_json(metadata[_ABOUT])
        rows = pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException, KeyError, ValidationError) as error:
        raise DataError(
            f"{file} is no file of logits of this version: {error!r}. Remove it, and they are made again."
        ) from error
    if rows != about.steps * about.feed.batch_size:
        raise DataError(
            f"{file} has logits of {rows} images, expected {about.steps} steps of {about.feed.batch_size}. Remove it."
        )
    return about


def _differences(expected: FeedConfig, found: FeedConfig) -> list[tuple[str, object, object]]:
    ours, theirs = (json.loads(config.model_dump_json()) for config in (expected, found))
    names = sorted({*ours, *theirs} - {"augmentation"})
    mine, other = ours["augmentation"], theirs["augmentation"]
    inside = [(f"augmentation.{name}", mine[name], other[name]) for name in mine]
    return [(name, ours.get(name), theirs.get(name)) for name in names] + inside


def _require_same(kept: Columns, batch: Made, step: int, file: Path) -> None:
    found = {"row": batch.rows, "partner": batch.partners, "lam": batch.lam}
    wrong = [name for name, values in found.items() if not np.array_equal(kept[name], values.numpy())]
    if wrong:
        name = wrong[0]
        raise DataError(
            f"The logits of step {step} in {file} are of another batch: expected {', '.join(wrong)} "
            f"{found[name][:4].tolist()}, ... found {kept[name][:4].tolist()}, ... "
            f"The data set or the code has changed since; remove the file, and they are made again."
        )
