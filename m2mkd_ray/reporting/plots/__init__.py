"""The report's figures. To add one, write a function and its `Plot`, and give it a line in `FIGURES`."""

from collections.abc import Mapping

from m2mkd_ray.reporting.plots.accuracy import ACCURACY, CLASSES, SUITES
from m2mkd_ray.reporting.plots.counters import COUNTERS
from m2mkd_ray.reporting.plots.experts import LOAD, ROUTING
from m2mkd_ray.reporting.plots.style import DARK, LIGHT, Plot, Theme, png
from m2mkd_ray.reporting.plots.timeline import TIMELINE
from m2mkd_ray.reporting.plots.training import CURVES, FINETUNING, TEACHER_SHARE
from m2mkd_ray.reporting.report import Report

FIGURES: Mapping[str, Plot[Report]] = {
    "accuracy": ACCURACY,
    "suites": SUITES,
    "classes": CLASSES,
    "finetuning": FINETUNING,
    "curves": CURVES,
    "teacher_share": TEACHER_SHARE,
    "expert_load": LOAD,
    "routing": ROUTING,
    "timeline": TIMELINE,
    "counters": COUNTERS,
}
"""By the name of their file, in the order of the page."""

__all__ = ["DARK", "FIGURES", "LIGHT", "Plot", "Theme", "png"]
