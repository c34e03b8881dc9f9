import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.evaluation import predict

CPU = torch.device("cpu")


@pytest.fixture
def model() -> nn.Module:
    """A model in training mode but for one frozen part."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 4), nn.Sequential(nn.Dropout(0.5)))
    model[3].eval()
    return model


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3, 2, 2), torch.arange(size)) for size in (4, 4, 1)]


def test_logits_and_labels_are_those_of_all_batches_in_order(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> None:
    logits, labels = predict(model, batches, device=CPU)
    weights = model[2]
    images = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(logits, images.flatten(1) @ weights.weight.T.detach() + weights.bias.detach())
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert not logits.requires_grad


def test_every_part_is_left_in_the_mode_that_it_was_in(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    before = [part.training for part in model.modules()]
    predict(model, batches, device=CPU)
    assert [part.training for part in model.modules()] == before
    assert set(before) == {True, False}


def test_in_bf16_logits_come_back_in_float32(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    exact, _ = predict(model, batches, device=CPU)
    rounded, _ = predict(model, batches, device=CPU, precision="bf16")
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
