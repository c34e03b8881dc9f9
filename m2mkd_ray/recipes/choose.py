"""A recipe as a person names it: a name, a baseline, or a YAML file, with settings that they change."""

from collections.abc import Sequence
from pathlib import Path

from m2mkd_ray.recipe import Recipe, merged, override, read_yaml
from m2mkd_ray.recipes import find_recipe


def choose(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by name or from a YAML file, changed by settings; its data lie at an absolute path.

    Raises:
        UsageError: there is no such recipe or setting, or it does not fit together.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        base, changes = read_yaml(Path(name))
        recipe = merged(find_recipe(base), changes, name)
    else:
        recipe = find_recipe(name)
    if settings:
        recipe = override(recipe, settings)
    # Workers may have another working directory than the driver.
    placement = recipe.placement.model_copy(update={"data_root": _absolute(recipe.placement.data_root)})
    teacher = recipe.teacher
    if teacher.weights != "timm":
        teacher = teacher.model_copy(update={"weights": _absolute(teacher.weights)})
    return recipe.model_copy(update={"placement": placement, "teacher": teacher})


def _absolute(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).expanduser().absolute())
