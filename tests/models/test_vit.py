import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Vit
from m2mkd_ray.errors import UsageError
from m2mkd_ray.models.vit import create_vit, num_parameters, splice, split, width

# Each has something of its own on the way from images to logits.
NAMES = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",  # no position for the class token, layer scale
    "vit_small_patch14_dinov2",  # layer scale
    "vit_small_patch14_reg4_dinov2",  # register tokens, no position for prefix tokens
    "vit_base_patch16_clip_224",  # norm before the blocks, no bias in the patch embedding
    "vit_small_patch16_18x2_224",  # parallel layers in a block
]


def tiny(name: str, depth: int = 4) -> Vit:
    return Vit(name=name, img_size=16, patch_size=4, num_classes=5, width=16, depth=depth, num_heads=2)


def scrambled(vit: nn.Module) -> nn.Module:
    """Weights far from their start, so that zeros and ones there hide nothing."""
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(std=0.3)
    return vit.eval()


@pytest.mark.parametrize("depths", [(4,), (1, 3), (1, 2, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_modules_in_a_row_are_the_vit(name: str, depths: tuple[int, ...], images: Tensor) -> None:
    vit = scrambled(create_vit(tiny(name)))
    assert torch.equal(nn.Sequential(*split(vit, depths))(images), vit(images))


def test_modules_in_a_row_train_as_the_vit(images: Tensor) -> None:
    """With stochastic depth and dropout on: the same gradients from the same random numbers."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2,
                            drop_path_rate=0.5, pos_drop_rate=0.2, drop_rate=0.2, patch_drop_rate=0.5)  # fmt: skip
    gradients = []
    for model in (vit, nn.Sequential(*split(vit, (1, 2, 1)))):
        vit.zero_grad()
        torch.manual_seed(3)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in vit.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_split_shares_parameters_and_counts_each_once() -> None:
    vit = create_vit(tiny("vit_tiny_patch16_224"))
    row = nn.Sequential(*split(vit, (2, 2)))
    assert {id(parameter) for parameter in row.parameters()} == {id(parameter) for parameter in vit.parameters()}
    assert num_parameters(row) == num_parameters(vit)


def test_names_in_modules_are_the_place_and_timms_name() -> None:
    first, last = split(create_vit(tiny("vit_tiny_patch16_224")), (1, 3))
    assert {"0.cls_token", "0.pos_embed", "0.patch_embed.proj.weight", "1.attn.qkv.weight"} <= set(first.state_dict())
    assert {"0.attn.qkv.weight", "2.mlp.fc1.bias", "3.norm.weight", "3.head.bias"} <= set(last.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_modules_make_the_same_modules_again(name: str, images: Tensor) -> None:
    modules = split(scrambled(create_vit(tiny(name))), (1, 3))
    again = split(create_vit(tiny(name)).eval(), (1, 3))
    for module, fresh in zip(modules, again, strict=True):
        fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(nn.Sequential(*again)(images), nn.Sequential(*modules)(images))


def test_a_copied_module_is_independent_of_its_vit(images: Tensor) -> None:
    vit = scrambled(create_vit(tiny("deit3_small_patch16_224")))
    modules = copy.deepcopy(split(vit, (2, 2)))
    before = vit(images)
    scrambled(vit)
    assert torch.equal(nn.Sequential(*modules)(images), before)


@pytest.mark.parametrize("training", [True, False])
def test_split_keeps_the_vits_mode(training: bool) -> None:
    vit = create_vit(tiny("vit_tiny_patch16_224")).train(training)
    assert all(part.training is training for module in split(vit, (2, 2)) for part in module.modules())


def test_splicing_a_models_own_module_changes_nothing(images: Tensor) -> None:
    vit = scrambled(create_vit(tiny("vit_tiny_patch16_224")))
    modules = split(vit, (1, 1, 1, 1))
    for index, module in enumerate(modules):
        assert torch.equal(splice(modules, index, module)(images), vit(images))


def test_splicing_a_teachers_module_into_the_meta_model_equals_running_the_parts(
    blueprint: Blueprint, images: Tensor
) -> None:
    meta = split(scrambled(create_vit(blueprint.meta)), (1, 1, 1))
    teacher = split(scrambled(create_vit(blueprint.teacher)), blueprint.teacher_depths)
    assert torch.equal(splice(meta, 1, teacher[1])(images), meta[2](teacher[1](meta[0](images))))


def test_split_gives_both_totals_when_depths_dont_add_up() -> None:
    with pytest.raises(ValueError, match="add up to 6 blocks, but the ViT has 4"):
        split(create_vit(tiny("vit_tiny_patch16_224")), (2, 2, 2))


def test_split_refuses_a_module_without_blocks() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        split(create_vit(tiny("vit_tiny_patch16_224")), (4, 0))


def test_splice_refuses_a_place_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="place 2: there are 2 modules"):
        splice([nn.Identity(), nn.Identity()], 2, nn.Identity())


def test_weights_depend_on_the_seed_alone() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(create_vit(tiny("deit3_small_patch16_224")).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_create_vit_without_changes_is_timms() -> None:
    with torch.device("meta"):
        ours = create_vit(Vit(name="vit_base_patch16_224")).state_dict()
        theirs = timm.create_model("vit_base_patch16_224").state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_drop_path_grows_linearly_over_the_blocks() -> None:
    blocks = create_vit(tiny("vit_tiny_patch16_224", depth=3), drop_path=0.2).blocks
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks] == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("given", [None, 48])
def test_width_is_known_also_where_the_blueprint_leaves_it_open(given: int | None) -> None:
    assert width(Vit(name="vit_small_patch16_224", width=given, num_heads=6)) == (given or 384)


@pytest.mark.parametrize(
    ("vit", "message"),
    [
        (Vit(name="vit_tinny_patch16_224"), "not known to timm.*vit_tiny_patch16_224"),
        (Vit(name="resnet50"), "not a ViT that can be cut"),
        (Vit(name="swin_tiny_patch4_window7_224"), "not a ViT that can be cut"),
        (Vit(name="deit_tiny_distilled_patch16_224"), "second head.*Use 'deit_tiny_patch16_224'"),
        (Vit(name="vit_base_patch16_siglip_224", depth=1), "pools by attention"),
        (Vit(name="vit_base_patch16_siglip_gap_224", depth=1), "no class token"),
        (Vit(name="vit_tiny_patch16_224.nobody", depth=1), "no weights 'vit_tiny_patch16_224.nobody'.*augreg_in21k"),
        (Vit(name="vit_tiny_patch16_224", img_size=100, depth=1), "img_size 100 is not a multiple of 16"),
        (Vit(name="vit_tiny_patch16_224", width=64, depth=1), "cannot build.*width=64"),
    ],
    ids=lambda value: value.name if isinstance(value, Vit) else "",
)
def test_a_vit_that_cannot_be_cut_is_refused_with_the_reason(vit: Vit, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_vit(vit)
