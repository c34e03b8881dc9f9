import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.errors import UsageError
from m2mkd_ray.models import vmoe
from m2mkd_ray.models.fill import fill
from m2mkd_ray.models.moe import MoeMlp, num_active_parameters
from m2mkd_ray.models.stitch import Stitch
from m2mkd_ray.models.vit import create_vit, num_parameters

PAPER = Blueprint(
    teacher=Vit(name="vit_large_patch16_224", depth=24),
    teacher_depths=(6, 6, 6, 6),
    student=Student(vit=Vit(name="vit_base_patch16_224")),
    student_depths=(3, 3, 3, 3),
)


def with_moe(blueprint: Blueprint, **fields: object) -> Blueprint:
    moe = blueprint.student.moe.model_copy(update=fields)
    return blueprint.model_copy(update={"student": blueprint.student.model_copy(update={"moe": moe})})


def with_vit(blueprint: Blueprint, **fields: object) -> Blueprint:
    vit = blueprint.student.vit.model_copy(update=fields)
    return blueprint.model_copy(update={"student": blueprint.student.model_copy(update={"vit": vit})})


@pytest.mark.parametrize(
    ("blocks", "sparse"), [("all", [0, 1, 2, 3]), ("every_2", [1, 3]), ((0, 3), [0, 3]), ((), [])]
)
def test_chosen_blocks_have_a_mixture(blocks: str | tuple[int, ...], sparse: list[int], blueprint: Blueprint) -> None:
    vit = vmoe.model(with_moe(blueprint, blocks=blocks))
    assert [i for i, block in enumerate(vit.blocks) if isinstance(block.mlp, MoeMlp)] == sparse
    assert all(isinstance(block.mlp, Mlp | MoeMlp) for block in vit.blocks)


def test_dropping_stitches_equals_taking_them_out_of_the_modules(blueprint: Blueprint, images: Tensor) -> None:
    modules = [module.eval() for module in vmoe.modules(blueprint)]
    model = vmoe.model(blueprint).eval()
    fill(model, [module.state_dict() for module in modules], vmoe.rules(blueprint))
    layers = [layer for module in modules for layer in module if not isinstance(layer, Stitch)]
    assert torch.equal(model(images), nn.Sequential(*layers)(images))


@pytest.mark.parametrize("teacher_width", [24, 16])
def test_stitches_stand_between_the_modules_also_when_widths_are_equal(
    teacher_width: int, blueprint: Blueprint
) -> None:
    teacher = blueprint.teacher.model_copy(update={"width": teacher_width})
    modules = vmoe.modules(blueprint.model_copy(update={"teacher": teacher}))
    stitches = [[isinstance(layer, Stitch) for layer in module] for module in modules]
    assert stitches == [[False, False, True], [True, False, False, True], [True, False, False]]
    assert modules[1][0].proj.weight.shape == (16, teacher_width)
    assert modules[1][-1].proj.weight.shape == (teacher_width, 16)


def test_drop_path_is_linear_within_each_module(blueprint: Blueprint) -> None:
    blocks = [layer for module in vmoe.modules(blueprint, 0.3) for layer in module if hasattr(layer, "drop_path1")]
    assert [getattr(block.drop_path1, "drop_prob", 0) for block in blocks] == pytest.approx([0, 0, 0.3, 0])


def test_experts_start_as_the_blueprint_says(blueprint: Blueprint) -> None:
    vit = vmoe.model(with_moe(blueprint, expert_init="fastmoe"))
    assert vit.blocks[0].mlp.experts.w1.abs().max() <= (16 * 64) ** -0.5


def test_v_moe_base_has_the_papers_size() -> None:
    """483.3 M parameters, 143.3 M active; "Every 2" would have 284.9 M."""
    with torch.device("meta"):
        model, every_2 = vmoe.model(PAPER), vmoe.model(with_moe(PAPER, blocks="every_2"))
    assert num_parameters(model) == pytest.approx(483.3e6, abs=5e4)
    assert num_active_parameters(model) == pytest.approx(143.3e6, abs=5e4)
    assert num_parameters(every_2) == pytest.approx(284.9e6, abs=5e4)


def test_meta_model_and_modules_have_the_papers_sizes() -> None:
    """Meta model of DeiT-L 52.4 M; student modules 122.0 M each."""
    with torch.device("meta"):
        meta, modules = create_vit(PAPER.meta), vmoe.modules(PAPER)
    assert num_parameters(meta) == pytest.approx(52.4e6, abs=5e4)
    assert [num_parameters(module) for module in modules] == pytest.approx([122.0e6] * 4, abs=5e4)


def test_a_mixture_in_a_block_that_is_not_there_is_refused(blueprint: Blueprint) -> None:
    with pytest.raises(UsageError, match=r"moe.blocks names blocks \[4\], but the student has blocks 0 to 3"):
        vmoe.model(with_moe(blueprint, blocks=(0, 4)))


def test_depths_that_dont_add_up_to_the_entry_points_are_refused(blueprint: Blueprint) -> None:
    with pytest.raises(UsageError, match=r"student_depths \(1, 2, 1\) add up to 4 blocks.*has 12"):
        vmoe.modules(with_vit(blueprint, depth=None))


def test_a_vit_without_plain_mlps_is_refused(blueprint: Blueprint) -> None:
    with pytest.raises(UsageError, match="Block 0 of 'vit_giant_patch14_dinov2' has GluMlp where a plain MLP"):
        vmoe.model(with_vit(blueprint, name="vit_giant_patch14_dinov2", mlp_ratio=4.0))


def test_moe_of_the_paper_is_the_default() -> None:
    assert Moe() == Moe(num_experts=8, top_k=2, blocks="all", expert_init="trunc_normal")
