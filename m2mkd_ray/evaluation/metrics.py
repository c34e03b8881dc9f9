"""Metrics of logits against labels.

N = images, K = classes
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of images whose label is among the k largest logits; k above K counts as K."""
    k = min(k, logits.shape[-1])
    hits = (logits.topk(k, dim=-1).indices == labels[:, None]).any(dim=-1)  # (N,)
    return hits.double().mean().item()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log softmax(logits) at the label, in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def calibration_error(logits: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error with bins of equal width (Guo et al., arXiv 1706.04599, equation 3).

    The mean over images of |accuracy - confidence| of the bin that their confidence falls into, 0 to 1.
    """
    confidence, predicted = logits.double().softmax(dim=-1).max(dim=-1)  # (N,), (N,)
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1  # (N,), bins open on the left
    gaps = (predicted == labels).double() - confidence  # (N,)
    return torch.zeros(num_bins, dtype=torch.double).index_add_(0, bins, gaps).abs().sum().item() / len(labels)


def per_class_accuracy(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Mapping[str, float]:
    """Top-1 of each class that has images, by its name."""
    hits = (logits.argmax(dim=-1) == labels).double()
    return {name: hits[labels == index].mean().item() for index, name in enumerate(names) if (labels == index).any()}


def measure(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float | int | Mapping[str, float]]:
    """All metrics of logits (N, K) against labels (N,); `names` are the K classes."""
    return {
        "num_images": len(labels),
        "top1": top_k_accuracy(logits, labels, 1),
        "top5": top_k_accuracy(logits, labels, 5),
        "nll": negative_log_likelihood(logits, labels),
        "ece": calibration_error(logits, labels),
        "per_class": per_class_accuracy(logits, labels, names),
    }
