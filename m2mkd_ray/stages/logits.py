"""Stages `logits-i`: write down the logits of a pair's teacher hybrid, for pairs to read.

With `views` the batches of a training come again, and so do the teacher's answers:
they are the same for every epoch, try and trial of a sweep. A pair's own training
then runs no teacher, which is about a third of its step (docs/method.md); reading a
row costs a few kilobytes. In a cohort the batches and the meta model's tokens are
shared, as they are in the pairs'. Steps are written in parts, so that a stage that
was killed goes on after the last whole part; with notice that the node goes, the part
ends where it is, and nothing is lost. What is read is the same wherever parts end.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
from pyarrow import fs
from pydantic import BaseModel
from torch import Tensor

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import Batch, FeedConfig
from m2mkd_ray.data.logits import LogitsAbout, LogitsFormat, LogitsWriter, join
from m2mkd_ray.errors import PreemptedError
from m2mkd_ray.execution.cohort import Left, Member, alone
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.scratch import own_folder
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.stages.pair import LOGITS, Frozen
from m2mkd_ray.stages.parts import feed_of, files_of
from m2mkd_ray.training import Precision, TeacherHybrid, TrainPlacement
from m2mkd_ray.training.engine import local_device, micro_batches

_PART_IMAGES = 2**16
"""Images whose logits are written before they are safe from a kill."""
_REPORT_EVERY = 20
"""Steps."""


class LogitsConfig(BaseModel, frozen=True, extra="forbid"):
    """Whose logits, of which batches, and how exactly they are kept."""

    blueprint: Blueprint
    index: int
    feed: FeedConfig
    precision: Precision
    """What the teacher runs in."""
    format: LogitsFormat = LogitsFormat()


def run(config: LogitsConfig, context: StageContext) -> Metrics:
    """Reads `data`, `meta` and `split`; writes `logits.parquet`."""
    return alone(together, config, context)


def together(members: Sequence[Member]) -> Iterator[Left]:
    """Write the logits of several pairs' teachers, batch by batch. They read the same batches, meta and split."""
    with ExitStack() as stack:
        local = [stack.enter_context(own_folder("logits")) for _ in members]
        yield from _together(members, local)


def _together(members: Sequence[Member], local: Sequence[Path]) -> Iterator[Left]:
    config: LogitsConfig = members[0].config
    context = members[0].context
    placement, device = cast(TrainPlacement, context.placement), local_device()
    frozen, feed = Frozen(config.blueprint, context), feed_of(config.feed, context)
    assert config.feed.views is not None
    steps = config.feed.views * feed.steps_per_epoch
    living: dict[int, _Book] = {}
    for place, member in enumerate(members):
        try:
            hybrid = frozen.hybrid(member.config.index, member.context)
            hybrid.to(device)
            hybrid.set_precision(config.precision)
            living[place] = _Book(member, hybrid, steps, local[place])
        except Exception as error:
            yield Left(place, error=error)
    if not living:
        return
    frozen.prefix.to(device)
    frozen.prefix.set_precision(config.precision)
    start = min(book.next for book in living.values())
    batches = feed.loader(start, steps, num_workers=placement.data_workers, pin_memory=device.type == "cuda")
    for step, batch in enumerate(batches, start):
        parts = micro_batches(batch.images.to(device, non_blocking=True), batch.targets, placement.micro_batch)
        given: dict[int, list[Tensor]] = {place: [] for place, book in living.items() if book.next == step}
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            for images, _ in parts:
                for place, logits in given.items():
                    logits.append(living[place].hybrid(images).float())
        for place, logits in given.items():
            try:
                living[place].add(batch, torch.cat(logits))
            except Exception as error:  # a value that float16 cannot hold, say: it is this pair's alone
                del living[place]
                yield Left(place, error=error)
        if not living:
            return
        if step + 1 < steps and context.has_notice():
            yield from _leave(living, step + 1)
            return
    for place, book in living.items():
        try:
            yield Left(place, metrics=book.close())
        except Exception as error:
            yield Left(place, error=error)


def _leave(living: "Mapping[int, _Book]", step: int) -> Iterator[Left]:
    """The node goes: keep what is written, and leave."""
    for place, book in living.items():
        try:
            book.cut()
            error: Exception = PreemptedError(
                f"Its node is being drained, so it left before step {step} with all parts kept; it goes on elsewhere"
            )
        except Exception as failure:
            error = failure
        yield Left(place, error=error)


class _Book:
    """What is written for a pair: parts in the stage's durable folder, put together at the end."""

    def __init__(self, member: Member, hybrid: TeacherHybrid, steps: int, local: Path) -> None:
        self.context, self.hybrid = member.context, hybrid
        config: LogitsConfig = member.config
        self._about = LogitsAbout(
            feed=config.feed,
            num_classes=config.blueprint.teacher.num_classes,
            format=config.format,
            teacher=self.context.input_manifests["split"]["key"],
            steps=steps,
        )
        self._files, self._root = files_of(self.context.durable)
        self._each = max(1, _PART_IMAGES // config.feed.batch_size)
        """Most steps of a part."""
        self._local = local
        self._errors: list[tuple[int, dict[str, float]]] = []
        """Steps of each part, and what its format loses."""
        self._parts = self._kept()
        self.next = sum(count for count, _ in self._errors)
        """The step that is written next."""
        self._start = self._stop = self.next
        """Of the part that is being written."""
        self._began, self._first, self._writer = time.perf_counter(), self.next, self._part()

    def add(self, batch: Batch, logits: Tensor) -> None:
        """The logits (B, K) of the batch of step `next`."""
        if self._writer is None:
            self._writer = self._part()
        assert self._writer is not None
        self._writer.add(self.next, batch, logits)
        self.next += 1
        steps = self._about.steps
        if self.next == self._stop:
            self._keep(self._writer.close())
            self._writer = None
        if self.next % _REPORT_EVERY == 0 or self.next == steps:
            self.context.report(self.next, steps, self._speed())

    def cut(self) -> None:
        """End the part here, and keep it if it has any step."""
        if self._writer is None:
            return
        if self.next == self._start:
            self._writer.abort()
        else:
            self._keep(self._writer.close_here())

    def close(self) -> Metrics:
        """Put the parts together; size, errors of a format that loses something, and speed."""
        local = [self._fetched(name) for name in self._parts]
        file = self.context.out / LOGITS
        join(local, file)
        size = {"bytes": file.stat().st_size, "views": self._about.feed.views}
        return {**size, **_of_all_steps(self._errors), **self._speed()}

    def _part(self) -> LogitsWriter | None:
        if self.next == self._about.steps:
            return None
        self._start, self._stop = self.next, min(self.next + self._each, self._about.steps)
        return LogitsWriter(self._local / _name(self._start), self._about, self._start, self._stop)

    def _speed(self) -> dict[str, float]:
        images = (self.next - self._first) * self._about.feed.batch_size
        return {"images_per_s": images / (time.perf_counter() - self._began), "teacher_calls": float(images)}

    def _kept(self) -> list[str]:
        """Names of the parts that an earlier attempt kept, from the first on without a gap."""
        found = self._files.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        names = {info.base_name for info in found}
        kept: list[str] = []
        first = 0
        while (name := _name(first)) in names and f"{name}.json" in names:
            with self._files.open_input_stream(f"{self._root}/{name}.json") as stream:
                try:
                    count, errors = json.loads(stream.read())
                except ValueError:
                    break  # it was cut, as by a full disk: from here on parts are made again
            self._errors.append((count, errors))
            kept.append(name)
            first += count
        return kept

    def _keep(self, closed: dict[str, float]) -> None:
        """Bring a whole part to safety, and then what says that it is whole."""
        name, errors = _name(self._start), {key: value for key, value in closed.items() if key != "bytes"}
        count = self.next - self._start
        self._files.create_dir(self._root, recursive=True)
        fs.copy_files(str(self._local / name), f"{self._root}/{name}", destination_filesystem=self._files)
        with self._files.open_output_stream(f"{self._root}/.{name}.json") as stream:
            stream.write(json.dumps([count, errors]).encode())
        self._files.move(f"{self._root}/.{name}.json", f"{self._root}/{name}.json")
        self._errors.append((count, errors))
        self._parts.append(name)

    def _fetched(self, name: str) -> Path:
        local = self._local / name
        if not local.exists():
            fs.copy_files(f"{self._root}/{name}", str(local), source_filesystem=self._files)
        return local


def _of_all_steps(errors: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The errors of parts of so many steps as one: means weighted, else the largest."""
    steps = sum(count for count, _ in errors)
    return {
        name: sum(count * one[name] for count, one in errors) / steps
        if name.endswith("mean")
        else max(one[name] for _, one in errors)
        for name in errors[0][1]
    }


def _name(first: int) -> str:
    return f"part-{first:09d}.parquet"
