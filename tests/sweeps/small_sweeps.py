"""A sweep whose trials take seconds: the last pair of the demo's flow, with models of width 16."""

from pathlib import Path
from typing import Any

from m2mkd_ray.execution import Stage, Store
from m2mkd_ray.sweeps.points import base, recipes, targets
from m2mkd_ray.sweeps.results import TrialRecord
from m2mkd_ray.sweeps.sweep import Sweep, validated

TINY = """
from: demo
data: {max_rows: 320, validation: {max_rows: 100}}
blueprint:
  teacher: {width: 16, depth: 2, num_heads: 2}
  teacher_depths: [1, 1]
  student: {vit: {width: 16, depth: 2, num_heads: 2}, moe: {num_experts: 2, top_k: 1}}
  student_depths: [1, 1]
meta: {epochs: 0.2, warmup_epochs: 0, batch_size: 32}
teacher: {source: trained, incubation: null, phase: {epochs: 0.2, warmup_epochs: 0, batch_size: 32}}
pairs: {epochs: 4, warmup_epochs: 0, batch_size: 32, validate_every_epochs: 1}
finetune: {epochs: 0.2, warmup_epochs: 0, batch_size: 32}
placement: {finetune: {engine: torch}, pairs: {log_every_steps: 2, checkpoint_every_s: 0.2}}
"""


def small_sweep(folder: Path, **changes: Any) -> Sweep:
    """Learning rate and temperature, eight points in one cohort, of which ASHA stops some."""
    (folder / "tiny.yaml").write_text(TINY)
    tree = {
        "name": "small",
        "title": "Small",
        "recipe": str(folder / "tiny.yaml"),
        "level": {"kind": "pair", "index": 1},
        "space": {"pairs.lr": "loguniform(1e-5, 1e-2)", "pairs.distill.temperature": "loguniform(1, 8)"},
        "scheduler": {"kind": "asha", "grace": 1, "reduction": 2},
        "budget": {"trials": 8},
        "cohort": 8,
    }
    return validated(tree | changes, "small")


def stage_of(sweep: Sweep, trial: TrialRecord) -> Stage:
    """The pair of a trial, which has one seed."""
    (recipe,) = recipes(sweep, trial.point, base(sweep)).values()
    (stage,) = targets(sweep, recipe)
    return stage


def state_of(sweep: Sweep, trial: TrialRecord, store: Store) -> str:
    """What the store holds of a trial's pair."""
    return store.status(stage_of(sweep, trial).address).state
