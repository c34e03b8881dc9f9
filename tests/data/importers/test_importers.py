"""Round trips: files as their makers write them, imported, and compared pixel by pixel."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from m2mkd_ray.data import DATASETS, IMPORTERS, guess_importer, import_data
from m2mkd_ray.data.importers.cifar import unpickle
from m2mkd_ray.data.index import DatasetFolder
from m2mkd_ray.data.pixels import decode
from m2mkd_ray.errors import DataError, UsageError


def imported(kind, source, out, options=None, **settings):
    assert guess_importer(source) == kind
    import_data(kind, source, "set", out, options, **settings)
    folder = DatasetFolder.open(out / "set")
    for split in folder.index.splits:
        folder.verify(split)
    return folder


def pixels(folder, split):
    """Pixels and label of every row by its path."""
    rows = folder.rows(split)
    images = [np.asarray(decode(image)) for image in rows.read(range(len(rows)))]
    return {path: (image, label) for path, image, label in zip(rows.paths, images, rows.labels.tolist())}


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def jpeg(seed=0, size=(20, 30)):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_idx(path, array):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(params=["", ".gz"])
def idx_folder(request, tmp_path):
    folder = tmp_path / "fashion"
    folder.mkdir()
    for prefix, rows in (("train", 40), ("t10k", 10)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{request.param}", random_images(rows, 28, 28))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{request.param}", np.arange(rows, dtype=np.uint8) % 10)
    return folder


def test_idx_images_arrive_pixel_by_pixel(idx_folder, tmp_path):
    folder = imported("idx", idx_folder, tmp_path)
    for split, rows in (("train", 40), ("test", 10)):
        found = pixels(folder, split)
        assert len(found) == rows
        for number, image in enumerate(random_images(rows, 28, 28)):
            assert np.array_equal(found[f"{split}/{number:06d}.png"][0], image)
            assert found[f"{split}/{number:06d}.png"][1] == number % 10
    assert folder.index.classes[9].name == "Ankle boot"


def test_idx_files_that_are_cut_or_of_another_form_are_named(idx_folder, tmp_path):
    file = next(idx_folder.glob("t10k-images*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"t10k-images.*(expected 7840 bytes|cannot be unpacked)"):
        import_data("idx", idx_folder, "set", tmp_path)
    write_idx(file, np.zeros(7, np.uint8))
    with pytest.raises(DataError, match="expected it to begin with 00000803, found 00000801"):
        import_data("idx", idx_folder, "set", tmp_path)
    write_idx(file, random_images(9, 28, 28))
    with pytest.raises(DataError, match="t10k has 9 images, but 10 labels"):
        import_data("idx", idx_folder, "set", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="has no file t10k-images-idx"):
        import_data("idx", idx_folder, "set", tmp_path)


def cifar_rows(split_seed, rows, num_classes):
    rng = np.random.default_rng(split_seed)
    return rng.integers(0, 256, (rows, 3072), dtype=np.uint8), [i % num_classes for i in range(rows)]


def cifar_10(folder, form):
    folder.mkdir()
    names = [f"class{i}" for i in range(10)]
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data, labels = cifar_rows(number, 20, 10)
        if form == "python":
            batch = {b"batch_label": name.encode(), b"labels": labels, b"data": data, b"filenames": [b"x.png"] * 20}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            table = np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1)
            (folder / f"{name}.bin").write_bytes(table.tobytes())
    if form == "python":
        meta = {b"num_cases_per_batch": 20, b"label_names": [name.encode() for name in names], b"num_vis": 3072}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    else:
        (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    return folder


def cifar_100(folder, form):
    folder.mkdir()
    for number, name in enumerate(("train", "test")):
        data, labels = cifar_rows(number, 200, 100)
        coarse = [label // 5 for label in labels]
        if form == "python":
            batch = {b"fine_labels": labels, b"coarse_labels": coarse, b"data": data}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            table = np.concatenate([np.array([coarse, labels], np.uint8).T, data], axis=1)
            (folder / f"{name}.bin").write_bytes(table.tobytes())
    names = [f"class{i}" for i in range(100)]
    if form == "python":
        meta = {b"fine_label_names": [name.encode() for name in names], b"coarse_label_names": [b"c"] * 20}
        (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    else:
        (folder / "fine_label_names.txt").write_text("\n".join(names))
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_images_arrive_pixel_by_pixel(num_classes, form, packed, tmp_path):
    source = (cifar_10 if num_classes == 10 else cifar_100)(tmp_path / "unpacked", form)
    if packed:
        archive = tmp_path / f"cifar-{num_classes}-{form}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(source, arcname=f"cifar-{num_classes}-batches")
        source = archive
    folder = imported("cifar", source, tmp_path)
    assert [c.name for c in folder.index.classes] == [f"class{i}" for i in range(num_classes)]
    assert {name: split.rows for name, split in folder.index.splits.items()} == (
        {"train": 100, "test": 20} if num_classes == 10 else {"train": 200, "test": 200}
    )
    test, labels = cifar_rows(5 if num_classes == 10 else 1, 20 if num_classes == 10 else 200, num_classes)
    found = pixels(folder, "test")
    for number, (row, label) in enumerate(zip(test, labels)):
        image, found_label = found[f"test/{number:06d}.png"]
        assert found_label == label
        red, green, blue = row.reshape(3, 32, 32)
        assert np.array_equal(image[..., 0], red)
        assert np.array_equal(image[..., 1], green)
        assert np.array_equal(image[..., 2], blue)


class Attack:
    def __reduce__(self):
        return (print, ("this would be any code",))


def test_a_pickle_that_asks_for_code_is_refused(tmp_path, capsys):
    source = cifar_10(tmp_path / "cifar", "python")
    (source / "data_batch_2").write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}))
    with pytest.raises(DataError, match=r"data_batch_2 cannot be unpickled safely: it asks for builtins.print"):
        import_data("cifar", source, "set", tmp_path)
    assert capsys.readouterr().out == ""


def test_pickles_of_old_numpy_are_read():
    array = np.arange(5, dtype=np.uint8)
    pickled = pickle.dumps({b"data": array}, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert np.array_equal(unpickle(pickled, "x")[b"data"], array)


def test_cifar_files_that_are_missing_or_cut_are_named(tmp_path):
    source = cifar_10(tmp_path / "cifar", "binary")
    file = source / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3.bin: expected a multiple of 3073 bytes, found 61459"):
        import_data("cifar", source, "set", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"is cifar-10 binary, but lacks data_batch_3.bin"):
        import_data("cifar", source, "set", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half an archive")
    with pytest.raises(DataError, match="cannot be unpacked"):
        import_data("cifar", tmp_path / "cifar-10-python.tar.gz", "set", tmp_path)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_npz_images_arrive_pixel_by_pixel(shape, tmp_path):
    images = random_images(30, *shape)
    arrays = {"x": images[:20], "y": np.arange(20) % 3, "xt": images[20:], "yt": np.arange(10) % 3}
    np.savez(tmp_path / "a.npz", names=np.array(["ant", "bee", "cat"]), **arrays)
    folder = imported("npz", tmp_path / "a.npz", tmp_path, {"splits": "train=x:y,test=xt:yt", "classes": "names"})
    assert [c.name for c in folder.index.classes] == ["ant", "bee", "cat"]
    found = pixels(folder, "test")
    assert all(np.array_equal(found[f"test/{i:06d}.png"][0], images[20 + i].squeeze()) for i in range(10))


def test_npz_arrays_that_do_not_fit_are_described(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8)), labels=np.arange(3))
    with pytest.raises(DataError, match=r"expected images uint8 .* found float64 \(3, 8, 8\)"):
        import_data("npz", tmp_path / "a.npz", "set", tmp_path)
    np.savez(tmp_path / "a.npz", images=random_images(3, 8, 8), labels=np.arange(4))
    with pytest.raises(DataError, match=r"expected 3 integer labels, found int64 \(4,\)"):
        import_data("npz", tmp_path / "a.npz", "set", tmp_path)
    with pytest.raises(DataError, match="has no array x, y; it has images, labels"):
        import_data("npz", tmp_path / "a.npz", "set", tmp_path, {"splits": "train=x:y"})
    with pytest.raises(UsageError, match=r"cannot be read\. Expected train=IMAGES:LABELS"):
        import_data("npz", tmp_path / "a.npz", "set", tmp_path, {"splits": "images"})


def icons_file(folder):
    """Four monochrome icons by two artists, a colour icon and an emoji under a share-alike licence."""
    rgba = random_images(2, 6, 6, 4)
    rgba[0, 0, 0] = (10, 20, 30, 255)
    rgba[0, 0, 1] = (10, 20, 30, 0)
    np.savez(
        folder / "icons.npz",
        alpha=random_images(4, 6, 6),
        rgba=rgba,
        y=np.array([0, 1, 0, 1, 0, 1], np.int16),
        domain=np.array(["mono"] * 4 + ["uicolor", "emoji"]),
        family=np.array(["fa", "fa", "solar", "solar", "fa", "noto"]),
        name=np.array(["fa:a", "fa:b", "solar:a", "solar:b", "fa:c", "noto:d"]),
        classes=np.array(["alarm-clock", "bed"]),
    )
    licences = {"fa": {"license": "MIT"}, "solar": {"license": "CC-BY-4.0"}, "noto": {"license": "CC-BY-SA-4.0"}}
    (folder / "icon_domains_sets.json").write_text(json.dumps(licences))
    return folder / "icons.npz"


def test_icons_are_ink_on_paper_and_split_by_artist(tmp_path):
    folder = imported("icons", icons_file(tmp_path), tmp_path, on_bad="skip")
    artists = {split: {path.split(":")[0] for path in folder.rows(split).paths} for split in folder.index.splits}
    assert artists["uicolor"] == {"fa"}
    assert artists["emoji"] == {"noto"}
    assert not artists.get("train", set()) & artists.get("test", set())
    mono = {**pixels(folder, "train"), **(pixels(folder, "test") if "test" in artists else {})}
    for number, name in enumerate(("fa:a", "fa:b", "solar:a", "solar:b")):
        assert np.array_equal(mono[f"{name}.png"][0], 255 - random_images(4, 6, 6)[number])
    colour = pixels(folder, "uicolor")["fa:c.png"][0]
    assert colour[0, 0].tolist() == [10, 20, 30]
    assert colour[0, 1].tolist() == [255, 255, 255]


def test_icons_under_share_alike_licences_can_be_left_out(tmp_path):
    folder = imported("icons", icons_file(tmp_path), tmp_path, {"licences": "permissive"}, on_bad="skip")
    assert "emoji" not in folder.index.splits
    assert folder.index.licence == "CC-BY-4.0, MIT"
    with pytest.raises(UsageError, match="licences"):
        import_data("icons", tmp_path / "icons.npz", "other", tmp_path, {"licences": "free"})


def hub_table(rows, metadata=None, image="image", label="label"):
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(rows)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {image: pa.array(images, kind), label: pa.array([i % 2 for i in range(rows)], pa.int64())}
    return pa.table(columns).replace_schema_metadata(metadata)


def test_hub_images_are_kept_byte_by_byte_in_their_order(tmp_path):
    source = tmp_path / "hub"
    source.mkdir()
    metadata = {"classes": json.dumps([{"wnid": "n1", "name": "ant"}, {"wnid": "n2", "name": "bee"}])}
    table = hub_table(20, metadata)
    pq.write_table(table.slice(0, 12), source / "train-00000-of-00002.parquet", row_group_size=5)
    pq.write_table(table.slice(12), source / "train-00001-of-00002.parquet", row_group_size=5)
    pq.write_table(hub_table(4, metadata), source / "test.parquet")
    folder = imported("hub-parquet", source, tmp_path)
    assert list(folder.index.splits) == ["train", "test"]
    rows = folder.rows("train")
    assert rows.read(range(20)) == [jpeg(i) for i in range(20)]
    assert rows.labels.tolist() == [i % 2 for i in range(20)]
    assert [(c.id, c.name) for c in folder.index.classes] == [("n1", "ant"), ("n2", "bee")]


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        (None, ["0", "1"]),
        ({"classes": '["ant", "bee"]'}, ["ant", "bee"]),
        (
            {"huggingface": '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'},
            ["cat", "dog"],
        ),
    ],
)
def test_hub_class_names_are_found_where_they_may_be(metadata, names, tmp_path):
    pq.write_table(hub_table(6, metadata), tmp_path / "train.parquet")
    folder = imported("hub-parquet", tmp_path / "train.parquet", tmp_path)
    assert [c.name for c in folder.index.classes] == names


def test_a_missing_column_is_named_and_another_can_be_chosen(tmp_path):
    pq.write_table(hub_table(6, image="img", label="fine_label"), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"column image \(images\) is missing; column label \(labels\) is missing"):
        import_data("hub-parquet", tmp_path / "train.parquet", "set", tmp_path)
    folder = imported(
        "hub-parquet", tmp_path / "train.parquet", tmp_path, {"image": "img", "label": "fine_label"}, limit=4
    )
    assert folder.index.splits["train"].rows == 4


def test_hub_rows_without_bytes_or_label_are_problems(tmp_path):
    table = hub_table(6)
    images, labels = table["image"].to_pylist(), table["label"].to_pylist()
    images[2]["bytes"], labels[3] = None, None
    broken = pa.table({"image": pa.array(images, table["image"].type), "label": pa.array(labels, pa.int64())})
    pq.write_table(broken, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"2.jpg: train.parquet row 2 has no bytes, only a path"):
        import_data("hub-parquet", tmp_path / "train.parquet", "set", tmp_path)
    index = import_data("hub-parquet", tmp_path / "train.parquet", "set", tmp_path, on_bad="skip")
    assert index.splits["train"].bad == {"undecodable image": 1, "unknown label": 1}


def test_a_sorted_hub_file_is_warned_of(tmp_path, caplog):
    table = hub_table(20)
    pq.write_table(table.set_column(1, "label", pa.array([0] * 10 + [1] * 10)), tmp_path / "train.parquet")
    import_data("hub-parquet", tmp_path / "train.parquet", "set", tmp_path)
    assert "is sorted by label" in caplog.text


def test_digits_come_from_the_installed_package(tmp_path):
    folder = imported("digits", tmp_path / "sklearn", tmp_path)
    assert sum(split.rows for split in folder.index.splits.values()) == 1797
    assert folder.index.splits["test"].rows == 359
    found = np.stack([image for split in ("train", "test") for image, _ in pixels(folder, split).values()])
    expected = np.rint(load_digits().images / 16 * 255).astype(np.uint8)
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in expected)


def test_every_importer_refuses_what_is_not_its_own(tmp_path):
    (tmp_path / "empty").mkdir()
    for kind in IMPORTERS:
        if kind != "digits":
            with pytest.raises(DataError):
                import_data(kind, tmp_path / "empty", "set", tmp_path)
    with pytest.raises(UsageError, match="is in no form that can be imported"):
        guess_importer(tmp_path / "empty")


def test_unknown_kinds_and_options_list_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match=r"Unknown kind of data set 'coco'\. Known: image-folder, idx"):
        import_data("coco", tmp_path, "set", tmp_path)
    with pytest.raises(UsageError, match=r"do not suit the importer idx \(options: classes, licence\)"):
        import_data("idx", tmp_path, "set", tmp_path, {"colour": "red"})


def test_the_shared_parquet_files_are_imported_as_they_are(shared, tmp_path):
    folder = imported("hub-parquet", shared / "tiny-imagenet", tmp_path, limit=300)
    assert folder.index.num_classes == 200
    assert folder.index.classes[0].id == "n01443537"
    assert folder.index.classes[0].name == "goldfish"
    rows = folder.rows("val")
    original = pq.ParquetFile(shared / "tiny-imagenet" / "val.parquet").read_row_group(0).slice(0, 300).to_pylist()
    assert rows.read(range(300)) == [row["image"]["bytes"] for row in original]
    assert rows.labels.tolist() == [row["label"] for row in original]


def test_the_shared_icons_are_split_by_artist(shared, tmp_path):
    folder = imported("icons", shared / "icon_domains_64.npz", tmp_path, {"licences": "permissive"}, limit=200)
    assert list(folder.index.splits) == ["train", "test", "uicolor", "emoji", "emojimono"]
    assert folder.index.num_classes == 100
    assert not any("CC-BY-SA" in licence for licence in folder.index.licence.split(", "))


def test_a_known_data_set_has_the_catalogues_licence_unless_one_is_given(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "some.npz", images=images, labels=labels)
    known = import_data("npz", tmp_path / "some.npz", "fashion-mnist", tmp_path / "a")
    assert known.licence == DATASETS["fashion-mnist"].licence
    given = import_data("npz", tmp_path / "some.npz", "fashion-mnist", tmp_path / "b", {"licence": "CC0-1.0"})
    assert given.licence == "CC0-1.0"
