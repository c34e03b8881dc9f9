"""Counters against sums worked out by hand, and against what a real training returns."""

import pytest

from m2mkd_ray.reporting import CounterRow, count_table, summary, time_table
from m2mkd_ray.reporting.counters import joined

METRICS = {
    "steps": 40, "loss": 1.0, "images_per_s": 100.0, "data_wait": 0.1, "train_s": 50.0, "prefix_s": 5.0,
    "teacher_s": 10.0, "student_s": 20.0, "suffix_s": 2.5, "decodes": 5000, "teacher_calls": 2000,
    "cache_hits": 3000, "cache_bytes": 2e6, "cache_kl_mean": 3.14e-5, "own_batches": 12,
    "flops": 4e14, "mfu": 0.25, "peak_memory_gb": 0.5,
}  # fmt: skip


def row(**changes: object) -> CounterRow:
    found = CounterRow.of("pair-0", "demo", METRICS | changes)
    assert found is not None
    return found


def test_shares_are_of_the_time_in_training_and_add_up_to_one() -> None:
    shares = row().shares
    assert shares == pytest.approx(
        {"data wait": 0.1, "prefix": 0.1, "teacher": 0.2, "student": 0.4, "suffix": 0.05, "rest": 0.15}
    )
    names = list(shares)
    assert (names[0], names[-1]) == ("data wait", "rest")


def test_time_that_was_not_counted_follows_from_images_and_speed() -> None:
    assert row(train_s=None).seconds == 5000 / 100.0
    assert row(train_s=None, teacher_calls=None, cache_hits=None).seconds is None
    assert row(train_s=None, teacher_calls=None, cache_hits=None).shares == {"data wait": 0.1, "rest": 0.9}


def test_parts_that_overlap_never_add_up_to_more_than_all() -> None:
    shares = row(student_s=60.0).shares
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["rest"] == 0
    assert shares["student"] / shares["teacher"] == pytest.approx(6)


def test_hit_rate_and_speed_are_of_all_images_and_all_time() -> None:
    assert row().hit_rate == pytest.approx(0.6)
    assert row(cache_hits=None).hit_rate is None
    assert row(cache_hits=0, teacher_calls=0).hit_rate is None
    assert row().flops_per_s == pytest.approx(8e12)
    assert row(flops=None).flops_per_s is None


def test_what_is_no_training_has_no_counters() -> None:
    assert CounterRow.of("evaluate", "demo", {"top1": 0.5}) is None


def test_an_old_training_has_a_row_of_what_it_counted() -> None:
    old = CounterRow.of("meta", "demo", {"steps": 5, "images_per_s": 3.21, "data_wait": 0.25})
    assert old is not None
    table = time_table([old])
    assert table.columns == ("stage", "images/s", "data wait", "rest")
    assert table.rows == (("meta", "3.2", "25 %", "75 %"),)
    assert count_table([old]).rows == ()


def test_the_tables_have_all_and_recipes_where_there_are_several() -> None:
    other = row().model_copy(update={"recipe": "demo/pure", "cohort": ("pair-0-0123456789ab", "pair-1-0123456789ab")})
    times, counts = time_table([row(), other]), count_table([row(), other])
    assert (times.numeric_from, counts.numeric_from) == (3, 2)
    names = {"stage": "pair-0", "recipe": "demo/pure"}
    assert dict(zip(times.columns, times.rows[1])) == names | {
        "worker shared by": "pair-0,1", "images/s": "100", "data wait": "10 %", "prefix": "10 %", "teacher": "20 %",
        "student": "40 %", "suffix": "5 %", "rest": "15 %",
    }  # fmt: skip
    assert dict(zip(counts.columns, counts.rows[1])) == names | {
        "images decoded": "5,000", "batches made alone": "12", "teacher calls": "2,000", "cache hits": "60 %",
        "cache size": "2 MB", "cache KL, nats": "3.1e-05", "FLOP": "400 T", "FLOP/s": "8 T",
        "MFU": "25 %", "peak memory": "500 MB",
    }  # fmt: skip


def test_the_summary_has_counters_as_numbers(minimal_report) -> None:
    (numbers,) = summary(minimal_report.model_copy(update={"counters": (row(),)}))["counters"]
    assert (numbers["decodes"], numbers["hit_rate"], numbers["shares"]["teacher"]) == (5000, 0.6, 0.2)


@pytest.mark.parametrize(
    ("addresses", "text"),
    [
        (["pair-0-0123456789ab", "pair-1-0123456789ab", "pair-10-0123456789ab"], "pair-0,1,10"),
        (["trial-0123456789ab", "trial-0123456789ac", "trial-0123456789ad"], "trial ×3"),
        (["pair-0-0123456789ab", "pair-0-ba9876543210"], "pair-0 ×2"),
        (["meta-0123456789ab"], "meta"),
        (["pair-3-0123456789ab"], "pair-3"),
        ([], ""),
    ],
)
def test_stages_that_share_a_worker_are_named_in_short(addresses: list[str], text: str) -> None:
    assert joined(addresses) == text
