"""Event files: what is read back is what was written, in order, and once, whoever wrote before."""

import math
import struct
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c

from m2mkd_ray.reporting.scalars import Board, read

HISTORY = [
    {"step": 0, "epoch": 0.0, "val_top1": 0.125, "first_step_at": 1.7e9},
    {"step": 10, "epoch": 0.5, "loss": 2.0, "lr": 0.5, "images_per_s": 64.0, "teacher_s": 0.25},
    {"step": 20, "epoch": 1.0, "loss": 1.5, "lr": 0.25, "images_per_s": 128.0, "teacher_s": 0.5},
    {"step": 20, "epoch": 1.0, "val_top1": 0.5},
]  # values that float32 holds exactly, because event files hold no more
EXPECTED = {
    "training/val_top1": [(0, 0.125), (20, 0.5)],
    "training/loss": [(10, 2.0), (20, 1.5)],
    "training/lr": [(10, 0.5), (20, 0.25)],
    "counters/images_per_s": [(10, 64.0), (20, 128.0)],
    "counters/teacher_s": [(10, 0.25), (20, 0.5)],
}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for tag, step, value in read(folder):
        found.setdefault(tag, []).append((step, value))
    return found


def test_a_history_becomes_curves(tmp_path: Path) -> None:
    board = Board(tmp_path / "run")
    assert board.add(HISTORY) == 10
    board.close()
    assert curves(tmp_path / "run") == EXPECTED


def test_records_are_as_tensorflow_frames_them(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.add(HISTORY)
    board.close()
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    data, at, records = file.read_bytes(), 0, 0

    def masked(content: bytes) -> int:
        crc = crc32c(content)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        content = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 8) == (masked(data[at : at + 8]),)
        assert struct.unpack_from("<I", data, at + 12 + length) == (masked(content),)
        at, records = at + 16 + length, records + 1
    assert records == 2 + 10  # version and start, and a record for each value


def test_writing_the_same_again_adds_nothing(tmp_path: Path) -> None:
    for expected in (10, 0, 0):
        board = Board(tmp_path)
        assert board.add(HISTORY) == expected
        board.close()
    assert curves(tmp_path) == EXPECTED


def test_a_training_that_was_tried_again_has_each_step_once(tmp_path: Path) -> None:
    first, again = Board(tmp_path), [*HISTORY[:2], {**HISTORY[2], "images_per_s": 99.0}, HISTORY[3]]
    first.add(HISTORY[:3])
    first.close()  # killed after step 20; it goes on from a checkpoint of step 10
    second = Board(tmp_path)
    second.add(again[1:3])
    second.add([*again[2:], {"step": 30, "loss": 1.0}])
    second.close()
    found = curves(tmp_path)
    assert found["training/loss"] == [(10, 2.0), (20, 1.5), (30, 1.0)]
    assert found["counters/images_per_s"] == [(10, 64.0), (20, 128.0)]
    assert found["training/val_top1"] == [(0, 0.125), (20, 0.5)]


def test_a_validation_that_is_known_later_than_its_step_is_added(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.add([HISTORY[1]])
    board.add([HISTORY[2]])
    assert board.add(HISTORY[:1] + HISTORY[3:]) == 2
    board.close()
    assert curves(tmp_path) == EXPECTED


def test_what_was_missed_between_is_there_when_the_training_is_complete(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.add([HISTORY[2]])  # step 10 was never seen
    assert board.complete(HISTORY) == 6
    board.close()
    assert curves(tmp_path) == EXPECTED
    assert Board(tmp_path).complete(HISTORY) == 0


def test_a_record_that_was_cut_by_a_kill_is_written_again(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.add(HISTORY[:3])
    board.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # teacher_s of step 20
    again = Board(tmp_path)
    assert again.complete(HISTORY) == 2
    again.close()
    assert curves(tmp_path) == EXPECTED


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out(tmp_path: Path, value: float) -> None:
    board = Board(tmp_path)
    assert board.add([{"step": 1, "loss": value}]) == 0
    assert not list(tmp_path.iterdir())
