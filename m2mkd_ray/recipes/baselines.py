"""The controls: every claim of a recipe has one of these in the same table."""

from m2mkd_ray.models.compute import module_stage_factor
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.recipes.published import LOSS


def pure(recipe: Recipe) -> Recipe:
    """The same student with the same fine-tuning, from random weights: what m2mKD's start is worth."""
    return recipe.model_copy(update={"title": "pure", "start": "scratch"})


def pure_matched(recipe: Recipe) -> Recipe:
    """`pure` with as much computation as m2mKD's pairs and fine-tuning take together.

    So many epochs more, and what training from random weights wants: the meta model's
    learning rate and a fifth of the epochs to warm up (docs/method.md). Teacher and meta
    model are not counted, which is in m2mKD's favour: they may be at hand.
    """
    epochs = recipe.finetune.epochs * matched_factor(recipe)
    longer = {"epochs": epochs, "warmup_epochs": epochs / 5, "lr": recipe.meta.lr}
    return pure(recipe).model_copy(
        update={
            "title": "pure, compute-matched",
            "finetune": recipe.finetune.model_copy(update=longer),
        }
    )


def incubation(recipe: Recipe) -> Recipe:
    """m2mKD without its teacher (`alpha=0`): student modules in the meta model with labels alone.

    It tells whether the teacher's signal or the meta model gives the gain (docs/method.md).
    """
    distill = recipe.pairs.distill.model_copy(update={"alpha": 0.0})
    of = {index: settings.model_copy(update={"alpha": None}) for index, settings in recipe.pairs.of.items()}
    without = {"distill": distill, "of": {index: settings for index, settings in of.items() if settings.given}}
    return recipe.model_copy(
        update={"title": "incubation (no teacher)", "pairs": recipe.pairs.model_copy(update=without)}
    )


def authors_loss(recipe: Recipe) -> Recipe:
    """m2mKD with the loss as its authors trained: alpha 0.5, temperature 1, divided by B * K (docs/method.md).

    What a loss that was tuned is worth; all else is the recipe's, single pairs' learning rates too.
    """
    of = {
        index: settings.model_copy(update={"alpha": None, "temperature": None, "kind": None, "reduction": None})
        for index, settings in recipe.pairs.of.items()
    }
    update = {"distill": LOSS, "of": {index: settings for index, settings in of.items() if settings.given}}
    return recipe.model_copy(update={"title": "authors' loss", "pairs": recipe.pairs.model_copy(update=update)})


def matched_factor(recipe: Recipe) -> float:
    """Computation of pairs and fine-tuning by that of the fine-tuning alone."""
    of_pairs = module_stage_factor(recipe.blueprint, with_teacher=recipe.distills)
    return 1 + of_pairs * recipe.pairs.epochs / recipe.finetune.epochs
