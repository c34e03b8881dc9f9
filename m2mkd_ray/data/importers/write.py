"""From a source to a data set on disk: checked, shuffled, resumable.

Images are read and checked by a few threads, a row group ahead; they reach the
writer in order. After each whole shard the journal is written: rows dealt with,
problems, shards. The same import goes on from there, and as a row's place depends
only on the seed, it ends with the same files. The index comes last.
"""

import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError

from m2mkd_ray.data.importers.source import Sample, Source, SplitSource
from m2mkd_ray.data.index import INDEX, JOURNAL, DatasetFolder, Index, Split
from m2mkd_ray.data.pixels import UNDECODABLE, grey_or_rgb
from m2mkd_ray.data.shards import Row, Shard, ShardWriter
from m2mkd_ray.errors import DataError

logger = logging.getLogger(__name__)

OnBad = Literal["fail", "skip"]
OnProgress = Callable[[str, int, int], None]
"""Called with the split, its rows dealt with and its rows."""


class WriteConfig(BaseModel, frozen=True, extra="forbid"):
    """How a source is written."""

    name: str
    rows_per_group: int = 256
    groups_per_shard: int = 16
    seed: int = 0
    """Of the order of the rows."""
    limit: int | None = None
    """At most this many rows a split; None: all."""
    imported: dict[str, str] = {}
    """Kind and options of the import, for the index."""


class Done(BaseModel, frozen=True, extra="forbid"):
    """What a split's whole shards hold."""

    consumed: int = 0
    """Rows of the source that are dealt with, good or bad."""
    rows_per_class: tuple[int, ...]
    shards: tuple[Shard, ...] = ()
    bad: dict[str, int] = {}
    complete: bool = False


class Journal(BaseModel, frozen=True, extra="forbid"):
    """How far an import is."""

    config: WriteConfig
    splits: dict[str, Done] = {}


class Bad(Exception):
    """A row that cannot be imported: the kind of problem, and what exactly."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def write(
    source: Source,
    out: Path,
    config: WriteConfig,
    *,
    on_bad: OnBad = "fail",
    on_progress: OnProgress | None = None,
) -> Index:
    """Write a source to the folder `out/<name>`, or go on where an earlier call was interrupted.

    Args:
        on_bad: fail: raise at the first problem; skip: leave the row out, log and count it. Not in the
            config, as an import that failed may go on with skip.

    Raises:
        DataError: with `on_bad="fail"`, an image, label or class has a problem; or the folder
            holds something else.
    """
    folder = out / config.name
    if (folder / INDEX).exists():
        return _same(DatasetFolder.open(folder), config)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    journal = _journal(folder, config)
    for name, split in source.splits.items():
        journal = _write_split(folder, journal, name, split, source, on_bad, on_progress or _silent)
    index = Index(
        name=config.name,
        licence=source.licence,
        source=source.origin,
        classes=source.classes,
        splits={name: _split(done) for name, done in journal.splits.items()},
        imported=_imported(config),
    )
    _replace(folder / INDEX, index.model_dump_json(indent=1) + "\n")
    (folder / JOURNAL).unlink()
    return index


def _same(found: DatasetFolder, config: WriteConfig) -> Index:
    if found.index.imported == _imported(config):
        logger.info("%s is complete already", found.path)
        return found.index
    raise DataError(
        f"{found.path} holds a data set that was imported with {found.index.imported}, not {_imported(config)}. "
        "Remove the folder or import under another name."
    )


def _imported(config: WriteConfig) -> dict[str, str]:
    settings = config.model_dump(exclude={"name", "imported"})
    return config.imported | {name: str(value) for name, value in settings.items()}


def _journal(folder: Path, config: WriteConfig) -> Journal:
    file = folder / JOURNAL
    if not file.exists():
        return Journal(config=config)
    try:
        journal = Journal.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise DataError(f"{file} cannot be read; remove {folder} and import again. {error}") from error
    if journal.config != config:
        raise DataError(
            f"{folder} holds the beginning of another import ({journal.config!r}), expected {config!r}. "
            "Remove the folder, or give the other import's command."
        )
    logger.info("Going on with the import into %s", folder)
    return journal


def _write_split(
    folder: Path,
    journal: Journal,
    name: str,
    split: SplitSource,
    source: Source,
    on_bad: OnBad,
    on_progress: OnProgress,
) -> Journal:
    config = journal.config
    done = _whole(folder, journal.splits.get(name), len(source.classes))
    if done.complete:
        return journal
    order = _order(split, config)
    writer = ShardWriter(
        folder,
        name,
        rows_per_group=config.rows_per_group,
        groups_per_shard=config.groups_per_shard,
        shards=done.shards,
    )
    per_class, bad = np.array(done.rows_per_class), Counter(done.bad)

    def keep(consumed: int, *, complete: bool = False) -> Journal:
        now = Done(
            consumed=consumed,
            rows_per_class=tuple(per_class.tolist()),
            shards=tuple(writer.shards),
            bad=dict(sorted(bad.items())),
            complete=complete,
        )
        kept = journal.model_copy(update={"splits": {**journal.splits, name: now}})
        _replace(folder / JOURNAL, kept.model_dump_json(indent=1))
        return kept

    try:
        for consumed, row in _rows(split, order[done.consumed :], len(source.classes), config.rows_per_group):
            consumed += done.consumed
            if isinstance(row, Bad):
                _report(row, name, on_bad)
                bad[row.kind] += 1
                continue
            per_class[row.label] += 1
            if writer.add(row):
                keep(consumed)
            on_progress(name, consumed, len(order))
        writer.close()
        if split.needs_every_class and config.limit is None:
            for label in np.flatnonzero(per_class == 0).tolist():
                _report(Bad("empty class", f"class {source.classes[label].id} has no images"), name, on_bad)
                bad["empty class"] += 1
    finally:
        writer.abort()
    on_progress(name, len(order), len(order))
    return keep(len(order), complete=True)


def _whole(folder: Path, done: Done | None, num_classes: int) -> Done:
    """What of `done` is really there; shards that vanished mean that the split begins anew."""
    if done is None or any(not _is_whole(folder / shard.file, shard.bytes) for shard in done.shards):
        return Done(rows_per_class=(0,) * num_classes)
    return done


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _order(split: SplitSource, config: WriteConfig) -> np.ndarray:
    order = np.arange(split.rows)
    if split.shuffle:
        order = np.random.default_rng(config.seed).permutation(order)
    return order[: config.limit]


def _rows(split: SplitSource, order: np.ndarray, num_classes: int, ahead: int) -> Iterator[tuple[int, Row | Bad]]:
    """The rows of `order`, each with the number of rows consumed with it."""

    def load(sample: Sample) -> Row | Bad:
        try:
            return checked(sample, num_classes)
        except Bad as bad:
            return bad

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(order), ahead):
            samples = [split.sample(number) for number in order[start : start + ahead].tolist()]
            yield from enumerate(pool.map(load, samples), start + 1)


def checked(sample: Sample, num_classes: int) -> Row:
    """Read and decode a sample.

    Raises:
        Bad: its label is no class, or its image cannot be read or decoded.
    """
    if not isinstance(sample.label, int) or not 0 <= sample.label < num_classes:
        raise Bad("unknown label", f"{sample.path}: label {sample.label!r} is none of the {num_classes} classes")
    try:
        image = sample.read()
        decoded = Image.open(io.BytesIO(image))
        # An eighth of the size: all bytes of a JPEG are read (a truncated one is found), a third of the time.
        decoded.draft("RGB", (max(1, decoded.width // 8), max(1, decoded.height // 8)))
        decoded.load()
        grey_or_rgb(decoded)
    except UNDECODABLE as error:
        kind = "missing image" if isinstance(error, FileNotFoundError) else "undecodable image"
        raise Bad(kind, f"{sample.path}: {error}") from error
    return Row(image=image, path=sample.path, label=sample.label)


def _report(bad: Bad, split: str, on_bad: OnBad) -> None:
    if on_bad == "fail":
        raise DataError(
            f"Importing split {split} met a problem, {bad.kind}: {bad}. "
            "Mend the source, or leave such rows out with --on-bad skip."
        )
    logger.warning("Split %s: %s, left out: %s", split, bad.kind, bad)


def _split(done: Done) -> Split:
    return Split(rows=sum(done.rows_per_class), rows_per_class=done.rows_per_class, shards=done.shards, bad=done.bad)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


def _silent(split: str, done: int, rows: int) -> None:
    """No progress is shown."""
