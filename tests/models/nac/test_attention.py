"""Attention along a graph against a loop over edges, and the read-in against one that makes all keys and values."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ray.models.nac.attention import LatentAttention, ReadInAttention, SignatureKernel

IMAGES, RECEIVERS, SENDERS, WIDTH, CODE, HEADS, HEAD = 2, 3, 5, 8, 6, 2, 4


def attention(kernel: SignatureKernel | None, **changed: object) -> LatentAttention:
    settings: dict[str, object] = {"layer_scale": 0.1, "share_norm": False, "residual": True, **changed}
    return LatentAttention(WIDTH, CODE, HEADS, HEAD, kernel=kernel, **settings)


def states_and_codes(seed: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=draw)
        for shape in ((IMAGES, RECEIVERS, WIDTH), (RECEIVERS, CODE), (IMAGES, SENDERS, WIDTH), (SENDERS, CODE))
    )


def per_edge(layer: LatentAttention, receivers, receiver_codes, senders, sender_codes, weight) -> Tensor:
    """Every receiver sums over its edges: exp(q k / sqrt(E)) times the edge's weight, normalised, times v."""
    sent, own = layer.sender_norm(senders), layer.receiver_norm(receivers)
    queries, exits = layer.query(own, receiver_codes), torch.zeros(IMAGES, RECEIVERS, HEADS * HEAD)
    keys, values = layer.key(sent, sender_codes), layer.value(sent, sender_codes)
    for b in range(IMAGES):
        for u in range(RECEIVERS):
            for head in range(HEADS):
                part = slice(head * HEAD, (head + 1) * HEAD)
                total, message = 0.0, torch.zeros(HEAD)
                for v in range(SENDERS):
                    share = math.exp(queries[b, u, part] @ keys[b, v, part] / math.sqrt(HEAD)) * weight(u, v)
                    total, message = total + share, message + share * values[b, v, part]
                exits[b, u, part] = message / total
    return receivers + 0.1 * layer.exit(exits, receiver_codes)


@torch.no_grad()
def test_attention_in_evaluation_is_a_sum_over_edges() -> None:
    layer = attention(SignatureKernel(truncation=0.9, temperature=0.5)).eval()
    layer.kernel.bandwidth.fill_(0.7)
    drawn = states_and_codes(1)
    of_senders = torch.randn(SENDERS, 4, generator=torch.Generator().manual_seed(1))
    of_senders[4] = -of_senders[2]
    of_receivers = of_senders[:RECEIVERS]  # who is a sender too sees itself, so nobody is without an edge
    distance = 1 - F.cosine_similarity(of_receivers[:, None], of_senders[None], dim=-1)
    num_cut = int((distance > 0.9).sum())
    assert distance[2, 4] > 0.9
    assert 1 < num_cut < RECEIVERS * (SENDERS - 1)

    def weight(u: int, v: int) -> float:
        return 0.0 if distance[u, v] > 0.9 else math.exp(-distance[u, v] / 0.7)

    found = layer(*drawn, (of_receivers, of_senders))
    torch.testing.assert_close(found, per_edge(layer, *drawn, weight))


@torch.no_grad()
def test_without_a_kernel_everybody_sees_everybody() -> None:
    layer, drawn = attention(None), states_and_codes(2)
    torch.testing.assert_close(layer(*drawn), per_edge(layer, *drawn, lambda u, v: 1.0))
    assert not any("kernel" in name for name in layer.state_dict())


@torch.no_grad()
def test_a_shared_norm_is_the_receivers_and_a_read_out_adds_no_states() -> None:
    torch.manual_seed(3)
    shared = attention(None, share_norm=True)
    apart = attention(None)
    apart.load_state_dict(
        shared.state_dict() | {f"sender_norm.{n}": t for n, t in shared.receiver_norm.named_parameters()}
    )
    drawn = states_and_codes(3)
    torch.testing.assert_close(shared(*drawn), apart(*drawn))
    alone = attention(None, share_norm=True, residual=False)
    alone.load_state_dict(shared.state_dict())
    torch.testing.assert_close(alone(*drawn) + drawn[0], shared(*drawn))


def test_in_training_edges_are_samples_for_each_image_between_receivers_and_senders() -> None:
    """Frequencies of a relaxed Bernoulli's halves are its probability, at any temperature."""
    kernel = SignatureKernel(truncation=0.9, temperature=0.5)
    receivers = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.0, 0.6, 1.2, 3.0])
    senders = torch.stack([angles.cos(), angles.sin()], dim=-1)
    torch.manual_seed(0)
    sampled = kernel(receivers, senders, 4000).exp().squeeze(1)  # (B, V)
    expected = torch.exp(-(1 - angles.cos()))
    torch.testing.assert_close((sampled[:, :3] > 0.5).float().mean(0), expected[:3], atol=0.03, rtol=0)
    assert sampled[:, 3].max() < 1e-6  # cut: PyTorch's least probability, at the temperature's power
    assert (sampled[0] != sampled[1]).any()
    torch.testing.assert_close(
        kernel.eval()(receivers, senders, 2).exp()[0], torch.cat([expected[:3], torch.zeros(1)])
    )


def test_a_cut_edge_has_no_gradient_and_the_bandwidth_has_one() -> None:
    kernel = SignatureKernel(truncation=0.9, temperature=0.5)
    receivers = torch.tensor([[1.0, 0.0]], requires_grad=True)
    senders = torch.tensor([[0.8, 0.6], [0.4, -0.9], [-1.0, 0.1]], requires_grad=True)
    torch.manual_seed(0)
    kernel(receivers, senders, 3).softmax(-1)[..., 0].sum().backward()
    assert (senders.grad[:2].abs().sum(-1) > 0).all()
    assert torch.equal(senders.grad[2], torch.zeros(2))
    assert kernel.bandwidth.grad.isfinite()
    assert kernel.bandwidth.grad != 0


def test_a_read_outs_kernel_cuts_and_samples_nothing() -> None:
    kernel, receivers, senders = SignatureKernel(), torch.randn(3, 4), torch.randn(5, 4)
    expected = F.cosine_similarity(receivers[:, None], senders[None], dim=-1) - 1
    torch.testing.assert_close(kernel(receivers, senders, 2), expected)


def plain_read_in(layer: ReadInAttention, states: Tensor, codes: Tensor, tokens: Tensor) -> Tensor:
    """As the equations have it: keys and values of every token, for every latent, with the latent's code."""
    heads, latents = layer.num_heads, states.shape[1]
    repeated = layer.sender_norm(tokens).unsqueeze(2).expand(-1, -1, latents, -1)  # (B, V, U, T)
    keys, values = (
        part(repeated, codes).unflatten(-1, (heads, -1)) for part in (layer.key, layer.value)
    )  # (B, V, U, H, E)
    queries = layer.query(layer.receiver_norm(states), codes).unflatten(-1, (heads, -1))  # (B, U, H, E)
    scores = torch.einsum("buhe,bvuhe->buhv", queries, keys) / math.sqrt(layer.head_width)
    message = torch.einsum("buhv,bvuhe->buhe", scores.softmax(-1), values).flatten(2)
    return states + layer.layer_scale(layer.exit(message, codes))


def test_the_read_in_equals_one_that_makes_every_latents_keys_and_values() -> None:
    torch.manual_seed(4)
    layer = ReadInAttention(10, WIDTH, CODE, HEADS, HEAD)
    given = [torch.randn(2, 3, WIDTH), torch.randn(3, CODE), torch.randn(2, 7, 10)]
    results = []
    for forward in (layer, lambda *inputs: plain_read_in(layer, *inputs)):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        layer.zero_grad()
        output = forward(*leaves)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves), *(weight.grad for weight in layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", [None, SignatureKernel(0.9, 0.5)], ids=["plain", "kernel"])
def test_autocast_changes_attention_by_rounding_alone(kernel: SignatureKernel | None) -> None:
    layer, drawn = attention(kernel).eval(), states_and_codes(5)
    of_senders = torch.randn(SENDERS, 4)
    signatures = (of_senders[:RECEIVERS], of_senders)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(*drawn, signatures)
    torch.testing.assert_close(found, layer(*drawn, signatures), atol=0.01, rtol=0.02)
