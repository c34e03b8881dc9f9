"""What the published recipes share: phases, loss and machines of the reference's commands (docs/method.md)."""

from typing import Any

from m2mkd_ray.execution.stage import Resources
from m2mkd_ray.recipe import Pairs, Phase, Placement, StagePlacement
from m2mkd_ray.stages.finetune import FinetunePlacement
from m2mkd_ray.stages.incubate import IncubatePlacement
from m2mkd_ray.stages.pair import DistillConfig

_COMMON: dict[str, Any] = {"schedule": "epoch", "precision": "bf16", "validate_every_epochs": 5}

META = Phase(epochs=300, batch_size=2048, lr=2e-3, warmup_epochs=20, **_COMMON)
INCUBATED = Phase(epochs=100, batch_size=2048, lr=2e-3, warmup_epochs=20, drop_path=0.1, **_COMMON)
"""A module of the teacher, and one of the student."""
TUNED = Phase(epochs=100, batch_size=1024, lr=1e-3, drop_path=0.1, clip_norm=1.0, **_COMMON)
LOSS = DistillConfig(alpha=0.5, temperature=1.0, kind="soft", reduction="numel")
PAIRS = Pairs(**INCUBATED.model_dump(), distill=LOSS)


def on_gpus(micro_batch: int) -> Placement:
    """A GPU a module, eight for fine-tuning; `micro_batch` images at a time fit where modules are trained."""
    one = StagePlacement(resources=Resources(cpus=12, gpus=1), data_workers=11, micro_batch=micro_batch)
    return Placement(
        data_root="data",
        models=one,
        pairs=IncubatePlacement(**one.model_dump()),
        evaluation=StagePlacement(resources=Resources(cpus=8, gpus=1), data_workers=7),
        finetune=FinetunePlacement(
            num_workers=8, cpus_per_worker=12, gpus_per_worker=1, data_workers=11, micro_batch=128
        ),
    )
