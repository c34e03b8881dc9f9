"""The ends of a circuit against their equations: first states, pooling, and where an image's parts go."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ray.models.nac.ends import Pooling, Seeder, Tokenizer

LATENTS, CODE, WIDTH, CLASSES = 4, 6, 5, 3


@pytest.fixture
def seeder() -> Seeder:
    torch.manual_seed(0)
    return Seeder(CODE, WIDTH)


@pytest.fixture
def pooling() -> Pooling:
    torch.manual_seed(0)
    return Pooling(WIDTH, CLASSES)


@pytest.fixture
def codes() -> Tensor:
    return torch.randn(LATENTS, CODE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def states() -> Tensor:
    """Of two images; large, so that confidences differ."""
    return 5 * torch.randn(2, LATENTS, WIDTH, generator=torch.Generator().manual_seed(2))


def mean_and_deviation(seeder: Seeder, codes: Tensor) -> tuple[Tensor, Tensor]:
    """mu(LN(c)) and exp(logvar(LN(c)) / 2), (U, D) each."""
    normed = (codes - codes.mean(-1, keepdim=True)) / (codes.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    of_mean, of_variance = seeder.mean, seeder.log_variance
    log_variance = normed @ of_variance.weight.T + of_variance.bias
    return normed @ of_mean.weight.T + of_mean.bias, log_variance.exp().sqrt()


@torch.no_grad()
def test_first_states_are_normal_with_the_mean_and_deviation_of_their_codes(seeder: Seeder, codes: Tensor) -> None:
    assert torch.equal(seeder.log_variance.bias, torch.full((WIDTH,), -5.0))
    seeder.log_variance.weight.mul_(8)  # so that deviations differ
    mean, deviation = mean_and_deviation(seeder, codes)
    assert deviation.max() > 3 * deviation.min()
    torch.manual_seed(3)
    drawn = seeder(codes, 4000, noise="each")
    assert drawn.shape == (4000, LATENTS, WIDTH)
    assert ((drawn.mean(0) - mean).abs() < 4 * deviation / 4000**0.5).all()
    torch.testing.assert_close(drawn.std(0), deviation, rtol=0.05, atol=0)
    normed = (drawn - mean) / deviation  # (B, U, D), apart in images, latents and channels
    assert normed.flatten(1).T.corrcoef().fill_diagonal_(0).abs().max() < 0.08


@torch.no_grad()
def test_without_noise_first_states_are_their_mean(seeder: Seeder, codes: Tensor) -> None:
    mean, _ = mean_and_deviation(seeder, codes)
    torch.testing.assert_close(seeder(codes, 3, noise="none"), mean.expand(3, -1, -1))


@torch.no_grad()
def test_shared_noise_is_that_of_one_image_for_all(seeder: Seeder, codes: Tensor) -> None:
    torch.manual_seed(4)
    shared = seeder(codes, 3, noise="shared")
    torch.manual_seed(4)
    assert torch.equal(shared, seeder(codes, 1, noise="each").expand(3, -1, -1))


def pooled(pooling: Pooling, states: Tensor, gumbels: Tensor) -> Tensor:
    """Image by image, latent by latent: softmax of confidence and noise (B, U), sum of states, classifier."""
    found = []
    for of_image, noise in zip(states, gumbels, strict=True):
        confidences = [state @ pooling.confidence.weight[0] + pooling.confidence.bias[0] for state in of_image]
        weights = [(confidence + drawn).exp() for confidence, drawn in zip(confidences, noise, strict=True)]
        mean = sum(weight * state for weight, state in zip(weights, of_image, strict=True)) / sum(weights)
        found.append(pooling.head.weight @ mean + pooling.head.bias)
    return torch.stack(found)


def test_pooling_without_noise_is_a_plain_softmax(pooling: Pooling, states: Tensor) -> None:
    torch.testing.assert_close(pooling(states, noise="none"), pooled(pooling, states, torch.zeros(2, LATENTS)))


def test_pooling_with_noise_has_torchs_gumbel_softmax(pooling: Pooling, states: Tensor) -> None:
    torch.manual_seed(5)
    found = pooling(states, noise="each")
    torch.manual_seed(5)
    shares = F.gumbel_softmax(pooling.confidence(states).squeeze(-1), tau=1.0, hard=False, dim=-1)
    torch.testing.assert_close(found, pooling.head((shares.unsqueeze(-1) * states).sum(1)))


def test_pooling_with_shared_noise_adds_the_same_to_all_images(pooling: Pooling, states: Tensor) -> None:
    torch.manual_seed(6)
    found = pooling(states, noise="shared")
    torch.manual_seed(6)
    gumbels = -torch.empty(LATENTS).exponential_().log()
    torch.testing.assert_close(found, pooled(pooling, states, gumbels.expand(2, -1)))


@pytest.fixture
def tokenizer() -> Tokenizer:
    """3 x 3 tokens of 8 + 5 channels."""
    torch.manual_seed(0)
    return Tokenizer(24, 16, 5)


@torch.no_grad()
def test_tokens_are_in_rows_of_8_x_8_pixels(tokenizer: Tokenizer) -> None:
    """At the start a block hardly adds anything, so a token knows of its own pixels alone."""
    image = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    for row, column in ((0, 0), (1, 2), (2, 1)):
        other = image.clone()
        other[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += torch.randn(
            3, 8, 8, generator=torch.Generator().manual_seed(2)
        )
        moved = (tokenizer(other) - tokenizer(image)).abs().amax((0, 2))  # (V,)
        assert moved.argmax() == 3 * row + column
        assert moved.sort().values[-2] < 1e-3 * moved.max()


@torch.no_grad()
def test_a_tokens_last_channels_are_its_place_in_the_grid(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(torch.randn(2, 3, 24, 24))
    assert tokens.shape == (2, 9, 8 + 5)
    for row in range(3):
        for column in range(3):
            assert torch.equal(tokens[:, 3 * row + column, 8:], tokenizer.grid[:, row, column].expand(2, -1))


def test_a_tokenizers_blocks_start_with_a_layer_scale_of_1e_6(tokenizer: Tokenizer) -> None:
    scales = [tensor for name, tensor in tokenizer.named_parameters() if name.endswith("gamma")]
    assert [len(scale) for scale in scales] == [4] * 3 + [8] * 3
    assert all(torch.equal(scale, torch.full_like(scale, 1e-6)) for scale in scales)
