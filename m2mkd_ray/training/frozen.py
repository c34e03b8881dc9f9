"""The frozen parts of a module's training, computed once for all that need them.

Members of a cohort get the same images. Those of one prefix share the tokens before
their modules, up to the deepest that any of them asked for; those of one teacher's
hybrid share its logits. What was computed for images is kept until others come or the
step is over, and is found by the images' identity: two members see the same tensor
object. Who asked for it is noted, and counts its share.

B = images, K = classes
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from m2mkd_ray.training.counters import Stopwatch
from m2mkd_ray.training.precision import Precision, cast_frozen, take_any_dtype


@dataclass
class Memo:
    """What was computed for some images."""

    name: str
    images: Tensor | None = None
    results: list[Tensor] = field(default_factory=list)
    runs: int = 0
    """How many modules were run, one after the other."""
    askers: list[tuple[int, Stopwatch]] = field(default_factory=list)
    """Who asked, and the output of how many of these modules."""

    def of(self, images: Tensor, runs: int, asker: Stopwatch | None) -> list[Tensor]:
        """What is there for these images; everything else is forgotten. The asker needs so many runs."""
        if images is not self.images:
            self.forget()
            self.images = images
        if asker is not None:
            self.askers.append((runs, asker))
        return self.results

    def forget(self) -> None:
        """Drop it, and count: each run is divided by all that needed it."""
        for run in range(self.runs):
            users = [asker for runs, asker in self.askers if runs > run]
            for asker in users:
                asker.counts[self.name] += 0 if self.images is None else len(self.images) / len(users)
        self.images, self.results, self.runs, self.askers = None, [], 0, []


class Frozen(nn.Module):
    """Modules that never learn: without gradients, in evaluation mode, cast once to the precision that they run in."""

    def __init__(self, name: str) -> None:
        """`name`: what its calls are counted as."""
        super().__init__()
        self._memo = Memo(name)
        self.calls: Counter[str] = Counter()
        """Images that went through: a meta module before the pair, the teacher's hybrid."""
        self.precision: Precision = "fp32"
        self._was_run = False

    def freeze(self) -> None:
        """Call when all parts are there."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in evaluation mode."""
        return super().train(False)

    def forget(self) -> None:
        """Drop what was computed for the last images; those that asked for it get their shares of the count."""
        self._memo.forget()

    def set_precision(self, precision: Precision) -> None:
        """Cast the weights, once.

        Raises:
            ValueError: they were cast to another precision before, for another member of a cohort.
        """
        if self._was_run and self.precision != precision:
            raise ValueError(
                f"Frozen modules are shared by a member that trains in {self.precision} and one that trains in "
                f"{precision}. Give members of different precision modules of their own."
            )
        self.precision, self._was_run = precision, True
        cast_frozen(self, precision)
        if precision == "bf16_pure":
            for part in self.parts():
                take_any_dtype(part)

    def parts(self) -> Iterable[nn.Module]:
        """The modules that are frozen here, which others may run too."""
        raise NotImplementedError


class Prefix(Frozen):
    """The meta model's modules, and the tokens between them."""

    def __init__(self, meta: Sequence[nn.Module]) -> None:
        super().__init__("prefix_calls")
        self.meta = nn.ModuleList(meta)
        self.freeze()

    def forward(self, images: Tensor, index: int, asker: Stopwatch | None = None) -> Tensor:
        """What module `index` gets of images (B, 3, H, W): these for the first, tokens (B, L, D) for others.

        The asker counts its share of the modules that were run.

        No graph, but tensors that may be saved for a backward pass, so not in inference mode.
        """
        results = self._memo.of(images, index, asker)
        with torch.no_grad():
            if not results:
                results.append(images.bfloat16() if self.precision == "bf16_pure" else images)
            for module in self.meta[len(results) - 1 : index]:
                results.append(module(results[-1]))
                self._memo.runs += 1
                self.calls["prefix"] += len(images)
        return results[index]

    def parts(self) -> Iterable[nn.Module]:
        """See `Frozen`."""
        return self.meta

    def after(self, index: int) -> nn.Sequential:
        """The modules after place `index`."""
        return nn.Sequential(*self.meta[index + 1 :])


class TeacherHybrid(Frozen):
    """The meta model with the teacher module in place `index`."""

    def __init__(self, prefix: Prefix, index: int, teacher: nn.Module) -> None:
        super().__init__("teacher_calls")
        self.prefix, self.index, self.teacher, self.after = prefix, index, teacher, prefix.after(index)
        self.freeze()

    def forward(self, images: Tensor, asker: Stopwatch | None = None) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W). The asker counts its share of them."""
        tokens = self.prefix(images, self.index)
        results = self._memo.of(images, 1, asker)
        if not results:
            with torch.inference_mode():
                logits = self.after(self.teacher(tokens))
            results.append(logits.clone())  # outside of inference mode: a tensor like any other
            self._memo.runs += 1
            self.calls["teacher"] += len(images)
        return results[0]

    def parts(self) -> Iterable[nn.Module]:
        """See `Frozen`; those of the meta model are the prefix's."""
        return [self.teacher]
