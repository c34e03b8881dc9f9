"""`m2mkd status`, `report`, `export`, `predict`: what a run left, or has left so far. Runs no stage."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2mkd_ray.commands.output import Column, bar, mates, place, print_json, print_table, said
from m2mkd_ray.commands.session import AsJson, RecipeName, Session, Settings, StoreRoot, planned, session
from m2mkd_ray.errors import ArtifactError, StoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m2mkd_ray.execution.status import StageStatus
    from m2mkd_ray.reporting import Cost, CounterRow


def status(
    context: typer.Context,
    recipe: RecipeName,
    settings: Settings = None,
    store: StoreRoot = "runs",
    counters: Annotated[
        bool, typer.Option("--counters", help="Show where each training's time goes, and what it counted, instead.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            help="Show the nodes of this Ray cluster too (auto, host:port), what runs there, and what waits."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how far each stage is, from the store; also while another process runs it."""
    from m2mkd_ray.commands.watching import cluster_now, print_cluster
    from m2mkd_ray.execution import plan_status
    from m2mkd_ray.reporting import cost_line

    now = session(context)
    statuses = plan_status(planned(now.choose(recipe, settings)), now.open_store(store))
    cluster = None if address is None else cluster_now(address, statuses)
    if as_json:
        print_json(
            {
                "recipe": recipe,
                **({} if cluster is None else {"cluster": cluster}),
                "store": now.open_store(store).root,
                "stages": [asdict(found) for found in statuses],
                "counters": [row.numbers for row in _counters(statuses)],
                "costs": [asdict(cost) for cost in _costs(statuses)],
            }
        )
        return
    if counters:
        _print_counters(_counters(statuses))
        return
    if cluster is not None:
        print_cluster(cluster)
    columns = [Column("stage"), Column("of"), Column("state"), Column("progress"), Column("time", is_number=True)]
    columns += [Column("tries", is_number=True), Column("metrics", wraps=True), Column("where"), Column("address")]
    print_table(columns, map(_status_cells, statuses))
    complete = sum(found.state == "complete" for found in statuses)
    typer.echo(f"\n{complete} of {len(statuses)} stages are complete in {now.open_store(store).root}.")
    if line := cost_line(_costs(statuses)):
        typer.echo(line)


def _costs(statuses: "Sequence[StageStatus]") -> "list[Cost]":
    """What all attempts that have ended held."""
    from m2mkd_ray.reporting import costs
    from m2mkd_ray.stages.report import spans_of

    known = (
        {"name": s.name, "of": s.of, "attempts": s.attempts, "placement": s.placement, "started": "", "metrics": {}}
        for s in statuses
    )
    return costs([span for manifest in known for span in spans_of(manifest)])


def _counters(statuses: "Sequence[StageStatus]") -> "list[CounterRow]":
    """Those of every training that runs, was stopped or is complete."""
    from m2mkd_ray.reporting import CounterRow

    rows = (CounterRow.of(s.name, s.of, s.metrics, _cohort(s)) for s in statuses if s.state != "absent")
    return [row for row in rows if row is not None]


def _print_counters(rows: "Sequence[CounterRow]") -> None:
    """Two tables, because one would be wider than a terminal."""
    from m2mkd_ray.reporting import count_table, time_table

    tables = [table for table in (time_table(rows), count_table(rows)) if table.rows]
    for table in tables:
        columns = [
            Column(name, is_number=at >= table.numeric_from, wraps=0 < at < table.numeric_from)
            for at, name in enumerate(table.columns)
        ]
        typer.echo(("" if table is tables[0] else "\n") + f"{table.title}\n")
        print_table(columns, table.rows)
    if not tables:
        typer.echo("No training has counted anything yet.")


def _cohort(found: "StageStatus") -> list[str]:
    others = mates(found.where, found.address)
    return sorted([found.address, *others]) if others else []


def _status_cells(found: "StageStatus") -> tuple[str, ...]:
    from m2mkd_ray.reporting.counters import joined
    from m2mkd_ray.reporting.units import duration

    is_under_way = found.state in ("running", "partial")
    return (
        found.name,
        found.of,
        found.state,
        bar(found.step, found.total_steps) if is_under_way else "",
        duration(found.seconds) if found.seconds is not None else "",
        str(len(found.attempts) or ""),
        f"no node can hold it: it asks for {found.waits}" if found.waits else said(found.metrics),
        place(found.where) + (f", with {joined(others)}" if (others := mates(found.where, found.address)) else ""),
        found.address,
    )


def report(
    context: typer.Context,
    recipe: RecipeName,
    settings: Settings = None,
    store: StoreRoot = "runs",
    as_json: AsJson = False,
) -> None:
    """Print the path of a recipe's report, or with --json its numbers."""
    folder = _artifact(session(context), recipe, settings, store, "report")
    if as_json:
        print_json(numbers_of(folder)["summary"])
    else:
        typer.echo(str(folder / "report.html"))


def export(
    context: typer.Context,
    recipe: RecipeName,
    to: Annotated[Path, typer.Option("--to", help="Folder to copy to; it must be new or empty.")],
    settings: Settings = None,
    store: StoreRoot = "runs",
) -> None:
    """Copy the trained student, its settings and its model card to a folder."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"Cannot export to {to}: it is not an empty folder. Name a new one with --to.")
    folder = _artifact(session(context), recipe, settings, store, "export")
    try:
        shutil.copytree(folder, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    except OSError as error:
        raise StoreError(f"Cannot export to {to}: {error}. Name a folder that can be written with --to.") from error
    typer.echo(str(to.absolute()))


def predict(
    exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder that `m2mkd export` wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Most likely classes to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Ask an exported student what is on images."""
    from m2mkd_ray.evaluation import load_export
    from m2mkd_ray.reporting.units import percent

    predictions = load_export(exported).predict(images, top=top)
    if as_json:
        print_json(
            [
                {"image": one.image, "classes": [{"name": name, "share": share} for name, share in one.classes]}
                for one in predictions
            ]
        )
        return
    for one in predictions:
        typer.echo(one.image)
        for name, share in one.classes:
            typer.echo(f"  {percent(share):>7}  {name}")


def numbers_of(folder: Path) -> dict[str, Any]:
    """The content of a report's `report.json`: `summary` and `report`."""
    numbers: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return numbers


def _artifact(now: Session, recipe: str, settings: list[str] | None, root: str, name: str) -> Path:
    """The folder of a complete artifact of the plan.

    Raises:
        ArtifactError: it is not made yet.
    """
    from m2mkd_ray.execution import plan_status

    stages = planned(now.choose(recipe, settings))
    store = now.open_store(root)
    (stage,) = (stage for stage in stages if stage.name == name)
    if store.status(stage.address).state == "complete":
        return store.open(stage.address)
    complete = sum(found.state == "complete" for found in plan_status(stages, store))
    raise ArtifactError(
        f"The {name} of {recipe} is not made yet: {complete} of {len(stages)} stages are complete in {store.root}, "
        f"and `{stage.address}` is not. Run `m2mkd run {recipe} --store {root}` (with the same --set, if any)."
    )
