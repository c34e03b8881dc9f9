"""`m2mkd data`: import data sets, list them, compare them with their hashes."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2mkd_ray.commands.output import Column, print_json, print_table
from m2mkd_ray.commands.session import AsJson, session
from m2mkd_ray.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from m2mkd_ray.commands.log import Log
    from m2mkd_ray.data import Index

app = typer.Typer(help="Import, list and verify data sets.", no_args_is_help=True)

DataRoot = Annotated[str, typer.Option("--data-root", help="Folder with imported data sets.")]


class OnBad(StrEnum):
    """What to do about an image, label or class with a problem."""

    FAIL = "fail"
    SKIP = "skip"


@app.command("import")
def import_(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What recipes will call it; `m2mkd data list`.")],
    source: Annotated[Path, typer.Option("--source", help="Folder or file with the images as they were got.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of imported data sets; the set goes to OUT/NAME.")] = Path(
        "data"
    ),
    kind: Annotated[str | None, typer.Option("--kind", help="Form of the source; default: guessed.")] = None,
    on_bad: Annotated[
        OnBad, typer.Option(help="fail at the first bad row, or skip, log and count them.")
    ] = OnBad.FAIL,
    options: Annotated[
        list[str] | None, typer.Option("--option", metavar="name=value", help="Of the importer; may be repeated.")
    ] = None,
    licences: Annotated[
        str | None, typer.Option(help="Of icons: all, or permissive; short for --option licences=.")
    ] = None,
    rows_per_group: Annotated[int, typer.Option(min=1, help="Images that are read at once.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images a split; default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import a data set as Parquet shards. An import that was interrupted goes on with the same command."""
    from m2mkd_ray.data import guess_importer, import_data

    if kind is None and source.name != "sklearn" and not source.exists():
        raise UsageError(f"Cannot import {name!r}: there is no file or folder {source}. Name it with --source.")
    chosen = _options(options or []) | ({"licences": licences} if licences is not None else {})
    with _Bars(session(context).log) as bars:
        index = import_data(
            kind or guess_importer(source),
            source,
            name,
            out,
            chosen,
            on_bad=on_bad.value,
            rows_per_group=rows_per_group,
            limit=limit,
            on_progress=bars.show,
        )
    if as_json:
        print_json(_imported(index, out / name))
    else:
        _print_imported(index, out / name)


@app.command("list")
def list_(data_root: DataRoot = "data", as_json: AsJson = False) -> None:
    """List the known data sets: licence, where to get the files, imported or not."""
    from m2mkd_ray.data import DATASETS

    found = {name: _where(name, data_root) for name in [*DATASETS, *_others(data_root)]}
    if as_json:
        print_json([{**_known(name), "imported": path} for name, path in found.items()])
        return
    columns = (Column("name"), Column("classes", is_number=True), Column("imported"), Column("licence"))
    rows = [(name, _known(name), path) for name, path in found.items()]
    print_table(
        [*columns, Column("where the files are"), Column("command")],
        ((name, str(known["classes"]), path or "no", *map(str, _how(known))) for name, known, path in rows),
    )


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: all imported ones.")] = None,
    data_root: DataRoot = "data",
    as_json: AsJson = False,
) -> None:
    """Read every shard and compare it with its hash."""
    from m2mkd_ray.data import DATASETS, find

    chosen = names or [name for name in [*DATASETS, *_others(data_root)] if _where(name, data_root)]
    problems: list[str] = []
    verified: list[dict[str, Any]] = []
    for name in chosen:
        folder = find(name, data_root)
        for split, held in folder.index.splits.items():
            try:
                folder.verify(split)
            except DataError as error:
                problems.append(str(error))
            else:
                verified.append({"dataset": name, "split": split, "rows": held.rows, "path": str(folder.path)})
    if as_json:
        print_json({"verified": verified, "problems": problems})
    else:
        columns = (Column("data set"), Column("split"), Column("rows", is_number=True), Column("folder"))
        print_table(columns, ((v["dataset"], v["split"], f"{v['rows']:,}", v["path"]) for v in verified))
    if problems:
        raise DataError("\n".join(problems))


class _Bars:
    """A progress bar a split on a terminal; elsewhere nothing, as the result says all."""

    def __init__(self, log: "Log") -> None:
        self._log = log
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._log.console, disable=not self._log.console.is_terminal)
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, split: str, done: int, rows: int) -> None:
        """Move the bar of a split."""
        assert self._progress is not None
        if split not in self._tasks:
            self._tasks[split] = self._progress.add_task(split, total=rows)
        self._progress.update(self._tasks[split], completed=done)


def _options(settings: list[str]) -> dict[str, str]:
    parts = [setting.partition("=") for setting in settings]
    if wrong := [name for name, equals, _ in parts if not equals]:
        raise UsageError(f"--option {', '.join(wrong)}: expected name=value, such as --option splits=test=images.")
    return {name: value for name, _, value in parts}


def _imported(index: "Index", folder: Path) -> dict[str, Any]:
    splits = {name: {"rows": split.rows, "bad": split.bad} for name, split in index.splits.items()}
    return {
        "name": index.name,
        "path": str(folder.absolute()),
        "classes": index.num_classes,
        "licence": index.licence,
        "fingerprint": index.fingerprint,
        "splits": splits,
    }


def _print_imported(index: "Index", folder: Path) -> None:
    columns = (Column("split"), Column("rows", is_number=True), Column("left out"))
    bad = {name: ", ".join(f"{n} {kind}" for kind, n in split.bad.items()) for name, split in index.splits.items()}
    print_table(columns, ((name, f"{split.rows:,}", bad[name]) for name, split in index.splits.items()))
    typer.echo(f"\n{index.name}: {index.num_classes} classes, fingerprint {index.fingerprint}, in {folder.absolute()}")


def _where(name: str, data_root: str) -> str | None:
    """The folder of a data set; None if it is not imported."""
    from m2mkd_ray.data import find

    try:
        return str(find(name, data_root).path)
    except DataError:
        return None


def _others(data_root: str) -> list[str]:
    """Imported data sets that the catalogue does not name."""
    from m2mkd_ray.data import DATASETS
    from m2mkd_ray.data.index import INDEX

    return sorted({file.parent.name for file in Path(data_root).glob(f"*/{INDEX}")} - set(DATASETS))


def _known(name: str) -> dict[str, Any]:
    """What the catalogue says of a data set."""
    from dataclasses import asdict

    from m2mkd_ray.data import DATASETS

    if name in DATASETS:
        return asdict(DATASETS[name])
    return {"name": name, "title": name, "classes": "", "splits": (), "licence": "", "source": "your own", "how": ""}


def _how(known: dict[str, Any]) -> tuple[str, str, str]:
    return known["licence"], known["source"], known["how"]
