"""What a history says of the training, apart from what it says of the machine."""

from collections.abc import Iterable

from m2mkd_ray.training import Point

MEASURED = {"images_per_s", "data_wait", "train_s", "first_step_at", "peak_memory_gb"}
MEASURED |= {"decodes", "prefix_calls", "teacher_calls"}
MEASURED |= {f"{part}_s" for part in ("prefix", "teacher", "student", "suffix")}


def without_measures(history: Iterable[Point]) -> list[Point]:
    """What is equal whenever the training is: neither how fast it was nor who computed what."""
    return [{name: value for name, value in point.items() if name not in MEASURED} for point in history]
