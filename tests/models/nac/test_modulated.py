"""ModFC and ModFFN by hand, from their equations."""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor

from m2mkd_ray.models.nac.modulated import ModulatedLinear, ModulatedMlp, noisy


def by_hand(layer: ModulatedLinear, inputs: Tensor, code: Tensor) -> Tensor:
    """W (x * (1 + g LN(A c))) + b for one row."""
    context = layer.modulation.weight @ code
    normed = (context - context.mean()) / torch.sqrt(context.var(unbiased=False) + 1e-5)
    found = layer.weight @ (inputs * (1 + layer.gain * normed))
    return found if layer.bias is None else found + layer.bias


def test_each_latents_inputs_are_scaled_by_its_own_code() -> None:
    layer = ModulatedLinear(6, 4, 5)
    torch.nn.init.normal_(layer.bias)
    inputs, codes = torch.randn(2, 3, 6), torch.randn(3, 5)
    found = layer(inputs, codes)
    for image in range(2):
        for latent in range(3):
            torch.testing.assert_close(found[image, latent], by_hand(layer, inputs[image, latent], codes[latent]))


def test_one_code_stands_for_all_latents() -> None:
    layer, inputs, code = ModulatedLinear(6, 4, 5, bias=False), torch.randn(2, 3, 6), torch.randn(1, 5)
    torch.testing.assert_close(layer(inputs, code), layer(inputs, code.expand(3, 5)))
    assert layer.bias is None


def test_weights_start_as_the_reference_draws_them() -> None:
    layer = ModulatedLinear(400, 300, 5)
    assert layer.weight.abs().max() <= 1 / 20
    assert math.isclose(layer.weight.std().item(), 1 / 20 / math.sqrt(3), rel_tol=0.01)
    assert (layer.gain.item(), layer.bias.abs().max().item()) == (torch.tensor(0.1).item(), 0)


def test_an_mlp_is_geglu_between_modulated_layers() -> None:
    mlp = ModulatedMlp(6, 5, mlp_ratio=1.5, layer_scale=0.1)
    states, codes = torch.randn(2, 3, 6), torch.randn(3, 5)
    found = mlp(states, codes)
    for image in range(2):
        for latent in range(3):
            normed = F.layer_norm(states[image, latent], (6,))
            hidden = by_hand(mlp.fc1, normed, codes[latent])
            assert hidden.shape == (18,)
            hidden = hidden[:9] * F.gelu(hidden[9:])
            expected = states[image, latent] + 0.1 * by_hand(mlp.fc2, hidden, codes[latent])
            torch.testing.assert_close(found[image, latent], expected)


def test_an_mlp_drops_its_path_for_whole_images() -> None:
    mlp, states = ModulatedMlp(6, 5, mlp_ratio=1, layer_scale=0.1, drop_path=0.5), torch.randn(64, 3, 6)
    assert isinstance(mlp.drop_path, DropPath)
    is_dropped = (mlp(states, torch.randn(3, 5)) == states).flatten(1).all(1)
    assert 10 < is_dropped.sum() < 54


def test_noise_on_codes_is_in_proportion_to_them_and_has_no_gradient() -> None:
    codes = torch.randn(50, 40).requires_grad_()
    found = noisy(codes, 0.05)
    share = ((found - codes) / codes).detach()
    assert share.abs().max() <= 0.0501
    assert math.isclose(share.std().item(), 0.05 / math.sqrt(3), rel_tol=0.05)
    found.sum().backward()
    assert torch.equal(codes.grad, torch.ones_like(codes))
