"""One training loop: objectives say what is learnt, engines how a step is taken."""

from m2mkd_ray.training.engine import DeepSpeedConfig, DeepSpeedEngine, Engine, TorchEngine, TrainPlacement
from m2mkd_ray.training.fit import Point, fit
from m2mkd_ray.training.objective import Classification, Kind, ModuleDistillation, Reduction
from m2mkd_ray.training.optim import TrainConfig
from m2mkd_ray.training.seed import derive, seeded

__all__ = [
    "Classification",
    "DeepSpeedConfig",
    "DeepSpeedEngine",
    "Engine",
    "Kind",
    "ModuleDistillation",
    "Point",
    "Reduction",
    "TorchEngine",
    "TrainConfig",
    "TrainPlacement",
    "derive",
    "fit",
    "seeded",
]
