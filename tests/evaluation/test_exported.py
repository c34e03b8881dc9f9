from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import Augmentation, EvalBatches, find
from m2mkd_ray.errors import ArtifactError, DataError
from m2mkd_ray.evaluation import Exported, load_export, predict
from m2mkd_ray.evaluation.exported import ExportedConfig
from m2mkd_ray.models import family

AUGMENTATION = Augmentation(kind="light", shift=2, mean=(0.286,) * 3, std=(0.353,) * 3)
IMAGE = "fashion-mnist-small"


def blueprint() -> Blueprint:
    size = {"name": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 14, "num_classes": 10, "num_heads": 2}
    return Blueprint(
        teacher=Vit(width=24, depth=2, **size),
        teacher_depths=(1, 1),
        student=Student(vit=Vit(width=16, depth=2, **size), moe=Moe(num_experts=3)),
        student_depths=(1, 1),
    )


@pytest.fixture(params=[False, True], ids=["stitches-dropped", "stitches-kept"])
def student(request: pytest.FixtureRequest) -> nn.Module:
    return family("vmoe").model(blueprint(), keep_stitches=request.param).eval()


@pytest.fixture
def export(student: nn.Module, tmp_path: Path) -> Path:
    """A folder as the stage `export` leaves it."""
    folder = tmp_path / "export"
    folder.mkdir()
    config = ExportedConfig(
        blueprint=blueprint(),
        keep_stitches=any("Stitch" in type(block).__name__ for block in student.blocks),
        augmentation=AUGMENTATION,
        classes=tuple(entry.name for entry in find(IMAGE).index.classes),
        recipe="test",
        key="0123456789ab",
        versions={},
    )
    (folder / "config.json").write_text(config.model_dump_json())
    save_file(student.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Twelve test images as PNG files."""
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for file, content in zip(files, find(IMAGE).rows("test").read(range(12))):
        file.write_bytes(content)
    return files


def test_an_export_comes_back_bit_equal_in_evaluation_mode(student: nn.Module, export: Path) -> None:
    loaded = load_export(export)
    pixels = torch.randn(3, 3, 28, 28)
    assert torch.equal(loaded.model(pixels), student(pixels))
    assert not any(part.training for part in loaded.model.modules())


def test_files_are_predicted_as_the_evaluation_predicts_their_rows(
    student: nn.Module, export: Path, images: list[Path]
) -> None:
    batches = EvalBatches(find(IMAGE), "test", img_size=28, batch_size=12, augmentation=AUGMENTATION)
    logits, _ = predict(student, [batches[0]], device=torch.device("cpu"))
    loaded = load_export(export)
    assert torch.equal(loaded.read(images), batches[0][0])
    for file, prediction, row in zip(images, loaded.predict(images, top=3), logits.double().numpy()):
        shares = np.exp(row) / np.exp(row).sum()
        best = np.argsort(-shares)[:3]
        assert prediction.image == str(file)
        assert [name for name, _ in prediction.classes] == [loaded.config.classes[index] for index in best]
        assert [share for _, share in prediction.classes] == pytest.approx(shares[best], rel=1e-4)


def test_transparent_and_deep_images_are_read_as_in_training(export: Path, tmp_path: Path) -> None:
    clear, deep = tmp_path / "clear.png", tmp_path / "deep.png"
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save(clear)
    Image.fromarray(np.full((28, 28), 32768, np.uint16)).save(deep)
    grey = load_export(export).read([clear, deep]) * 0.353 + 0.286
    assert grey[0].unique().tolist() == pytest.approx([1.0])
    assert grey[1].unique().tolist() == pytest.approx([0.5], abs=0.01)


def test_many_files_are_predicted_some_at_a_time(export: Path, images: list[Path]) -> None:
    loaded, seen = load_export(export), []
    loaded.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    predictions = loaded.predict(images * 11)
    assert seen == [64, 64, 4]
    assert [p.image for p in predictions] == [str(file) for file in images] * 11
    assert [name for name, _ in predictions[-1].classes] == [name for name, _ in predictions[11].classes]


def test_no_more_classes_are_told_than_there_are(export: Path, images: list[Path]) -> None:
    (prediction,) = load_export(export).predict(images[:1], top=99)
    assert len(prediction.classes) == 10
    assert sum(share for _, share in prediction.classes) == pytest.approx(1)


def test_all_files_that_are_no_images_are_listed(export: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(images[0].read_bytes()[:100])
    bad = [tmp_path / "words.png", tmp_path / "half.png", tmp_path / "gone.png"]
    with pytest.raises(DataError) as error:
        load_export(export).predict([images[0], *bad[:2], *images * 8, bad[2]])
    told = str(error.value).splitlines()
    assert len(told) == 4
    assert all(str(file) in line for file, line in zip(bad, told[1:]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"half"),
        lambda folder: save_file({"head.bias": torch.zeros(10)}, folder / "model.safetensors"),
    ],
    ids=["no-config", "another-config", "half-written", "other-weights"],
)
def test_a_folder_that_is_no_whole_export_is_refused(damage, export: Path) -> None:
    damage(export)
    with pytest.raises(ArtifactError, match=r"is no export of this version; write one with `m2mkd export RECIPE"):
        load_export(export)


def test_an_export_is_a_value(export: Path) -> None:
    loaded = load_export(export)
    assert isinstance(loaded, Exported)
    with pytest.raises(AttributeError):
        loaded.model = nn.Identity()
