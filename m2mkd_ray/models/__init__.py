"""Models: timm ViTs cut into modules, and the student families."""

from m2mkd_ray.models.families import FAMILIES, Family, family, student_with
from m2mkd_ray.models.fill import Filled, Rules, fill
from m2mkd_ray.models.moe import MoeMlp, Router, num_active_parameters
from m2mkd_ray.models.routing import RoutingRecord, record_routing
from m2mkd_ray.models.stitch import Stitch
from m2mkd_ray.models.vit import create_vit, drop_path_rates, num_parameters, set_drop_path, splice, split, width
from m2mkd_ray.models.weights import load_weights, pretrained_vit

__all__ = [
    "FAMILIES",
    "Family",
    "Filled",
    "MoeMlp",
    "Router",
    "RoutingRecord",
    "Rules",
    "Stitch",
    "create_vit",
    "drop_path_rates",
    "family",
    "fill",
    "load_weights",
    "num_active_parameters",
    "num_parameters",
    "pretrained_vit",
    "record_routing",
    "set_drop_path",
    "splice",
    "split",
    "student_with",
    "width",
]
