"""What is trained, and towards what.

An objective is an `nn.Module` that maps a batch to a loss; only its `trainable`
part learns. Losses are computed in float32 whatever the precision of the model.

B = images, K = classes
"""

from collections.abc import Iterable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["soft", "hard"]
Reduction = Literal["numel", "batchmean"]
Loss = tuple[Tensor, dict[str, Tensor]]
"""The scalar loss, and scalars to log by name, both detached from nothing that the caller may keep."""


class Objective(Protocol):
    """What `fit` trains: calling it gives the loss of a batch, `trainable` is what learns."""

    trainable: nn.Module

    def __call__(self, images: Tensor, targets: Tensor) -> Loss:
        """Images (B, 3, H, W) and soft targets (B, K) to a loss and what to log."""


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

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.trainable = model

    def forward(self, images: Tensor, targets: Tensor) -> Loss:
        """Soft-target cross-entropy of the model's logits."""
        loss = soft_cross_entropy(self.model(images), targets)
        return loss, {"loss": loss.detach()}


class ModuleDistillation(nn.Module):
    """Train a student module to act like its teacher module inside the frozen meta model.

    With z the output of the meta modules before the pair (the images for the first):
    t = after(teacher(z)), s = after(student(z)), and the loss is
    (1 - alpha) CE(s, y) + alpha KD(s, t) (arXiv 2402.16918, figure 2; METHOD in docs/method.md).

    `alpha=0` is plain cross-entropy, and the teacher is not run at all: module incubation
    (Deep Incubation, arXiv 2212.04129), which also trains the teacher's own modules.

    Args:
        meta: the meta model's modules, first to last; frozen.
        index: the place of the pair.
        student: the module that learns, stitches included.
        teacher: the teacher module; frozen. None only with `alpha=0`.
        alpha: weight of the teacher's term, 0 to 1.
        temperature: of the soft teacher term.
        kind: soft or hard teacher term.
        reduction: divisor of the soft teacher term.

    Raises:
        ValueError: there is no teacher, but alpha is above 0.
    """

    def __init__(
        self,
        meta: list[nn.Module],
        index: int,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        kind: Kind = "soft",
        reduction: Reduction = "numel",
    ) -> None:
        super().__init__()
        if teacher is None and alpha > 0:
            raise ValueError(f"Distillation with alpha {alpha} needs a teacher module; without one alpha must be 0.")
        self.before = nn.Sequential(*meta[:index])
        self.after = nn.Sequential(*meta[index + 1 :])
        self.teacher = teacher if alpha > 0 else None
        self.student = student
        self.trainable = student
        self.alpha, self.temperature, self.kind, self.reduction = alpha, temperature, kind, reduction
        for frozen in self._frozen():
            frozen.requires_grad_(False)
        self.train()

    def _frozen(self) -> Iterable[nn.Module]:
        return (part for part in (self.before, self.after, self.teacher) if part is not None)

    def train(self, mode: bool = True) -> "ModuleDistillation":
        """Only the student ever leaves evaluation mode."""
        super().train(mode)
        for frozen in self._frozen():
            frozen.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor) -> Loss:
        """The loss, and of it `ce`, `kd` and `teacher_share` (see `teacher_share`)."""
        with torch.no_grad():
            tokens = self.before(images)
            teacher_logits = None if self.teacher is None else self.after(self.teacher(tokens))
        student_logits = self.after(self.student(tokens))
        cross_entropy = soft_cross_entropy(student_logits, targets)
        if teacher_logits is None:
            return cross_entropy, {"loss": cross_entropy.detach()}
        divergence = distillation(student_logits, teacher_logits, self.temperature, self.kind, self.reduction)
        loss = (1 - self.alpha) * cross_entropy + self.alpha * divergence
        share = self.teacher_share(student_logits, teacher_logits, targets)
        return loss, {
            "loss": loss.detach(),
            "ce": cross_entropy.detach(),
            "kd": divergence.detach(),
            "teacher_share": share,
        }

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
