"""Who trains beside whom and with which help changes no result: every case against pairs alone."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from m2mkd_ray.data import Batches, find
from m2mkd_ray.data.logits import Logits
from m2mkd_ray.execution import Event, LocalLauncher, Requests, Stage, StageStarted, Store, execute
from m2mkd_ray.models import create_vit, splice, split
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipe import Recipe, override
from m2mkd_ray.stages.parts import load_meta, load_module

PAIRS = ("pair-0", "pair-1", "pair-2", "pair-3")
VIEWS = ("pairs.epochs=1.2", "pairs.views=1", "placement.pairs.micro_batch=16")


def bits(folder: Path) -> str:
    return hashlib.sha256((folder / "module.safetensors").read_bytes()).hexdigest()


def losses(folder: Path) -> list[float]:
    return [point["loss"] for point in json.loads((folder / "history.json").read_text()) if "loss" in point]


@dataclass
class Ran:
    """Pairs that were run in a store of their own."""

    recipe: Recipe
    store: Store

    def folder(self, name: str) -> Path:
        """What a stage left."""
        return self.store.open(self.stage(name).address)

    def stage(self, name: str) -> Stage:
        """A stage by its name."""
        return next(stage for stage in plan(self.recipe) if stage.name == name)


@pytest.fixture
def run(chain, tmp_path: Path) -> Callable[..., Ran]:
    """Run pairs in a store of their own, into which what they read is copied."""

    def run_pairs(recipe: Recipe, pairs: tuple[str, ...] = PAIRS) -> Ran:
        store = Store(str(tmp_path / f"store-{len(list(tmp_path.iterdir()))}"))
        ran = Ran(recipe, store)
        stages = [ran.stage(name) for name in pairs]
        chain.of(recipe).lend(store, stages)
        execute(stages, store, LocalLauncher()).raise_for_failures()
        return ran

    return run_pairs


@pytest.mark.parametrize("settings", [(), ("placement.pairs.micro_batch=8",)], ids=["whole", "micro-batches"])
def test_pairs_in_a_cohort_end_with_the_bits_of_pairs_alone(settings: tuple[str, ...], chain, run) -> None:
    recipe = override(chain.recipe, settings)
    together, alone = run(override(recipe, ["placement.pairs.cohort=4"])), run(recipe)
    for name in PAIRS:
        assert bits(together.folder(name)) == bits(alone.folder(name))
        assert losses(together.folder(name)) == losses(alone.folder(name))


@pytest.mark.slow
def test_members_of_a_cohort_are_said_in_their_attempts(chain, run) -> None:
    ran = run(override(chain.recipe, ["placement.pairs.cohort=2"]))
    for name in PAIRS:
        (attempt,) = ran.store.manifest(ran.stage(name).address)["attempts"]
        assert len(attempt["where"]["cohort"]) == 2
        assert ran.stage(name).address in attempt["where"]["cohort"]


def test_a_cache_of_exact_logits_changes_neither_address_nor_bits(chain, run) -> None:
    plain = override(chain.recipe, VIEWS)
    cached = override(plain, ["pairs.cache={kind: float32}"])
    without, with_cache = run(plain), run(cached)
    for name in PAIRS:
        assert without.stage(name).address == with_cache.stage(name).address
        assert bits(without.folder(name)) == bits(with_cache.folder(name))
    metrics = with_cache.store.manifest(with_cache.stage("pair-1").address)["metrics"]
    assert metrics["cache_hits"] > 0
    assert metrics.get("teacher_calls", 0) == 0


def test_augmenting_on_the_device_changes_neither_address_nor_bits(chain, run) -> None:
    """In a cohort and with cached logits, which the stage before writes on the device too."""
    augmentation = "{kind: timm, auto_augment: rand-m9-mstd0.5-inc1, random_erasing: 0.5, mixup: 0.8, cutmix: 1}"
    plain = override(chain.recipe, [*VIEWS, f"pairs.augmentation={augmentation}"])
    helped = ["placement.pairs.augment_on_device=true", "placement.pairs.cohort=2", "pairs.cache={kind: float32}"]
    pairs = ("pair-1", "pair-2")
    expected, found = run(plain, pairs), run(override(plain, helped), pairs)
    for name in pairs:
        assert found.stage(name).address == expected.stage(name).address
        assert bits(found.folder(name)) == bits(expected.folder(name))


@pytest.mark.slow
@pytest.mark.parametrize(("format", "tolerance"), [("{kind: float16}", 5e-3), ("{kind: top_k, top_k: 4}", 0.2)])
def test_a_cache_that_rounds_has_pairs_of_its_own_and_comes_close(format: str, tolerance: float, chain, run) -> None:
    plain = override(chain.recipe, VIEWS)
    cached = override(plain, [f"pairs.cache={format}"])
    pair = ("pair-2",)
    found, expected = run(cached, pair), run(plain, pair)
    assert found.stage("pair-2").address != expected.stage("pair-2").address
    assert losses(found.folder("pair-2")) == pytest.approx(losses(expected.folder("pair-2")), rel=tolerance)


def test_logits_are_the_teachers_for_every_view(chain, run) -> None:
    """A step's logits from the file, against the teacher's hybrid run on the step's batch."""
    recipe = override(chain.recipe, [*VIEWS, "pairs.cache={kind: float32}"])
    ran, blueprint = run(recipe, ("pair-2",)), recipe.blueprint
    feed = ran.stage("pair-2").config.training.feed
    teacher = split(create_vit(blueprint.teacher), blueprint.teacher_depths)[2]
    load_module(teacher, chain.of(recipe).folder("split") / "module-2.safetensors")
    hybrid = splice(load_meta(blueprint, chain.of(recipe).folder("meta")), 2, teacher).eval()
    batches = Batches(feed, find(feed.dataset, recipe.placement.data_root))
    logits = Logits(ran.folder("logits-2") / "logits.parquet", feed, teacher=ran.stage("split").key)
    for step in (0, 3, batches.steps_per_epoch, batches.steps_per_epoch + 3):
        with torch.no_grad():
            expected = torch.cat([hybrid(part) for part in batches[step].images.split(16)])
        torch.testing.assert_close(logits(step), expected)  # the stage computes the last block for one token alone


def test_a_member_that_fails_leaves_the_others_at_work(chain, run, tmp_path: Path) -> None:
    alone = run(chain.recipe)
    stages = {stage.name: stage for stage in plan(override(chain.recipe, ["placement.pairs.cohort=4"]))}
    config = stages["pair-1"].config
    wild = config.training.train.model_copy(update={"lr": 1e30})
    training = config.training.model_copy(update={"train": wild})
    stages["pair-1"] = replace(stages["pair-1"], config=config.model_copy(update={"training": training}))
    members, store = [stages[name] for name in PAIRS], Store(str(tmp_path / "failing"))
    chain.lend(store, members)
    outcome = execute(members, store, LocalLauncher())
    (failure,) = outcome.failed
    assert failure.stage.name == "pair-1"
    assert "not finite" in failure.message
    for name in ("pair-0", "pair-2", "pair-3"):
        assert bits(store.open(stages[name].address)) == bits(alone.folder(name))
        assert len(store.manifest(stages[name].address)["attempts"]) == 1


def test_a_pair_that_is_withdrawn_leaves_the_others_with_the_bits_that_they_had(
    chain, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.worker._REPORT_EVERY_S", 0.0)
    often = override(chain.recipe, ["placement.pairs.log_every_steps=1", "placement.pairs.checkpoint_every_s=0"])
    alone, store = run(often), Store(str(tmp_path / "withdrawn"))
    stages = {stage.name: stage for stage in plan(override(often, ["placement.pairs.cohort=4"]))}
    members, requests, left = [stages[name] for name in PAIRS], Requests(), stages["pair-2"]
    chain.lend(store, members)

    def withdraw(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage.name == "pair-3":
            store.say_withdrawn(left.address, True)  # as the executor would, did it not train itself here
            requests.close()

    requests.add(members)
    outcome = execute((), store, LocalLauncher(), on_event=withdraw, requests=requests)
    for name in ("pair-0", "pair-1", "pair-3"):
        assert bits(store.open(stages[name].address)) == bits(alone.folder(name))
        assert losses(store.open(stages[name].address)) == losses(alone.folder(name))
    # Nobody had asked for it, so it was taken up again, from the checkpoint that it had left with.
    assert bits(store.open(left.address)) == bits(alone.folder("pair-2"))
    attempts = [attempt["outcome"] for attempt in store.manifest(left.address)["attempts"]]
    assert attempts == ["WITHDRAWN", "COMPLETE"]
    assert len(outcome.complete) >= 4
