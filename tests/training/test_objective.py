"""The losses against METHOD's formulas in plain Python, and what of a pair learns.

B = images, K = classes
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.models import create_vit, split
from m2mkd_ray.training import Classification, ModuleDistillation, Prefix, TeacherHybrid, TorchEngine, TrainConfig
from m2mkd_ray.training.objective import distillation, soft_cross_entropy

VIT = Vit(name="vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=5, width=16, depth=3, num_heads=2)
B, K = 6, 5


def log_softmax(row: Sequence[float], temperature: float) -> list[float]:
    total = math.log(sum(math.exp(value / temperature) for value in row))
    return [value / temperature - total for value in row]


def by_hand_cross_entropy(logits: Tensor, targets: Tensor) -> float:
    rows = zip(logits.tolist(), targets.tolist())
    return sum(-y * log_p for row, ys in rows for y, log_p in zip(ys, log_softmax(row, 1.0))) / len(logits)


def by_hand_soft(student: Tensor, teacher: Tensor, temperature: float, divisor: int) -> float:
    total = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist()):
        for log_s, log_t in zip(log_softmax(s_row, temperature), log_softmax(t_row, temperature)):
            total += math.exp(log_t) * (log_t - log_s)
    return temperature**2 / divisor * total


def by_hand_hard(student: Tensor, teacher: Tensor) -> float:
    rows = zip(student.tolist(), teacher.tolist())
    return sum(-log_softmax(s_row, 1.0)[t_row.index(max(t_row))] for s_row, t_row in rows) / len(student)


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


@pytest.fixture
def student_logits() -> Tensor:
    return 3 * torch.randn(B, K)


@pytest.fixture
def teacher_logits() -> Tensor:
    return 3 * torch.randn(B, K)


@pytest.fixture
def targets() -> Tensor:
    return torch.rand(B, K).softmax(dim=-1)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(B, 3, 16, 16)


@pytest.fixture
def vit_modules() -> Callable[[], list[nn.Module]]:
    """Three modules of a new ViT that is sure of its opinions."""

    def make() -> list[nn.Module]:
        vit = create_vit(VIT)
        nn.init.normal_(vit.head.weight)
        return list(split(vit, (1, 1, 1)))

    return make


class Refuses(nn.Module):
    """A teacher that must not be run."""

    def forward(self, tokens: Tensor) -> Tensor:
        raise AssertionError("the teacher was run")


def test_cross_entropy_is_the_formulas(student_logits: Tensor, targets: Tensor) -> None:
    found = soft_cross_entropy(student_logits, targets)
    assert found.item() == pytest.approx(by_hand_cross_entropy(student_logits, targets), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("reduction", "divisor"), [("numel", B * K), ("batchmean", B)])
def test_soft_distillation_is_the_formulas(
    reduction: str, divisor: int, temperature: float, student_logits: Tensor, teacher_logits: Tensor
) -> None:
    found = distillation(student_logits, teacher_logits, temperature, "soft", reduction)
    expected = by_hand_soft(student_logits, teacher_logits, temperature, divisor)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduction", ["numel", "batchmean"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_hard_distillation_is_cross_entropy_with_the_teachers_choice(
    reduction: str, temperature: float, student_logits: Tensor, teacher_logits: Tensor
) -> None:
    found = distillation(student_logits, teacher_logits, temperature, "hard", reduction)
    assert found.item() == pytest.approx(by_hand_hard(student_logits, teacher_logits), rel=1e-5)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn_of_it(teacher_logits: Tensor) -> None:
    assert distillation(teacher_logits + 2.0, teacher_logits).item() == pytest.approx(0, abs=1e-6)


def test_losses_are_taken_in_float32(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> None:
    student, teacher = student_logits.bfloat16(), teacher_logits.bfloat16()
    for found, same in (
        (soft_cross_entropy(student, targets), soft_cross_entropy(student.float(), targets)),
        (distillation(student, teacher), distillation(student.float(), teacher.float())),
        (distillation(student, teacher, kind="hard"), distillation(student.float(), teacher.float(), kind="hard")),
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, same)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("reduction", ["numel", "batchmean"])
def test_the_gradient_at_the_logits_is_the_formulas(
    alpha: float, reduction: str, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor
) -> None:
    """(1 - a) (p_s - y) / B + a T (p_s^T - p_t^T) / n, where p^T are the shares at temperature T."""
    temperature, divisor = 2.0, B * K if reduction == "numel" else B
    logits = student_logits.requires_grad_()
    cross_entropy = soft_cross_entropy(logits, targets)
    divergence = distillation(logits, teacher_logits, temperature, "soft", reduction)
    ((1 - alpha) * cross_entropy + alpha * divergence).backward()
    s, t = logits.detach().numpy(), teacher_logits.numpy()
    of_labels = (softmax(s) - targets.numpy()) / B
    of_teacher = temperature * (softmax(s / temperature) - softmax(t / temperature)) / divisor
    expected = (1 - alpha) * of_labels + alpha * of_teacher
    torch.testing.assert_close(logits.grad, torch.from_numpy(expected))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    "loss",
    [
        {"alpha": 0.5},
        {"alpha": 0.3, "temperature": 3.0, "reduction": "batchmean"},
        {"alpha": 0.7, "kind": "hard"},
        {"alpha": 1.0},
    ],
    ids=lambda loss: "-".join(map(str, loss.values())),
)
def test_the_loss_of_a_pair_is_the_papers(
    index: int,
    loss: dict,
    vit_modules: Callable[[], list[nn.Module]],
    images: Tensor,
    targets: Tensor,
) -> None:
    meta, teacher, student = vit_modules(), vit_modules()[index], vit_modules()[index]
    found, logs = ModuleDistillation(meta, index, student, teacher, **loss)(images, targets)
    with torch.no_grad():
        tokens = nn.Sequential(*meta[:index])(images)
        after = nn.Sequential(*meta[index + 1 :])
        s, t = after(student(tokens)), after(teacher(tokens))
    cross_entropy, alpha, temperature = by_hand_cross_entropy(s, targets), loss["alpha"], loss.get("temperature", 1.0)
    divisor = B if loss.get("reduction") == "batchmean" else B * K
    hard = loss.get("kind") == "hard"
    divergence = by_hand_hard(s, t) if hard else by_hand_soft(s, t, temperature, divisor)
    assert found.item() == pytest.approx((1 - alpha) * cross_entropy + alpha * divergence, rel=1e-4)
    assert logs["loss"].item() == found.item()
    assert logs["ce"].item() == pytest.approx(cross_entropy, rel=1e-4)
    assert logs["kd"].item() == pytest.approx(divergence, rel=1e-4)
    assert not any(value.requires_grad for value in logs.values())


def test_without_alpha_a_pair_is_cross_entropy_exactly_and_runs_no_teacher(
    vit_modules: Callable[[], list[nn.Module]], images: Tensor, targets: Tensor
) -> None:
    meta, student = vit_modules(), vit_modules()[1]
    objective = ModuleDistillation(meta, 1, student, Refuses(), alpha=0)
    loss, logs = objective(images, targets)
    hybrid = nn.Sequential(meta[0], student, meta[2])
    assert torch.equal(loss, -(targets * F.log_softmax(hybrid(images), -1)).sum(-1).mean())
    assert set(logs) == {"loss"}
    assert objective.teacher is None


def test_distilling_without_a_teacher_is_refused(vit_modules: Callable[[], list[nn.Module]]) -> None:
    with pytest.raises(ValueError, match=r"alpha 0\.5 needs a teacher module"):
        ModuleDistillation(vit_modules(), 0, vit_modules()[0], None, alpha=0.5)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_the_teachers_share_is_that_of_the_gradients_norms(
    alpha: float, vit_modules: Callable[[], list[nn.Module]], images: Tensor, targets: Tensor
) -> None:
    meta, teacher, student = vit_modules(), vit_modules()[1], vit_modules()[1]
    _, logs = ModuleDistillation(meta, 1, student, teacher, alpha=alpha)(images, targets)
    with torch.no_grad():
        s = meta[2](student(meta[0](images))).numpy()
        t = meta[2](teacher(meta[0](images))).numpy()
    of_labels = np.linalg.norm((1 - alpha) * (softmax(s) - targets.numpy()) / B)
    of_teacher = np.linalg.norm(alpha * (softmax(s) - softmax(t)) / (B * K))
    assert logs["teacher_share"].item() == pytest.approx(of_teacher / (of_labels + of_teacher), rel=1e-3)


def test_only_the_student_moves(
    vit_modules: Callable[[], list[nn.Module]],
    images: Tensor,
    targets: Tensor,
    copy_of: Callable[[nn.Module], dict[str, Tensor]],
) -> None:
    objective = ModuleDistillation(vit_modules(), 1, vit_modules()[1], vit_modules()[1])
    before = copy_of(objective)
    engine = TorchEngine(objective, TrainConfig(epochs=1, lr=0.1))
    for _ in range(2):
        engine.begin(0.1, is_logged=True)
        engine.accumulate(images, targets, weight=1.0, is_last=True)
        engine.update()
    moved = {name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, before[name])}
    learns = {name for name in before if name.startswith(("student.", "trainable."))}
    assert moved == learns


def test_frozen_parts_stay_in_evaluation_mode(vit_modules: Callable[[], list[nn.Module]]) -> None:
    objective = ModuleDistillation(vit_modules(), 1, vit_modules()[1], vit_modules()[1])
    objective.train()
    assert objective.student.training
    assert not any(part.training for part in (*objective.prefix.meta, *objective.after, objective.teacher.teacher))


class Counts(nn.Module):
    """A module, and how often it was run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.runs = module, 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        return self.module(tokens)


def test_members_of_a_prefix_share_the_tokens_of_the_images_at_hand(
    vit_modules: Callable[[], list[nn.Module]], images: Tensor
) -> None:
    meta = [Counts(module) for module in vit_modules()]
    prefix = Prefix(meta)
    assert prefix(images, 0) is images
    first, second = prefix(images, 1), prefix(images, 2)
    assert torch.equal(second, meta[1].module(meta[0].module(images)))
    assert prefix(images, 1) is first
    assert [module.runs for module in meta] == [1, 1, 0]
    assert torch.equal(prefix(images.clone(), 2), second)
    assert [module.runs for module in meta] == [2, 2, 0], "others' images are others, though equal"
    assert not second.requires_grad
    assert not second.is_inference(), "the student saves them for its backward pass"


def test_trials_of_a_pair_share_the_teachers_logits(
    vit_modules: Callable[[], list[nn.Module]], images: Tensor, targets: Tensor
) -> None:
    prefix, teacher = Prefix(vit_modules()), Counts(vit_modules()[1])
    hybrid = TeacherHybrid(prefix, 1, teacher)
    trials = [ModuleDistillation(prefix, 1, vit_modules()[1], hybrid, temperature=t) for t in (1.0, 2.0, 4.0)]
    for trial in trials:
        trial(images, targets)[0].backward()
    assert teacher.runs == 1
    assert hybrid.calls["teacher"] == len(images)
    assert torch.equal(hybrid(images), prefix.meta[2](teacher.module(prefix.meta[0](images))))


def test_teacher_logits_that_are_given_take_the_teachers_place(
    vit_modules: Callable[[], list[nn.Module]], images: Tensor, targets: Tensor
) -> None:
    meta, teacher, student = vit_modules(), vit_modules()[1], vit_modules()[1]
    logits = TeacherHybrid(Prefix(meta), 1, teacher)(images)
    loss, logs = ModuleDistillation(meta, 1, student, teacher, alpha=0.6)(images, targets)
    objective = ModuleDistillation(meta, 1, student, Refuses(), alpha=0.6)
    cached, cached_logs = objective(images, targets, logits)
    assert torch.equal(loss, cached)
    assert logs == cached_logs
    assert objective.stopwatch.take()[1]["cache_hits"] == len(images)


def test_a_hybrid_of_another_place_is_refused(vit_modules: Callable[[], list[nn.Module]]) -> None:
    prefix, other = Prefix(vit_modules()), Prefix(vit_modules())
    for hybrid in (TeacherHybrid(prefix, 0, vit_modules()[0]), TeacherHybrid(other, 1, vit_modules()[1])):
        with pytest.raises(ValueError, match=f"hybrid is of place {hybrid.index}"):
            ModuleDistillation(prefix, 1, vit_modules()[1], hybrid)


def test_frozen_modules_cannot_be_in_two_precisions(vit_modules: Callable[[], list[nn.Module]]) -> None:
    prefix = Prefix(vit_modules())
    ModuleDistillation(prefix, 1, vit_modules()[1], alpha=0).set_precision("bf16")
    with pytest.raises(ValueError, match="trains in bf16 and one that trains in fp32"):
        ModuleDistillation(prefix, 0, vit_modules()[0], alpha=0).set_precision("fp32")


def test_casting_what_is_frozen_once_gives_what_autocast_gives(
    vit_modules: Callable[[], list[nn.Module]], images: Tensor, targets: Tensor
) -> None:
    meta, teacher, student = vit_modules(), vit_modules()[1], vit_modules()[1]
    objective = ModuleDistillation(meta, 1, student, teacher)
    found = []
    for cast in (False, True):
        if cast:
            objective.set_precision("bf16")
            assert meta[0][1].attn.qkv.weight.dtype == torch.bfloat16
            assert meta[0][1].norm1.weight.dtype == torch.float32
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(images.clone(), targets)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in student.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_teachers_share_is_left_out_of_steps_that_are_not_logged(
    vit_modules: Callable[[], list[nn.Module]], images: Tensor, targets: Tensor
) -> None:
    objective = ModuleDistillation(vit_modules(), 1, vit_modules()[1], vit_modules()[1])
    assert "teacher_share" in objective(images, targets)[1]
    objective.is_logged = False
    assert set(objective(images, targets)[1]) == {"loss", "ce", "kd"}


class Weighed(nn.Linear):
    """A model whose loss has a term of its own: the sum of its weights' squares."""

    def regulariser(self) -> Tensor:
        return self.weight.square().sum()


def test_a_models_own_term_is_added_to_its_labels_loss() -> None:
    images, targets = torch.randn(B, 3), torch.eye(K)[torch.arange(B) % K]
    plain, weighed = nn.Linear(3, K), Weighed(3, K)
    weighed.load_state_dict(plain.state_dict())
    (loss, logs), (of_labels, alone) = Classification(weighed)(images, targets), Classification(plain)(images, targets)
    torch.testing.assert_close(loss, of_labels + plain.weight.square().sum())
    assert (logs["ce"], logs["loss"]) == (of_labels, loss)
    assert set(alone) == {"loss"}
