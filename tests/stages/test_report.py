import json

import pytest

from m2mkd_ray.recipes import baseline
from m2mkd_ray.reporting import Report


@pytest.fixture(scope="module")
def numbers(chain) -> dict:
    return json.loads((chain.folder("report") / "report.json").read_text())


def subjects(chain, role: str) -> list[dict]:
    return json.loads((chain.folder(role) / "evaluation.json").read_text())


def test_the_page_stands_alone(chain, numbers: dict) -> None:
    folder = chain.folder("report")
    page = (folder / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert 'src="http' not in page
    assert list((folder / "figures").glob("*.png"))
    assert Report.model_validate(numbers["report"]).title == "m2mKD · demo"


def test_its_numbers_are_those_of_the_evaluations(chain, numbers: dict) -> None:
    pure = chain.of(baseline(chain.recipe, "pure"))
    expected = {
        subject["name"]: subject
        for role in ("evaluate-student", "evaluate-teacher", "evaluate-meta", "evaluate-hybrids")
        for subject in subjects(chain, role)
    }
    (expected["pure"],) = subjects(pure, "evaluate-student")
    told = {subject["name"]: subject for subject in numbers["report"]["subjects"]}
    assert told.keys() == expected.keys()
    for name, subject in expected.items():
        assert told[name]["num_parameters"] == subject["num_parameters"]
        for ours, theirs in zip(told[name]["results"], subject["results"], strict=True):
            kept = ("suite", "num_images", "top1", "top5", "nll", "ece", "per_class", "shifted")
            assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}


def test_the_gain_is_the_students_over_pures(chain, numbers: dict) -> None:
    (student,) = subjects(chain, "evaluate-student")
    (pure,) = subjects(chain.of(baseline(chain.recipe, "pure")), "evaluate-student")
    in_domain, shifted = (
        100 * (ours["top1"] - theirs["top1"]) for ours, theirs in zip(student["results"], pure["results"])
    )
    gain = numbers["summary"]["gains"]["pure"]
    assert gain["student"] == "student"
    assert (gain["in_domain_points"], gain["shifted_points"]) == pytest.approx((in_domain, shifted))


def test_every_training_has_its_curve_and_every_stage_its_row(chain, numbers: dict) -> None:
    curves = {curve["name"]: curve for curve in numbers["report"]["curves"]}
    trained = ["meta", "teacher", *(f"incubate-{index}" for index in range(4))]
    assert set(curves) == {*trained, *(f"hybrid-{index}" for index in range(4)), "student", "pure"}
    for role in trained:
        assert curves[role]["points"] == json.loads((chain.folder(role) / "history.json").read_text())
    rows = [row["stage"] for row in numbers["report"]["stages"]]
    assert rows.count("finetune") == 2
    assert {"meta", "teacher", "pair-0", "incubate-3", "evaluate-hybrids"} <= set(rows)


def test_every_training_has_its_counters(chain, numbers: dict) -> None:
    counted = {(row["stage"], row["recipe"]): row for row in numbers["report"]["counters"]}
    assert {stage for stage, _ in counted} == {
        "meta", "teacher", "finetune", *(f"incubate-{index}" for index in range(4)),
        *(f"pair-{index}" for index in range(4)),
    }  # fmt: skip
    returned = chain.metrics("pair-1")
    row = counted["pair-1", "demo"]
    assert (row["images_per_s"], row["data_wait"]) == (returned["images_per_s"], returned["data_wait"])
    assert row["teacher_calls"] == returned.get("teacher_calls")
    assert "Where the time goes" in (chain.folder("report") / "report.html").read_text()
