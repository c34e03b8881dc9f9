"""The claim of a recipe, over seeds, beside its controls.

    python -m benchmarks.seeds --recipe demo --seeds 0 1 2 --baselines pure pure_matched incubation --json seeds.json

Runs the recipe (a name, or a file such as a sweep's best.yaml) with every seed
(finished stages of --store are reused), prints mean ± sample standard deviation of
top-1 per network and suite, and the difference of the student to each control seed
by seed.
"""

import json
import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks._run import parser, run, write
from m2mkd_ray.execution.store import Store
from m2mkd_ray.recipes.choose import choose

Scores = dict[str, dict[str, list[float]]]
"""Top-1 in percent by network and suite, a number a seed."""


def main() -> None:
    """Run all seeds, print the tables, write the numbers."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--baselines", nargs="*", default=["pure", "pure_matched", "incubation"])
    arguments = options.parse_args()
    store = Store(arguments.store)
    settings = [*arguments.settings, f"baselines={json.dumps(arguments.baselines)}"]
    scores: Scores = {}
    for seed in arguments.seeds:
        recipe = choose(arguments.recipe, [*settings, f"seed={seed}"])
        manifests, _, _ = run(recipe, store, arguments.launcher)
        report = next(address for address, manifest in manifests.items() if manifest["name"] == "report")
        add(scores, json.loads((store.open(report) / "report.json").read_text())["report"]["subjects"])
    print_scores(arguments.recipe, arguments.seeds, scores)
    gains = {control: gain(scores, control) for control in arguments.baselines}
    print_gains(gains)
    write(arguments.json, {"recipe": arguments.recipe, "seeds": arguments.seeds, "top1": scores, "gains": gains})


def add(scores: Scores, subjects: Sequence[Mapping[str, object]]) -> None:
    """Add what one report says of its networks."""
    for subject in subjects:
        results = subject["results"]
        assert isinstance(results, list)
        for result in results:
            of_suite = scores.setdefault(str(subject["name"]), {})
            of_suite.setdefault(result["suite"], []).append(100 * result["top1"])


def gain(scores: Scores, control: str) -> dict[str, list[float]]:
    """Points by which the student is ahead of a control, by suite, a number a seed."""
    return {
        suite: [ours - theirs for ours, theirs in zip(values, scores[control][suite], strict=True)]
        for suite, values in scores["student"].items()
    }


def print_scores(recipe: str, seeds: Sequence[int], scores: Scores) -> None:
    """The tables: mean ± standard deviation."""
    suites = list(scores["student"])
    table = Table("network", *suites, title=f"{recipe}, seeds {', '.join(map(str, seeds))}: top-1 in %")
    for name, of_suite in scores.items():
        table.add_row(name, *(spread(of_suite[suite]) for suite in suites))
    Console().print(table)


def print_gains(gains: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """By how many points the student leads each control, and seed by seed."""
    if not gains:
        return
    suites = list(next(iter(gains.values())))
    table = Table("lead over", *suites, title="points")
    for control, of_suite in gains.items():
        seeds = (", ".join(f"{points:+.1f}" for points in of_suite[suite]) for suite in suites)
        table.add_row(
            control, *(f"{spread(of_suite[suite])} ({each})" for suite, each in zip(suites, seeds, strict=True))
        )
    Console().print(table)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the mean alone of one value."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


if __name__ == "__main__":
    main()
