"""How good a model is: suites, predictions and metrics."""

from m2mkd_ray.evaluation.exported import Exported, Prediction, load_export
from m2mkd_ray.evaluation.metrics import measure, top_k_accuracy
from m2mkd_ray.evaluation.predict import predict
from m2mkd_ray.evaluation.suites import SUITES, Suite, class_columns, find_suite, remap

__all__ = [
    "SUITES",
    "Exported",
    "Prediction",
    "Suite",
    "class_columns",
    "find_suite",
    "load_export",
    "measure",
    "predict",
    "remap",
    "top_k_accuracy",
]
