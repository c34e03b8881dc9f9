"""What is asked of a benchmark and cannot be had is said before anything is measured."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import cohorts, step


def refused(main: Callable[[], None], *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def test_a_shape_that_is_unknown_is_refused_beside_one_that_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(step.main, "--shapes", "demo", "vmoe_large", monkeypatch=monkeypatch)
    told = capsys.readouterr().err
    assert "argument --shapes: invalid choice: 'vmoe_large'" in told
    assert all(shape.name in told for shape in step.shapes())


def no_folder(folder: Path) -> None:
    """Nothing is there."""


def an_empty_folder(folder: Path) -> None:
    folder.mkdir()


def of_two_classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "teal").save(folder / "train" / name / "1.png")


def no_image(folder: Path) -> None:
    of_two_classes(folder)
    (folder / "train" / "dog" / "1.png").write_bytes(b"woof")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (no_folder, "There is no "),
        (an_empty_folder, "is in no form that can be imported"),
        (of_two_classes, "has 2 classes and the splits train. Tiny-ImageNet has 200 classes"),
        (no_image, "1.png"),
    ],
)
def test_what_is_not_tiny_imagenet_is_refused_in_a_sentence(
    make: Callable[[Path], None],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "images")
    refused(cohorts.main, "--tiny-imagenet", tmp_path / "images", "--rows", 1, monkeypatch=monkeypatch)
    told = capsys.readouterr().err
    assert "error: --tiny-imagenet: " in told
    assert found in told
