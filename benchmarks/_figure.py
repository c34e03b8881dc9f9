"""What the benchmarks found, as one picture: `python -m benchmarks._figure FOLDER performance.png`.

Reads the JSON files that the benchmarks wrote to FOLDER; each figure that the project set itself a
bound for is a bar, as a share of its bound: within it on the left of the line.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HELD, MISSED = "#1664b0", "#c25a00"
BOUNDS: tuple[tuple[str, str, str, float, bool], ...] = (
    # file, field, words, bound, whether less is better
    ("scheduling", "fake_512_64_ratio", "512 stages on 64 fake nodes: makespan / bound", 1.05, True),
    ("scheduling_mixed", "fake_512_64_mixed_ratio", "the same, nodes of mixed speeds", 1.05, True),
    ("scaling", "speed_up_2", "real pairs, 2 workers: speed-up", 1.9, False),
    ("cohorts", "pairs_ratio", "cohort of 4 pairs: CPU time / apart", 0.85, True),
    ("cohorts", "compute_ratio", "cohort of 8 trials, computing: CPU time / apart", 0.62, True),
    ("cohorts", "loader_ratio", "cohort of 8 trials, loading: CPU time / apart", 0.20, True),
    ("cohorts_tiny_imagenet", "tiny_imagenet_ratio", "the same, Tiny-ImageNet's JPEGs", 0.20, True),
    ("sweep_cost", "ratio", "sweep of 8 trials: CPU time / separate trials", 0.62, True),
    ("decodes", "decodes_per_image_with_feed_4", "decodes an image, 4 readers of a node", 1.0, True),
    ("step", "fp32_ratio", "step, same work: plain / ours, median over shapes", 1.5, False),
    ("step", "compiled_ratio", "the same, ours compiled", 1.5, False),
    ("step", "artifact_ratio", "step, logits from the artifact: plain / ours", 1.5, False),
    ("step", "artifact_compiled_ratio", "the same, ours compiled", 1.5, False),
    ("overhead", "warm_s", "launch to first step, warm, s", 2.0, True),
    ("overhead", "cold_s", "launch to first step, cold, s", 5.0, True),
)


def main() -> None:
    """Read, draw, save."""
    folder, target = map(Path, sys.argv[1:3])
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    rows = list(measured(found))
    figure = Figure(figsize=(10, 0.5 * len(rows) + 1.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (_, value, bound, share, is_held) in enumerate(reversed(rows)):
        axes.barh(place, share, color=HELD if is_held else MISSED, height=0.6)
        axes.text(max(share, 1.0) + 0.02, place, f"{value:.3g}  (bound {bound:g})", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)], fontsize=9)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(0, max(1.6, max(row[3] for row in rows) + 0.35))
    axes.set_xlabel("share of the bound; blue: held, orange: not")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


def measured(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float, float, float, bool]]:
    """Words, value, bound, share of the bound (less is better) and whether it is held, of all that was measured."""
    for file, field, words, bound, is_less_better in BOUNDS:
        if field in found.get(file, {}):
            value = float(found[file][field])
            share = value / bound if is_less_better else bound / value
            yield words, value, bound, share, share <= 1


if __name__ == "__main__":
    main()
