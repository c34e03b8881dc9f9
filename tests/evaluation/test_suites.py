import pytest
import torch

from m2mkd_ray.data import CORRUPTIONS, DATASETS
from m2mkd_ray.errors import DataError, UsageError
from m2mkd_ray.evaluation import SUITES, Suite, class_columns, find_suite, measure, remap

every_suite = pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)


@every_suite
def test_suites_are_of_known_data_sets_splits_and_corruptions(suite: Suite) -> None:
    assert suite.dataset in DATASETS
    assert suite.split in DATASETS[suite.dataset].splits
    assert set(suite.corruptions) <= set(CORRUPTIONS)
    assert SUITES[suite.name] is suite


@every_suite
def test_corrupted_suites_are_called_shifted(suite: Suite) -> None:
    assert suite.shifted or not (suite.corruptions or "corrupted" in suite.name or suite.name.endswith("-r"))


def test_an_unknown_suite_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no suite 'imagenet-x'\. Known suites: .*imagenet-r"):
        find_suite("imagenet-x")


OF_MODEL = ("ant", "bee", "cat", "dog", "eel")
OF_SUITE = ("dog", "gnu", "bee", "ant")
HAS_IMAGES = (True, False, True, True)


def test_logits_are_masked_to_the_suites_classes_in_its_order() -> None:
    """Image by image: the best of the suite's classes by name, whatever the other classes' logits."""
    logits, labels = torch.randn(50, 5), torch.tensor([0, 2, 3, 2, 0] * 10)
    logits[:, 4] += 100  # no suite image is an eel
    columns = class_columns("few", OF_MODEL, OF_SUITE, HAS_IMAGES)
    names = [name for name, has in zip(OF_SUITE, HAS_IMAGES) if has]
    found = measure(logits[:, columns], remap(labels, HAS_IMAGES), names)
    hits = []
    for row, label in zip(logits.tolist(), labels.tolist()):
        among = {name: value for name, value in zip(OF_MODEL, row) if name in names}
        hits.append(max(among, key=among.get) == OF_SUITE[label])
    assert 0 < found["top1"] < 1
    assert found["top1"] == pytest.approx(sum(hits) / len(hits))
    assert list(found["per_class"]) == ["dog", "bee", "ant"]


def test_a_suite_with_the_models_own_classes_leaves_everything_in_place() -> None:
    labels = torch.tensor([4, 0, 3])
    assert class_columns("same", OF_MODEL, OF_MODEL, [True] * 5).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(remap(labels, [True] * 5), labels)


def test_images_of_classes_that_the_model_does_not_know_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"Suite 'few' has images of 1 classes .*: gnu\. Use a suite"):
        class_columns("few", OF_MODEL, OF_SUITE, (True,) * 4)


def test_many_unknown_classes_are_counted_and_cut_short() -> None:
    with pytest.raises(DataError, match=r"images of 30 classes .*: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 …\."):
        class_columns("many", OF_MODEL, [str(number) for number in range(30)], [True] * 30)
