"""The stages `evaluate-*`: numbers against predictions made here from the same artifacts."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from m2mkd_ray.data import EvalBatches, find
from m2mkd_ray.data.importers.source import Source
from m2mkd_ray.data.importers.write import WriteConfig, write
from m2mkd_ray.data.index import ClassName
from m2mkd_ray.evaluation import find_suite
from m2mkd_ray.execution import Stage
from m2mkd_ray.models import family, splice
from m2mkd_ray.stages.parts import load_meta, load_module, load_student, load_vit

SPLITS = {"fashion-small": "test", "fashion-small-corrupted": "corrupted"}


def evaluation(chain, subject: str) -> list[dict]:
    return json.loads((chain.folder(f"evaluate-{subject}") / "evaluation.json").read_text())


def hits(chain, data_root: Path, model: nn.Module, split: str) -> np.ndarray:
    """Whether each image of a split is predicted right, one after another."""
    folder = find("fashion-mnist-small", str(data_root))
    augmentation = chain.recipe.data.augmentation
    batches = EvalBatches(folder, split, img_size=28, batch_size=1, augmentation=augmentation)
    with torch.no_grad():
        return np.array([model.eval()(image).argmax().item() == label.item() for image, label in batches])


@pytest.mark.parametrize("subject", ["meta", "teacher", "student"])
def test_a_model_is_measured_on_every_suite(subject: str, chain, data_root: Path) -> None:
    blueprint = chain.recipe.blueprint
    model = {
        "meta": lambda: load_vit(blueprint.meta, chain.folder("meta")),
        "teacher": lambda: load_vit(blueprint.teacher, chain.folder("teacher")),
        "student": lambda: load_student(blueprint, chain.folder("finetune"), keep_stitches=False),
    }[subject]()
    (found,) = evaluation(chain, subject)
    assert found["name"] == subject
    assert found["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert [result["suite"] for result in found["results"]] == list(SPLITS)
    for result in found["results"]:
        right = hits(chain, data_root, model, SPLITS[result["suite"]])
        assert result["num_images"] == len(right) == 40
        assert result["top1"] == pytest.approx(right.mean())
        assert result["shifted"] == (result["suite"] == "fashion-small-corrupted")
        assert np.mean(list(result["per_class"].values())) == pytest.approx(right.mean())  # four images a class
        assert set(result["experts"]) == ({f"blocks.{i}" for i in range(4)} if subject == "student" else set())
    metrics = chain.metrics(f"evaluate-{subject}")
    assert metrics == {f"{subject}/{result['suite']}/top1": result["top1"] for result in found["results"]}


def test_every_hybrid_is_measured(chain, data_root: Path) -> None:
    blueprint = chain.recipe.blueprint
    meta = load_meta(blueprint, chain.folder("meta"))
    found = evaluation(chain, "hybrids")
    assert [subject["name"] for subject in found] == [f"hybrid-{index}" for index in range(4)]
    for index, module in enumerate(family("vmoe").modules(blueprint)):
        load_module(module, chain.folder(f"pair-{index}") / "module.safetensors")
        right = hits(chain, data_root, splice(meta, index, module), "test")
        assert found[index]["results"][0]["top1"] == pytest.approx(right.mean())


def test_experts_are_used_by_all_tokens_of_the_suite(chain) -> None:
    (student,) = evaluation(chain, "student")
    for use in student["results"][0]["experts"].values():
        assert sum(use["load"]) == pytest.approx(1)
        assert len(use["load"]) == 3
        assert 0 < use["entropy"] <= np.log(3) + 1e-6


def test_routing_examples_are_images_of_the_first_suite_with_an_expert_a_patch(chain, data_root: Path) -> None:
    examples = json.loads((chain.folder("evaluate-student") / "routing.json").read_text())
    folder = find("fashion-mnist-small", str(data_root))
    names = [entry.name for entry in folder.index.classes]
    pictures = [np.asarray(Image.open(io.BytesIO(image))) for image in folder.rows("test").read(range(40))]
    assert len(examples) == 6
    for example in examples:
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(example["image"]))))
        assert shown.shape == (28, 28, 3)
        assert any((shown[..., 0] == picture).all() for picture in pictures)
        assert example["block"] == "blocks.3"
        assert {example["label"], example["predicted"]} <= set(names)
        assert np.array(example["grid"]).shape == (4, 4)
        assert set(np.array(example["grid"]).flatten()) <= {0, 1, 2}


@pytest.mark.slow
def test_loader_processes_change_no_number(chain, anew) -> None:
    stage = chain.with_settings("placement.evaluation.data_workers=1").stage("evaluate-meta")
    assert stage.address == chain.stage("evaluate-meta").address
    assert json.loads((anew(stage) / "evaluation.json").read_text()) == evaluation(chain, "meta")


@pytest.fixture
def few_classes(chain, data_root: Path, tmp_path: Path, some_rows):
    """`evaluate-student` on a data set with three of the classes, in another order, and one that has no image."""
    index = find("fashion-mnist-small", str(data_root)).index
    chosen = (9, 2, 5)
    classes = (*(index.classes[label] for label in chosen), ClassName(id="hat", name="hat"))
    rows = some_rows("test", 60, chosen)
    write(
        Source(classes=classes, splits={"test": rows}, licence="MIT", origin="a test"),
        tmp_path,
        WriteConfig(name="fashion-mnist"),
    )
    (tmp_path / "fashion-mnist-small").symlink_to(data_root / "fashion-mnist-small")
    chain.run(chain.stage("finetune"))
    stage = chain.with_settings("suites=[fashion]", f"placement.data_root={tmp_path}").stage("evaluate-student")
    return stage, chosen


def test_a_suite_with_some_of_the_classes_is_masked_to_them(few_classes, chain, tmp_path: Path) -> None:
    stage, chosen = few_classes
    assert isinstance(stage, Stage)
    ((result,),) = (
        [*subject["results"]] for subject in json.loads((chain.run(stage) / "evaluation.json").read_text())
    )
    student = load_student(chain.recipe.blueprint, chain.folder("finetune"), keep_stitches=False)
    augmentation = chain.recipe.data.augmentation
    folder = find("fashion-mnist", str(tmp_path))
    batches = EvalBatches(folder, "test", img_size=28, batch_size=99, augmentation=augmentation)
    images, labels = batches[0]
    with torch.no_grad():
        logits = student(images).tolist()
    right = [max(chosen, key=lambda c: row[c]) == chosen[label] for row, label in zip(logits, labels.tolist())]
    assert result["num_images"] == len(right)
    assert result["top1"] == pytest.approx(np.mean(right))
    assert list(result["per_class"]) == [folder.index.classes[place].name for place in range(3)]


def test_the_corruptions_of_a_suite_are_pooled(few_classes, chain, tmp_path: Path) -> None:
    _, chosen = few_classes
    several = chain.with_settings("suites=[fashion-corrupted]", f"placement.data_root={tmp_path}")
    (subject,) = json.loads((several.folder("evaluate-student") / "evaluation.json").read_text())
    (result,) = subject["results"]
    student = load_student(chain.recipe.blueprint, chain.folder("finetune"), keep_stitches=False)
    folder, suite, right = find("fashion-mnist", str(tmp_path)), find_suite("fashion-corrupted"), []
    for name in suite.corruptions:
        batches = EvalBatches(
            folder,
            "test",
            img_size=28,
            batch_size=99,
            augmentation=chain.recipe.data.augmentation,
            corruption=(name, suite.severity, chain.recipe.seed),
        )
        images, labels = batches[0]
        with torch.no_grad():
            logits = student(images)[:, list(chosen)]
        right += (logits.argmax(1) == labels).tolist()
    assert result["num_images"] == len(right) == 7 * len(labels)
    assert result["top1"] == pytest.approx(np.mean(right))
