"""Stages `logits-i`: write down the logits of a pair's teacher hybrid, for pairs to read.

With `views` the batches of a training come again, and so do the teacher's answers:
they are the same for every epoch, try and trial of a sweep. A pair's own training
then runs no teacher, which is about a third of its step (docs/method.md); reading a
row costs a few kilobytes. In a cohort the batches and the meta model's tokens are
shared, as they are in the pairs'.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import FeedConfig
from m2mkd_ray.data.logits import LogitsAbout, LogitsFormat, LogitsWriter
from m2mkd_ray.execution.cohort import Left, Member, alone
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.stages.pair import LOGITS, Frozen
from m2mkd_ray.stages.parts import feed_of
from m2mkd_ray.training import Precision, TeacherHybrid, TrainPlacement
from m2mkd_ray.training.engine import local_device, micro_batches

_REPORT_EVERY = 20
"""Steps."""


class LogitsConfig(BaseModel, frozen=True, extra="forbid"):
    """Whose logits, of which batches, and how exactly they are kept."""

    blueprint: Blueprint
    index: int
    feed: FeedConfig
    precision: Precision
    """What the teacher runs in."""
    format: LogitsFormat = Field(LogitsFormat())


def run(config: LogitsConfig, context: StageContext) -> Metrics:
    """Reads `data`, `meta` and `split`; writes `logits.parquet`."""
    return alone(together, config, context)


def together(members: Sequence[Member]) -> Iterator[Left]:
    """Write the logits of several pairs' teachers, batch by batch. They read the same batches, meta and split."""
    config: LogitsConfig = members[0].config
    context = members[0].context
    placement, device = cast(TrainPlacement, context.placement), local_device()
    frozen = Frozen(config.blueprint, context)
    feed = feed_of(config.feed, context)
    assert config.feed.views is not None
    steps = config.feed.views * feed.steps_per_epoch
    books = [_Book(member, frozen.hybrid(member.config.index, member.context), steps) for member in members]
    for part in (frozen.prefix, *(book.hybrid for book in books)):
        part.to(device)
        part.set_precision(config.precision)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    try:
        batches = feed.loader(0, steps, num_workers=placement.data_workers, pin_memory=device.type == "cuda")
        for step, batch in enumerate(batches):
            images = batch.images.to(device, non_blocking=True)
            parts = micro_batches(images, batch.targets, placement.micro_batch)
            logits: list[list[Tensor]] = [[] for _ in books]
            for part_images, _ in parts:
                with autocast:
                    for of_book, book in zip(logits, books, strict=True):
                        of_book.append(book.hybrid(part_images).float())
            for of_book, book in zip(logits, books, strict=True):
                book.writer.add(step, batch, torch.cat(of_book))
                if step % _REPORT_EVERY == 0 or step + 1 == steps:
                    book.member.context.report(step + 1, steps, book.speed(step + 1))
        for place, book in enumerate(books):
            yield Left(place, metrics={**book.writer.close(), **book.speed(steps), "views": config.feed.views})
    except BaseException:
        for book in books:
            book.writer.abort()
        raise


@dataclass
class _Book:
    """What is being written for a pair."""

    member: Member
    hybrid: TeacherHybrid
    steps: int
    began: float = field(default_factory=time.perf_counter)
    writer: LogitsWriter = field(init=False)

    def __post_init__(self) -> None:
        config: LogitsConfig = self.member.config
        about = LogitsAbout(
            feed=config.feed,
            num_classes=config.blueprint.teacher.num_classes,
            format=config.format,
            teacher=self.member.context.input_manifests["split"]["key"],
            steps=self.steps,
        )
        self.writer = LogitsWriter(self.member.context.out / LOGITS, about)

    def speed(self, steps: int) -> dict[str, float]:
        """Images a second so far, and in all."""
        images = steps * self.member.config.feed.batch_size
        return {"images_per_s": images / (time.perf_counter() - self.began), "teacher_calls": float(images)}
