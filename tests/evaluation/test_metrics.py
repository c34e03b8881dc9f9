import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import Tensor

from m2mkd_ray.evaluation import measure, top_k_accuracy
from m2mkd_ray.evaluation.metrics import calibration_error, negative_log_likelihood, per_class_accuracy

N, K = 200, 7


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(N) % K


@pytest.fixture
def logits(labels: Tensor) -> Tensor:
    """Right more often than not, and too sure of it."""
    return 4 * torch.randn(N, K) + 3 * torch.nn.functional.one_hot(labels, K)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_scikit_learns(k: int, logits: Tensor, labels: Tensor) -> None:
    assert top_k_accuracy(logits, labels, k) == top_k_accuracy_score(labels, logits, k=k)


@pytest.mark.parametrize("k", [7, 50])
def test_all_classes_contain_the_label(k: int, logits: Tensor, labels: Tensor) -> None:
    assert top_k_accuracy(logits, labels, k) == 1


def test_negative_log_likelihood_is_scikit_learns(logits: Tensor, labels: Tensor) -> None:
    assert negative_log_likelihood(logits, labels) == pytest.approx(log_loss(labels, logits.double().softmax(-1)))


@pytest.mark.parametrize("num_bins", [1, 5, 15])
def test_calibration_error_is_the_sum_over_bins(num_bins: int, logits: Tensor, labels: Tensor) -> None:
    """Guo et al., arXiv 1706.04599, equation 3, bin by bin and image by image."""
    shares = logits.double().softmax(-1).tolist()
    error = 0.0
    for number in range(num_bins):
        hits = sure = count = 0.0
        for row, label in zip(shares, labels.tolist()):
            if number / num_bins < max(row) <= (number + 1) / num_bins:
                hits, sure, count = hits + (row.index(max(row)) == label), sure + max(row), count + 1
        if count:
            error += count / N * abs(hits / count - sure / count)
    assert calibration_error(logits, labels, num_bins) == pytest.approx(error)
    assert error > 0.05


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]]).repeat(8, 1)  # three quarters for class 0
    labels = torch.tensor([0] * 6 + [1] * 2)
    assert calibration_error(logits, labels) == pytest.approx(0, abs=1e-7)
    assert calibration_error(logits, 1 - labels) == pytest.approx(0.5)


@pytest.mark.parametrize("logit", [0.0, 1e4])
def test_the_least_and_the_most_sure_fall_into_bins_too(logit: float) -> None:
    logits = torch.tensor([[logit, 0.0]])
    assert calibration_error(logits, torch.tensor([0])) == pytest.approx(0.5 if logit == 0 else 0.0)


def test_accuracy_by_class_leaves_out_classes_without_images(logits: Tensor, labels: Tensor) -> None:
    names = [f"class {index}" for index in range(K)]
    some = labels != 3
    found = per_class_accuracy(logits[some], labels[some], names)
    predicted = logits.argmax(-1).numpy()
    expected = {f"class {i}": np.mean(predicted[labels.numpy() == i] == i) for i in range(K) if i != 3}
    assert found == pytest.approx(expected)


def test_all_metrics_together_agree_with_each_alone(logits: Tensor, labels: Tensor) -> None:
    found = measure(logits, labels, [str(index) for index in range(K)])
    assert found["num_images"] == N
    assert found["top1"] == pytest.approx(np.mean(list(found["per_class"].values())), abs=0.01)  # nearly balanced
    assert (found["top1"], found["top5"]) == (top_k_accuracy(logits, labels, 1), top_k_accuracy(logits, labels, 5))
    assert (found["nll"], found["ece"]) == (negative_log_likelihood(logits, labels), calibration_error(logits, labels))
