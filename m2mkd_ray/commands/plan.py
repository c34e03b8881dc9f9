"""`m2mkd plan`: what a run would do, without doing any of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2mkd_ray.commands.output import Column, print_json, print_table, resources
from m2mkd_ray.commands.session import AsJson, PlacementName, RecipeName, Settings, StoreRoot, planned, session
from m2mkd_ray.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from m2mkd_ray.execution import Stage, Store
    from m2mkd_ray.execution.status import StageStatus
    from m2mkd_ray.recipe import Recipe


@dataclass(frozen=True)
class ModelSize:
    """A model of the recipe."""

    model: str
    blocks: int
    width: int
    parameters: int
    active_parameters: int
    """Those that one token meets."""


@dataclass(frozen=True)
class PairSize:
    """A pair: which blocks meet, and what a training step costs."""

    pair: int
    teacher_blocks: str
    student_blocks: str
    gmac: float
    """Per image, forward and backward, the meta model's and the teacher's part included."""


def plan(
    context: typer.Context,
    recipe: RecipeName,
    settings: Settings = None,
    store: StoreRoot = "runs",
    cluster: Annotated[
        str | None,
        typer.Option(help="Show seats on these nodes: a YAML file, local, or a Ray's address (auto, host:port)."),
    ] = None,
    placement: PlacementName = "auto",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the seats, a row a device; with --cluster.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the stages of a recipe, how far each is, what the models cost, and who would run where. Runs nothing."""
    from m2mkd_ray import preflight
    from m2mkd_ray.execution import plan_status

    chosen = session(context).choose(recipe, settings)
    if cluster is not None:
        _plan_seats(chosen, cluster, placement, plot, session(context).open_store(store), as_json)
        return
    if plot is not None:
        raise UsageError("--plot draws seats on nodes: say which with --cluster.")
    stages = planned(chosen)
    problems = preflight.problems(chosen)
    opened = session(context).open_store(store)
    states = {status.address: status for status in plan_status(stages, opened)}
    rows = [stage_row(stage, states[stage.address], chosen) for stage in stages]
    models = [] if _is_unbuildable(problems) else model_sizes(chosen)
    pairs = [] if _is_unbuildable(problems) or chosen.start == "scratch" else pair_sizes(chosen)
    if as_json:
        print_json(
            {
                "recipe": chosen.name,
                "store": opened.root,
                "stages": rows,
                "models": [asdict(model) for model in models],
                "pairs": [asdict(pair) for pair in pairs],
                "problems": problems,
            }
        )
        return
    _print_stages(rows)
    _print_models(models, pairs)
    if problems:
        typer.echo("This plan cannot run here yet:\n" + "\n".join(f"- {text}" for text in problems), err=True)


def _plan_seats(
    recipe: "Recipe",
    cluster: str,
    placement: str,
    plot: Path | None,
    store: "Store",
    as_json: bool,
) -> None:
    """Print, and draw if asked to, the seats of the stages that train a module."""
    from m2mkd_ray.commands.clusters import cluster_nodes
    from m2mkd_ray.commands.grouping import in_groups
    from m2mkd_ray.commands.seats import draw, expect, print_expected

    nodes = cluster_nodes(cluster)
    recipe = in_groups(recipe, nodes)
    stages = planned(recipe)
    expected, visits = expect(recipe, stages, nodes, placement, store)
    if plot is not None:
        draw(visits, nodes, expected, plot)
    if as_json:
        print_json({"recipe": recipe.name, "nodes": [node.name for node in nodes], **expected.as_json()})
        return
    print_expected(expected)
    if plot is not None:
        typer.echo(f"Chart: {plot}")


def stage_row(stage: "Stage", status: "StageStatus", recipe: "Recipe") -> dict[str, Any]:
    """A stage of the plan as JSON values."""
    return {
        "name": stage.name,
        "recipe": stage.of,
        "address": stage.address,
        "state": status.state,
        "needs": {role: need.address for role, need in stage.needs.items()},
        "resources": stage.resources.model_dump(mode="json"),
        "training": training_of(stage, recipe),
    }


def training_of(stage: "Stage", recipe: "Recipe") -> dict[str, Any] | None:
    """Epochs, batch and steps of a stage that trains; None for one that does not. Steps need the data set."""
    from m2mkd_ray.data import rows_of_an_epoch
    from m2mkd_ray.stages.parts import Training

    training = getattr(stage.config, "training", None)
    if not isinstance(training, Training):
        return None
    feed = training.feed
    found = {"epochs": training.train.epochs, "batch_size": feed.batch_size}
    rows = rows_of_an_epoch(feed.dataset, feed.split, feed.max_rows, recipe.placement.data_root)
    steps = None if rows is None else training.train.total_steps(max(1, rows // feed.batch_size))
    return {**found, "steps": steps}


def model_sizes(recipe: "Recipe") -> list[ModelSize]:
    """Sizes of the models that the recipe trains."""
    import torch
    from torch import nn

    from m2mkd_ray.models import create_vit, family, num_active_parameters, num_parameters

    blueprint = recipe.blueprint
    depths = {"teacher": sum(blueprint.teacher_depths), "meta": blueprint.num_modules}
    with torch.device("meta"):
        student = family(blueprint.student.family).model(blueprint)
        models: dict[str, nn.Module] = {"student": student}
        if recipe.start == "distilled":
            models = {"teacher": create_vit(blueprint.teacher), "meta": create_vit(blueprint.meta), **models}
    return [
        ModelSize(
            model=name,
            blocks=depths.get(name, sum(blueprint.student_depths)),
            width=_width(model),
            parameters=num_parameters(model),
            active_parameters=num_active_parameters(model),
        )
        for name, model in models.items()
    ]


def _width(model: "nn.Module") -> int:
    """Of a ViT's tokens, or of a circuit's states."""
    width = getattr(model, "embed_dim", None) or getattr(model, "width")  # noqa: B009  # one or the other
    assert isinstance(width, int)
    return width


def pair_sizes(recipe: "Recipe") -> list[PairSize]:
    """What each pair is and costs."""
    from m2mkd_ray.models.compute import pair_cost

    return [
        PairSize(
            pair=pair.index,
            teacher_blocks=_range(pair.teacher_blocks),
            student_blocks=_range(pair.student_blocks),
            gmac=pair_cost(recipe.blueprint, pair, with_teacher=recipe.pairs.at(pair.index).distill.alpha > 0).total
            / 1e9,
        )
        for pair in recipe.blueprint.pairs
    ]


def _range(blocks: tuple[int, int]) -> str:
    return f"{blocks[0]}-{blocks[1] - 1}" if blocks[1] - blocks[0] > 1 else str(blocks[0])


def _is_unbuildable(problems: list[str]) -> bool:
    return any(problem.startswith("Cannot build") for problem in problems)


def _print_stages(rows: list[dict[str, Any]]) -> None:
    columns = [Column("stage"), Column("of"), Column("state"), Column("epochs", True), Column("steps", True)]
    print_table(
        [*columns, Column("resources"), Column("address"), Column("reads", wraps=True)],
        [
            (
                row["name"],
                row["recipe"],
                row["state"],
                f"{row['training']['epochs']:g}" if row["training"] else "",
                _steps(row["training"]),
                resources(**row["resources"]),
                row["address"],
                _reads(row["needs"]),
            )
            for row in rows
        ],
    )


def _steps(training: dict[str, Any] | None) -> str:
    if training is None:
        return ""
    return "data not imported" if training["steps"] is None else f"{training['steps']:,}"


def _reads(needs: dict[str, str]) -> str:
    """The stages that a stage reads, each once; many are counted."""
    names = list(dict.fromkeys(address.rpartition("-")[0] for address in needs.values()))
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])} and {len(names) - 4} more"


def _print_models(models: list[ModelSize], pairs: list[PairSize]) -> None:
    from m2mkd_ray.reporting.units import count

    if models:
        numbers = [Column(name, True) for name in ("blocks", "width", "parameters", "active")]
        sizes = (
            (m.model, str(m.blocks), str(m.width), count(m.parameters), count(m.active_parameters)) for m in models
        )
        typer.echo()
        print_table([Column("model"), *numbers], sizes)
    if pairs:
        columns = [Column("pair"), Column("teacher blocks"), Column("student blocks"), Column("GMAC an image", True)]
        typer.echo()
        print_table(columns, ((str(p.pair), p.teacher_blocks, p.student_blocks, f"{p.gmac:.3g}") for p in pairs))
