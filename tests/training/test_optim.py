import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.models import family
from m2mkd_ray.training import TrainConfig
from m2mkd_ray.training.optim import adamw, learning_rate


def timms(config: TrainConfig, unit: int) -> tuple[CosineLRScheduler, torch.optim.Optimizer]:
    """timm's scheduler of the same settings, whose time runs in 1/unit epochs."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=round(config.epochs * unit),
        lr_min=config.min_lr,
        warmup_t=round(config.warmup_epochs * unit),
        warmup_lr_init=config.warmup_lr,
    )
    return scheduler, optimizer


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_the_learning_rate_of_a_step_is_timms(warmup_epochs: int) -> None:
    config = TrainConfig(epochs=10, lr=1e-3, warmup_epochs=warmup_epochs)
    scheduler, optimizer = timms(config, unit=7)
    for step in range(70):
        scheduler.step(step)
        assert learning_rate(config, step, 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("warmup_epochs", [0, 20])
def test_the_schedule_by_epochs_is_the_references_with_its_off_by_one(warmup_epochs: int) -> None:
    """kamanphoebe/m2mKD `di/main.py`: `lr_scheduler.step(epoch)` stands at the end of epoch `epoch`."""
    config = TrainConfig(epochs=100, lr=2e-3, warmup_epochs=warmup_epochs, schedule="epoch")
    scheduler, optimizer = timms(config, unit=1)
    steps_per_epoch, rates = 3, []
    for epoch in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            assert learning_rate(config, step, steps_per_epoch) == pytest.approx(rates[-1], rel=1e-9)
        scheduler.step(epoch)
    assert rates[0] == rates[1] == (1e-6 if warmup_epochs else 2e-3)
    assert rates[-1] > config.min_lr


def test_the_learning_rate_starts_and_ends_where_it_should() -> None:
    config = TrainConfig(epochs=2, lr=1e-2, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-4)
    assert learning_rate(config, 0, 10) == 1e-5
    assert learning_rate(config, 10, 10) == pytest.approx(1e-4 + 0.5 * (1e-2 - 1e-4))
    assert learning_rate(config, 20, 10) == pytest.approx(1e-4)
    assert learning_rate(config, 25, 10) == pytest.approx(1e-4)  # a last step that was rounded up


@pytest.mark.parametrize(("epochs", "steps"), [(3, 21), (0.5, 4), (0.01, 1)])
def test_a_part_of_an_epoch_is_rounded_to_steps_and_never_none(epochs: float, steps: int) -> None:
    assert TrainConfig(epochs=epochs, lr=1e-3).total_steps(7) == steps


def test_a_warm_up_longer_than_the_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_epochs 3\.0 is more than epochs 2\.0"):
        TrainConfig(epochs=2, lr=1e-3, warmup_epochs=3)


@pytest.fixture
def student() -> nn.Module:
    """A whole student that has one of every kind of tensor, stitches included."""
    size = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "num_classes": 5, "num_heads": 2}
    blueprint = Blueprint(
        teacher=Vit(width=24, depth=2, **size),
        teacher_depths=(1, 1),
        student=Student(vit=Vit(width=16, depth=2, **size), moe=Moe(num_experts=3, blocks=(1,))),
        student_depths=(1, 1),
    )
    return family("vmoe").model(blueprint, keep_stitches=True)


def test_biases_norms_embeddings_and_tokens_are_not_decayed(student: nn.Module) -> None:
    optimizer = adamw(student, TrainConfig(epochs=1, lr=1e-3, weight_decay=0.05))
    names = {parameter: name for name, parameter in student.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == set(names.values())
    matrices = {name for name, rate in decay.items() if rate == 0.05}
    assert {name for name, rate in decay.items() if rate == 0.0} == set(decay) - matrices
    assert matrices == {
        "patch_embed.proj.weight",
        "head.weight",
        *(f"blocks.{i}.attn.{part}.weight" for i in (0, 3) for part in ("qkv", "proj")),
        *(f"blocks.0.mlp.{part}.weight" for part in ("fc1", "fc2")),
        "blocks.3.mlp.router.gate.weight",
        *(f"blocks.3.mlp.experts.{part}" for part in ("w1", "w2")),
        *(f"blocks.{i}.proj.weight" for i in (1, 2)),
    }


def test_only_what_requires_a_gradient_is_optimized(student: nn.Module) -> None:
    student.requires_grad_(False)
    student.get_submodule("head").requires_grad_(True)
    optimizer = adamw(student, TrainConfig(epochs=1, lr=1e-3, betas=(0.8, 0.99), eps=1e-6))
    assert sorted(p.numel() for group in optimizer.param_groups for p in group["params"]) == [5, 80]
    assert all((group["betas"], group["eps"]) == ((0.8, 0.99), 1e-6) for group in optimizer.param_groups)


def test_everything_decays_where_it_is_said() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).requires_grad_(True)
    model[0].bias.requires_grad_(False)
    (group,) = adamw(model, TrainConfig(epochs=1, lr=1e-3, weight_decay=0.075, decayed="all")).param_groups
    assert group["weight_decay"] == 0.075
    assert {id(weight) for weight in group["params"]} == {id(model[0].weight), id(model[1].weight), id(model[1].bias)}
    assert "decayed" not in TrainConfig(epochs=1, lr=1e-3).model_dump()  # so that keys stay
