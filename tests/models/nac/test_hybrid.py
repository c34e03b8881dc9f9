"""A circuit's modules in the meta model, and how the circuit is put together from them."""

import re

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Nac, Student, Vit
from m2mkd_ray.errors import UsageError
from m2mkd_ray.models import create_vit, fill, nac, num_parameters, splice, split
from m2mkd_ray.models.nac.hybrid import PropagatorModule, ReadInModule, ReadOutModule


def with_nac(blueprint: Blueprint, **changed: object) -> Blueprint:
    assert blueprint.student.nac is not None
    student = Student(family="nac", nac=blueprint.student.nac.model_copy(update=changed))
    return blueprint.model_copy(update={"student": student})


def test_modules_have_the_references_sizes() -> None:
    """4.09 M, 3.50 M and 3.39 M parameters, at a teacher's width of 1280 and 1000 classes at 224."""
    sizes = Nac(img_size=224, num_classes=1000)
    with torch.device("meta"):
        modules = ReadInModule(sizes, 1280), PropagatorModule(sizes, 1280, 0.1), ReadOutModule(sizes, 1280)
    assert [num_parameters(module) / 1e6 for module in modules] == pytest.approx([4.09, 3.50, 3.39], abs=0.006)


@pytest.mark.parametrize("hybrid_inputs", [1, 5])
def test_a_hybrid_goes_on_with_the_read_ins_tokens(hybrid_inputs: int, blueprint: Blueprint, images: Tensor) -> None:
    changed = with_nac(blueprint, hybrid_inputs=hybrid_inputs)
    meta = split(create_vit(blueprint.meta), (1,) * 4)
    modules = nac.modules(changed)
    assert modules[0](images).shape == (3, hybrid_inputs, 24)
    for index, module in enumerate(modules):
        assert splice(meta, index, module)(images).shape == (3, 5)
        assert nac.num_tokens(changed, index) == (17 if index else hybrid_inputs)


def test_a_propagator_in_the_meta_model_treats_all_tokens_alike(blueprint: Blueprint) -> None:
    module, tokens = nac.modules(blueprint)[1], torch.randn(2, 17, 24)
    order = torch.randperm(17)
    torch.testing.assert_close(module(tokens[:, order]), module(tokens)[:, order])


def test_stitches_are_plain_linear_layers(blueprint: Blueprint) -> None:
    shapes = [
        {name: tuple(part.weight.shape) for name, part in module.named_children() if name.endswith("stitch")}
        for module in nac.modules(blueprint)
    ]
    between = {"pre_stitch": (16, 24), "post_stitch": (24, 16)}
    assert shapes == [{"post_stitch": (24, 16)}, between, between, {"pre_stitch": (16, 24)}]


def test_only_propagators_drop_their_path(blueprint: Blueprint) -> None:
    def rates(model: nn.Module) -> set[tuple[str, float]]:
        found = ((name, getattr(part, "drop_prob", 0.0)) for name, part in model.named_modules())
        return {(re.sub(r"s?\.\d+|s$", "", name.split(".attention")[0].split(".mlp")[0]), p) for name, p in found if p}

    modules = nac.modules(blueprint, drop_path=0.1)
    assert [rates(module) for module in modules] == [set(), {("propagator", 0.1)}, {("propagator", 0.1)}, set()]
    assert rates(nac.model(blueprint, drop_path=0.1)) == {("propagator", 0.1)}


def test_codes_and_states_are_kept_with_the_module_and_do_not_learn(blueprint: Blueprint, images: Tensor) -> None:
    for index, module in enumerate(nac.modules(blueprint)):
        assert module.state_dict()["code"].shape == (1, 16)
        assert ("state" in module.state_dict()) == (index in (0, 3))
        assert not {"code", "state"} & {name for name, _ in module.named_parameters()}


def test_codes_and_states_may_learn(blueprint: Blueprint, images: Tensor) -> None:
    modules = nac.modules(with_nac(blueprint, hybrid_codes="learned"))
    modules[0](images).sum().backward()
    modules[3](torch.randn(2, 17, 24)).sum().backward()
    for module in (modules[0], modules[3]):
        assert module.code.grad.abs().sum() > 0
        assert module.state.grad.abs().sum() > 0


def test_a_read_outs_confidence_has_nothing_to_learn_from(blueprint: Blueprint) -> None:
    """One latent's share is 1 whatever its confidence, so what is not carried over is no loss."""
    module = nac.modules(blueprint)[3]
    module(torch.randn(2, 17, 24)).square().sum().backward()
    assert not module.pooling.confidence.weight.grad.any()
    assert not module.pooling.confidence.bias.grad.any()
    assert module.pooling.head.weight.grad.any()


def test_every_module_draws_a_code_of_its_own(blueprint: Blueprint) -> None:
    codes = [module.code for module in nac.modules(blueprint)]
    assert not any(torch.equal(codes[0], other) for other in codes[1:])


UNTAUGHT = [
    "inputs.codes", "inputs.signatures", "mediators.codes", "mediators.signatures", "outputs.codes",
    "outputs.signatures", "pooling.confidence.bias", "pooling.confidence.weight",
    "propagators.0.attention.kernel.bandwidth", "propagators.1.attention.kernel.bandwidth",
    "read_out.attention.kernel.bandwidth", "seeder.log_variance.bias", "seeder.log_variance.weight",
    "seeder.mean.bias", "seeder.mean.weight", "seeder.norm.bias", "seeder.norm.weight",
]  # fmt: skip


def test_the_circuit_gets_every_tensor_by_name_but_those_that_no_module_has(blueprint: Blueprint) -> None:
    modules, model = nac.modules(blueprint), nac.model(blueprint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(torch.rand_like(parameter) + 1)
    parts = [module.state_dict() for module in modules]
    filled = fill(model, parts, nac.rules(blueprint), nac.fresh(blueprint))
    after = model.state_dict()
    same = sorted(name for name in after if torch.equal(after[name], before[name]))
    assert same == UNTAUGHT
    assert (filled.fresh, filled.filled) == (len(UNTAUGHT), len(after) - len(UNTAUGHT))
    sources = {"tokenizer": 0, "read_in": 0, "read_out": 3, "pooling": 3}
    for name, tensor in after.items():
        group, _, rest = name.partition(".")
        if name in UNTAUGHT:
            continue
        if group == "propagators":
            place, _, rest = rest.partition(".")
            assert torch.equal(tensor, parts[1 + int(place)][f"propagator.{rest}"])
        else:
            assert torch.equal(tensor, parts[sources[group]][name])


def test_most_of_the_tiny_circuit_is_taught() -> None:
    with torch.device("meta"):
        model = nac.model(
            Blueprint(
                teacher=Vit(name="vit_huge_patch14_224", img_size=64, patch_size=4, num_classes=200, depth=32),
                teacher_depths=(4, 3, 3, 3, 3, 3, 3, 3, 3, 4),
                student=Student(family="nac", nac=Nac(num_classes=200)),
                student_depths=(1,) * 10,
            )
        )
    fresh = sum(
        tensor.numel()
        for name, tensor in model.state_dict().items()
        if any(re.fullmatch(pattern, name) for pattern in nac.NEVER_TAUGHT)
    )
    assert 0.97 < 1 - fresh / num_parameters(model) < 0.99


def test_stitches_cannot_be_kept(blueprint: Blueprint) -> None:
    with pytest.raises(UsageError, match="A NAC cannot keep its stitches"):
        nac.model(blueprint, keep_stitches=True)
