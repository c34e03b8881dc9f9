"""One training loop: objectives say what is learnt, engines how a step is taken."""

from m2mkd_ray.training.counters import StepFlops
from m2mkd_ray.training.course import Member
from m2mkd_ray.training.engine import DeepSpeedConfig, DeepSpeedEngine, Engine, TrainPlacement
from m2mkd_ray.training.fit import Ended, fit, fit_together
from m2mkd_ray.training.frozen import Prefix, TeacherHybrid
from m2mkd_ray.training.objective import GIVEN, Classification, Kind, ModuleDistillation, Reduction
from m2mkd_ray.training.optim import TrainConfig
from m2mkd_ray.training.precision import Precision
from m2mkd_ray.training.seams import Point
from m2mkd_ray.training.seed import derive, seeded
from m2mkd_ray.training.torch_engine import TorchEngine

__all__ = [
    "GIVEN",
    "Classification",
    "DeepSpeedConfig",
    "DeepSpeedEngine",
    "Ended",
    "Engine",
    "Kind",
    "Member",
    "ModuleDistillation",
    "Point",
    "Precision",
    "Prefix",
    "Reduction",
    "StepFlops",
    "TeacherHybrid",
    "TorchEngine",
    "TrainConfig",
    "TrainPlacement",
    "derive",
    "fit",
    "fit_together",
    "seeded",
]
