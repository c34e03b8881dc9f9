"""How logits are kept: exactly, rounded, or the most probable classes alone.

N = images, K = classes, k = top classes.

The top-k form keeps the log-probabilities of the k most probable classes and the log
of the mass of all others, and spreads that evenly over them: the teacher's softmax is
kept where it says something, and adds up to one.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from m2mkd_ray.errors import DataError, UsageError

Columns = dict[str, np.ndarray]


class LogitsFormat(BaseModel, frozen=True, extra="forbid"):
    """How exactly logits are kept."""

    kind: Literal["float32", "float16", "top_k"] = "float32"
    top_k: int | None = Field(None, gt=0)
    """top_k: classes that are kept."""

    @model_validator(mode="after")
    def _top_k_is_for_top_k(self) -> "LogitsFormat":
        if (self.kind == "top_k") != (self.top_k is not None):
            raise ValueError(
                f"kind is {self.kind} and top_k is {self.top_k}: kind top_k needs it, the others have none"
            )
        return self

    def check(self, num_classes: int) -> None:
        """
        Raises:
            UsageError: there are not more classes than are kept.
        """
        if self.top_k is not None and self.top_k >= num_classes:
            raise UsageError(
                f"Keeping the top {self.top_k} of {num_classes} classes leaves none for the rest. "
                f"Set top_k below {num_classes}, or kind to float16."
            )


def error_of(logits: Tensor, format: LogitsFormat) -> dict[str, float]:
    """What a format loses of logits float (N, K).

    Returns:
        `kl_mean` and `kl_max` over the images, of KL(softmax of the logits || softmax of what is read back), in nats,
        and `probability_error_max`, the largest absolute difference of a probability.
    """
    format.check(logits.shape[1])
    values = logits.detach().float().cpu()
    read = torch.from_numpy(decoded(encoded(values, format), format, values.shape[1]))
    full, kept = (some.double().log_softmax(1) for some in (values, read))
    kl = (full.exp() * (full - kept)).sum(1).clamp(min=0)  # (N,)
    worst = (full.exp() - kept.exp()).abs().max()
    return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max()), "probability_error_max": float(worst)}


def together(errors: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The errors of steps of one size as one."""
    if not errors:
        return {}
    worst = {name: max(error[name] for error in errors) for name in errors[0]}
    return {**worst, "kl_mean": sum(error["kl_mean"] for error in errors) / len(errors)}


def encoded(logits: Tensor, format: LogitsFormat) -> Columns:
    """The columns that hold logits float32 (N, K), each (N,) or (N, ...).

    Raises:
        DataError: the format cannot hold a value.
    """
    with np.errstate(over="ignore"):  # what is too large is refused below, with what to do
        columns = _plain(logits, format.kind) if format.top_k is None else _top(logits, format.top_k)
    for values in columns.values():
        if not np.isfinite(values).all():
            raise DataError(
                f"Logits cannot be kept as {format.kind}: expected finite values of up to "
                f"{np.finfo(values.dtype).max:g}, found {float(logits.abs().max()):g}. "
                + ("The teacher is broken." if format.kind == "float32" else "Set kind to float32.")
            )
    return columns


def _plain(logits: Tensor, dtype: str) -> Columns:
    return {"logits": logits.numpy().astype(np.dtype(dtype))}


def _top(logits: Tensor, k: int) -> Columns:
    log_probs = logits.double().log_softmax(1)  # (N, K)
    top, classes = log_probs.topk(k, dim=1)  # (N, k)
    rest = log_probs.scatter(1, classes, -torch.inf).logsumexp(1)  # (N,)
    return {
        "classes": classes.numpy().astype(class_type(logits.shape[1])),
        "log_probs": top.numpy().astype(np.float16),
        "rest": rest.numpy().astype(np.float16),
    }


def decoded(columns: Columns, format: LogitsFormat, num_classes: int) -> np.ndarray:
    """What is read back: float32 (N, K)."""
    if format.top_k is None:
        return columns["logits"].astype(np.float32)
    others = columns["rest"].astype(np.float32) - np.log(np.float32(num_classes - format.top_k))
    logits = np.repeat(others[:, None], num_classes, axis=1)  # (N, K)
    np.put_along_axis(logits, columns["classes"].astype(np.int64), columns["log_probs"].astype(np.float32), axis=1)
    return logits


def class_type(num_classes: int) -> type[np.unsignedinteger]:
    """Of the numbers of so many classes."""
    return np.uint16 if num_classes <= 2**16 else np.uint32
