"""What a person can get wrong, made for real through the command line.

Every mistake is a row of `MISTAKES`: what they do, how it ends, what they read. The
table in docs/operations.md is made from the same rows.
"""

import errno
import io
import json
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m2mkd_ray.execution import Store
from m2mkd_ray.execution.locks import Locks

DOCS = Path(__file__).parent.parent / "docs" / "operations.md"
BEGIN, END = "<!-- mistakes -->\n", "<!-- /mistakes -->\n"


@dataclass(frozen=True)
class Place:
    """Where a mistake is made."""

    folder: Path
    """Empty; also the working directory."""
    store: Path
    """Holds complete artifacts `data-*` and `meta-*` of tiny.yaml."""
    until_the_end: ExitStack
    """What is to be closed after the test."""


def nothing(place: Place) -> None:
    """The command alone is the mistake."""


@dataclass(frozen=True)
class Mistake:
    """A row of the table."""

    what: str
    command: str
    """After `m2mkd`; run in `Place.folder`."""
    says: str
    """Part of the message, white space aside."""
    code: int = 1
    prepare: Callable[[Place], None] = nothing


# What is wrong before the command


def png(size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), "teal").save(file, "PNG")
    return file.getvalue()


def image_folder(place: Place) -> Path:
    for name in ("cat", "dog"):
        (place.folder / "pets" / "train" / name).mkdir(parents=True)
        (place.folder / "pets" / "train" / name / "1.png").write_bytes(png())
    return place.folder / "pets"


def a_corrupt_image(place: Place) -> None:
    (image_folder(place) / "train" / "dog" / "2.png").write_bytes(png()[:40])


def an_empty_class(place: Place) -> None:
    (image_folder(place) / "train" / "emu").mkdir()


def parquet(place: Place, columns: dict[str, list], metadata: dict[str, str]) -> None:
    (place.folder / "hub").mkdir()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), place.folder / "hub" / "train.parquet")


def an_unknown_label(place: Place) -> None:
    images = [{"bytes": png(), "path": f"{i}.png"} for i in range(3)]
    parquet(place, {"image": images, "label": [0, 1, 7]}, {"classes": json.dumps(["cat", "dog"])})


def no_labels(place: Place) -> None:
    parquet(place, {"image": [{"bytes": png(), "path": "0.png"}]}, {})


def a_truncated_shard(place: Place) -> None:
    from m2mkd_ray.data import find

    copied = place.folder / "data" / "fashion-mnist-small"
    shutil.copytree(find("fashion-mnist-small").path, copied)
    shard = copied / "test-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1000])


def a_spoilt_artifact(place: Place) -> None:
    (weights,) = place.store.glob("meta-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])


def a_file_in_the_way(place: Place) -> None:
    (place.folder / "taken").write_text("not a store")


def linux_only(place: Place) -> None:
    """/proc is Linux's: nobody can make a folder there, root neither."""
    if not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc")


def a_taken_port(place: Place) -> None:
    """Something that is no Ray listens at the port (here, a server that knows HTTP/1 only)."""
    try:
        server = place.until_the_end.enter_context(HTTPServer(("127.0.0.1", 8265), BaseHTTPRequestHandler))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return  # the port is taken already, which is the mistake
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    place.until_the_end.callback(thread.join)
    place.until_the_end.callback(server.shutdown)


def too_many_images(place: Place) -> None:
    """101 MiB that take no room on the disk."""
    (place.folder / "images").mkdir()
    with (place.folder / "images" / "all.tar").open("wb") as file:
        file.truncate(101 * 1024**2)


def a_full_folder(place: Place) -> None:
    (place.folder / "full").mkdir()
    (place.folder / "full" / "notes.txt").write_text("mine")


def an_export(place: Place) -> None:
    """A student with random weights, as `m2mkd export` writes it; and a file that is no image."""
    from m2mkd_ray.commands.session import chosen
    from m2mkd_ray.evaluation.exported import CONFIG, WEIGHTS, ExportedConfig
    from m2mkd_ray.stages.parts import fresh_student, save_weights

    recipe = chosen("tiny.yaml", [])
    student = fresh_student(recipe.blueprint, 0, drop_path=0, keep_stitches=False)
    config = ExportedConfig(
        blueprint=recipe.blueprint,
        keep_stitches=False,
        augmentation=recipe.data.augmentation,
        classes=tuple("0123456789"),
        recipe="tiny",
        key="0" * 12,
        versions={},
    )
    (place.folder / "export").mkdir()
    save_weights(student, place.folder / "export" / WEIGHTS)
    (place.folder / "export" / CONFIG).write_text(config.model_dump_json())
    (place.folder / "notes.txt").write_text("no image")


def a_yaml_without_from(place: Place) -> None:
    (place.folder / "mine.yaml").write_text("pairs: {epochs: 3}\n")


def no_yaml(place: Place) -> None:
    (place.folder / "mine.yaml").write_text("from: demo\npairs: {epochs: 3\n")


def a_sweep(place: Place, **changes: object) -> None:
    """A sweep file of tiny.yaml, with something in it that is wrong."""
    tree = {
        "name": "mine",
        "title": "Mine",
        "recipe": "tiny.yaml",
        "level": {"kind": "pair", "index": 1},
        "space": {"pairs.distill.alpha": "uniform(0, 1)"},
        "budget": {"trials": 2},
    }
    (place.folder / "mine.yaml").write_text(json.dumps({**tree, **changes}))


def a_misspelt_path(place: Place) -> None:
    a_sweep(place, space={"incubate.temperature": "loguniform(1, 8)"})


def a_domain_too_wide(place: Place) -> None:
    a_sweep(place, space={"pairs.distill.alpha": "uniform(0, 2)"})


def words_for_a_number(place: Place) -> None:
    a_sweep(place, space={"pairs.distill.temperature": "choice([cold, warm])"})


def an_unknown_domain(place: Place) -> None:
    a_sweep(place, space={"pairs.lr": "logunifrm(1e-4, 1e-2)"})


def an_empty_space(place: Place) -> None:
    a_sweep(place, space={})


def a_range_of_nothing(place: Place) -> None:
    a_sweep(place, space={"pairs.lr": "uniform(3, 3)"})


def a_setting_of_another_stage(place: Place) -> None:
    a_sweep(place, space={"finetune.lr": "uniform(1e-4, 1e-3)"})


def an_unknown_metric(place: Place) -> None:
    a_sweep(place, metric="val_top5")


def population_based_training(place: Place) -> None:
    a_sweep(place, scheduler="pbt")


def a_grace_without_validation(place: Place) -> None:
    a_sweep(place, scheduler={"kind": "asha", "grace": 0.1})


def an_unknown_pair(place: Place) -> None:
    a_sweep(place, level={"kind": "pair", "index": 7})


RANKS = "--set placement.finetune.engine=deepspeed --set placement.finetune.num_workers"
MISTAKES = (
    # names and settings
    Mistake("no recipe", "run", "Missing argument 'RECIPE'", 2),
    Mistake("unknown recipe", "run demmo", "There is no recipe 'demmo'. Known recipes: ", 2),
    Mistake("unknown baseline", "run demo/purr", "There is no baseline 'purr'. Known baselines: ", 2),
    Mistake(
        "misspelt setting", "run demo --set pairs.distil.alpha=0.3", "'distil' is unknown; did you mean distill?", 2
    ),
    Mistake("setting without a value", "run demo --set seed", "'seed' is not of the form a.b=value", 2),
    Mistake(
        "value of another type", "run demo --set pairs.epochs=many", "pairs.epochs: Input should be a valid number", 2
    ),
    Mistake(
        "precision that is not offered",
        "run demo --set finetune.precision=fp16",
        "should be 'fp32', 'bf16' or 'bf16_pure'",
        2,
    ),
    Mistake(
        "misspelt augmentation policy",
        "run demo --set 'pairs.augmentation={kind: timm, auto_augment: rand-m9-msdt0.5}'",
        "pairs.augmentation.auto_augment: 'rand-m9-msdt0.5' is no policy that timm can read: Unknown RandAugment",
        2,
    ),
    Mistake(
        "cache of views that never come again",
        "run demo --set 'pairs.cache={kind: float16}'",
        "`cache` keeps the logits of views that come again: set `views`",
        2,
    ),
    Mistake(
        "pairs that share a device and have several",
        "run demo --set placement.pairs.ranks=2 --set placement.pairs.cohort=2",
        "a pair has several devices, or shares one, not both",
        2,
    ),
    Mistake(
        "ranks of a pair that do not divide the lanes",
        "run demo --set placement.pairs.ranks=3",
        "placement.pairs.ranks 3 does not divide data.lanes 2",
        2,
    ),
    Mistake("unknown placement", "plan demo --cluster local --placement best", "There is no placement 'best'", 2),
    Mistake("unknown suite", "run demo --set suites=[imagenet]", "There is no suite 'imagenet'. Known suites: ", 2),
    Mistake("unknown stage", "run tiny.yaml --until spilt", "The plan has no stage spilt. It has: ", 2),
    Mistake("recipe file that is not there", "plan my.yaml", "Cannot read the recipe file my.yaml", 2),
    Mistake("recipe file without `from`", "plan mine.yaml", "must start with `from: NAME`", 2, a_yaml_without_from),
    Mistake("recipe file that is no YAML", "plan mine.yaml", "The recipe file mine.yaml is not YAML", 2, no_yaml),
    # models
    Mistake(
        "depths that do not add up",
        "run tiny.yaml --set blueprint.teacher_depths=[1,2]",
        "teacher_depths (1, 2) add up to 3 blocks, but teacher has depth 2",
        2,
    ),
    Mistake(
        "heads that do not divide the width",
        "run tiny.yaml --set blueprint.student.vit.num_heads=5",
        "width 16 is not a multiple of num_heads 5",
        2,
    ),
    Mistake(
        "ViT that timm does not have",
        "run tiny.yaml --set blueprint.teacher.name=vit_tony",
        "'vit_tony' is not known to timm",
    ),
    Mistake(
        "mixtures in blocks that are not there",
        "run tiny.yaml --set blueprint.student.moe.blocks=[9]",
        "moe.blocks names blocks [9], but the student has blocks 0 to 1",
    ),
    Mistake(
        "family without its sizes",
        "run tiny.yaml --set blueprint.student.family=nac",
        "`nac` is needed by family=nac, and only by it; family is nac",
        2,
    ),
    Mistake(
        "sizes that a circuit cannot have",
        "run nac_tiny --set blueprint.student.nac.width=30",
        "width 30 is not a multiple of 4",
        2,
    ),
    Mistake(
        "mixtures that a circuit does not have",
        "run nac_tiny --set blueprint.student.moe.num_experts=4",
        "`moe` changes nothing for family=nac, which has no mixtures; leave it out",
        2,
    ),
    Mistake(
        "stitches that a circuit cannot keep",
        "run nac_tiny --set keep_stitches=true",
        "Cannot build the student: A NAC cannot keep its stitches",
    ),
    Mistake(
        "weights that are not there",
        "run tiny.yaml --set teacher.source=pretrained --set teacher.weights=deit.pth",
        "deit.pth. Give a .safetensors, .pth or .pt file, or `timm`.",
    ),
    # data
    Mistake("data set that is not imported", "run cifar10", "then: m2mkd data import cifar10 --source"),
    Mistake("unknown data set", "run demo --set data.dataset=fashion", "Known data sets: "),
    Mistake("unknown split", "run demo --set data.split=training", "has no split 'training', only train, "),
    Mistake(
        "part of a split that is written otherwise",
        "run demo --set data.split=train[500]",
        "a part of a split is written train[5000:], train[:5000] or train[:10%]",
    ),
    Mistake(
        "rows to choose settings on that are trained on",
        "run demo --set data.validation.split=train[:500]",
        "has 500 of the rows that are trained on (data.split 'train')",
    ),
    Mistake(
        "another number of classes",
        "run tiny.yaml --set blueprint.teacher.num_classes=7 --set blueprint.student.vit.num_classes=7",
        "has 10 classes, but the blueprint's num_classes is 7",
    ),
    Mistake(
        "batch larger than the data",
        "run tiny.yaml --set meta.batch_size=512",
        "meta.batch_size 512 is more than the 160 rows",
    ),
    Mistake("import of what is not there", "data import pets --source pets", "there is no file or folder pets", 2),
    Mistake(
        "corrupt image at import",
        "data import pets --source pets",
        "met a problem, undecodable image: train/dog/2.png",
        prepare=a_corrupt_image,
    ),
    Mistake(
        "unknown label at import",
        "data import pets --source hub",
        "label 7 is none of the 2 classes",
        prepare=an_unknown_label,
    ),
    Mistake(
        "missing column at import",
        "data import pets --source hub",
        "column label (labels) is missing",
        prepare=no_labels,
    ),
    Mistake(
        "empty class at import", "data import pets --source pets", "class emu has no images", prepare=an_empty_class
    ),
    Mistake(
        "truncated shard",
        "run tiny.yaml --until data --launcher local --set placement.data_root=data --store new",
        "is damaged: test-00000.parquet: expected",
        prepare=a_truncated_shard,
    ),
    # machines
    Mistake(
        "more CPUs than there are",
        "run tiny.yaml --set placement.pairs.resources.cpus=4000",
        "ask for 4000 CPUs, but no node has",
    ),
    Mistake(
        "more GPUs than there are",
        "run tiny.yaml --set placement.pairs.resources.gpus=4000",
        "4000 GPUs, but no node has",
    ),
    Mistake(
        "node group that is not there",
        "run tiny.yaml --set placement.pairs.resources.node_group=gpus",
        "on a node of group gpus, but there is none",
    ),
    Mistake(
        "more ranks than there is room for",
        f"run tiny.yaml {RANKS}=2 --set placement.finetune.cpus_per_worker=1 --num-cpus 1",
        "finetune asks for 2 ranks of 1 CPUs each, but there is room for 1",
    ),
    Mistake(
        "ranks that do not divide the lanes",
        f"run tiny.yaml {RANKS}=3",
        "placement.finetune.num_workers 3 does not divide data.lanes 2",
        2,
    ),
    Mistake(
        "micro-batch that does not divide the batch",
        f"run tiny.yaml {RANKS}=2 --set placement.finetune.micro_batch=5",
        "a rank's 16 images are not a multiple of micro_batch 5",
    ),
    Mistake(
        "ranks without Ray",
        f"run tiny.yaml {RANKS}=2 --launcher local",
        "Use --launcher ray, or --set placement.finetune.engine=torch",
    ),
    Mistake(
        "address at which no Ray answers",
        "run tiny.yaml --address 127.0.0.1:1",
        "no Ray answers at `127.0.0.1:1`",
    ),
    Mistake(
        "address whose port something else has taken",
        "run tiny.yaml --address 127.0.0.1:8265",
        "no Ray answers at `127.0.0.1:8265`: something else listens there",
        prepare=a_taken_port,
    ),
    # jobs
    Mistake("unknown job", "submit demmo", "There is no job 'demmo'. Known jobs: ", 2),
    Mistake("job with an unknown setting", "submit demo --dry-run --set seeds=1", "'seeds' is unknown", 2),
    Mistake("job file that is not there", "submit mine.yaml", "Cannot read the job file mine.yaml", 2),
    Mistake("recipe file as a job", "submit tiny.yaml", "is not as Ray takes it: - entrypoint. Field required", 2),
    Mistake(
        "job whose store would go with it",
        "submit demo --store runs",
        "Give --store an absolute path that all nodes share, or a URI",
        2,
    ),
    Mistake(
        "address of Ray's own port for a job",
        "submit demo --address 127.0.0.1:6379",
        "is not the address of a job server, which is its dashboard's URL",
        2,
    ),
    Mistake(
        "address at which no job server answers",
        "submit demo --address http://127.0.0.1:1",
        "Connecting to the job server http://127.0.0.1:1: nobody answers",
    ),
    Mistake(
        "job that uploads too much",
        "submit demo --dry-run",
        "but a cluster's dashboard takes less than 100 MiB. Most of it is images (",
        2,
        prepare=too_many_images,
    ),
    # sweeps
    Mistake("unknown sweep", "sweep quik", "There is no sweep 'quik'. Known sweeps: ", 2),
    Mistake("sweep file that is not there", "sweep my.yaml", "Cannot read the sweep file my.yaml", 2),
    Mistake(
        "misspelt path of a sweep",
        "sweep mine.yaml",
        "'incubate' is unknown; known here: ",
        prepare=a_misspelt_path,
    ),
    Mistake(
        "domain with values that the recipe does not take",
        "sweep mine.yaml",
        "Input should be less than or equal to 1 (found 2) (2 of uniform(0, 2))",
        prepare=a_domain_too_wide,
    ),
    Mistake(
        "domain of another type",
        "sweep mine.yaml",
        "should be a valid number, unable to parse string as a number (found 'warm') ('warm' of choice",
        prepare=words_for_a_number,
    ),
    Mistake(
        "unknown domain", "sweep mine.yaml", "no domain 'logunifrm'; did you mean loguniform", 2, an_unknown_domain
    ),
    Mistake("empty space", "sweep mine.yaml", "space is empty: name at least one setting", 2, an_empty_space),
    Mistake("range without a value", "sweep mine.yaml", "low 3 is not below high 3", 2, a_range_of_nothing),
    Mistake(
        "path that changes nothing that is measured",
        "sweep mine.yaml",
        "space.finetune.lr changes nothing that is measured at level pair",
        prepare=a_setting_of_another_stage,
    ),
    Mistake(
        "metric that no trial reports",
        "sweep mine.yaml",
        "metric 'val_top5': no trial of level pair reports it. Known: val_top1, loss, ce",
        prepare=an_unknown_metric,
    ),
    Mistake(
        "scheduler that changes settings in mid-training",
        "sweep mine.yaml",
        "pbt changes settings in the middle of a training, but a stage's key is made from the settings",
        2,
        population_based_training,
    ),
    Mistake(
        "grace that is over before anything is measured",
        "sweep mine.yaml",
        "is over before pairs is validated: set pairs.validate_every_epochs",
        prepare=a_grace_without_validation,
    ),
    Mistake(
        "pair that is not there",
        "sweep mine.yaml",
        "level.index 7: there is no such pair, only 0 to 1",
        prepare=an_unknown_pair,
    ),
    Mistake(
        "more GPUs a trial than there are",
        "sweep mine.yaml --set placement.pairs.resources.gpus=4000",
        "4000 GPUs, but no node has",
        prepare=a_sweep,
    ),
    Mistake(
        "best of a sweep that was not started",
        "sweep best quick --store runs",
        "The sweep 'quick' has no results in",
    ),
    # the store and its results
    Mistake(
        "store in a read-only place",
        "run tiny.yaml --store /proc/m2mkd",
        "The store `/proc/m2mkd` cannot be written: no folder can be made at `/proc/m2mkd`; choose another folder",
        prepare=linux_only,
    ),
    Mistake(
        "store with a file in the way",
        "run tiny.yaml --store taken",
        "a file is in the way",
        prepare=a_file_in_the_way,
    ),
    Mistake("store of an unknown kind", "run tiny.yaml --store ftp://here/runs", "cannot be opened"),
    Mistake(
        "artifact that was spoilt",
        "run tiny.yaml --until meta --launcher local --store runs",
        "is spoilt (model.safetensors has",
        0,
        a_spoilt_artifact,
    ),
    Mistake(
        "loss that is not finite",
        "run tiny.yaml --until meta --launcher local --set meta.lr=1e30 --set meta.epochs=2",
        "not finite",
    ),
    Mistake("report before the run is over", "report tiny.yaml", "The report of tiny.yaml is not made yet"),
    Mistake("export to a full folder", "export tiny.yaml --to full", "it is not an empty folder", 2, a_full_folder),
    Mistake("prediction for a file that is no image", "predict export notes.txt", "cannot identify", 1, an_export),
    Mistake(
        "prediction by what is no export", "predict full cat.png", "is no export of this version", 1, a_full_folder
    ),
)


# Making them


@pytest.fixture(scope="module")
def begun(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the artifacts of the first stages of tiny.yaml."""
    from m2mkd_ray.cli import main

    store = tmp_path_factory.mktemp("begun") / "runs"
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(tiny), "--until", "meta", "--launcher", "local", "--store", str(store)])
    return store


@pytest.fixture
def place(begun: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    shutil.copytree(begun, tmp_path / "runs")
    shutil.copy(tiny, tmp_path / "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    with ExitStack() as until_the_end:
        yield Place(tmp_path, tmp_path / "runs", until_the_end)


def one_line(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def unsound(root: Path) -> list[str]:
    """Artifacts of a store that are not whole."""
    store = Store(str(root))
    addresses = [address for of_name in store.addresses().values() for address in of_name]
    return [address for address in addresses if store.status(address, verify=True).state != "complete"]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what.replace(" ", "_"))
def test_a_mistake_ends_with_a_message_and_a_sound_store(mistake, place, m2mkd):
    mistake.prepare(place)
    complete = Store(str(place.store)).addresses()
    ended = m2mkd(*shlex.split(mistake.command))
    assert mistake.says in one_line(ended.err)
    assert ended.code == mistake.code
    if mistake.code:
        assert ended.out == ""
    assert "Traceback" not in ended.err
    assert not unsound(place.store)
    assert complete.items() <= Store(str(place.store)).addresses().items()
    for other in ("new", "data"):
        assert not unsound(place.folder / other)
    assert not list(place.folder.glob("data/*/index.json")) or mistake.prepare is a_truncated_shard


def test_a_second_run_at_once_is_refused_and_the_first_goes_on(place, m2mkd):
    with _another_driver(place, "teacher") as address:
        ended = m2mkd("run", "tiny.yaml", "--launcher", "local")
        assert (ended.code, ended.out) == (1, "")
        assert f"Another driver is computing `{address}`" in ended.err
        states = {s["name"]: s["state"] for s in json.loads(m2mkd("status", "tiny.yaml", "--json").out)["stages"]}
        assert states["meta"] == "complete"
    assert m2mkd("run", "tiny.yaml", "--launcher", "local", "--until", "teacher").code == 0


@contextmanager
def _another_driver(place: Place, name: str) -> Iterator[str]:
    from m2mkd_ray.commands.session import chosen, planned

    (stage,) = (stage for stage in planned(chosen("tiny.yaml", [])) if stage.name == name)
    with Locks(Store(str(place.store))) as locks:
        locks.acquire([stage.address])
        yield stage.address


# Telling of them


def table() -> str:
    rows = [
        f"| {mistake.what} | `m2mkd {mistake.command}` | {mistake.says.strip()} | {mistake.code} |"
        for mistake in MISTAKES
    ]
    return "\n".join(["| mistake | for example | part of what is said | exit code |", "|---|---|---|---|", *rows, ""])


def test_the_documentation_lists_every_mistake():
    found = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    assert found == table(), f"Put this between the marks in {DOCS.name}:\n{table()}"
