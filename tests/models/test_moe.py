import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.models import vmoe
from m2mkd_ray.models.moe import MoeMlp, Router, num_active_parameters


def scrambled(moe: MoeMlp) -> MoeMlp:
    """Weights far from their start: biases not zero, a router with preferences."""
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.5)
    return moe


def token_by_token(moe: MoeMlp, tokens: Tensor) -> Tensor:
    """The mixture's definition, one token and one expert at a time."""
    gate, experts = moe.router.gate, moe.experts
    outputs = []
    for token in tokens.flatten(0, -2):
        logits = gate.weight @ token + gate.bias
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: moe.router.top_k]
        gates = torch.stack([logits[e] for e in chosen]).softmax(0)
        outputs.append(
            sum(
                g * (F.gelu(token @ experts.w1[e] + experts.b1[e]) @ experts.w2[e] + experts.b2[e])
                for g, e in zip(gates, chosen, strict=True)
            )
        )
    return torch.stack(outputs).unflatten(0, tokens.shape[:-1])


def test_router_is_the_top_k_of_the_logits_then_a_softmax_over_them() -> None:
    router = Router(width=6, num_experts=5, top_k=3)
    nn.init.normal_(router.gate.weight)
    nn.init.normal_(router.gate.bias)
    tokens = torch.randn(2, 7, 6)
    routing = router(tokens)
    logits = tokens @ router.gate.weight.T + router.gate.bias
    torch.testing.assert_close(routing.logits, logits)
    order = logits.argsort(-1, descending=True)[..., :3]
    assert torch.equal(routing.indices, order)
    exps = logits.gather(-1, order).exp()
    torch.testing.assert_close(routing.gates, exps / exps.sum(-1, keepdim=True))


def test_router_computes_in_float32_under_autocast() -> None:
    router, tokens = Router(8, 4, 2), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(tokens)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    assert torch.equal(routing.logits, router(tokens).logits)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 4), (8, 2)])
@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 8), (7, 8)])
def test_moe_equals_its_definition_with_gradients(num_experts: int, top_k: int, shape: tuple[int, ...]) -> None:
    moe = scrambled(MoeMlp(8, 12, num_experts=num_experts, top_k=top_k))
    tokens = torch.randn(shape, requires_grad=True)
    weights = torch.randn(shape)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}  # of sums in another order in float32, of values around 10
    inputs = [tokens, *moe.parameters()]
    output, expected = moe(tokens), token_by_token(moe, tokens)
    torch.testing.assert_close(output, expected, **tolerance)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    slow_gradients = torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True)
    for gradient, slow in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if slow is None else slow, **tolerance)


def test_experts_without_tokens_get_a_zero_gradient() -> None:
    moe = scrambled(MoeMlp(8, 12, num_experts=5, top_k=2))
    with torch.no_grad():
        moe.router.gate.bias.copy_(torch.tensor([-1e3, 1e3, -1e3, 1e3, -1e3]))
    tokens = torch.randn(2, 3, 8)
    torch.testing.assert_close(moe(tokens), token_by_token(moe, tokens))
    moe(tokens).sum().backward()
    for parameter in moe.experts.parameters():
        assert [bool(gradient.any()) for gradient in parameter.grad] == [False, True, False, True, False]


def test_a_moe_of_equal_experts_is_a_plain_mlp() -> None:
    moe, tokens = scrambled(MoeMlp(8, 12, num_experts=4, top_k=2)), torch.randn(2, 3, 8)
    experts = moe.experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    expected = F.gelu(tokens @ experts.w1[0] + experts.b1[0]) @ experts.w2[0] + experts.b2[0]
    torch.testing.assert_close(moe(tokens), expected)


def test_a_token_is_treated_alike_in_any_batch() -> None:
    """Dropless: what the other tokens choose has no effect."""
    moe, tokens = scrambled(MoeMlp(8, 12, num_experts=4, top_k=2)), torch.randn(4, 5, 8)
    torch.testing.assert_close(moe(tokens)[1:2], moe(tokens[1:2]))


def test_used_twice_in_one_graph_gradients_add_up() -> None:
    moe, tokens = scrambled(MoeMlp(8, 12, num_experts=4, top_k=2)), torch.randn(2, 3, 8)
    slow = copy.deepcopy(moe)
    moe(moe(tokens)).sum().backward()
    token_by_token(slow, token_by_token(slow, tokens)).sum().backward()
    for parameter, other in zip(moe.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_autocast_computes_the_experts_in_bfloat16() -> None:
    moe, tokens = MoeMlp(16, 32), torch.randn(2, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = moe(tokens)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), moe(tokens), rtol=0.03, atol=1e-4)
    assert all(parameter.grad.dtype == torch.float32 for parameter in moe.parameters())


def test_trunc_normal_experts_start_with_std_002() -> None:
    experts = MoeMlp(64, 256, expert_init="trunc_normal").experts
    assert experts.w1.std().item() == pytest.approx(0.02, rel=0.02)
    assert not experts.b1.any()
    assert not torch.equal(experts.w1[0], experts.w1[1])


def test_fastmoe_experts_start_as_kaiming_uniform_on_its_3d_weights() -> None:
    """fastmoe 1.1.0 `layers.py` FMoELinear: weight (num_expert, out, in), drawn expert by expert."""
    theirs = torch.empty(8, 256, 64)
    for expert in range(8):
        nn.init.kaiming_uniform_(theirs[expert : expert + 1], a=math.sqrt(5))
    ours = MoeMlp(64, 256, expert_init="fastmoe").experts.w1
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=1e-3)
    assert ours.abs().max() <= 1 / math.sqrt(64 * 256)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.02)


def test_nothing_but_the_experts_is_named_expert() -> None:
    """DeepSpeed's saving fails on others that are (microsoft/DeepSpeed #7685)."""
    moe = MoeMlp(8, 12)
    named = {name for name in moe.state_dict() if "expert" in name}
    assert named == {f"experts.{name}" for name, _ in moe.experts.named_parameters()}


def test_active_parameters_are_those_that_one_token_meets() -> None:
    moe = MoeMlp(8, 12, num_experts=5, top_k=2)
    router, expert = 8 * 5 + 5, 8 * 12 + 12 + 12 * 8 + 8
    assert num_active_parameters(moe) == router + 2 * expert
    assert num_active_parameters(nn.Sequential(nn.Linear(3, 4), moe)) == 16 + router + 2 * expert


def test_active_parameters_of_a_model_with_all_experts_active_are_all(blueprint: Blueprint) -> None:
    moe = blueprint.student.moe.model_copy(update={"top_k": 4})
    student = blueprint.student.model_copy(update={"moe": moe})
    model = vmoe.model(blueprint.model_copy(update={"student": student}))
    assert num_active_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")  # the compiler warns about torch's own code
def test_compiled_code_does_not_follow_from_where_tokens_go() -> None:
    """Compiled once for a shape: on a CPU sizes are known, and would be compiled for."""
    compiled = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    moe = MoeMlp(8, 16, num_experts=4)
    moe.compile(backend=count)
    with torch.no_grad():
        moe(torch.randn(2, 5, 8))
        at_first = len(compiled)
        for _ in range(4):
            moe(torch.randn(2, 5, 8))
    assert at_first > 0
    assert len(compiled) == at_first
