"""Whoever watches a training sees every validation, whenever they look, and after a kill again."""

from m2mkd_ray.training.landmarks import Landmarks


def logged(step: int, epoch: float, **more: float) -> dict[str, float]:
    return {"step": step, "epoch": epoch, "lr": 0.1, "loss": 1 / step, "decodes": 8.0, **more}


def validated(step: int, epoch: float) -> dict[str, float]:
    return {"step": step, "epoch": epoch, "val_top1": epoch / 10}


HISTORY = [
    validated(0, 0.0), logged(2, 0.5, flops=1.0), logged(4, 1.0, flops=1.0), validated(4, 1.0), logged(6, 1.5),
    logged(8, 2.0, flops=3.0), logged(9, 2.25), validated(8, 2.0),
]  # fmt: skip


def test_landmarks_are_validations_and_the_first_losses_after_every_epoch() -> None:
    found = [(point["step"], "val_top1" in point, "loss" in point) for point in Landmarks(HISTORY).points]
    assert found == [(4, False, True), (4, True, False), (8, False, True), (8, True, False)]


def test_a_landmark_knows_what_was_counted_up_to_it() -> None:
    assert [point["decodes"] for point in Landmarks(HISTORY).points] == [16.0, 16.0, 32.0, 40.0]
    assert [point["flops"] for point in Landmarks(HISTORY).points] == [2.0, 2.0, 5.0, 5.0]
    assert [point["counted_steps"] for point in Landmarks(HISTORY).points] == [4, 4, 8, 9]


def test_those_of_a_training_that_is_taken_up_are_those_that_it_had() -> None:
    for cut in range(len(HISTORY)):
        taken_up = Landmarks(HISTORY[:cut])
        for point in HISTORY[cut:]:
            taken_up.see(point)
        assert taken_up.points == Landmarks(HISTORY).points
