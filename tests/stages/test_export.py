import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ray.data import find
from m2mkd_ray.evaluation import load_export
from m2mkd_ray.stages.parts import load_student


def test_the_export_is_the_trained_student_bit_for_bit(chain) -> None:
    exported, images = load_export(chain.folder("export")), torch.randn(2, 3, 28, 28)
    student = load_student(chain.recipe.blueprint, chain.folder("finetune"), keep_stitches=False)
    assert torch.equal(exported.model(images), student(images))
    trained = load_file(chain.folder("finetune") / "model.safetensors")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in exported.model.state_dict().items())


def test_it_knows_its_classes_and_where_it_comes_from(chain, data_root: Path) -> None:
    config = load_export(chain.folder("export")).config
    index = find("fashion-mnist-small", str(data_root)).index
    assert config.classes == tuple(entry.name for entry in index.classes)
    assert (config.recipe, config.key) == ("demo", chain.stage("finetune").key)
    assert {"m2mkd_ray", "torch", "timm"} <= config.versions.keys()


def test_it_predicts_images_as_they_were_evaluated(chain, data_root: Path, tmp_path: Path) -> None:
    folder = find("fashion-mnist-small", str(data_root))
    rows, names = folder.rows("test"), [entry.name for entry in folder.index.classes]
    files = [tmp_path / f"{number}.png" for number in range(len(rows))]
    for file, content in zip(files, rows.read(range(len(rows)))):
        file.write_bytes(content)
    found = [prediction.classes[0][0] for prediction in load_export(chain.folder("export")).predict(files)]
    right = [name == names[label] for name, label in zip(found, rows.labels.tolist())]
    (student,) = json.loads((chain.folder("evaluate-student") / "evaluation.json").read_text())
    assert sum(right) / len(right) == pytest.approx(student["results"][0]["top1"])


def test_the_card_tells_results_data_and_recipe(chain) -> None:
    card = (chain.folder("export") / "README.md").read_text()
    (student,) = json.loads((chain.folder("evaluate-student") / "evaluation.json").read_text())
    for result in student["results"]:
        assert f"{100 * result['top1']:.1f} %" in card
    assert f"{student['num_parameters']:,}" in card
    assert chain.stage("finetune").key in card
    assert "licence MIT" in card
    assert '"name": "demo"' in card


def test_a_student_with_its_stitches_is_exported_with_them(chain) -> None:
    kept, images = chain.with_settings("keep_stitches=true"), torch.randn(2, 3, 28, 28)
    exported = load_export(kept.folder("export"))
    student = load_student(chain.recipe.blueprint, kept.folder("finetune"), keep_stitches=True)
    assert exported.config.keep_stitches
    assert torch.equal(exported.model(images), student(images))
