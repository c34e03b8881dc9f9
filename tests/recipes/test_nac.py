"""The recipe of neural attentive circuits: its published numbers, and all of it run small."""

import json
from pathlib import Path

import pytest

from m2mkd_ray.data.augment import IMAGENET
from m2mkd_ray.data.importers.digits import DigitsOptions, open_digits
from m2mkd_ray.data.importers.write import WriteConfig, write
from m2mkd_ray.evaluation.exported import load_export
from m2mkd_ray.execution import LocalLauncher, Store, execute
from m2mkd_ray.models import vit
from m2mkd_ray.pipeline import plan, variant
from m2mkd_ray.preflight import problems
from m2mkd_ray.recipe import Recipe, override
from m2mkd_ray.recipes import find_recipe


@pytest.fixture
def recipe() -> Recipe:
    return find_recipe("nac_tiny")


def test_nac_tiny_trains_the_circuit_as_published(recipe: Recipe) -> None:
    """docs/method.md: lr 1.2e-3 * 1024 / 512 and min lr 4e-5 * 1024 / 512, decay of everything."""
    phase = recipe.finetune
    assert (phase.epochs, phase.batch_size, phase.warmup_epochs, phase.drop_path) == (400, 1024, 25, 0.1)
    assert (phase.lr, phase.min_lr) == pytest.approx((1.2e-3 * 2, 4e-5 * 2))
    assert (phase.weight_decay, phase.decayed, phase.eps, phase.warmup_lr) == (0.075, "all", 1e-8, 1e-6)
    assert phase.clip_norm is None


def test_nac_tiny_prepares_and_distills_as_published(recipe: Recipe) -> None:
    blueprint, distill = recipe.blueprint, recipe.pairs.distill
    assert blueprint.teacher_depths == (4, 3, 3, 3, 3, 3, 3, 3, 3, 4)
    assert (distill.alpha, distill.temperature, distill.kind, distill.reduction) == (0.5, 1.0, "soft", "numel")
    assert recipe.teacher.incubation is not None
    phases = (recipe.meta, recipe.teacher.incubation, recipe.teacher.phase, recipe.pairs)
    found = [(p.epochs, p.batch_size, p.lr, p.warmup_epochs, p.drop_path, p.clip_norm, p.decayed) for p in phases]
    incubated = (100, 2048, 2e-3, 20, 0.1, None, "matrices")
    assert found == [
        (300, 2048, 2e-3, 20, 0, None, "matrices"), incubated, (100, 1024, 1e-3, 0, 0.1, 1.0, "matrices"), incubated,
    ]  # fmt: skip
    assert recipe.data.augmentation == IMAGENET


def test_nac_tinys_teacher_has_as_many_tokens_as_a_vit_h_at_224(recipe: Recipe) -> None:
    assert vit.num_tokens(recipe.blueprint.teacher) == 257
    assert vit.width(recipe.blueprint.teacher) == 1280


def test_stitches_that_are_to_be_kept_are_refused_before_anything_starts(recipe: Recipe) -> None:
    found = problems(override(recipe, ["keep_stitches=true"]))
    assert any("A NAC cannot keep its stitches" in problem for problem in found)


OF_TEACHER, OF_NAC = "blueprint.teacher", "blueprint.student.nac"
EVALUATED = {"evaluate-student", "report", "export"}
OF_CIRCUIT = {"assemble", "finetune", "pure", *EVALUATED}
FROM_MODULES = {*(f"pair-{index}" for index in range(10)), "evaluate-hybrids", "assemble", "finetune", *EVALUATED}
RUNS_AGAIN = {
    "prior.kind=erdos_renyi": OF_CIRCUIT,
    "num_mediators=128": OF_CIRCUIT,
    "repulsion=0.2": OF_CIRCUIT,
    "code_noise=0": OF_CIRCUIT,
    "evaluation=sampled": EVALUATED,
    "hybrid_codes=learned": FROM_MODULES,
    "hybrid_inputs=4": FROM_MODULES,
    "layer_scale=0.2": {*FROM_MODULES, "pure"},
    "width=256": {*FROM_MODULES, "pure"},
}
"""By setting of the circuit, the stages whose address it changes; `pure` is that baseline's fine-tuning."""


@pytest.mark.parametrize("setting", RUNS_AGAIN)
def test_a_setting_of_the_circuit_trains_again_only_what_goes_by_it(setting: str, recipe: Recipe) -> None:
    def named(recipe: Recipe) -> dict[str, str]:
        stages = {stage.address: stage for stage in plan(recipe)}
        return {a: "pure" if (s.of, s.name) == ("nac_tiny/pure", "finetune") else s.name for a, s in stages.items()}

    before = named(recipe)
    again = {
        name for address, name in named(override(recipe, [f"{OF_NAC}.{setting}"])).items() if address not in before
    }
    assert again == RUNS_AGAIN[setting]


SMALL = (
    *(f"{OF_TEACHER}.{name}={value}" for name, value in {"width": 32, "num_heads": 4, "depth": 6}.items()),
    *(f"{of}.{name}" for of in (OF_TEACHER, OF_NAC) for name in ("img_size=32", "num_classes=10")),
    "blueprint.teacher.patch_size=8",
    "blueprint.teacher_depths=[2, 1, 1, 2]",
    "blueprint.student_depths=[1, 1, 1, 1]",
    *(f"{OF_NAC}.{name}=16" for name in ("width", "num_mediators", "signature_width", "grid_width")),
    *(f"{OF_NAC}.{name}=2" for name in ("num_heads", "num_inputs", "num_outputs")),
    "blueprint.student.nac.prior.steps=20",
    "data.dataset=digits",
    "data.validation.split=test",
    "suites=[digits]",
    "baselines=[]",
    *(f"{phase}.batch_size=16" for phase in ("meta", "teacher.incubation", "teacher.phase", "pairs", "finetune")),
    *(f"{phase}.epochs=0.5" for phase in ("meta", "teacher.incubation", "teacher.phase", "pairs", "finetune")),
    *(f"{phase}.warmup_epochs=0.25" for phase in ("meta", "teacher.incubation", "pairs", "finetune")),
    "placement.finetune.engine=torch",
    *(f"placement.{part}.data_workers=0" for part in ("models", "pairs", "finetune", "evaluation")),
)


@pytest.mark.slow
def test_nac_tiny_in_small_runs_through_all_its_stages(recipe: Recipe, tmp_path: Path) -> None:
    digits = WriteConfig(name="digits", limit=64, rows_per_group=8)
    write(open_digits(Path("sklearn"), DigitsOptions()), tmp_path / "data", digits)
    small = override(recipe, [*SMALL, f"placement.data_root={tmp_path / 'data'}"])
    store, own = Store(str(tmp_path / "runs")), variant(small)
    assert problems(small) == []
    execute(plan(small), store, LocalLauncher()).raise_for_failures()
    for role, stage in own.items():
        assert store.status(stage.address).state == "complete", role
    for role in ("meta", "incubate-0", "teacher", "pair-0", "pair-1", "pair-3", "finetune"):
        history = json.loads((store.open(own[role].address) / "history.json").read_text())
        assert history[-1]["step"] == 2
    (step,) = (point for point in history if "loss" in point)
    assert step["loss"] == pytest.approx(step["ce"] + step["regulariser"])
    (student,) = json.loads((store.open(own["evaluate-student"].address) / "evaluation.json").read_text())
    assert student["results"][0]["num_images"] == 64
    exported = load_export(store.open(next(stage for stage in plan(small) if stage.name == "export").address))
    assert exported.read([]).shape == (0, 3, 32, 32)
