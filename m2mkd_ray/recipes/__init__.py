"""The recipes, and the baselines that every one of them can be set beside.

A recipe is a function of no arguments that returns a frozen `Recipe`; a baseline is
a function from a recipe to its control. `find_recipe("demo")`, `find_recipe("demo/pure")`.
"""

from collections.abc import Callable

from m2mkd_ray.errors import UsageError
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.recipes.baselines import authors_loss, incubation, pure, pure_matched
from m2mkd_ray.recipes.cifar10 import cifar10
from m2mkd_ray.recipes.demo import demo
from m2mkd_ray.recipes.fashion import fashion
from m2mkd_ray.recipes.icons import icons
from m2mkd_ray.recipes.nac import nac_tiny
from m2mkd_ray.recipes.tiny_imagenet import tiny_imagenet
from m2mkd_ray.recipes.vmoe import vmoe_base

RECIPES: dict[str, Callable[[], Recipe]] = {
    "cifar10": cifar10,
    "demo": demo,
    "fashion": fashion,
    "icons": icons,
    "nac_tiny": nac_tiny,
    "tiny_imagenet": tiny_imagenet,
    "vmoe_base": vmoe_base,
}
BASELINES: dict[str, Callable[[Recipe], Recipe]] = {
    "authors_loss": authors_loss,
    "incubation": incubation,
    "pure": pure,
    "pure_matched": pure_matched,
}


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or one of its baselines as `recipe/baseline`.

    Raises:
        UsageError: there is none of that name; lists the known ones.
    """
    base, slash, variant = name.partition("/")
    if base not in RECIPES:
        raise UsageError(
            f"There is no recipe {base!r}. Known recipes: {', '.join(RECIPES)}; a file of your own ends in .yaml."
        )
    recipe = RECIPES[base]()
    return baseline(recipe, variant) if slash else recipe


def baseline(recipe: Recipe, name: str) -> Recipe:
    """A control of the recipe, called `recipe/name`.

    Raises:
        UsageError: there is no such baseline; lists the known ones.
    """
    if name not in BASELINES:
        raise UsageError(f"There is no baseline {name!r}. Known baselines: {', '.join(BASELINES)}.")
    return BASELINES[name](recipe).model_copy(update={"name": f"{recipe.name}/{name}", "baselines": ()})


__all__ = ["BASELINES", "RECIPES", "baseline", "find_recipe"]
