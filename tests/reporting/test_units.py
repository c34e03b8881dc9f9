"""Numbers as people read them."""

import pytest

from m2mkd_ray.reporting import units


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("difference", "text"), [(0.114, "+11.4"), (-0.006, "−0.6"), (-0.0001, "0.0"), (0.0004, "0.0")]
)
def test_points(difference: float, text: str) -> None:
    assert units.points(difference) == text


@pytest.mark.parametrize(
    ("number", "text"), [(410, "410"), (612_000, "612,000"), (1_240_000, "1.24 M"), (86_000_000, "86 M"), (2e9, "2 G")]
)
def test_counts(number: float, text: str) -> None:
    assert units.count(number) == text


def test_epochs() -> None:
    assert [units.epochs(number) for number in (6.0, 2.5, 20.0)] == ["6", "2.5", "20"]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 FLOP"), (950.0, "950 FLOP"), (4.16e14, "416 TFLOP"), (1.234e18, "1.23 EFLOP")]
)
def test_quantities(number: float, text: str) -> None:
    assert units.quantity(number, "FLOP") == text


def test_memory_and_rates() -> None:
    assert [units.memory(gigabytes) for gigabytes in (0.0432, 0.9999, 1.5, 71.25)] == [
        "43 MB",
        "1.0 GB",
        "1.5 GB",
        "71.2 GB",
    ]
    assert [units.rate(speed) for speed in (3.21, 9.96, 912.4, 12_345.6)] == ["3.2", "10", "912", "12,346"]
