"""Who trains beside whom, on how many devices and with which help changes no result: every case against pairs alone."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2mkd_ray.execution import LocalLauncher, Stage, StageEnded, Store, execute
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipe import Recipe, override

PAIRS = ("pair-0", "pair-1", "pair-2", "pair-3")
VIEWS = ("pairs.epochs=1.2", "pairs.views=1", "placement.pairs.micro_batch=16")


def bits(folder: Path) -> str:
    return hashlib.sha256((folder / "module.safetensors").read_bytes()).hexdigest()


def losses(folder: Path) -> list[float]:
    return [point["loss"] for point in json.loads((folder / "history.json").read_text()) if "loss" in point]


@pytest.fixture
def run(chain, anew_store: Store) -> Callable[..., dict[str, Path]]:
    """Run the pairs of a recipe in a store of their own, into which what they read is copied."""

    def run_pairs(recipe: Recipe, pairs: tuple[str, ...] = PAIRS) -> dict[str, Path]:
        stages = {stage.name: stage for stage in plan(recipe)}
        chain.of(recipe).lend(anew_store, [stages[name] for name in pairs])
        outcome = execute([stages[name] for name in pairs], anew_store, LocalLauncher())
        outcome.raise_for_failures()
        return {name: anew_store.open(stages[name].address) for name in pairs}

    return run_pairs


def alone(chain, recipe: Recipe, pairs: tuple[str, ...] = PAIRS) -> dict[str, Path]:
    return {name: chain.of(recipe).folder(name) for name in pairs}


@pytest.mark.parametrize("settings", [(), ("placement.pairs.micro_batch=8",)], ids=["whole", "micro-batches"])
def test_pairs_in_a_cohort_end_with_the_bits_of_pairs_alone(settings: tuple[str, ...], chain, run) -> None:
    recipe = override(chain.recipe, settings)
    together = run(override(recipe, ["placement.pairs.cohort=4"]))
    for name, folder in alone(chain, recipe).items():
        assert bits(together[name]) == bits(folder)
        assert losses(together[name]) == losses(folder)


def test_members_of_a_cohort_are_said_in_their_attempts(chain, run, anew_store: Store) -> None:
    recipe = override(chain.recipe, ["placement.pairs.cohort=2"])
    run(recipe)
    stages = {stage.name: stage for stage in plan(recipe)}
    for name in PAIRS:
        (attempt,) = anew_store.manifest(stages[name].address)["attempts"]
        cohort = attempt["where"]["cohort"]
        assert len(cohort) == 2
        assert stages[name].address in cohort


def test_a_cache_of_exact_logits_changes_neither_address_nor_bits(chain, run, anew_store: Store) -> None:
    plain = override(chain.recipe, VIEWS)
    cached = override(plain, ["pairs.cache=fp32"])
    by_name: dict[str, Stage] = {stage.name: stage for stage in plan(cached)}
    assert {stage.address for stage in plan(plain) if stage.name in PAIRS} == {by_name[n].address for n in PAIRS}
    with_cache = run(cached)
    for name, folder in alone(chain, plain).items():
        assert bits(with_cache[name]) == bits(folder)
    metrics = anew_store.manifest(by_name["pair-1"].address)["metrics"]
    assert metrics["cache_hits"] > 0
    assert metrics["teacher_calls"] == 0


@pytest.mark.parametrize(("kind", "tolerance"), [("fp16", 5e-3), ("top_k", 0.2)])
def test_a_cache_that_rounds_has_pairs_of_its_own_and_comes_close(kind: str, tolerance: float, chain, run) -> None:
    plain = override(chain.recipe, VIEWS)
    cached = override(plain, [f"pairs.cache={kind}", "pairs.cache_top_k=4"])
    assert not {s.address for s in plan(plain) if s.name in PAIRS} & {s.address for s in plan(cached)}
    found, expected = run(cached, ("pair-2",))["pair-2"], alone(chain, plain, ("pair-2",))["pair-2"]
    assert losses(found) == pytest.approx(losses(expected), rel=tolerance)


def test_logits_are_the_teachers_for_every_view(chain, run, anew_store: Store) -> None:
    """A step's logits from the file, against the teacher's hybrid run on the step's batch."""
    from m2mkd_ray.data import Batches, find
    from m2mkd_ray.data.logits import Logits
    from m2mkd_ray.models import create_vit, splice, split
    from m2mkd_ray.stages.parts import load_meta, load_module

    recipe = override(chain.recipe, [*VIEWS, "pairs.cache=fp32"])
    run(recipe, ("pair-2",))
    stages = {stage.name: stage for stage in plan(recipe)}
    blueprint, feed = recipe.blueprint, stages["pair-2"].config.training.feed
    teacher = split(create_vit(blueprint.teacher), blueprint.teacher_depths)[2]
    load_module(teacher, chain.of(recipe).folder("split") / "module-2.safetensors")
    hybrid = splice(load_meta(blueprint, chain.of(recipe).folder("meta")), 2, teacher).eval()
    batches = Batches(feed, find(feed.dataset, recipe.placement.data_root))
    logits = Logits(anew_store.open(stages["logits-2"].address) / "logits.parquet", feed)
    for step in (0, 3, batches.steps_per_epoch, batches.steps_per_epoch + 3):
        with torch.no_grad():
            expected = torch.cat([hybrid(part) for part in batches[step].images.split(16)])
        assert torch.equal(logits(step), expected)


def test_a_member_that_fails_leaves_the_others_at_work(chain, run, anew_store: Store) -> None:
    recipe = override(chain.recipe, ["placement.pairs.cohort=4"])
    stages = {stage.name: stage for stage in plan(recipe)}
    broken = dict(stages)
    config = stages["pair-1"].config
    wild = config.training.train.model_copy(update={"lr": 1e30})
    training = config.training.model_copy(update={"train": wild})
    broken["pair-1"] = replace(stages["pair-1"], config=config.model_copy(update={"training": training}))
    members = [broken[name] for name in PAIRS]
    chain.of(recipe).lend(anew_store, members)
    outcome = execute(members, anew_store, LocalLauncher())
    (failure,) = outcome.failed
    assert failure.stage.name == "pair-1"
    assert "not finite" in failure.message
    ended = {done.stage.name: done for done in outcome.complete if isinstance(done, StageEnded)}
    assert {"pair-0", "pair-2", "pair-3"} <= set(ended)
    for name in ("pair-0", "pair-2", "pair-3"):
        assert bits(anew_store.open(stages[name].address)) == bits(chain.folder(name))
