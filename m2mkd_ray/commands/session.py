"""What commands share: their options, the recipe and plan that a user names, and the log.

The result of a command goes to stdout and its log to stderr, so that results can be piped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from m2mkd_ray.commands.log import Log
from m2mkd_ray.errors import UsageError

if TYPE_CHECKING:
    from m2mkd_ray.execution import Stage, Store
    from m2mkd_ray.recipe import Recipe

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe (demo), one of its baselines (demo/pure), or a YAML file."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Change a setting of the recipe; may be repeated."),
]
StoreRoot = Annotated[str, typer.Option("--store", help="Folder or URI (s3://, gs://) of the store.")]
PlacementName = Annotated[
    str,
    typer.Option(
        "--placement",
        metavar="auto|given|alone|cohort|FILE.yaml",
        help="Who shares a device with whom. auto may train a module on several GPUs: equal but for rounding and the "
        "draws of stochastic depth. A file has seats by stage name.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Log more; -vv everything.")
]


@dataclass
class Session:
    """What the error boundary can tell of the command that is under way."""

    arguments: Sequence[str]
    log: Log = field(default_factory=Log)
    recipe: "Recipe | None" = None
    store: "Store | None" = None

    def choose(self, name: str, settings: Sequence[str] | None) -> "Recipe":
        """The recipe that a user names, with the settings that they change.

        Raises:
            UsageError: there is no such recipe or setting, or it does not fit together.
        """
        self.recipe = chosen(name, settings or ())
        return self.recipe

    def open_store(self, root: str) -> "Store":
        """The store at a path or URI; nothing is written."""
        from m2mkd_ray.execution import Store

        self.store = Store(root)
        return self.store


def session(context: typer.Context) -> Session:
    """The session that the error boundary started."""
    assert isinstance(context.obj, Session)
    return context.obj


def chosen(name: str, settings: Sequence[str]) -> "Recipe":
    """A recipe by name or from a YAML file, changed by settings; its data lie at an absolute path.

    Raises:
        UsageError: there is no such recipe or setting, or it does not fit together.
    """
    from m2mkd_ray.recipes.choose import choose

    return choose(name, settings)


def planned(recipe: "Recipe") -> "list[Stage]":
    """The stages of a recipe.

    Raises:
        UsageError: it names what is unknown, or settings of a stage do not fit together.
    """
    from pydantic import ValidationError

    from m2mkd_ray.pipeline import plan

    try:
        return plan(recipe)
    except ValidationError as error:
        problems = "\n".join(f"  - {problem['msg'].removeprefix('Value error, ')}" for problem in error.errors())
        raise UsageError(f"Recipe {recipe.name!r} does not fit together:\n{problems}") from error
