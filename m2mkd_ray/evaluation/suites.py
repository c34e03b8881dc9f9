"""Suites: on what a model is evaluated.

A suite names images; how its labels meet the model's outputs follows from the
class ids of both data sets. A suite that has only some of the model's classes
(ImageNet-R, Tiny-ImageNet-R) masks the other logits, as the NAC authors do
(mweiss17/NeuralAttentiveCircuits `data/imagenet_r.py`).
"""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from m2mkd_ray.errors import DataError, UsageError


class Suite(BaseModel, frozen=True, extra="forbid"):
    """One evaluation: images, and what is done to them."""

    name: str
    title: str
    """How plots and tables call it."""
    dataset: str
    """A name in `m2mkd_ray.data.DATASETS`."""
    split: str
    shifted: bool = False
    """Whether it lies outside the domain that the model was trained on."""
    corruptions: tuple[str, ...] = ()
    """Names in `m2mkd_ray.data.CORRUPTIONS`, each applied to all images; the results are pooled."""
    severity: int = Field(3, ge=1, le=5)
    max_rows: int | None = Field(None, gt=0)
    """Only so many rows, as many of every class; None takes all."""


CORRUPTIONS_C = ("gaussian_noise", "impulse_noise", "gaussian_blur", "contrast", "brightness", "pixelate", "rotate")
"""What a corrupted suite without files of its own applies: one or two of each family of arXiv 1903.12261."""


def _corrupted(name: str, title: str, dataset: str, split: str) -> Suite:
    return Suite(
        name=name,
        title=title,
        dataset=dataset,
        split=split,
        shifted=True,
        corruptions=CORRUPTIONS_C,
        max_rows=2000,
    )


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(name="fashion-small", title="Fashion-MNIST", dataset="fashion-mnist-small", split="test"),
        Suite(
            name="fashion-small-corrupted",
            title="Fashion-MNIST, corrupted",
            dataset="fashion-mnist-small",
            split="corrupted",
            shifted=True,
        ),
        Suite(name="fashion", title="Fashion-MNIST", dataset="fashion-mnist", split="test"),
        _corrupted("fashion-corrupted", "Fashion-MNIST, corrupted", "fashion-mnist", "test"),
        Suite(name="digits", title="digits", dataset="digits", split="test"),
        _corrupted("digits-corrupted", "digits, corrupted", "digits", "test"),
        Suite(name="icons", title="icons of unseen artists", dataset="icon-domains", split="test"),
        Suite(name="icons-emoji", title="emoji", dataset="icon-domains", split="emoji", shifted=True),
        Suite(name="icons-uicolor", title="colour icons", dataset="icon-domains", split="uicolor", shifted=True),
        Suite(name="cifar10", title="CIFAR-10", dataset="cifar10", split="test"),
        _corrupted("cifar10-corrupted", "CIFAR-10, corrupted", "cifar10", "test"),
        Suite(name="cifar100", title="CIFAR-100", dataset="cifar100", split="test"),
        _corrupted("cifar100-corrupted", "CIFAR-100, corrupted", "cifar100", "test"),
        Suite(name="tiny-imagenet", title="Tiny-ImageNet", dataset="tiny-imagenet", split="val"),
        _corrupted("tiny-imagenet-corrupted", "Tiny-ImageNet, corrupted", "tiny-imagenet", "val"),
        Suite(name="tiny-imagenet-r", title="Tiny-ImageNet-R", dataset="tiny-imagenet-r", split="test", shifted=True),
        Suite(name="imagenet-1k", title="ImageNet-1k", dataset="imagenet-1k", split="val"),
        Suite(name="imagenet-r", title="ImageNet-R", dataset="imagenet-r", split="test", shifted=True),
    )
}


def find_suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        UsageError: there is none of that name; lists the known ones.
    """
    if name not in SUITES:
        raise UsageError(f"There is no suite {name!r}. Known suites: {', '.join(sorted(SUITES))}.")
    return SUITES[name]


def class_columns(suite: str, of_model: Sequence[str], of_suite: Sequence[str], has_images: Sequence[bool]) -> Tensor:
    """For each class of the suite that has images, the column of the model's logits.

    Args:
        suite: the suite's name, for the message.
        of_model: class ids in the order of the model's outputs.
        of_suite: class ids in the order of the suite's labels.
        has_images: whether a class of the suite has images.

    Raises:
        DataError: the suite has images of classes that the model does not know.
    """
    columns = {class_id: column for column, class_id in enumerate(of_model)}
    wanted = [class_id for class_id, has in zip(of_suite, has_images, strict=True) if has]
    unknown = [class_id for class_id in wanted if class_id not in columns]
    if unknown:
        raise DataError(
            f"Suite {suite!r} has images of {len(unknown)} classes that the model was not trained on: "
            f"{', '.join(unknown[:10])}{' …' if len(unknown) > 10 else ''}. Use a suite whose class ids are among the "
            f"training data's, or leave it out of `suites`."
        )
    return torch.tensor([columns[class_id] for class_id in wanted])


def remap(labels: Tensor, has_images: Sequence[bool]) -> Tensor:
    """Labels of the suite as positions among its classes with images, matching `class_columns`."""
    positions = torch.tensor(has_images).cumsum(0) - 1
    return positions[labels]
