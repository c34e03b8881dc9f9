"""One member's way through its training: when to validate, to log, to keep a checkpoint, to stop."""

import logging
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from m2mkd_ray.errors import PreemptedError, TrainingError
from m2mkd_ray.training.counters import Meter, StepFlops, cost_of_flops, peak_memory_gb
from m2mkd_ray.training.engine import Engine, TrainPlacement
from m2mkd_ray.training.landmarks import Landmarks
from m2mkd_ray.training.optim import TrainConfig, learning_rate
from m2mkd_ray.training.saving import Saver
from m2mkd_ray.training.seams import Feed, Point, Session
from m2mkd_ray.training.seed import derive

logger = logging.getLogger(__name__)


@dataclass
class Member:
    """A training in a cohort: what is its own. Batches and what is frozen it may share with others."""

    engine: Engine
    """Holds the objective; at the end its weights are the trained ones."""
    config: TrainConfig
    session: Session
    seed: int
    """Of dropout and drop path (with the step and the micro-batch's number, see `Course.accumulate`)."""
    validate: Callable[[], Mapping[str, float]] | None = None
    """Measured every `validate_every_epochs`, at step 0 and at the end; on rank 0 alone."""
    teacher_logits: Callable[[int], Tensor | None] | None = None
    """The teacher's logits (B, K), on the CPU, for this rank's batch of a step; None computes them."""
    flops_per_image: StepFlops | None = None
    """Of a training step, for the counters `flops` and `mfu`; None: not known."""


class Course:
    """Where a member is."""

    def __init__(self, place: int, member: Member, placement: TrainPlacement, feed: Feed) -> None:
        self.place, self.member, self.engine, self.config = place, member, member.engine, member.config
        self.placement, self.feed = placement, feed
        self.total = member.config.total_steps(feed.steps_per_epoch)
        self.step, self.history, self.landmarks = 0, list[Point](), Landmarks()
        self.is_over = self._had_notice = False
        self.error: Exception | None = None
        self.saver = Saver(member.session.checkpoints, beside=self.engine.world == 1 and self.engine.copies)
        self.saved_at, self.first_step_at, self.meter = time.monotonic(), 0.0, Meter()
        self._logits: Sequence[Tensor | None] = ()
        self.counts: defaultdict[str, float] = defaultdict(float)
        """Its share of what the feed counted since the last point."""

    @contextmanager
    def own(self) -> Iterator[None]:
        """What is raised inside ends this member alone.

        With several ranks that is so for what all of them see alike, a loss that is not finite. Anything else is
        raised, and ends the process: other ranks would wait in a collective for ever.
        """
        try:
            yield
        except Exception as error:
            if self.engine.world > 1 and not isinstance(error, TrainingError):
                raise
            self.error, self.is_over = error, True
            self.saver.close()  # what is on its way is kept before anybody is told that this member is gone
            traceback.clear_frames(error.__traceback__)  # they hold the step's activations
            self.engine.release()

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one.

        Raises:
            ValueError: the training is to end early, but nothing validates it.
            RuntimeError: ranks see different checkpoints; raised on all of them.
        """
        if self.config.patience is not None and self.member.validate is None and self.engine.rank == 0:
            raise ValueError("`patience` ends a training by its validation, but it has none. Pass `validate`.")
        checkpoint = self.member.session.checkpoints.latest()
        steps = self.engine.gather(0 if checkpoint is None else checkpoint[0])
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"Ranks would go on from different steps: their newest checkpoints are of steps {steps}, by rank. "
                "All must see the same one. See that they reach the same store, and start again."
            )
        if checkpoint is not None:
            self.step, folder = checkpoint
            self.engine.load(folder)
            self.history = Saver.history_in(folder)
            self.landmarks = Landmarks(self.history)
            logger.info("Resuming from the checkpoint of step %d", self.step)

    def look(self) -> None:
        """Validate before the next step, if it is time to; end here at the end, or out of patience."""
        is_at_end = self.step >= self.total
        if is_at_end:
            self.engine.end()
        elif self.step not in self._validation_steps():
            return
        if self.member.validate is not None and not self._was_seen():
            self._note({**self._now(), **self.member.validate()})
            if self.step and not is_at_end:
                self._report()
        if not is_at_end and self.config.patience is not None and self.engine.agree(self._is_out_of_patience()):
            logger.info("Ending at step %d: top-1 has not risen for %d validations", self.step, self.config.patience)
            self.engine.end()
            is_at_end = True
        if is_at_end:
            self._finish()

    def begin(self) -> None:
        """Begin a step."""
        lr = learning_rate(self.config, self.step, self.feed.steps_per_epoch)
        self.engine.begin(lr, is_logged=self._is_logged)
        self._logits = ()

    def accumulate(self, images: Tensor, targets: Tensor, part: int, num_parts: int, *, weight: float) -> None:
        """Take in micro-batch `part` of `num_parts`.

        Its randomness follows from seed, step and the number r + w * p of part p of rank r of w. Where a micro-batch
        is exactly a lane of the feed, that is the lane's number, and any number of ranks draws the same for the same
        images. Otherwise other micro-batches or ranks make other draws for stochastic depth and dropout.
        """
        if part == 0 and self.member.teacher_logits is not None:
            self._logits = self._read(self.member.teacher_logits, images.device, num_parts)
        torch.manual_seed(derive(self.member.seed, "step", self.step, self.engine.rank + self.engine.world * part))
        logits_of_part = self._logits[part] if self._logits else None
        self.engine.accumulate(images, targets, logits_of_part, weight=weight, is_last=part == num_parts - 1)

    def _read(
        self, teacher_logits: Callable[[int], Tensor | None], device: torch.device, num_parts: int
    ) -> Sequence[Tensor]:
        """The step's logits by micro-batches, if they are at hand; a wait for data. From memory that is not pinned
        the copy to a GPU would wait for it."""
        asked = time.perf_counter()
        logits = teacher_logits(self.step)
        if logits is not None and device.type == "cuda":
            logits = logits.pin_memory().to(device, non_blocking=True)
        self.meter.data_s += time.perf_counter() - asked
        return () if logits is None else logits.to(device).tensor_split(num_parts)

    def forget(self) -> None:
        """After a step's last micro-batch: let go of what was computed and read for it."""
        self._logits = ()
        for part in self.engine.objective.frozen:
            part.forget()

    def update(self, num_images: int) -> None:
        """Move the weights after this rank's `num_images`; log the step, if that is due.

        Raises:
            TrainingError: the loss is not finite. The newest checkpoint stays.
        """
        is_logged, lr = self._is_logged, learning_rate(self.config, self.step, self.feed.steps_per_epoch)
        logs = self.engine.update()
        self.meter.images += num_images * self.engine.world
        self.first_step_at = self.first_step_at or time.time()
        if is_logged:
            values = dict(zip(logs, self.engine.mean(list(logs.values())), strict=True))
            self._require_finite(values)
        self.step += 1
        if is_logged:
            self._note({**self._now(), "lr": lr, **values, **self._counters()})
            self._report()
            self.meter = Meter()

    def keep(self) -> None:
        """Keep a checkpoint of a step that was logged, if it is time to. At the end there is none to keep.

        With notice that the machine goes, a checkpoint is kept at once and awaited. What was counted since the last
        point of the history is then in none.

        Raises:
            PreemptedError: the machine goes. Several ranks go on instead until they are stopped: whoever started
                them starts them again, all at once.
        """
        is_logged = self.step % self.placement.log_every_steps == 0
        if self.step == self.total or (self.engine.world > 1 and not is_logged):
            return
        has_notice = self.member.session.has_notice() and not self._had_notice
        is_due = time.monotonic() - self.saved_at >= self.placement.checkpoint_every_s
        if has_notice or (is_logged and self.engine.agree(is_due)):
            if not is_logged:  # nobody has looked at this step's loss
                self._require_finite_weights()
            self._had_notice |= has_notice
            self.saver.wait()  # a second copy of the state in memory is one too many
            # Ranks' folders are merged where there are several, so one keeps the history.
            self.saver.save(self.step, self.engine.snapshot(), self.history if self.engine.rank == 0 else None)
            self.saved_at = time.monotonic()
        if has_notice:
            self.saver.wait()
        if has_notice and self.engine.world == 1:
            raise PreemptedError(
                f"Its node is being drained, so it left after step {self.step} with a checkpoint; it goes on elsewhere"
            )

    @property
    def _is_logged(self) -> bool:
        """With patience the training may end before any step that is validated, and its last point has a loss too."""
        done = self.step + 1
        may_end = done == self.total or (self.config.patience is not None and done in self._validation_steps())
        return may_end or done % self.placement.log_every_steps == 0

    def _finish(self) -> None:
        self.saver.wait()
        if self.first_step_at and self.history:
            self.history[0].setdefault("first_step_at", self.first_step_at)
        if self.landmarks.points:
            self._report()
        self.is_over = True

    def _note(self, point: Point) -> None:
        self.history.append(point)
        self.landmarks.see(point)

    def _report(self) -> None:
        self.member.session.report(self.step, self.total, self.history[-1], self.landmarks.points)

    def _now(self) -> Point:
        return {"step": self.step, "epoch": self.step / self.feed.steps_per_epoch}

    def _validation_steps(self) -> range:
        if self.config.validate_every_epochs is None:
            return range(0)
        every = max(1, round(self.config.validate_every_epochs * self.feed.steps_per_epoch))
        return range(0, self.total, every)

    def _was_seen(self) -> bool:
        return any(point["step"] == self.step and "val_top1" in point for point in self.history)

    def _is_out_of_patience(self) -> bool:
        seen = [point["val_top1"] for point in self.history if "val_top1" in point]
        patience = self.config.patience
        return patience is not None and len(seen) > patience and max(seen[-patience:]) <= max(seen[:-patience])

    def _counters(self) -> Point:
        seconds, counts = self.engine.objective.stopwatch.take()
        rates = self.meter.rates()
        of_feed, self.counts = self.counts, defaultdict(float)
        return {
            **rates,
            **{f"{part}_s": value for part, value in seconds.items()},
            **of_feed,
            **counts,
            **self._flops(counts, rates["train_s"]),
            "peak_memory_gb": peak_memory_gb(self.engine.device),
        }

    def _flops(self, counts: Mapping[str, float], seconds: float) -> Point:
        if self.member.flops_per_image is None:
            return {}
        flops = self.member.flops_per_image.of(self.meter.images, counts, self.engine.world)
        return cost_of_flops(flops, seconds, self.engine.device, self.config.precision, self.engine.world)

    def _require_finite(self, values: Mapping[str, float]) -> None:
        if not all(torch.isfinite(torch.tensor(value)) for value in values.values()):
            raise self._not_finite(f"The loss is not finite at step {self.step}: {dict(values)}")

    def _require_finite_weights(self) -> None:
        if not all(torch.isfinite(weight).all() for weight in self.engine.objective.trainable.parameters()):
            raise self._not_finite(f"Weights are not finite after step {self.step}")

    def _not_finite(self, what: str) -> TrainingError:
        self.saver.wait()
        kept = self.member.session.checkpoints.latest()
        return TrainingError(
            f"{what}. {f'The checkpoint of step {kept[0]} is kept' if kept else 'No checkpoint was written yet'}. "
            f"Lower the learning rate, set clip_norm to 1.0 or precision to fp32; a changed setting starts anew."
        )
