import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from m2mkd_ray.data import Augmentation, Batches, FeedConfig
from m2mkd_ray.data import logits as logits_file
from m2mkd_ray.data.logit_formats import LogitsFormat, error_of
from m2mkd_ray.data.logits import Logits, LogitsAbout, LogitsWriter
from m2mkd_ray.errors import DataError, UsageError

LIGHT = Augmentation(kind="light", shift=2, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
FORMATS = [LogitsFormat(), LogitsFormat(kind="float16"), LogitsFormat(kind="top_k", top_k=3)]
NUM_CLASSES = 11


def feed(**settings):
    defaults = {"dataset": "small", "batch_size": 8, "lanes": 4, "shuffle_window": 2, "img_size": 8, "views": 2}
    return FeedConfig(augmentation=LIGHT, **(defaults | settings))


@pytest.fixture
def batches(make_dataset):
    return Batches(feed(), make_dataset(100))


@pytest.fixture
def written(tmp_path, batches):
    """Write a file in a format: its path, the logits of every step, and what the writer said at the end."""

    def write(format, **changes):
        (tmp_path / "logits.parquet").unlink(missing_ok=True)
        steps = 2 * batches.steps_per_epoch
        settings = {"feed": feed(), "num_classes": NUM_CLASSES, "format": format, "teacher": "0123", "steps": steps}
        writer = LogitsWriter(tmp_path / "logits.parquet", LogitsAbout(**(settings | changes)))
        full = (
            torch.randn(steps, 8, (settings | changes)["num_classes"], generator=torch.Generator().manual_seed(1)) * 5
        )
        for step in range(steps):
            writer.add(step, batches[step], full[step])
            assert not (tmp_path / "logits.parquet").exists()
        return tmp_path / "logits.parquet", full, writer.close()

    return write


def slowly_read_back(row, k):
    """Top-k of one image, by the definition."""
    log_probs = [value - math.log(sum(math.exp(other) for other in row)) for value in row]
    top = sorted(range(len(row)), key=lambda place: -log_probs[place])[:k]
    rest = math.log(sum(math.exp(value) for place, value in enumerate(log_probs) if place not in top))
    even = float(np.float16(rest)) - math.log(len(row) - k)
    return [float(np.float16(log_probs[place])) if place in top else even for place in range(len(row))]


def slow_kl(full, read):
    p, q = ([math.exp(value) / sum(math.exp(other) for other in some) for value in some] for some in (full, read))
    return sum(a * math.log(a / b) for a, b in zip(p, q))


@pytest.mark.parametrize("group_bytes", [1, 1000, 2**20])
def test_float32_is_read_as_it_was_written_for_every_epoch(group_bytes, written, batches, monkeypatch):
    monkeypatch.setattr(logits_file, "_GROUP_BYTES", group_bytes)
    file, full, said = written(LogitsFormat())
    logits = Logits(file, feed(), teacher="0123")
    for step in range(3 * len(full)):
        assert torch.equal(logits(step, batches[step]), full[step % len(full)])
    assert torch.equal(logits(7), full[7])  # in any order
    assert said == {"bytes": file.stat().st_size} == {"bytes": logits.bytes}


def test_float16_is_rounded(written, batches):
    file, full, said = written(LogitsFormat(kind="float16"))
    logits = Logits(file, feed(), teacher="0123")
    for step in range(len(full)):
        assert torch.equal(logits(step, batches[step]), full[step].half().float())
    kls = [slow_kl(a, b) for a, b in zip(full.flatten(0, 1).tolist(), full.half().flatten(0, 1).tolist())]
    assert said["kl_max"] == pytest.approx(max(kls), rel=1e-6, abs=1e-12)
    assert 0 < said["probability_error_max"] < 2e-3


def test_top_k_keeps_the_most_probable_and_spreads_the_rest(written, batches):
    file, full, said = written(LogitsFormat(kind="top_k", top_k=3))
    logits = Logits(file, feed(), teacher="0123")
    rows = full.flatten(0, 1).tolist()
    read = torch.cat([logits(step, batches[step]) for step in range(len(full))])
    expected = [slowly_read_back(row, 3) for row in rows]
    torch.testing.assert_close(read, torch.tensor(expected), rtol=0, atol=2e-6)
    kls = [slow_kl(row, back) for row, back in zip(rows, expected)]
    assert said["kl_mean"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert said["kl_max"] == pytest.approx(max(kls), rel=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kind)
def test_the_error_of_a_format_is_that_of_a_slow_loop(format):
    full = torch.randn(6, NUM_CLASSES) * 4
    read = full.tolist()
    if format.kind == "float16":
        read = full.half().tolist()
    if format.top_k:
        read = [slowly_read_back(row, format.top_k) for row in full.tolist()]
    kls = [slow_kl(a, b) for a, b in zip(full.tolist(), read)]
    error = error_of(full, format)
    assert error["kl_mean"] == pytest.approx(sum(kls) / len(kls), rel=1e-4, abs=1e-12)
    assert error["kl_max"] == pytest.approx(max(kls), rel=1e-4, abs=1e-12)
    assert (error["probability_error_max"] == 0) == (format.kind == "float32")


def test_sizes_are_what_the_format_says(written):
    rows = 8 * 24
    sizes = {format.kind: written(format, num_classes=200)[2]["bytes"] for format in FORMATS}
    assert sizes["float32"] - sizes["float16"] == pytest.approx(rows * 200 * 2, rel=0.05)
    assert sizes["float16"] - sizes["top_k"] == pytest.approx(rows * (200 * 2 - 3 * 4 - 2), rel=0.1)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kind)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_read_the_logits_of_their_part(format, world, written, make_dataset):
    file, _, _ = written(format)
    whole = Logits(file, feed(), teacher="0123")
    for rank in range(world):
        mine = Batches(feed(), make_dataset(100), rank, world)
        logits = Logits(file, feed(), teacher="0123", rank=rank, world=world)
        for step in (0, 9):
            lanes = whole(step).unflatten(0, (4, 2))  # (lane, row, K)
            assert torch.equal(logits(step, mine[step]), lanes[rank::world].flatten(0, 1))


def test_a_batch_that_the_logits_are_not_of_is_refused(written, batches):
    logits = Logits(written(LogitsFormat())[0], feed(), teacher="0123")
    with pytest.raises(DataError, match=r"logits of step 3 in .* are of another batch: expected row"):
        logits(3, batches[4])
    mixed_otherwise = batches[3]._replace(lam=batches[3].lam * 0.5)
    with pytest.raises(DataError, match="another batch: expected lam"):
        logits(3, mixed_otherwise)


def test_a_file_of_other_batches_or_another_teacher_is_refused(written):
    file = written(LogitsFormat())[0]
    with pytest.raises(DataError, match=r"seed: expected 5, found 0; views: expected 3, found 2\. Remove it"):
        Logits(file, feed(seed=5, views=3), teacher="0123")
    other = feed().model_copy(update={"augmentation": LIGHT.model_copy(update={"shift": 1})})
    with pytest.raises(DataError, match=r"augmentation.shift: expected 1, found 2"):
        Logits(file, other, teacher="0123")
    with pytest.raises(DataError, match="teacher: expected 9999, found 0123"):
        Logits(file, feed(), teacher="9999")


def test_a_file_that_is_damaged_or_something_else_is_refused(tmp_path, written):
    file = written(LogitsFormat())[0]
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="is no file of logits of this version"):
        Logits(damaged, feed(), teacher="0123")
    pq.write_table(pq.read_table(file).replace_schema_metadata({}), damaged)
    with pytest.raises(DataError, match="is no file of logits of this version"):
        Logits(damaged, feed(), teacher="0123")
    with pytest.raises(DataError, match="is no file of logits of this version"):
        Logits(tmp_path / "absent.parquet", feed(), teacher="0123")


def test_nothing_is_left_of_a_file_that_is_not_whole(tmp_path, batches):
    about = LogitsAbout(feed=feed(), num_classes=NUM_CLASSES, format=LogitsFormat(), teacher="0123", steps=24)
    writer = LogitsWriter(tmp_path / "logits.parquet", about)
    writer.add(0, batches[0], torch.randn(8, NUM_CLASSES))
    with pytest.raises(DataError, match="expected step 1 with logits of shape"):
        writer.add(2, batches[2], torch.randn(8, NUM_CLASSES))
    with pytest.raises(DataError, match=r"\(8, 11\), found step 1, \(4, 11\)"):
        writer.add(1, batches[1], torch.randn(4, NUM_CLASSES))
    with pytest.raises(DataError, match="would end before step 1, expected 24"):
        writer.close()
    assert not list(tmp_path.glob("*logits*"))


def test_formats_that_do_not_fit_are_refused(tmp_path, batches):
    with pytest.raises(UsageError, match="Keeping the top 11 of 11 classes leaves none for the rest"):
        error_of(torch.randn(2, 11), LogitsFormat(kind="top_k", top_k=11))
    with pytest.raises(ValueError, match="kind top_k needs it"):
        LogitsFormat(kind="top_k")
    with pytest.raises(ValueError, match="the others have none"):
        LogitsFormat(kind="float16", top_k=3)
    with pytest.raises(DataError, match=r"kept as float16: .* up to 65504, found 1e\+06. Set kind to float32"):
        error_of(torch.tensor([[1e6, 0.0]]), LogitsFormat(kind="float16"))


def test_very_unlikely_rests_stay_finite():
    full = torch.zeros(1, 70_000)
    full[0, 69_999] = 500.0
    error = error_of(full, LogitsFormat(kind="top_k", top_k=1))
    assert error["kl_max"] < 1e-6
