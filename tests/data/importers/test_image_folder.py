import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m2mkd_ray.data import guess_importer, import_data
from m2mkd_ray.data.index import DatasetFolder
from m2mkd_ray.errors import DataError

CLASSES = ("n01", "n02", "n03")


def jpeg(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet's layout: 3 classes of 6 training and 2 validation images."""
    root = tmp_path / "imagenet"
    for label, wnid in enumerate(CLASSES):
        for number in range(6):
            put(root / "train" / wnid / f"{wnid}_{number}.JPEG", jpeg(10 * label + number))
        for number in range(2):
            put(root / "val" / wnid / f"ILSVRC2012_val_{label}{number}.JPEG", jpeg(100 + 10 * label + number))
    (root / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\nn03 great white shark\n")
    return root


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Tiny-ImageNet's layout, with its heap of test images without labels."""
    root = tmp_path / "tiny-imagenet-200"
    annotations = []
    for label, wnid in enumerate(CLASSES):
        (root / "train" / wnid).mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        for number in range(4):
            put(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", jpeg(10 * label + number))
        put(root / "val" / "images" / f"val_{label}.JPEG", jpeg(100 + label))
        annotations.append(f"val_{label}.JPEG\t{wnid}\t0\t32\t44\t62\n")
        put(root / "test" / "images" / f"test_{label}.JPEG", jpeg(200 + label))
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(annotations)))
    (root / "wnids.txt").write_text("n03\nn01\nn02\n")
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn03\ttailed frog\nn04\tnewt\n")
    return root


def imported(root, out, options=None, **settings):
    assert guess_importer(root) == "image-folder"
    import_data("image-folder", root, "set", out, options, **settings)
    return DatasetFolder.open(out / "set")


def contents(folder, split):
    rows = folder.rows(split)
    return dict(zip(rows.paths, zip(rows.read(range(len(rows))), rows.labels.tolist())))


def test_imagenet_files_are_kept_byte_by_byte(imagenet, tmp_path):
    folder = imported(imagenet, tmp_path)
    assert [(c.id, c.name) for c in folder.index.classes] == [
        ("n01", "tench, Tinca tinca"),
        ("n02", "goldfish"),
        ("n03", "great white shark"),
    ]
    assert contents(folder, "train") == {
        f"train/{wnid}/{wnid}_{number}.JPEG": (jpeg(10 * label + number), label)
        for label, wnid in enumerate(CLASSES)
        for number in range(6)
    }
    assert folder.index.splits["val"].rows_per_class == (2, 2, 2)


def test_files_are_shuffled_so_that_a_row_group_has_many_classes(imagenet, tmp_path):
    labels = imported(imagenet, tmp_path).rows("train").labels
    assert np.count_nonzero(np.diff(labels)) > 4


def test_tiny_imagenet_is_read_as_it_is_unpacked(tiny_imagenet, tmp_path):
    folder = imported(tiny_imagenet, tmp_path)
    assert list(folder.index.splits) == ["train", "val"]  # test has no labels
    assert [(c.id, c.name) for c in folder.index.classes] == [
        ("n01", "goldfish, Carassius auratus"),
        ("n02", "bullfrog"),
        ("n03", "tailed frog"),
    ]
    assert folder.index.splits["train"].rows_per_class == (4, 4, 4)
    assert contents(folder, "val") == {f"val/images/val_{i}.JPEG": (jpeg(100 + i), i) for i in range(3)}


def test_a_folder_of_one_split_is_named_by_an_option(imagenet, tmp_path):
    import_data("image-folder", imagenet / "val", "set", tmp_path, {"splits": "test=."})
    assert list(DatasetFolder.open(tmp_path / "set").index.splits) == ["test"]


def test_a_truncated_jpeg_is_named(imagenet, tmp_path):
    file = imagenet / "train" / "n02" / "n02_3.JPEG"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"undecodable image: train/n02/n02_3.JPEG: .*truncated"):
        imported(imagenet, tmp_path)
    folder = imported(imagenet, tmp_path, on_bad="skip")
    assert folder.index.splits["train"].bad == {"undecodable image": 1}
    assert folder.index.splits["train"].rows_per_class == (6, 5, 6)


def test_a_class_that_training_does_not_have_is_named(imagenet, tmp_path):
    put(imagenet / "val" / "n09" / "x.JPEG", jpeg(0))
    with pytest.raises(DataError, match=r"split val .* unknown label: val/n09/x.JPEG: label 'n09' is none of the 3"):
        imported(imagenet, tmp_path)


def test_a_class_without_images_is_named(imagenet, tmp_path):
    (imagenet / "train" / "n04").mkdir()
    with pytest.raises(DataError, match="empty class: class n04 has no images"):
        imported(imagenet, tmp_path)


def test_an_annotated_file_that_is_missing_is_named(tiny_imagenet, tmp_path):
    (tiny_imagenet / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(DataError, match=r"missing image: val/images/val_1.JPEG"):
        imported(tiny_imagenet, tmp_path)


def test_folders_without_labels_are_refused_with_advice(tmp_path, imagenet):
    put(tmp_path / "heap" / "val" / "1.JPEG", jpeg(0))
    with pytest.raises(DataError, match=r"no folder of a split .* moved to folders of their classes"):
        import_data("image-folder", tmp_path / "heap", "set", tmp_path)
    with pytest.raises(DataError, match=r"No folders of classes and no val_annotations.txt in .*heap/val"):
        import_data("image-folder", tmp_path / "heap", "set", tmp_path, {"splits": "val=val"})
    put(tmp_path / "texts" / "train" / "n01" / "readme.txt", b"")
    with pytest.raises(DataError, match=r"texts/train \(split train\) has no image files"):
        import_data("image-folder", tmp_path / "texts", "set", tmp_path)


def test_shared_tiny_imagenet_unpacked_to_files_comes_back(shared, tmp_path):
    table = pq.ParquetFile(shared / "tiny-imagenet" / "val.parquet").read_row_group(0).slice(0, 200).to_pylist()
    images = {f"train/{row['image']['path']}": row["image"]["bytes"] for row in table}
    for path, image in images.items():
        put(tmp_path / "unpacked" / path, image)
    folder = imported(tmp_path / "unpacked", tmp_path)
    assert {path: image for path, (image, _) in contents(folder, "train").items()} == images
    wnids = sorted({path.split("/")[1] for path in images})
    assert all(wnids[label] == path.split("/")[1] for path, (_, label) in contents(folder, "train").items())
