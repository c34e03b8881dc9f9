"""The loop: killed and resumed, validated, stopped by a loss that is not finite."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import Cut, Killed
from histories import without_measures

from m2mkd_ray.data import Batches
from m2mkd_ray.data.feed import Batch
from m2mkd_ray.errors import PreemptedError, TrainingError
from m2mkd_ray.evaluation import predict, top_k_accuracy
from m2mkd_ray.training import Classification, Point, TorchEngine, TrainConfig, TrainPlacement, fit

TWO_EPOCHS = TrainConfig(epochs=2, lr=1e-2, warmup_epochs=0.5, clip_norm=1.0, validate_every_epochs=0.5)
EVERY_STEP = TrainPlacement(checkpoint_every_s=0, log_every_steps=1)
NEVER = TrainPlacement(checkpoint_every_s=1e9)


class Tampered:
    """A feed that does something to the batch of one step."""

    def __init__(self, feed: Batches, at: int, change: Callable[[Batch], Batch]) -> None:
        self.feed, self.at, self.change = feed, at, change

    @property
    def steps_per_epoch(self) -> int:
        return self.feed.steps_per_epoch

    def loader(self, start: int, stop: int, **settings: Any) -> Iterator[Batch]:
        for step, batch in enumerate(self.feed.loader(start, stop, **settings), start=start):
            yield self.change(batch) if step == self.at else batch


def spoilt(feed: Batches, at: int) -> Tampered:
    return Tampered(feed, at, lambda batch: batch._replace(images=batch.images * float("nan")))


@pytest.fixture
def run(keeper: Callable) -> Callable:
    """Train an objective: (objective, feed, placement, …) to (history, weights and optimizer state, session)."""

    def fit_it(
        objective: Classification,
        feed: Any,
        placement: TrainPlacement = NEVER,
        *,
        config: TrainConfig = TWO_EPOCHS,
        name: str = "training",
        seed: int = 0,
        validates: bool = True,
    ) -> tuple[list[Point], dict, Any]:
        session, engine = keeper(name), TorchEngine(objective, config)
        batches = [(feed.feed if isinstance(feed, Tampered | Cut) else feed)[step] for step in range(6)]

        def validate() -> dict[str, float]:
            rows = ((batch.images, batch.targets.argmax(1)) for batch in batches)
            logits, labels = predict(objective.model, rows, device=torch.device("cpu"))
            return {"val_top1": top_k_accuracy(logits, labels, 1)}

        history = fit(feed, engine, config, placement, session, seed=seed, validate=validate if validates else None)
        return history, {**objective.model.state_dict(), **moments(engine)}, session

    return fit_it


def moments(engine: TorchEngine) -> dict[str, torch.Tensor]:
    state = engine.optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kills", [(1,), (7,), (3, 4, 11)], ids=str)
def test_a_training_killed_and_resumed_ends_bit_equal(
    kills: tuple[int, ...], run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    history, weights, _ = run(classification(), feed, EVERY_STEP, name="undisturbed")
    for at in kills:
        with pytest.raises(Killed):
            run(classification(), Cut(feed, at), EVERY_STEP)
    resumed_history, resumed, _ = run(classification(seed=9), feed, EVERY_STEP)  # its own start must not matter
    assert equal(resumed, weights)
    assert without_measures(resumed_history) == without_measures(history)


def test_killed_before_the_first_checkpoint_a_training_starts_anew(
    run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    _, weights, _ = run(classification(), feed, name="undisturbed")
    with pytest.raises(Killed):
        run(classification(), Cut(feed, 8))
    assert equal(run(classification(), feed)[1], weights)


def test_a_training_whose_machine_goes_leaves_at_once_with_a_checkpoint_and_ends_bit_equal(
    run: Callable, keeper: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    """Between two logged steps, and long before the next checkpoint is due."""
    rarely = TrainPlacement(checkpoint_every_s=1e9, log_every_steps=4)
    _, weights, _ = run(classification(), feed, rarely, name="undisturbed")
    session = keeper()
    session.notice_from = 6
    engine = TorchEngine(classification(), TWO_EPOCHS)
    with pytest.raises(PreemptedError, match="after step 6 with a checkpoint"):
        fit(feed, engine, TWO_EPOCHS, rarely, session, seed=0, validate=lambda: {"val_top1": 0.0})
    assert session.checkpoints.newest_step() == 6
    history, resumed, _ = run(classification(seed=9), feed, rarely)
    assert equal(resumed, weights)
    assert [point["step"] for point in history if "loss" in point] == [4, 8, 12]


def test_at_its_last_step_a_training_whose_machine_goes_ends_as_usual(
    keeper: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    session = keeper()
    session.notice_from = 12
    history = fit(
        feed,
        TorchEngine(classification(), TWO_EPOCHS),
        TWO_EPOCHS,
        NEVER,
        session,
        seed=0,
        validate=lambda: {"val_top1": 0.0},
    )
    assert history[-1]["step"] == 12


def test_how_often_it_is_logged_and_saved_changes_nothing(
    run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    placements = [EVERY_STEP, NEVER, TrainPlacement(checkpoint_every_s=0, log_every_steps=5)]
    ends = [run(classification(), feed, placement, name=str(n))[1] for n, placement in enumerate(placements)]
    assert equal(ends[0], ends[1])
    assert equal(ends[0], ends[2])


def test_a_checkpoint_is_kept_at_points_of_the_history_but_not_at_the_end(
    run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    _, _, session = run(classification(), feed, TrainPlacement(checkpoint_every_s=0, log_every_steps=4))
    step, folder = session.checkpoints.latest()
    assert step == 8
    assert [point["step"] for point in json.loads((folder / "history.json").read_text()) if "loss" in point] == [4, 8]


def test_validating_changes_nothing_but_the_history(
    run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    seen, weights, _ = run(classification(), feed, name="validated")
    unseen, same, _ = run(classification(), feed, validates=False)
    assert equal(weights, same)
    assert without_measures(unseen) == [point for point in without_measures(seen) if "loss" in point]


def test_the_history_goes_forward_from_step_0_to_the_end(
    run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    history, _, session = run(classification(), feed, TrainPlacement(checkpoint_every_s=1e9, log_every_steps=4))
    assert [(p["step"], "val_top1" in p) for p in history] == [
        *[(0, True), (3, True), (4, False), (6, True), (8, False), (9, True), (12, False), (12, True)]
    ]
    assert [p["epoch"] for p in history] == [p["step"] / 6 for p in history]
    assert history[0]["first_step_at"] > 1.7e9
    assert [(step, total) for step, total, _ in session.reports] == [(at, 12) for at in (3, 4, 6, 8, 9, 12, 12)]
    assert [p["step"] for p in session.landmarks if "val_top1" in p] == [3, 6, 9, 12]
    assert all(p["images_per_s"] > 0 and 0 <= p["data_wait"] <= 1 for p in history if "loss" in p)


def test_speed_leaves_validation_out(
    feed: Batches, keeper: Callable, classification: Callable[..., Classification]
) -> None:
    """Images a second are compared between machines; how often one validates must not show in them."""
    naps = []

    def validate() -> dict[str, float]:
        naps.append(0.1)
        time.sleep(naps[-1])
        return {"val_top1": 0.5}

    placement = TrainPlacement(checkpoint_every_s=1e9, log_every_steps=1)
    began = time.perf_counter()
    engine = TorchEngine(classification(), TWO_EPOCHS)
    history = fit(feed, engine, TWO_EPOCHS, placement, keeper(), seed=0, validate=validate)
    wall = time.perf_counter() - began
    assert len(naps) == 5
    assert sum(16 / point["images_per_s"] for point in history if "loss" in point) <= wall - sum(naps)


def test_speed_leaves_checkpoints_out(run: Callable, feed: Batches, classification: Callable) -> None:
    """Between checkpoints at every step the seconds of the points are those of the steps, no more, no less."""
    began = time.perf_counter()
    history, _, _ = run(classification(), feed, EVERY_STEP)
    wall = time.perf_counter() - began
    seconds = [point["train_s"] for point in history if "loss" in point]
    assert min(seconds) > 1e-4, "a step took no time"
    assert sum(seconds) < wall
    assert all(point["images_per_s"] == pytest.approx(16 / point["train_s"]) for point in history if "loss" in point)


class Live(TorchEngine):
    """An engine whose snapshot is the state as it is when it is written."""

    copies = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.writers: list[threading.Thread] = []

    def snapshot(self) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            self.writers.append(threading.current_thread())
            time.sleep(0.1)  # long enough for a step to come between
            super(Live, self).snapshot()(folder)

        return write


def test_a_snapshot_that_is_no_copy_is_written_before_the_next_step(
    run: Callable, keeper: Callable, feed: Batches, classification: Callable
) -> None:
    _, weights, _ = run(classification(), feed, name="undisturbed")
    engine = Live(classification(), TWO_EPOCHS)
    with pytest.raises(Killed):
        fit(Cut(feed, 3), engine, TWO_EPOCHS, EVERY_STEP, keeper(), seed=0, validate=lambda: {"val_top1": 0.0})
    assert engine.writers == [threading.current_thread()] * 3
    assert equal(run(classification(), feed)[1], weights)


def test_a_training_learns(run: Callable, feed: Batches, classification: Callable[..., Classification]) -> None:
    config = TrainConfig(epochs=20, lr=3e-3, validate_every_epochs=10)
    history, _, _ = run(classification(dropout=0, drop_path=0), feed, config=config)
    assert history[-2]["loss"] < 2.0 < history[1]["loss"]
    assert history[-1]["val_top1"] > history[0]["val_top1"] + 0.2


def test_other_seeds_draw_other_dropout(
    run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    _, weights, _ = run(classification(), feed, name="one")
    _, others, _ = run(classification(), feed, name="other", seed=1)
    assert not equal(weights, others)


def test_the_global_random_state_neither_matters_nor_changes(
    run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    ends = []
    for start in (1, 2):
        torch.manual_seed(start)
        before = torch.get_rng_state()
        ends.append(run(classification(), feed, name=str(start))[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(*ends)


def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_kept_checkpoint(
    run: Callable, keeper: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    with pytest.raises(TrainingError, match=r"not finite at step 7: .*nan.* The checkpoint of step 7 is kept"):
        run(classification(), spoilt(feed, 7), EVERY_STEP)
    step, folder = keeper().checkpoints.latest()
    assert step == 7
    weights = torch.load(folder / "state.pt", weights_only=True)["module"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_weights_that_are_not_finite_are_not_kept_because_the_machine_goes(
    keeper: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    """Between two logged steps, where nobody has looked at the loss."""
    rarely = TrainPlacement(checkpoint_every_s=0.0, log_every_steps=4)
    session = keeper()
    session.notice_from = 6
    engine = TorchEngine(classification(), TWO_EPOCHS)
    with pytest.raises(TrainingError, match=r"Weights are not finite after step 6\. The checkpoint of step 4 is kept"):
        fit(spoilt(feed, 5), engine, TWO_EPOCHS, rarely, session, seed=0, validate=lambda: {"val_top1": 0.0})
    assert session.checkpoints.newest_step() == 4


def test_a_loss_that_is_not_finite_before_any_checkpoint_says_so(
    run: Callable, feed: Batches, classification: Callable[..., Classification]
) -> None:
    with pytest.raises(TrainingError, match="No checkpoint was written yet"):
        run(classification(), spoilt(feed, 2))
