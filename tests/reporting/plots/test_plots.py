"""The parts of figures that can be wrong without looking wrong."""

import matplotlib
import pytest

from m2mkd_ray.reporting import FIGURES, CounterRow, Curve, ExpertUse, Report, Span, Subject
from m2mkd_ray.reporting.plots import DARK, LIGHT, Theme, png
from m2mkd_ray.reporting.plots.experts import _mean_use
from m2mkd_ray.reporting.plots.style import reads_dark_on, spread, subject_colour
from m2mkd_ray.reporting.plots.timeline import _busy, _drawn, _lanes, _rows


def _span(stage: str, start: float, end: float) -> Span:
    return Span(stage=stage, recipe="demo", worker=f"pid {start}", node="a", start=start, end=end)


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio."""

    def luminance(colour: str) -> float:
        channels = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)
        ]
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_its_paper(theme: Theme) -> None:
    assert _contrast(theme.ink, theme.paper) > 7
    assert _contrast(theme.muted, theme.paper) > 4.5
    for colour in (theme.m2mkd, theme.pure, theme.teacher, theme.meta):
        assert _contrast(colour, theme.paper) > 3.9


def test_text_on_a_colour_is_the_darker_or_lighter_as_reads_better() -> None:
    assert reads_dark_on("#ffffff")
    assert not reads_dark_on(LIGHT.m2mkd)


def test_labels_are_spread_in_their_order() -> None:
    assert spread([1.0, 5.0], 1.0) == [1.0, 5.0]
    close = spread([2.0, 1.9, 2.0], 1.0)
    assert sorted(close) == pytest.approx([close[1], close[1] + 1, close[1] + 2])
    assert sum(close) == pytest.approx(5.9)


def test_idle_time_is_cut_out_and_short_pauses_are_not() -> None:
    busy = _busy([_span("a", 100.0, 150.0), _span("b", 151.0, 200.0), _span("c", 5000.0, 5100.0)])
    assert busy == [(100.0, 200.0), (5000.0, 5100.0)]
    assert _drawn([100.0, 175.0, 200.0, 5000.0, 5050.0], busy) == [0.0, 75.0, 100.0, 100.0, 150.0]


def test_overlapping_stages_are_one_busy_time() -> None:
    assert _busy([_span("a", 0.0, 100.0), _span("b", 10.0, 20.0), _span("c", 90.0, 130.0)]) == [(0.0, 130.0)]


def test_a_timeline_of_stages_without_duration_can_be_drawn(minimal_report: Report) -> None:
    report = minimal_report.model_copy(update={"spans": (_span("data", 5.0, 5.0),)})
    content, _ = png(FIGURES["timeline"], report)
    assert content.startswith(b"\x89PNG")


def test_student_and_pure_have_the_same_colours_in_every_figure(full_report: Report) -> None:
    curves_only = full_report.model_copy(update={"subjects": ()})
    for name, colour in (("demo", LIGHT.m2mkd), ("demo/pure", LIGHT.pure)):
        assert subject_colour(full_report, LIGHT, name) == colour
        assert subject_colour(curves_only, LIGHT, name) == colour


def test_the_mean_use_of_experts_is_over_suites() -> None:
    mean = _mean_use([{"b": ExpertUse(load=(1.0, 0.0), entropy=0.2)}, {"b": ExpertUse(load=(0.5, 0.5), entropy=0.6)}])
    assert mean["b"].load == pytest.approx((0.75, 0.25))
    assert mean["b"].entropy == pytest.approx(0.4)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_any_share_of_the_teacher_can_be_drawn(minimal_report: Report, scale: float) -> None:
    points = tuple({"step": float(i), "epoch": float(i), "loss": 1.0, "teacher_share": scale / 2**i} for i in range(9))
    curve = Curve(name="pair-0", title="pair 0", kind="hybrid", recipe="tiny", points=points)
    _, alt = png(FIGURES["teacher_share"], minimal_report.model_copy(update={"curves": (curve,)}))
    assert alt.endswith(f"pair 0 {100 * scale / 256:.2g} %")


def test_fine_tuning_without_validation_shows_the_loss(minimal_report: Report) -> None:
    points = tuple({"step": float(i), "epoch": i / 2, "loss": 2.0 - i / 10} for i in range(9))
    curve = Curve(name="tiny", title="m2mKD", kind="student", recipe="tiny", points=points)
    _, alt = png(FIGURES["finetuning"], minimal_report.model_copy(update={"curves": (curve,)}))
    assert alt == "Training loss over epochs. m2mKD from 2.00 to 1.20"


def test_many_classes_show_both_ends_of_the_list(full_report: Report) -> None:
    def with_classes(subject: Subject, gain: float) -> Subject:
        classes = {f"class {i:02d}": 0.3 + gain * i for i in range(50)}
        result = subject.results[0].model_copy(update={"per_class": classes})
        return subject.model_copy(update={"results": (result,)})

    subjects = (with_classes(full_report.subjects[6], 0.01), with_classes(full_report.subjects[7], 0.0))
    _, alt = png(FIGURES["classes"], full_report.model_copy(update={"subjects": subjects}))
    shown = [part.split(" ")[1] for part in alt.partition(". ")[2].split("; ")]
    assert shown == [f"{i:02d}" for i in range(49, 34, -1)] + [f"{i:02d}" for i in range(14, -1, -1)]


def test_stages_of_one_worker_that_overlap_have_a_lane_each() -> None:
    def of_one(stage: str, start: float, end: float, worker: str = "a:1") -> Span:
        return Span(stage=stage, recipe="demo", worker=worker, node="a", start=start, end=end)

    spans = [of_one("p0", 0, 10), of_one("p1", 0, 5), of_one("q", 1, 9, "a:2"), of_one("p2", 5, 8), of_one("p3", 6, 9)]
    assert _lanes(spans) == [0, 1, 0, 1, 2]
    rows = _rows(spans, _lanes(spans))
    assert {worker: row.num_lanes for (_, worker), row in rows.items()} == {"a:1": 3, "a:2": 1}
    places = [rows["a", "a:1"].place(lane) for lane in range(3)]
    assert places == sorted(places)
    assert places[1] - places[0] >= rows["a", "a:1"].bar_height  # none over another
    assert rows["a", "a:2"].top > rows["a", "a:1"].top + rows["a", "a:1"].height


def test_bars_of_time_add_up_to_their_training(full_report: Report) -> None:
    with matplotlib.rc_context():
        figure = FIGURES["counters"].draw(full_report, LIGHT)
    (axes,) = figure.axes
    widths: dict[float, float] = {}
    for bar in axes.patches:
        if bar.get_height() == pytest.approx(0.66):
            widths[bar.get_y()] = widths.get(bar.get_y(), 0.0) + bar.get_width()
    assert list(widths.values()) == pytest.approx([1.0] * 9)
    assert "pair-1 (demo) data wait 4 %, prefix 4 %, teacher 28 %, student 40 %, suffix 10 %" in figure.get_label()


def test_trainings_that_counted_nothing_have_no_bars(minimal_report: Report) -> None:
    row = CounterRow(stage="meta", recipe="demo", images_per_s=12.0)
    assert not FIGURES["counters"].applies(minimal_report.model_copy(update={"counters": (row,)}))
