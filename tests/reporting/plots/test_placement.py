"""The chart of a placement."""

import matplotlib
import pytest

from m2mkd_ray.reporting.plots.placement import Bar, Lane, draw_placement, placement_png

LANES = [Lane("h100-0", "H100"), Lane("h100-0", "H100"), Lane("spot", "L4")]
BARS = [
    Bar("pair-0 + pair-2", 0, 0.0, 1.0, 0.0, 80.0, "cohort"),
    Bar("pair-1", 1, 0.0, 0.5, 0.0, 50.0, "fraction"),
    Bar("pair-3", 1, 0.5, 0.5, 10.0, 90.0, "fraction"),
]


def test_bars_lie_on_their_devices_and_fractions_share_one() -> None:
    with matplotlib.rc_context():
        figure = draw_placement(LANES, BARS, 70.0)
    (axes,) = figure.axes
    boxes = [patch.get_bbox() for patch in axes.patches]
    assert [(box.x0, box.x1) for box in boxes] == [(0, 80), (0, 50), (10, 90)]
    assert all(lane - 0.5 < box.y0 < box.y1 < lane + 0.5 for lane, box in zip((0, 1, 1), boxes, strict=True))
    assert boxes[1].y1 <= boxes[2].y0
    assert [label.get_text() for label in axes.get_yticklabels()] == ["h100-0  (H100)", "spot  (L4)"]
    assert "lower bound 1 min 10 s" in str(figure.get_label())


@pytest.mark.parametrize("count", [0, 1, 64, 512])
def test_any_number_of_devices_is_drawn(count: int) -> None:
    lanes = [Lane(f"n{i}", "T4") for i in range(count)]
    bars = [Bar(f"s{i}", i, 0.0, 1.0, 0.0, 1.0 + i, "alone") for i in range(count)]
    assert placement_png(lanes, bars, 1.0).startswith(b"\x89PNG")


def test_the_same_placement_gives_the_same_file() -> None:
    assert placement_png(LANES, BARS, 70.0) == placement_png(LANES, BARS, 70.0)
