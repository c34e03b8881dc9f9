"""The only training loop, for one model or for a cohort of them on the same batches.

It knows no model, no data set and no cluster: an objective gives the loss, a feed
gives the batch of a step, an engine takes the step, a session keeps checkpoints.
Because a batch and the randomness of a step follow from (seed, step), a training
that was killed and taken up from a checkpoint ends with the same weights, bit for
bit, as one that was not; and a member of a cohort ends with the weights that it
would have alone, with the same micro-batch.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from m2mkd_ray.training.counters import Meter, StepFlops, forget_peak_memory
from m2mkd_ray.training.course import Course, Member
from m2mkd_ray.training.engine import Engine, TrainPlacement, micro_batches
from m2mkd_ray.training.optim import TrainConfig
from m2mkd_ray.training.prefetch import on_device
from m2mkd_ray.training.seams import Feed, Point, Session


@dataclass(frozen=True)
class Ended:
    """A member that has come to its end, or to grief."""

    place: int
    """Its place among the members, from 0."""
    history: list[Point] | None = None
    error: Exception | None = None
    """What ended it, if it failed; the others go on."""


def fit(
    feed: Feed,
    engine: Engine,
    config: TrainConfig,
    placement: TrainPlacement,
    session: Session,
    *,
    seed: int,
    validate: Callable[[], Mapping[str, float]] | None = None,
    teacher_logits: Callable[[int], Tensor | None] | None = None,
    flops_per_image: StepFlops | None = None,
) -> list[Point]:
    """Train one model to the end, from the newest checkpoint if there is one; returns the history.

    See `Member` for the arguments.

    Raises:
        TrainingError: the loss is not finite. The newest checkpoint stays.
    """
    member = Member(engine, config, session, seed, validate, teacher_logits, flops_per_image)
    ended = next(fit_together(feed, [member], placement))  # goes no further: the engine's state is the caller's
    if ended.error is not None:
        raise ended.error
    assert ended.history is not None
    return ended.history


def fit_together(feed: Feed, members: Sequence[Member], placement: TrainPlacement) -> Iterator[Ended]:
    """Train several models on the same batches, each from its newest checkpoint; tells of each as it ends.

    Members differ in whatever they like: epochs, learning rates, objectives, the step that they go on from. Those
    that are ahead wait for the others. What fails while one member computes, validates or saves ends that member
    only; what the feed raises ends all.

    What an engine holds beside the trained weights is there until the next member's end is asked for.

    Every micro-batch goes through all members before the next one does, so that what they share is computed once.
    """
    courses = [Course(place, member, placement, feed) for place, member in enumerate(members)]
    try:
        yield from _together(feed, courses, placement)
    finally:
        for course in courses:
            course.saver.close()


def _together(feed: Feed, courses: list[Course], placement: TrainPlacement) -> Iterator[Ended]:
    for course in courses:
        with course.own():
            course.resume()
    for course in courses:
        course.meter = Meter()
        forget_peak_memory(course.engine.device)
    shares = _FeedShares(feed)
    living = courses
    while living:
        start, stop = min(course.step for course in living), max(course.total for course in living)
        device = living[0].engine.device
        loader = feed.loader(start, stop, num_workers=placement.data_workers, pin_memory=device.type == "cuda")
        batches = on_device(loader, device)
        for step in range(start, stop + 1):
            with _untimed(living):
                for course in _at(step, living):
                    with course.own():
                        course.look()
                yield from _ended(living)
                for course in living:
                    if course.is_over:
                        course.engine.release()
            living = [course for course in living if not course.is_over]
            active = _at(step, living)
            if not active:
                break  # all have ended, or the others are further on
            with _untimed([course for course in living if course not in active]):
                _take_step(batches, active, placement, shares)
            with _untimed(living):
                for course in _unhurt(active):
                    with course.own():
                        course.keep()


class _FeedShares:
    """Shares out what a feed counts among the members that take a step."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.counted = self._now()

    def give(self, courses: Sequence[Course]) -> None:
        """An equal share to each of what was counted since the last time."""
        before, self.counted = self.counted, self._now()
        for name, number in self.counted.items():
            for course in courses:
                course.counts[name] += (number - before.get(name, 0.0)) / len(courses)

    def _now(self) -> dict[str, float]:
        return {name: float(number) for name, number in getattr(self.feed, "counts", {}).items()}


def _take_step(
    batches: Iterator[tuple[Tensor, Tensor]], courses: list[Course], placement: TrainPlacement, shares: _FeedShares
) -> None:
    asked = time.perf_counter()
    images, targets = next(batches)
    shares.give(courses)
    for course in courses:
        course.meter.data_s += time.perf_counter() - asked
        with course.own():
            course.begin()
    parts = micro_batches(images, targets, placement.micro_batch)
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        for index, (part_images, part_targets) in enumerate(parts):
            for course in _unhurt(courses):
                with course.own():
                    weight = len(part_images) / len(images)
                    course.accumulate(part_images, part_targets, index, len(parts), weight=weight)
        for course in courses:
            course.forget()
        for course in _unhurt(courses):
            with course.own():
                course.update(len(images))


def _at(step: int, courses: list[Course]) -> list[Course]:
    return [course for course in courses if course.step == step and not course.is_over]


def _unhurt(courses: list[Course]) -> list[Course]:
    return [course for course in courses if not course.is_over]


def _ended(courses: list[Course]) -> Iterator[Ended]:
    for course in courses:
        if course.is_over:
            yield Ended(course.place, None if course.error else course.history, course.error)


@contextmanager
def _untimed(courses: list[Course]) -> Iterator[None]:
    """Leave the time that is spent inside out of everybody's speed."""
    began = time.perf_counter()
    yield
    for course in courses:
        course.meter.pause(time.perf_counter() - began)
