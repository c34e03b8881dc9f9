"""`m2mkd list`: the names that recipes, settings and commands take."""

import inspect

import typer

from m2mkd_ray.commands.data import list_ as list_datasets
from m2mkd_ray.commands.output import Column, print_json, print_table
from m2mkd_ray.commands.session import AsJson

app = typer.Typer(help="List recipes, baselines, data sets, suites, families, corruptions.", no_args_is_help=True)
app.command("datasets")(list_datasets)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """The recipes: what is trained on what."""
    from m2mkd_ray.recipes import RECIPES

    entries = [
        {
            "name": name,
            "what": _first_line(make),
            "dataset": (recipe := make()).data.dataset,
            "suites": list(recipe.suites),
            "baselines": list(recipe.baselines),
        }
        for name, make in RECIPES.items()
    ]
    if as_json:
        print_json(entries)
        return
    columns = (Column("recipe"), Column("data set"), Column("baselines"), Column("what"))
    rows = (
        (str(entry["name"]), str(entry["dataset"]), ", ".join(entry["baselines"]), str(entry["what"]))
        for entry in entries
    )
    print_table(columns, rows)


@app.command()
def baselines(as_json: AsJson = False) -> None:
    """The controls of any recipe: m2mkd run RECIPE/BASELINE."""
    from m2mkd_ray.recipes import BASELINES

    _print({name: _first_line(make) for name, make in BASELINES.items()}, "baseline", as_json=as_json)


@app.command()
def suites(as_json: AsJson = False) -> None:
    """The evaluations."""
    from m2mkd_ray.evaluation import SUITES

    if as_json:
        print_json([suite.model_dump(mode="json") for suite in SUITES.values()])
        return
    columns = (Column("suite"), Column("title"), Column("images"), Column("shifted"), Column("corruptions"))
    print_table(
        columns,
        (
            (
                suite.name,
                suite.title,
                f"{suite.dataset}, {suite.split}",
                "yes" if suite.shifted else "",
                _some(suite.corruptions),
            )
            for suite in SUITES.values()
        ),
    )


@app.command()
def families(as_json: AsJson = False) -> None:
    """The families of students."""
    from m2mkd_ray.models import FAMILIES

    _print({name: _first_line(found) for name, found in FAMILIES.items()}, "family", as_json=as_json)


@app.command()
def corruptions(as_json: AsJson = False) -> None:
    """The corruptions of images, with their strengths at the severities 1 to 5."""
    from m2mkd_ray.data import CORRUPTIONS

    strengths = {
        name: f"{found.meaning}: {', '.join(f'{strength:.3g}' for strength in found.strengths)}"
        for name, found in CORRUPTIONS.items()
    }
    _print(strengths, "corruption", as_json=as_json)


def _print(entries: dict[str, str], what: str, *, as_json: bool) -> None:
    if as_json:
        print_json([{"name": name, "what": text} for name, text in entries.items()])
    else:
        print_table((Column(what), Column("what")), entries.items())


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
