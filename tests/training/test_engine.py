import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.data import Batches
from m2mkd_ray.training import Classification, DeepSpeedConfig, Engine, TorchEngine, TrainConfig, seeded
from m2mkd_ray.training.engine import deepspeed_config, micro_batches

# A large epsilon: else AdamW turns the rounding of gradients that are zero by symmetry (attention's key biases) into
# whole steps.
CONFIG = TrainConfig(epochs=1, lr=1e-2, eps=1e-3, clip_norm=0.5)


def take_step(
    engine: Engine, images: Tensor, targets: Tensor, *, lr: float, micro_batch: int | None = None
) -> Mapping[str, Tensor]:
    engine.begin(lr, is_logged=True)
    parts = micro_batches(images, targets, micro_batch)
    for number, part in enumerate(parts, start=1):
        engine.accumulate(*part, weight=len(part[0]) / len(images), is_last=number == len(parts))
    return engine.update()


def train(
    objective: Classification, feed: Batches, config: TrainConfig = CONFIG, *, micro_batch: int | None = None
) -> nn.Module:
    engine = TorchEngine(objective, config)
    for step in range(3):
        take_step(engine, *feed[step][:2], lr=1e-2, micro_batch=micro_batch)
    engine.end()
    return objective.model


@pytest.fixture
def plain(classification: Callable[..., Classification]) -> Callable[[], Classification]:
    """An objective without dropout, the same every time."""
    return lambda: classification(dropout=0, drop_path=0)


@pytest.mark.parametrize(("most", "sizes"), [(None, [10]), (10, [10]), (99, [10]), (5, [5, 5]), (4, [4, 3, 3])])
def test_micro_batches_are_as_equal_as_they_can_be(most: int | None, sizes: list[int]) -> None:
    images, targets = torch.arange(10), torch.arange(10) + 100
    parts = micro_batches(images, targets, most)
    assert [len(part) for part, _ in parts] == sizes
    assert torch.equal(torch.cat([part for part, _ in parts]), images)
    assert all(torch.equal(part + 100, part_targets) for part, part_targets in parts)


def test_the_torch_engine_is_the_textbooks_loop(plain: Callable[[], Classification], feed: Batches) -> None:
    objective = plain()
    matrices = [p for name, p in objective.model.named_parameters() if p.ndim > 1 and not name.endswith("_embed")]
    matrices = [p for p in matrices if p.shape != (1, 1, 16)]  # the class token
    rest = [p for p in objective.model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.05}], lr=1e-2, eps=1e-3
    )
    for step in range(3):
        images, targets = feed[step][:2]
        loss = -(targets * objective.model(images).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.model.parameters(), 0.5)
        optimizer.step()
    ours = train(plain(), feed).state_dict()
    for name, tensor in objective.model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda found, name=name: f"{name}: {found}")


@pytest.mark.parametrize("micro_batch", [8, 6, 1])
def test_micro_batches_take_the_step_of_the_whole_batch(
    micro_batch: int, plain: Callable[[], Classification], feed: Batches
) -> None:
    whole = train(plain(), feed).state_dict()
    parts = train(plain(), feed, micro_batch=micro_batch).state_dict()
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_what_is_logged_is_the_mean_over_the_whole_batch(plain: Callable[[], Classification], feed: Batches) -> None:
    images, targets = feed[0][:2]
    with torch.no_grad():
        expected, _ = plain()(images, targets)
    logs = take_step(TorchEngine(plain(), CONFIG), images, targets, lr=0.0, micro_batch=6)
    torch.testing.assert_close(logs["loss"], expected)


def test_the_learning_rate_is_the_one_it_is_told(
    plain: Callable[[], Classification], feed: Batches, copy_of: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    objective = plain()
    before = copy_of(objective.model)
    take_step(TorchEngine(objective, CONFIG), *feed[0][:2], lr=0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.model.state_dict().items())


def test_clipping_bounds_the_step(plain: Callable[[], Classification], feed: Batches) -> None:
    """With a large epsilon AdamW's first step is nearly in proportion to the gradient."""
    steps = {}
    for clip_norm in (None, 1e-3):
        objective = plain()
        config = CONFIG.model_copy(update={"clip_norm": clip_norm, "eps": 1e3, "weight_decay": 0.0})
        engine = TorchEngine(objective, config)
        before = torch.cat([p.detach().flatten().clone() for p in objective.model.parameters()])
        take_step(engine, *feed[0][:2], lr=1e3)
        steps[clip_norm] = (torch.cat([p.detach().flatten() for p in objective.model.parameters()]) - before).norm()
    assert steps[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert steps[None] > 0.1


def test_bf16_is_autocast_over_float32_weights(plain: Callable[[], Classification], feed: Batches) -> None:
    objective, seen = plain(), []
    objective.model.get_submodule("1.blocks.0.mlp.fc1").register_forward_hook(
        lambda module, args, out: seen.append((module.weight.dtype, out.dtype))
    )
    config = CONFIG.model_copy(update={"precision": "bf16"})
    trained = train(objective, feed, config).state_dict()
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    torch.testing.assert_close(trained, train(plain(), feed).state_dict(), rtol=0.1, atol=0.02)


def test_pure_bf16_moves_float32_masters(plain: Callable[[], Classification], feed: Batches) -> None:
    """A small step is lost on most bfloat16 weights, but not on their masters."""
    objective, seen = plain(), []
    objective.model.get_submodule("1.blocks.0.mlp.fc1").register_forward_hook(
        lambda module, args, out: seen.append((module.weight.dtype, out.dtype))
    )
    config = CONFIG.model_copy(update={"precision": "bf16_pure", "weight_decay": 0.0})
    engine = TorchEngine(objective, config)
    before = torch.cat([master.flatten().clone() for master in engine.masters.state()])
    rounded = objective.model.get_submodule("1.head").weight.detach().clone()
    take_step(engine, *feed[0][:2], lr=1e-7)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    masters = torch.cat([master.flatten() for master in engine.masters.state()])
    assert (masters != before).float().mean() > 0.5
    assert (objective.model.get_submodule("1.head").weight == rounded).float().mean() > 0.9
    engine.end()
    assert all(parameter.dtype == torch.float32 for parameter in objective.model.parameters())
    ended = torch.cat([parameter.detach().flatten() for parameter in objective.model.parameters()])
    assert torch.equal(ended.sort()[0], masters.sort()[0])


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_pure_bf16_learns_what_float32_learns(
    micro_batch: int | None, plain: Callable[[], Classification], feed: Batches
) -> None:
    config = CONFIG.model_copy(update={"precision": "bf16_pure"})
    trained = train(plain(), feed, config, micro_batch=micro_batch).state_dict()
    torch.testing.assert_close(trained, train(plain(), feed).state_dict(), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_saved_state_is_taken_up_bit_for_bit(
    precision: str, classification: Callable[..., Classification], feed: Batches, tmp_path: Path
) -> None:
    config = TrainConfig(**{**CONFIG.model_dump(), "precision": precision})
    engine = TorchEngine(classification(dropout=0, drop_path=0), config)
    take_step(engine, *feed[0][:2], lr=1e-2)
    write = engine.snapshot()
    take_step(engine, *feed[1][:2], lr=1e-2)
    write(tmp_path)
    other = TorchEngine(classification(seed=5, dropout=0, drop_path=0), config)
    other.load(tmp_path)
    take_step(other, *feed[1][:2], lr=1e-2)
    for each in (engine, other):
        each.end()
    one, two = (each.objective.trainable.state_dict() for each in (engine, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore"
)  # the compiler warns about torch's own code and non-leaf tensors that it looks at
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_compiled_blocks_take_the_same_steps(
    drop_path: float, classification: Callable[..., Classification], feed: Batches
) -> None:
    """Stochastic depth draws the same, too."""
    ended = []
    for compile in (True, False):
        engine = TorchEngine(classification(dropout=0, drop_path=drop_path), CONFIG, compile=compile)
        for step in range(2):
            with seeded(step):
                take_step(engine, *feed[step][:2], lr=1e-2)
        ended.append(engine.objective.trainable.state_dict())
    torch.testing.assert_close(*ended, rtol=1e-4, atol=1e-6)


def test_deepspeed_refuses_pure_bf16() -> None:
    config = CONFIG.model_copy(update={"precision": "bf16_pure"})
    with pytest.raises(ValueError, match="Set precision to bf16, or train with the torch engine"):
        deepspeed_config(config, DeepSpeedConfig(), rows=8, world=1, micro_batch=None)


def test_deepspeeds_settings_add_up() -> None:
    settings = deepspeed_config(CONFIG, DeepSpeedConfig(zero_stage=2), rows=32, world=4, micro_batch=8)
    assert settings["train_batch_size"] == 128
    assert settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * 4 == 128
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"] == {"stage": 2}


def test_a_micro_batch_larger_than_the_ranks_part_is_all_of_it() -> None:
    settings = deepspeed_config(CONFIG, DeepSpeedConfig(), rows=8, world=2, micro_batch=64)
    assert settings["train_micro_batch_size_per_gpu"] == 8


def test_a_micro_batch_that_does_not_divide_the_ranks_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a rank's 32 images are not a multiple of micro_batch 12"):
        deepspeed_config(CONFIG, DeepSpeedConfig(), rows=32, world=1, micro_batch=12)


def ranks(folder: Path, world: int, *arguments: str) -> None:
    """Run `deepspeed_ranks.py` in `world` processes, as Ray Train does: a gloo group first, then DeepSpeed."""
    script = Path(__file__).parent / "deepspeed_ranks.py"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=540)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_deepspeed_takes_the_steps_of_torch_and_resumes_bit_for_bit(world: int, feed: Batches, tmp_path: Path) -> None:
    batches = [tuple(feed[step][:2]) for step in range(3)]
    torch.save({"config": CONFIG.model_dump(exclude={"precision"}), "batches": batches}, tmp_path / "job.pt")
    ranks(tmp_path, world)
    for zero_stage in (0, 1, 2):
        for precision, tolerance in (("fp32", {"rtol": 1e-4, "atol": 1e-6}), ("bf16", {"rtol": 0.1, "atol": 0.02})):
            found = torch.load(tmp_path / f"zero-{zero_stage}-{precision}.pt", weights_only=True)
            alone = torch.load(tmp_path / f"torch-{precision}.pt", weights_only=True)
            assert all(torch.equal(tensor, found["through"][name]) for name, tensor in found["resumed"].items())
            for way in ("through", "accumulated"):
                torch.testing.assert_close(found[way], alone, **tolerance)
    if world == 2:
        ranks(tmp_path, 1, "load-only")
        said = (tmp_path / "refused.txt").read_text()
        assert "was written by 2 ranks, but there are 1 now" in said
        assert "num_workers=2" in said
