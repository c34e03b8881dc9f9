"""Domains: what is read, what is refused, and that they are Ray Tune's; conditions."""

import pytest

from m2mkd_ray.sweeps.space import FORMS, Domain, Parameter, active, circles, parse


@pytest.mark.parametrize(
    ("text", "domain", "ends"),
    [
        ("loguniform(1, 8)", Domain("loguniform", (1, 8)), (1, 8)),
        (" uniform(-0.5,1e-1) ", Domain("uniform", (-0.5, 0.1)), (-0.5, 0.1)),
        ("quniform(0, 1, 0.25)", Domain("quniform", (0, 1, 0.25)), (0, 1)),
        ("qloguniform(2, 64, 2)", Domain("qloguniform", (2, 64, 2)), (2, 64)),
        ("randint(1, 5)", Domain("randint", (1, 5)), (1, 4)),
        ("lograndint(1, 65)", Domain("lograndint", (1, 65)), (1, 64)),
        ("choice([numel, 'batchmean', 3, true, null])", Domain("choice", (("numel", "batchmean", 3, True, None),)),
         ("numel", "batchmean", 3, True, None)),
        ("grid([0.5, 1])", Domain("grid", ((0.5, 1),)), (0.5, 1)),
    ],
)  # fmt: skip
def test_a_domain_is_read_with_its_ends(text: str, domain: Domain, ends: tuple) -> None:
    assert parse(text) == domain
    assert domain.ends == ends


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loguniform(0, 8)", "low 0 must be above 0 for a logarithm"),
        ("uniform(8, 1)", "it holds no value: low 8 is not below high 1"),
        ("randint(3, 3)", "it holds no value"),
        ("choice([])", "it holds no value"),
        ("choice([1, 2, 1])", "it holds 1 more than once"),
        ("grid(3)", r"expected grid\(\[a, b, …\]\), a list"),
        ("uniform(1)", r"expected uniform\(low, high\), found 1 arguments"),
        ("quniform(1, 8, 3)", "multiples of step 3"),
        ("quniform(1, 8, 0)", "step 0 must be above 0"),
        ("randint(1, 2.5)", "with whole numbers"),
        ("uniform(1, warm)", "with numbers"),
        ("uniform(1, inf)", "with numbers"),
        ("logunifrm(1, 8)", "there is no domain 'logunifrm'; did you mean loguniform"),
        ("uniform(low=1, high=2)", "is no domain"),
        ("8", "is no domain. Known: choice"),
        ("uniform(1, ", "is no domain"),
        ("__import__('os').getcwd()", "is no domain"),
        ("choice([open('x')])", "an argument that is no number, word or list"),
    ],
)
def test_what_is_no_domain_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("form", FORMS.values())
def test_every_domain_is_one_of_tunes(form: str) -> None:
    from ray.tune.search.sample import Domain as TunesDomain

    text = form.replace("a, b, …", "1, 2").replace("low", "1").replace("high", "9").replace("step", "1")
    of_tune = parse(text).to_tune()
    assert isinstance(of_tune, TunesDomain) or of_tune == {"grid_search": [1, 2]}


@pytest.mark.parametrize(
    ("text", "is_log", "is_numeric"),
    [
        ("loguniform(1, 8)", True, True),
        ("uniform(1, 8)", False, True),
        ("grid([0.5, 1, 2, 4, 8])", True, True),
        ("choice([1, 2, 3, 4])", False, True),
        ("choice([numel, batchmean])", False, False),
        ("choice([true, false])", False, False),
    ],
)
def test_a_domain_knows_how_its_axis_is_drawn(text: str, is_log: bool, is_numeric: bool) -> None:
    assert (parse(text).is_log, parse(text).is_numeric) == (is_log, is_numeric)


SPACE = {
    "t": Parameter(domain="uniform(1, 8)", when={"r": "batchmean"}),
    "r": Parameter(domain="choice([numel, batchmean])", when={"a": [1, 2]}),
    "a": Parameter(domain="choice([0, 1, 2])"),
}


@pytest.mark.parametrize(
    ("drawn", "point"),
    [
        ({"t": 3.0, "r": "batchmean", "a": 2}, {"t": 3.0, "r": "batchmean", "a": 2}),
        ({"t": 3.0, "r": "numel", "a": 1}, {"r": "numel", "a": 1}),
        # r is without effect, so its value cannot make t have one
        ({"t": 3.0, "r": "batchmean", "a": 0}, {"a": 0}),
    ],
)
def test_a_point_has_only_what_has_an_effect(drawn: dict, point: dict) -> None:
    assert active(SPACE, drawn) == point
    assert list(active(SPACE, drawn)) == [path for path in SPACE if path in point]


def test_a_point_is_made_of_plain_values() -> None:
    import numpy as np

    point = active({"a": Parameter(domain="uniform(0, 1)")}, {"a": np.float64(0.5)})
    assert type(point["a"]) is float


def test_conditions_that_wait_for_each_other_are_found() -> None:
    assert circles(SPACE) == []
    space = {
        "a": Parameter(domain="uniform(0, 1)", when={"b": 1}),
        "b": Parameter(domain="choice([1])", when={"a": 0.5}),
    }
    assert circles(space) == ["a", "b"]


@pytest.mark.parametrize(
    ("domain", "value", "expected"),
    [
        ("choice([numel, batchmean])", "batchmean", True),
        ("choice([numel, batchmean])", "mean", False),
        ("grid([4, 6])", 5, False),
        ("randint(1, 5)", 4, True),
        ("randint(1, 5)", 5, False),
        ("randint(1, 5)", "4", False),
        ("quniform(0, 1, 0.5)", 0.5, True),
        ("uniform(0, 1)", 0.5, False),
    ],
)
def test_a_domain_knows_what_it_may_give(domain: str, value: object, expected: bool) -> None:
    assert Parameter(domain=domain).parsed.may_be(value) == expected


def test_a_parameter_without_condition_is_written_as_its_domain_alone() -> None:
    assert Parameter.model_validate("uniform(0, 1)").model_dump() == "uniform(0, 1)"
    with_condition = SPACE["t"].model_dump()
    assert with_condition == {"domain": "uniform(1, 8)", "when": {"r": "batchmean"}}
    assert Parameter.model_validate(with_condition) == SPACE["t"]
