"""What it costs to keep the teacher's logits, and what each form of them loses.

    python -m benchmarks.logits --json FILE

For every form: the size of a pair's artifact, by image and view, and the divergence of
the teacher's softmax from what is read back (mean over images, largest), with the
largest error of a probability. The teacher is the recipe's own, trained first unless
the store has it.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._run import parser, write
from m2mkd_ray.execution import LocalLauncher, Store, execute
from m2mkd_ray.pipeline import variant
from m2mkd_ray.recipe import Recipe, override
from m2mkd_ray.recipes import find_recipe

COLUMNS = ("bytes_per_image", "kl_mean", "kl_max", "probability_error_max")


def forms(num_classes: int) -> dict[str, str]:
    """Settings of each form, by its name in the results."""
    tops = sorted({max(1, round(num_classes * share)) for share in (0.01, 0.1, 0.3, 0.5)})
    return {
        "float32": "{kind: float32}",
        "float16": "{kind: float16}",
        **{f"top_{k}": f"{{kind: top_k, top_k: {k}}}" for k in tops},
    }


def measure(recipe: Recipe, settings: str, store: Store, index: int) -> dict[str, Any]:
    """The figures of one form for one pair."""
    cached = override(recipe, ["pairs.views=1", f"pairs.cache={settings}"])
    stage = variant(cached)[f"logits-{index}"]
    execute([stage], store, LocalLauncher()).raise_for_failures()
    metrics = store.manifest(stage.address)["metrics"]
    images = metrics["teacher_calls"]
    return {
        "bytes": metrics["bytes"],
        "bytes_per_image": metrics["bytes"] / images,
        **{name: metrics.get(name, 0.0) for name in COLUMNS[1:]},
    }


def main() -> None:
    """Measure every form, print the table, write the numbers."""
    options = parser(__doc__)
    options.add_argument("--index", type=int, default=3, help="the pair; default: 3")
    arguments = options.parse_args()
    recipe, store = override(find_recipe(arguments.recipe), arguments.settings), Store(arguments.store)
    num_classes = recipe.blueprint.teacher.num_classes
    table, results = Table("form", *COLUMNS), dict[str, Any]()
    for name, settings in forms(num_classes).items():
        found = measure(recipe, settings, store, arguments.index)
        table.add_row(name, *(f"{found[column]:.3g}" for column in COLUMNS))
        results |= {f"{name}_{field}": value for field, value in found.items()}
    Console().print(table)
    write(arguments.json, {"recipe": recipe.name, "num_classes": num_classes, "index": arguments.index, **results})


if __name__ == "__main__":
    main()
