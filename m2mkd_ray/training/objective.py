"""What is trained, and towards what.

An objective is an `nn.Module` that maps a batch to a loss; only its `trainable`
part learns. Losses are computed in float32 whatever the precision of the model.

B = images, K = classes
"""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ray.training.counters import Stopwatch
from m2mkd_ray.training.frozen import Frozen, Prefix, TeacherHybrid
from m2mkd_ray.training.precision import Precision

Kind = Literal["soft", "hard"]
Reduction = Literal["numel", "batchmean"]
Loss = tuple[Tensor, dict[str, Tensor]]
"""The scalar loss, and scalars to log by name, both detached from nothing that the caller may keep."""


class Given(Enum):
    """In a teacher's place: its logits are given."""

    GIVEN = auto()


GIVEN = Given.GIVEN


class Objective(Protocol):
    """What `fit` trains: calling it gives the loss of a batch, `trainable` is what learns."""

    trainable: nn.Module
    frozen: Sequence[Frozen]
    """What does not learn; may be shared with other objectives."""
    stopwatch: Stopwatch
    """Runs laps over the parts of the forward pass, and over the backward pass down to what learns."""
    is_logged: bool
    """Whether this step goes into a history; what costs something to log is left out of the others."""

    def __call__(self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Loss:
        """Images (B, 3, H, W), soft targets (B, K) and, if they are at hand, the teacher's logits (B, K) to a loss
        and what to log."""

    def set_precision(self, precision: Precision) -> None:
        """Cast what is frozen, and take inputs in this precision; what learns is the engine's to cast."""


@runtime_checkable
class Regularised(Protocol):
    """A model with a term of its own in the loss of a training end to end."""

    def regulariser(self) -> Tensor:
        """A scalar that is added to the loss, a function of the weights."""


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_k y_k log softmax(logits)_k, for soft targets (B, K).

    timm/loss/cross_entropy.py (`SoftTargetCrossEntropy`), in float32.
    """
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    kind: Kind = "soft",
    reduction: Reduction = "numel",
) -> Tensor:
    """The teacher's term of m2mKD's loss (arXiv 2402.16918; kamanphoebe/m2mKD `di/losses.py`).

    soft: T^2 / n * sum_bk p_t (log p_t - log p_s) with p = softmax(logits / T), where n is B * K for
    `numel` (as DeiT and the reference divide) and B for `batchmean` (Hinton et al., 1503.02531).
    hard: cross-entropy with the teacher's arg max; temperature and reduction play no part.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K); no gradient flows into them.
        temperature: T, above 0.
        kind: soft or hard.
        reduction: what the sum is divided by.
    """
    teacher_logits = teacher_logits.detach().float()
    if kind == "hard":
        return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    divisor = student_logits.numel() if reduction == "numel" else len(student_logits)
    return divergence * temperature**2 / divisor


class Classification(nn.Module):
    """A model trained with labels alone."""

    frozen: Sequence[Frozen] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.trainable = model
        self.stopwatch, self.is_logged = Stopwatch(on_gpu=torch.cuda.is_available()), True
        self.precision: Precision = "fp32"

    def set_precision(self, precision: Precision) -> None:
        """See `Objective`."""
        self.precision = precision

    def forward(self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Loss:
        """Soft-target cross-entropy of the model's logits, and the model's own term if it has one; no teacher."""
        logits = self.model(images.bfloat16() if self.precision == "bf16_pure" else images)
        cross_entropy = soft_cross_entropy(logits, targets)
        if not isinstance(self.model, Regularised):
            return cross_entropy, {"loss": cross_entropy.detach()}
        regulariser = self.model.regulariser()
        loss = cross_entropy + regulariser
        return loss, {
            "loss": loss.detach(), "ce": cross_entropy.detach(), "regulariser": regulariser.detach(),
        }  # fmt: skip


class ModuleDistillation(nn.Module):
    """Train a student module to act like its teacher module inside the frozen meta model.

    With z the output of the meta modules before the pair (the images for the first):
    t = after(teacher(z)), s = after(student(z)), and the loss is
    (1 - alpha) CE(s, y) + alpha KD(s, t) (arXiv 2402.16918, figure 2; METHOD in docs/method.md).

    `alpha=0` is plain cross-entropy, and the teacher is not run at all: module incubation
    (Deep Incubation, arXiv 2212.04129), which also trains the teacher's own modules.

    Members of a cohort pass the same `Prefix`, and those of one pair the same `TeacherHybrid`:
    what is frozen is then computed once for all of them.

    Args:
        meta: the meta model's modules, first to last, or a prefix made of them; frozen.
        index: the place of the pair.
        student: the module that learns, stitches included.
        teacher: the teacher module, or its hybrid; frozen. `GIVEN` where its logits come with every batch; None only
            with `alpha=0`.
        alpha: weight of the teacher's term, 0 to 1.
        temperature: of the soft teacher term.
        kind: soft or hard teacher term.
        reduction: divisor of the soft teacher term.

    Raises:
        ValueError: there is no teacher, but alpha is above 0; or its hybrid is of another place or prefix.
    """

    def __init__(
        self,
        meta: Sequence[nn.Module] | Prefix,
        index: int,
        student: nn.Module,
        teacher: nn.Module | TeacherHybrid | Given | None = None,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        kind: Kind = "soft",
        reduction: Reduction = "numel",
    ) -> None:
        super().__init__()
        if teacher is None and alpha > 0:
            raise ValueError(f"Distillation with alpha {alpha} needs a teacher module; without one alpha must be 0.")
        self.prefix = meta if isinstance(meta, Prefix) else Prefix(meta)
        self.index = index
        self.after = self.prefix.after(index).eval()
        self.needs_logits = teacher is GIVEN and alpha > 0
        self.teacher = (
            None if teacher is None or teacher is GIVEN or alpha == 0 else _hybrid(self.prefix, index, teacher)
        )
        self.frozen: Sequence[Frozen] = [self.prefix, *([self.teacher] if self.teacher is not None else [])]
        self.student = student
        self.trainable = student
        self.alpha, self.temperature, self.kind, self.reduction = alpha, temperature, kind, reduction
        self.stopwatch, self.is_logged = Stopwatch(on_gpu=torch.cuda.is_available()), True
        self.train()

    def train(self, mode: bool = True) -> "ModuleDistillation":
        """Only the student ever leaves evaluation mode."""
        super().train(mode)
        self.after.eval()
        return self

    def set_precision(self, precision: Precision) -> None:
        """See `Objective`."""
        for part in self.frozen:
            part.set_precision(precision)

    def forward(self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Loss:
        """The loss, and of it `ce`, `kd` and `teacher_share` (see `teacher_share`), this only where it is logged.

        Teacher logits (B, K) that are given are used, and the teacher is not run.
        """
        watch = self.stopwatch
        watch.start()
        tokens = self.prefix(images, self.index, watch)
        watch.lap("prefix")
        if self.teacher is None and not self.needs_logits:
            teacher_logits = None
        elif teacher_logits is not None:
            watch.counts["cache_hits"] += len(images)
        elif self.teacher is None:
            raise ValueError("The teacher's logits were to be given with every batch, but this one came without.")
        else:
            teacher_logits = self.teacher(images, watch)
        watch.lap("teacher")
        output = self.student(tokens)
        watch.lap("student")
        if output.requires_grad:
            output.register_hook(lambda gradient: watch.lap("suffix"))  # the backward pass has come down to here
        loss, logs = self._loss(self.after(output), teacher_logits, targets)
        watch.lap("suffix")
        return loss, logs

    def _loss(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Loss:
        cross_entropy = soft_cross_entropy(student_logits, targets)
        if teacher_logits is None:
            return cross_entropy, {"loss": cross_entropy.detach()}
        divergence = distillation(student_logits, teacher_logits, self.temperature, self.kind, self.reduction)
        loss = (1 - self.alpha) * cross_entropy + self.alpha * divergence
        logs = {"loss": loss.detach(), "ce": cross_entropy.detach(), "kd": divergence.detach()}
        if self.is_logged:
            logs["teacher_share"] = self.teacher_share(student_logits, teacher_logits, targets)
        return loss, logs

    def teacher_share(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """The teacher term's part of the gradient at the student's logits, 0 to 1.

        |a dKD/ds| / (|(1 - a) dCE/ds| + |a dKD/ds|), with Euclidean norms over the batch.
        """
        with torch.enable_grad():
            logits = student_logits.detach().float().requires_grad_()
            ce = (1 - self.alpha) * soft_cross_entropy(logits, targets)
            kd = self.alpha * distillation(logits, teacher_logits, self.temperature, self.kind, self.reduction)
            (of_labels,), (of_teacher,) = torch.autograd.grad(ce, logits), torch.autograd.grad(kd, logits)
        norms = of_labels.norm() + of_teacher.norm()
        return of_teacher.norm() / norms.clamp_min(torch.finfo(torch.float32).tiny)


def _hybrid(prefix: Prefix, index: int, teacher: nn.Module | TeacherHybrid) -> TeacherHybrid:
    if not isinstance(teacher, TeacherHybrid):
        return TeacherHybrid(prefix, index, teacher)
    if teacher.prefix is not prefix or teacher.index != index:
        raise ValueError(
            f"The teacher's hybrid is of place {teacher.index} and prefix {id(teacher.prefix):#x}, but the student is "
            f"of place {index} and prefix {id(prefix):#x}. Make the hybrid of the same prefix and place."
        )
    return teacher
