"""Ray Tune's schedulers, which remember what trials reported before the driver was started again.

Tune keeps trials and searcher, but begins anew with a scheduler when a search is
restored: early stopping would forget whom it compares with.
"""

from typing import TYPE_CHECKING, Any, cast

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from m2mkd_ray.sweeps.bell import desk_of
from m2mkd_ray.sweeps.space import active
from m2mkd_ray.sweeps.sweep import Asha, Median, Sweep
from m2mkd_ray.sweeps.trials import POINT

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


def scheduler_of(sweep: Sweep, epochs: float) -> TrialScheduler:
    """Tune's scheduler, as a sweep asks for it. A trial has so many epochs."""
    scheduler = sweep.scheduler
    if isinstance(scheduler, Asha):
        return RememberingAsha(Memory(sweep), scheduler, epochs)
    if isinstance(scheduler, Median):
        return RememberingMedian(Memory(sweep), scheduler)
    return FIFOScheduler()


class Memory:
    """What trials reported in an earlier run of a sweep, told once a trial."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._told: set[str] = set()

    def of(self, trial: Trial) -> list[dict[str, Any]]:
        """Results, in order."""
        if trial.trial_id in self._told:
            return []
        self._told.add(trial.trial_id)
        history = desk_of(self._sweep).history(trial.trial_id, active(self._sweep.space, trial.config[POINT]))
        return [{"epoch": epoch, self._sweep.measured: value} for epoch, value in history]


class RememberingAsha(AsyncHyperBandScheduler):
    """ASHA."""

    def __init__(self, memory: Memory, settings: Asha, epochs: float) -> None:
        # Epochs are fractions here; nothing in Tune's class needs whole numbers.
        grace, most = cast(int, settings.grace), cast(int, epochs)
        super().__init__("epoch", grace_period=grace, max_t=most, reduction_factor=settings.reduction)
        self._memory = memory

    def on_trial_add(self, tune_controller: "TuneController", trial: Trial) -> None:
        """A trial is there, perhaps again."""
        super().on_trial_add(tune_controller, trial)
        for result in self._memory.of(trial):
            super().on_trial_result(tune_controller, trial, result)


class RememberingMedian(MedianStoppingRule):
    """The median stopping rule."""

    def __init__(self, memory: Memory, settings: Median) -> None:
        super().__init__("epoch", grace_period=settings.grace, min_samples_required=settings.min_trials)
        self._memory = memory

    def on_trial_add(self, tune_controller: "TuneController", trial: Trial) -> None:
        """A trial is there, perhaps again."""
        super().on_trial_add(tune_controller, trial)
        if results := self._memory.of(trial):
            self._results[trial].extend(results)

    def on_trial_result(self, tune_controller: "TuneController", trial: Trial, result: dict[str, Any]) -> str:
        """A value; the last one of a trial that an earlier run ended is told once more, and counts once."""
        if (known := self._results.get(trial)) and result.get("epoch", 0.0) <= known[-1]["epoch"]:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: "TuneController", trial: Trial, result: dict[str, Any]) -> None:
        """Its last value was told already: Tune's rule would count it twice, but not after a restart."""

    def _on_insufficient_samples(self, tune_controller: "TuneController", trial: Trial, time: float) -> str:
        """Go on. Tune's rule pauses it while another trial waits, but its stages would train on, and a trial here has
        no checkpoint to be taken up from."""
        return str(TrialScheduler.CONTINUE)
