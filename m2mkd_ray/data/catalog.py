"""The data sets that recipes name, and how each is had. To add one, add an entry (docs/data.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dataset:
    """A data set as the documentation names it; what is on disk is in its index."""

    name: str
    title: str
    classes: int
    splits: tuple[str, ...]
    licence: str
    source: str
    """Where a user gets the files."""
    how: str
    """The command that imports them."""


_ENTRIES = (
    Dataset(
        name="fashion-mnist-small",
        title="a part of Fashion-MNIST",
        classes=10,
        splits=("train", "validation", "test", "corrupted"),
        licence="MIT",
        source="ships with m2mkd_ray; made from the files of fashion-mnist",
        how="python -m m2mkd_ray.data.shipped.build --source FOLDER",
    ),
    Dataset(
        name="fashion-mnist",
        title="Fashion-MNIST",
        classes=10,
        splits=("train", "test"),
        licence="MIT",
        source="github.com/zalandoresearch/fashion-mnist, or Debian's package dataset-fashion-mnist",
        how="m2mkd data import fashion-mnist --source FOLDER",
    ),
    Dataset(
        name="digits",
        title="Optical Recognition of Handwritten Digits (scikit-learn's copy)",
        classes=10,
        splits=("train", "test"),
        licence="CC-BY-4.0",
        source="the installed package scikit-learn",
        how="m2mkd data import digits --source sklearn",
    ),
    Dataset(
        name="icon-domains",
        title="Icon domains: monochrome icons, and colour icons and emoji as shifted test sets",
        classes=100,
        splits=("train", "test", "uicolor", "emoji", "emojimono"),
        licence="MIT, Apache-2.0, CC-BY, OFL, ISC, BSD and others, by icon set",
        source="icon_domains_64.npz, drawn from the npm package @iconify/json",
        how="m2mkd data import icon-domains --source icon_domains_64.npz --licences permissive",
    ),
    Dataset(
        name="imagenet-1k",
        title="ImageNet-1k (ILSVRC 2012)",
        classes=1000,
        splits=("train", "val"),
        licence="non-commercial research, image-net.org/download",
        source="image-net.org, unpacked to train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
        how="m2mkd data import imagenet-1k --source FOLDER",
    ),
    Dataset(
        name="tiny-imagenet",
        title="Tiny-ImageNet (CS231n)",
        classes=200,
        splits=("train", "val"),
        licence="non-commercial research, as ImageNet",
        source="cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked",
        how="m2mkd data import tiny-imagenet --source tiny-imagenet-200",
    ),
    Dataset(
        name="tiny-imagenet-r",
        title="Tiny-ImageNet-R: renditions of 62 of the Tiny-ImageNet classes",
        classes=62,
        splits=("test",),
        licence="as ImageNet-R",
        source="zenodo.org/records/6653675, unpacked",
        how="m2mkd data import tiny-imagenet-r --source FOLDER --kind image-folder --option splits=test=.",
    ),
    Dataset(
        name="imagenet-r",
        title="ImageNet-R: renditions of 200 of the ImageNet classes",
        classes=200,
        splits=("test",),
        licence="MIT (annotations); images belong to their authors",
        source="github.com/hendrycks/imagenet-r, unpacked",
        how="m2mkd data import imagenet-r --source imagenet-r --kind image-folder --option splits=test=.",
    ),
    Dataset(
        name="cifar10",
        title="CIFAR-10",
        classes=10,
        splits=("train", "test"),
        licence="none stated",
        source="cs.toronto.edu/~kriz/cifar.html, the python or the binary version",
        how="m2mkd data import cifar10 --source cifar-10-python.tar.gz",
    ),
    Dataset(
        name="cifar100",
        title="CIFAR-100",
        classes=100,
        splits=("train", "test"),
        licence="none stated",
        source="cs.toronto.edu/~kriz/cifar.html, the python or the binary version",
        how="m2mkd data import cifar100 --source cifar-100-python.tar.gz",
    ),
)

DATASETS = {entry.name: entry for entry in _ENTRIES}
