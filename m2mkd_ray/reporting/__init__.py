"""The report of a run: one page that opens without a network, its figures, its numbers.

Build a `Report` and give it to `render`. Nothing here knows torch, Ray or the store.
"""

from m2mkd_ray.reporting.costs import Cost, cost_line, costs
from m2mkd_ray.reporting.counters import CounterRow
from m2mkd_ray.reporting.page import render
from m2mkd_ray.reporting.plots import FIGURES
from m2mkd_ray.reporting.report import (
    Curve,
    DataCard,
    ExpertUse,
    Report,
    RoutingExample,
    Span,
    StageRow,
    Subject,
    SuiteResult,
    encode_image,
)
from m2mkd_ray.reporting.tables import TABLES, count_table, summary, text_table, time_table

__all__ = [
    "FIGURES",
    "TABLES",
    "CounterRow",
    "Cost",
    "Curve",
    "DataCard",
    "ExpertUse",
    "Report",
    "RoutingExample",
    "Span",
    "StageRow",
    "Subject",
    "SuiteResult",
    "cost_line",
    "costs",
    "count_table",
    "encode_image",
    "render",
    "summary",
    "text_table",
    "time_table",
]
