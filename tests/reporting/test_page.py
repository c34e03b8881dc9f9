"""The page: whole, self-contained, escaped, repeatable, and with the numbers that it was given."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from m2mkd_ray.reporting import FIGURES, TABLES, DataCard, Report, Subject, render
from m2mkd_ray.reporting.page import lead, notes


@pytest.fixture(scope="module")
def full(full_report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    render(full_report, folder)
    return folder


@pytest.fixture(scope="module")
def minimal(minimal_report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minimal")
    render(minimal_report, folder)
    return folder


class _Tags(HTMLParser):
    """Tags with their attributes, and whether all that was opened was closed in order."""

    EMPTY = frozenset({"meta", "img", "source", "link", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_at_twice_the_pages_size(full: Path, full_report: Report, name: str) -> None:
    assert FIGURES[name].applies(full_report)
    height, width, _ = matplotlib.image.imread(full / "figures" / f"{name}.png").shape
    assert width == 2000
    assert height > 400


def test_only_figures_that_apply_are_drawn(minimal: Path) -> None:
    assert [file.name for file in (minimal / "figures").iterdir()] == ["accuracy.png"]


@pytest.mark.parametrize("folder", ["full", "minimal"])
def test_the_page_needs_nothing_from_outside(folder: str, request: pytest.FixtureRequest) -> None:
    html = (request.getfixturevalue(folder) / "report.html").read_text(encoding="utf-8")
    tags = _Tags(html)
    assert not tags.open
    references = [value for _, attrs in tags.tags for key, value in attrs.items() if key in ("src", "srcset", "href")]
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in references)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags.tags}
    assert not re.search(r"url\(|@import", html)


def test_every_image_has_a_description(full: Path, full_report: Report) -> None:
    tags = _Tags((full / "report.html").read_text(encoding="utf-8")).tags
    alts = [attrs["alt"] or "" for tag, attrs in tags if tag == "img"]
    assert len(alts) == len(FIGURES)
    assert all(len(alt) > 40 for alt in alts)
    assert "m2mKD, in domain 74.0 %" in alts[0]


def test_sections_without_content_are_left_out(minimal: Path) -> None:
    html = (minimal / "report.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", html) == ["Before you quote a number", "Results", "Provenance"]
    assert 'class="scores"' not in html


def test_the_headline_has_both_accuracies_and_their_difference(full: Path, full_report: Report) -> None:
    html = (full / "report.html").read_text(encoding="utf-8")
    student, pure = full_report.subjects[6], full_report.subjects[7]
    gain = 100 * (student.results[0].top1 - pure.results[0].top1)
    scores = html[html.index('class="scores"') : html.index('class="notes"')]
    for top1 in (student.results[0].top1, pure.results[0].top1):
        assert f"{100 * top1:.1f} %" in scores
    assert f"{gain:+.1f} points" in scores


def test_the_json_is_the_report(full: Path, full_report: Report) -> None:
    written = json.loads((full / "report.json").read_text(encoding="utf-8"))
    assert Report.model_validate(written["report"]) == full_report
    top1 = written["summary"]["accuracy"]["demo"]["suites"]["noise"]["top1"]
    assert top1 == full_report.subjects[6].results[1].top1


def test_the_same_report_gives_the_same_bytes(minimal: Path, minimal_report: Report, tmp_path: Path) -> None:
    render(minimal_report, tmp_path)
    for name in ("report.html", "report.json", "figures/accuracy.png"):
        assert (tmp_path / name).read_bytes() == (minimal / name).read_bytes()


def test_a_users_matplotlibrc_does_not_show(minimal: Path, minimal_report: Report, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        render(minimal_report, tmp_path)
    assert (tmp_path / "figures/accuracy.png").read_bytes() == (minimal / "figures/accuracy.png").read_bytes()


def test_text_is_escaped_and_never_taken_for_mathematics(minimal_report: Report, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> & $\\frac$ {{ 7 * 7 }}'
    subject = minimal_report.subjects[0].model_copy(update={"title": evil})
    data = DataCard(name="x", title=evil, licence=evil, num_classes=2, source=evil, rows={evil: 1})
    report = minimal_report.model_copy(
        update={"title": evil, "data": data, "notes": (evil,), "recipe_yaml": evil, "subjects": (subject,),
                "versions": {evil: evil}}
    )  # fmt: skip
    render(report, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "{{ 7 * 7 }}" in html


def test_a_report_without_networks_still_renders(minimal_report: Report, tmp_path: Path) -> None:
    render(minimal_report.model_copy(update={"subjects": ()}), tmp_path)
    assert "Provenance" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_lead_counts_modules_and_compares_epochs(full_report: Report) -> None:
    sentence = lead(full_report)
    assert "from 4 modules" in sentence
    assert "for 6 epochs" in sentence
    assert sentence.endswith("trained from scratch for as many.")


def test_a_missing_control_with_matched_compute_is_said(full_report: Report) -> None:
    assert any("as much compute as all stages" in note and "behind" in note for note in notes(full_report))
    fair = tuple(s.model_copy(update={"compute_matched": False}) for s in full_report.subjects)
    without = notes(full_report.model_copy(update={"subjects": fair}))
    assert any("No control with matched compute" in note for note in without)


def test_missing_shift_is_said(minimal_report: Report) -> None:
    assert any("No shifted suite" in note for note in notes(minimal_report))


def test_tables_have_a_cell_for_every_column(full_report: Report, minimal_report: Report) -> None:
    for report in (full_report, minimal_report):
        for build in TABLES.values():
            table = build(report)
            assert all(len(row) == len(table.columns) for row in table.rows), table.title


def test_subjects_and_curves_with_one_name_are_refused(minimal_report: Report) -> None:
    twice: tuple[Subject, ...] = minimal_report.subjects * 2
    with pytest.raises(ValueError, match=r"subjects must have names of their own.*'tiny'"):
        Report.model_validate({**dict(minimal_report), "subjects": twice})
