"""Stages `pair-i` and `incubate-i`: train one module inside the frozen meta model.

A pair trains a student module, stitches included, against its teacher module
(m2mKD, arXiv 2402.16918). Incubation trains the teacher's own module with labels
alone (Deep Incubation, arXiv 2212.04129): the same stage with `alpha=0`.

Several of them may share a worker, as a cohort: then a batch is made once, and what
they share of the frozen meta model and teacher is run once. Or one may have several
devices. Neither changes what comes out (several devices: but for rounding).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from m2mkd_ray.execution.cohort import Left, Member, alone
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.stages.group import Group, run_ranks
from m2mkd_ray.stages.pair import (
    DistillConfig,
    Frozen,
    IncubateConfig,
    IncubatePlacement,
    PairJob,
    fresh_module,
    teacher_top1,
    train_pair_on_this_rank,
    trainee,
)
from m2mkd_ray.stages.parts import MODULE, Trainee, save_weights, train_together

__all__ = ["DistillConfig", "IncubateConfig", "IncubatePlacement", "fresh_module", "run", "together"]


def run(config: IncubateConfig, context: StageContext) -> Metrics:
    """Reads `data`, `meta` and, unless alpha is 0, `split`; writes `module.safetensors` and `history.json`."""
    placement = cast(IncubatePlacement, context.placement)
    if placement.group is None:
        return alone(together, config, context)
    _train_on_ranks(config, placement.group, context)
    return alone(_together, config, context)  # what is left to do here: write down what they leave


def together(members: Sequence[Member]) -> Iterator[Left]:
    """Train several modules on the same batches; each is told of as it ends.

    They read the same `data` and `meta`, and train on the same batches in the same precision (`Stage.mates`).
    """
    return _together(members, teacher_top1)


def _together(
    members: Sequence[Member],
    measure: Callable[[IncubateConfig, StageContext, Frozen], dict[str, float]] = lambda *_: {},
) -> Iterator[Left]:
    frozen = Frozen(members[0].config.blueprint, members[0].context)
    trainees: dict[int, Trainee] = {}
    measured: dict[int, dict[str, float]] = {}
    for place, member in enumerate(members):
        try:
            measured[place] = measure(member.config, member.context, frozen)
            trainees[place] = trainee(member.config, member.context, frozen)
        except Exception as error:
            yield Left(place, error=error)
    places = list(trainees)
    for number, trained in train_together(list(trainees.values())):
        place = places[number]
        if isinstance(trained, Exception):
            yield Left(place, error=trained)
            continue
        try:
            save_weights(trainees[place].objective.trainable, members[place].context.out / MODULE)
            yield Left(place, metrics={**measured[place], **trained, **_of_cache(members[place].context)})
        except Exception as error:
            yield Left(place, error=error)


def _of_cache(context: StageContext) -> dict[str, float]:
    """Size of the teacher's logits that were read, and what their format loses; nothing where there are none."""
    told = {"cache_bytes": "bytes", "cache_kl_mean": "kl_mean", "cache_kl_max": "kl_max"}
    written = context.input_metrics.get("logits", {})
    return {name: float(written[theirs]) for name, theirs in told.items() if theirs in written}


def _train_on_ranks(config: IncubateConfig, group: Group, context: StageContext) -> None:
    from m2mkd_ray.execution.relay import relay

    with relay(context) as to_stage:
        job = PairJob(config, context.elsewhere(), to_stage)
        run_ranks(
            train_pair_on_this_rank,
            job,
            group,
            durable=context.durable,
            to_stage=to_stage,
            what=f"pair {config.index}",
        )
