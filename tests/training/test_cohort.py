"""A cohort: every member ends as it would alone, bit for bit, whatever becomes of the others."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cuts import Cut, Killed
from histories import without_measures
from torch import Tensor, nn

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.data import Batches
from m2mkd_ray.errors import TrainingError
from m2mkd_ray.evaluation import predict, top_k_accuracy
from m2mkd_ray.models import create_vit, drop_path_rates, set_drop_path, splice, split
from m2mkd_ray.training import (
    Ended,
    Member,
    ModuleDistillation,
    Point,
    Prefix,
    TeacherHybrid,
    TorchEngine,
    TrainConfig,
    TrainPlacement,
    fit_together,
    seeded,
)

VIT = Vit(
    name="vit_tiny_patch16_224",
    img_size=28,
    patch_size=14,
    num_classes=10,
    width=16,
    depth=3,
    num_heads=2,
    mlp_ratio=2,
)
CONFIG = TrainConfig(epochs=1, lr=1e-2, drop_path=0.4, clip_norm=1.0, validate_every_epochs=0.5)
NEVER = TrainPlacement(checkpoint_every_s=1e9)
EVERY_STEP = TrainPlacement(checkpoint_every_s=0, log_every_steps=1)


@dataclass(frozen=True)
class Wish:
    """A member to be made: the same every time."""

    index: int
    seed: int = 0
    config: TrainConfig = CONFIG
    loss: Mapping[str, Any] = field(default_factory=lambda: {"alpha": 0.5, "reduction": "batchmean"})
    spoil: Callable[[ModuleDistillation], None] | None = None
    patience_scores: tuple[float, ...] | None = None
    session: str = "alone"


WISHES = [
    Wish(0),
    Wish(2, seed=1, config=CONFIG.model_copy(update={"lr": 3e-3, "epochs": 2.0, "drop_path": 0.2})),
    Wish(1, seed=2, config=CONFIG.model_copy(update={"epochs": 0.5}), loss={"alpha": 0.9, "temperature": 3.0}),
    Wish(1, seed=3, loss={"alpha": 0.3, "kind": "hard"}),
    Wish(2, seed=4, loss={"alpha": 0.0}),
]


def vit_modules(seed: int) -> list[nn.Module]:
    with seeded(seed, "test"):
        vit = create_vit(VIT)
        nn.init.normal_(vit.head.weight, std=0.3)
        return list(split(vit, (1, 1, 1)))


class Frozen:
    """The meta model and the teachers' hybrids that the members of one call share."""

    def __init__(self) -> None:
        self.meta = vit_modules(100)
        self.prefix = Prefix(self.meta)
        self.hybrids = [TeacherHybrid(self.prefix, index, vit_modules(200)[index]) for index in range(3)]


@dataclass
class Ends:
    """What became of the members, by their places."""

    ended: dict[int, Ended]
    weights: dict[int, dict[str, Tensor]]
    frozen: Frozen


@pytest.fixture
def together(keeper: Callable, feed: Batches) -> Callable[..., Ends]:
    """Train members in one loop, all anew but for the checkpoints of their sessions."""
    batches = [feed[step] for step in range(3)]

    def member(wish: Wish, frozen: Frozen) -> Member:
        student = vit_modules(300 + wish.seed)[wish.index]
        set_drop_path(student, drop_path_rates(wish.config.drop_path, 2)[1:])
        hybrid = frozen.hybrids[wish.index]
        objective = ModuleDistillation(frozen.prefix, wish.index, student, hybrid, **wish.loss)
        if wish.spoil is not None:
            wish.spoil(objective)
        model = splice(frozen.meta, wish.index, student)
        scores = iter(wish.patience_scores or ())

        def validate() -> dict[str, float]:
            if wish.patience_scores is not None:
                return {"val_top1": next(scores)}
            rows = ((batch.images, batch.targets.argmax(1)) for batch in batches)
            return {"val_top1": top_k_accuracy(*predict(model, rows, device=torch.device("cpu")), 1)}

        return Member(TorchEngine(objective, wish.config), wish.config, keeper(wish.session), wish.seed, validate)

    def train(wishes: list[Wish], placement: TrainPlacement = NEVER, *, source: Any = feed) -> Ends:
        frozen = Frozen()
        members = [member(wish, frozen) for wish in wishes]
        ended, weights = {}, {}
        for end in fit_together(source, members, placement):
            ended[end.place], weights[end.place] = end, state_of(members[end.place])
        assert not any("exp_avg" in name for one in members for name in state_of(one)), "all give their memory back"
        return Ends(ended, weights, frozen)

    return train


def state_of(member: Member) -> dict[str, Tensor]:
    engine = member.engine
    assert isinstance(engine, TorchEngine)
    moments = {
        f"{index}.{name}": tensor
        for index, values in engine.optimizer.state_dict()["state"].items()
        for name, tensor in values.items()
    }
    return {**engine.objective.trainable.state_dict(), **moments}


def learned(end: Ended) -> list[Point]:
    assert end.error is None, end.error
    assert end.history is not None
    return without_measures(end.history)


def same(one: Ends, place: int, other: Ends, other_place: int = 0) -> bool:
    ours, theirs = one.weights[place], other.weights[other_place]
    assert learned(one.ended[place]) == learned(other.ended[other_place])
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def named(wishes: list[Wish], prefix: str) -> list[Wish]:
    return [Wish(**{**vars(wish), "session": f"{prefix}-{place}"}) for place, wish in enumerate(wishes)]


@pytest.mark.parametrize("micro_batch", [None, 8, 5])
def test_members_of_a_cohort_end_as_they_would_alone(micro_batch: int | None, together: Callable[..., Ends]) -> None:
    placement = NEVER.model_copy(update={"micro_batch": micro_batch, "log_every_steps": 2})
    alone = [together([wish], placement) for wish in named(WISHES, "alone")]
    cohort = together(named(WISHES, "together"), placement)
    assert list(cohort.ended) == [2, 0, 3, 4, 1], "each is told of when it ends"
    assert all(same(cohort, place, end) for place, end in enumerate(alone))


def nan_at(call: int) -> Callable[[ModuleDistillation], None]:
    def spoil(objective: ModuleDistillation) -> None:
        calls = itertools.count()
        objective.student.register_forward_hook(
            lambda module, args, output: output * float("nan") if module.training and next(calls) == call else output
        )

    return spoil


def no_memory_at(call: int) -> Callable[[ModuleDistillation], None]:
    def spoil(objective: ModuleDistillation) -> None:
        calls = itertools.count()

        def fill_up(module: nn.Module, args: Any) -> None:
            if module.training and next(calls) == call:
                raise torch.OutOfMemoryError("CUDA out of memory")

        objective.student.register_forward_pre_hook(fill_up)

    return spoil


@pytest.mark.parametrize("micro_batch", [None, 8])
def test_members_that_fail_leave_the_others_as_they_were(
    micro_batch: int | None, together: Callable[..., Ends]
) -> None:
    placement = EVERY_STEP.model_copy(update={"micro_batch": micro_batch})
    wishes = [WISHES[0], Wish(1, seed=7, spoil=nan_at(3)), WISHES[2], Wish(2, seed=8, spoil=no_memory_at(2))]
    alone = [together([wish], placement) for wish in named([WISHES[0], WISHES[2]], "alone")]
    cohort = together(named(wishes, "together"), placement)
    assert same(cohort, 0, alone[0])
    assert same(cohort, 2, alone[1])
    assert isinstance(cohort.ended[1].error, TrainingError)
    assert isinstance(cohort.ended[3].error, torch.OutOfMemoryError)
    step = 3 if micro_batch is None else 1
    assert f"not finite at step {step}" in str(cohort.ended[1].error)
    assert f"The checkpoint of step {step} is kept" in str(cohort.ended[1].error)


def test_a_member_that_fails_gives_its_memory_back(together: Callable[..., Ends]) -> None:
    cohort = together(named([Wish(1, spoil=nan_at(3)), WISHES[0]], "members"), EVERY_STEP)
    assert not any("exp_avg" in name for name in cohort.weights[0])
    assert any("exp_avg" in name for name in cohort.weights[1])


@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_member_beside_a_fresh_one(at: int, together: Callable[..., Ends], feed: Batches) -> None:
    """One that is ahead waits for the others."""
    alone = [together([wish], EVERY_STEP) for wish in named(WISHES[:3], "alone")]
    first, *others = named(WISHES[:3], "together")
    with pytest.raises(Killed):
        together([first], EVERY_STEP, source=Cut(feed, at))
    cohort = together([first, *others], EVERY_STEP)
    assert all(same(cohort, place, end) for place, end in enumerate(alone))


def test_a_member_that_waits_is_not_slowed_by_those_behind_it(together: Callable[..., Ends], feed: Batches) -> None:
    """Each step that the one behind makes alone takes long, and is not in the seconds of the one that waits."""
    first, behind = named([WISHES[0], Wish(1, spoil=slow(0.2, steps=4))], "members")
    with pytest.raises(Killed):
        together([first], EVERY_STEP, source=Cut(feed, 4))
    cohort = together([first, behind], TrainPlacement(checkpoint_every_s=1e9, log_every_steps=1))
    history = cohort.ended[0].history
    assert history is not None
    resumed = [point for point in history if "loss" in point and point["step"] > 4]
    assert len(resumed) == 2
    assert sum(point["train_s"] for point in resumed) < 0.4


def slow(seconds: float, *, steps: int) -> Callable[[ModuleDistillation], None]:
    def spoil(objective: ModuleDistillation) -> None:
        calls = itertools.count()

        def nap(module: nn.Module, args: Any) -> None:
            if module.training and next(calls) < steps:
                time.sleep(seconds)

        objective.student.register_forward_pre_hook(nap)

    return spoil


@pytest.mark.parametrize("kills", [(2,), (1, 3, 8)], ids=str)
def test_a_cohort_killed_and_resumed_ends_bit_equal(
    kills: tuple[int, ...], together: Callable[..., Ends], feed: Batches
) -> None:
    alone = [together([wish], EVERY_STEP) for wish in named(WISHES[:2], "alone")]
    wishes = named(WISHES[:2], "together")
    for at in kills:
        with pytest.raises(Killed):
            together(wishes, EVERY_STEP, source=Cut(feed, at))
    cohort = together(wishes, EVERY_STEP)
    assert all(same(cohort, place, end) for place, end in enumerate(alone))


def test_when_the_first_fails_those_further_on_go_on(together: Callable[..., Ends], feed: Batches) -> None:
    ahead = named([WISHES[0]], "ahead")[0]
    with pytest.raises(Killed):
        together([ahead], EVERY_STEP, source=Cut(feed, 4))
    cohort = together([ahead, named([Wish(1, spoil=no_memory_at(1))], "behind")[0]], EVERY_STEP)
    assert list(cohort.ended) == [1, 0]
    assert same(cohort, 0, together([WISHES[0]], EVERY_STEP))


def test_what_is_frozen_is_computed_once_for_all(together: Callable[..., Ends]) -> None:
    """Six steps of 16 images: two meta modules before the deepest member, a hybrid for each place with a teacher."""
    wishes = [Wish(0, seed=0), Wish(2, seed=1), Wish(2, seed=2), Wish(1, seed=3), Wish(2, seed=4, loss={"alpha": 0.0})]
    cohort = together(named(wishes, "members"))
    assert cohort.frozen.prefix.calls["prefix"] == 6 * 16 * 2
    assert [hybrid.calls["teacher"] for hybrid in cohort.frozen.hybrids] == [6 * 16] * 3


def test_members_have_equal_shares_of_what_they_needed(together: Callable[..., Ends]) -> None:
    """The first meta module is needed by four, the second by three, the last place's teacher by two of these."""
    wishes = [Wish(0, seed=0), Wish(2, seed=1), Wish(2, seed=2), Wish(1, seed=3), Wish(2, seed=4, loss={"alpha": 0.0})]
    cohort = together(named(wishes, "members"))
    images = 6 * 16
    deep = images / 4 + images / 3
    found = [[summed(cohort, place, f"{part}_calls") for place in range(5)] for part in ("prefix", "teacher")]
    assert found[0] == pytest.approx([0, deep, deep, images / 4, deep])
    assert found[1] == [images, images / 2, images / 2, images, 0]


def test_members_have_equal_shares_of_what_the_feed_counts(together: Callable[..., Ends], feed: Batches) -> None:
    """Of 16 images a step: three members for three steps, then two for three more, then one."""
    short, usual, longer = (CONFIG.model_copy(update={"epochs": epochs}) for epochs in (0.5, 1.0, 2.0))
    wishes = named([Wish(0, config=short), Wish(1, config=usual), Wish(2, config=longer)], "members")
    cohort = together(wishes, EVERY_STEP, source=Counting(feed))
    shares = [3 * 16 / 3, 3 * 16 / 3 + 3 * 16 / 2, 3 * 16 / 3 + 3 * 16 / 2 + 6 * 16]
    assert [summed(cohort, place, "images_made") for place in range(3)] == pytest.approx(shares)


class Counting:
    """A feed that says how many images it made."""

    def __init__(self, feed: Batches) -> None:
        self.feed, self.steps_per_epoch, self.counts = feed, feed.steps_per_epoch, {"images_made": 0}

    def loader(self, start: int, stop: int, **settings: Any) -> Any:
        for batch in self.feed.loader(start, stop, **settings):
            self.counts["images_made"] += len(batch.images)
            yield batch


def summed(ends: Ends, place: int, counter: str) -> float:
    history = ends.ended[place].history
    assert history is not None
    return sum(point.get(counter, 0.0) for point in history)


def test_nothing_is_kept_of_what_is_frozen_when_a_member_is_validated(together: Callable[..., Ends]) -> None:
    """The tokens of the last images would be held through optimizer, snapshot and validation."""
    seen = []

    def watch(objective: ModuleDistillation) -> None:
        objective.student.register_forward_hook(
            lambda module, args, output: None if module.training else seen.append(held(objective))
        )

    together(named([Wish(1, spoil=watch), WISHES[0]], "members"))
    assert seen
    assert not any(seen)


def held(objective: ModuleDistillation) -> int:
    return sum(len(part._memo.results) for part in objective.frozen)


def test_patience_ends_a_member_whose_top1_no_longer_rises(together: Callable[..., Ends], feed: Batches) -> None:
    """Validated every half epoch, three steps: rises at 3 and 6, then not at 9 and 12, equal counting as no rise."""
    config = CONFIG.model_copy(update={"epochs": 4.0, "patience": 2})
    impatient = Wish(1, config=config, patience_scores=(0.1, 0.2, 0.3, 0.3, 0.25))
    cohort = together(named([impatient, WISHES[0]], "members"), EVERY_STEP)
    history = cohort.ended[0].history
    assert history is not None
    assert [p["step"] for p in history if "val_top1" in p] == [0, 3, 6, 9, 12]
    assert history[-1]["val_top1"] == 0.25
    assert max(point["step"] for point in history) == 12
    assert same(cohort, 1, together([WISHES[0]], EVERY_STEP))


def test_out_of_patience_before_the_first_point_the_last_step_is_logged(together: Callable[..., Ends]) -> None:
    """Seldom logged: the counters of all steps are in the history all the same."""
    config = CONFIG.model_copy(update={"epochs": 4.0, "patience": 1})
    seldom = TrainPlacement(checkpoint_every_s=1e9, log_every_steps=1000)
    history = together([Wish(1, config=config, patience_scores=(0.3, 0.4, 0.2))], seldom).ended[0].history
    assert history is not None
    *_, logged, last = history
    assert (logged["step"], last["step"], last["val_top1"]) == (6, 6, 0.2)
    assert logged["loss"] > 0
    assert sum(point.get("teacher_calls", 0) for point in history) == 6 * 16


def test_patience_survives_a_kill(together: Callable[..., Ends], feed: Batches) -> None:
    config = CONFIG.model_copy(update={"epochs": 4.0, "patience": 2})
    scores = (0.1, 0.2, 0.3, 0.3, 0.25)
    alone = together([Wish(1, config=config, patience_scores=scores)], EVERY_STEP)
    with pytest.raises(Killed):
        together([Wish(1, config=config, patience_scores=scores, session="killed")], EVERY_STEP, source=Cut(feed, 10))
    resumed = together([Wish(1, config=config, patience_scores=scores[4:], session="killed")], EVERY_STEP)
    assert same(resumed, 0, alone)


def test_patience_without_validations_is_refused() -> None:
    with pytest.raises(ValueError, match="set validate_every_epochs"):
        TrainConfig(epochs=1, lr=1e-3, patience=2)


def test_what_the_feed_raises_ends_all(together: Callable[..., Ends], feed: Batches) -> None:
    with pytest.raises(Killed):
        together(named(WISHES, "members"), source=Cut(feed, 2))
