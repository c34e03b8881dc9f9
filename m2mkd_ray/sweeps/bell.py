"""What Ray Tune calls in the driver, and how it finds the desk.

Tune pickles all that it is given, to be restored by a later driver. So these hold the
sweep only, and look for the desk of this process when they are called.
"""

from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.experiment import Trial

from m2mkd_ray.sweeps.space import active
from m2mkd_ray.sweeps.sweep import Sweep
from m2mkd_ray.sweeps.trials import POINT

if TYPE_CHECKING:
    from m2mkd_ray.sweeps.desk import Desk

_desks: "dict[str, Desk]" = {}


def open_desk(sweep: Sweep, desk: "Desk") -> None:
    """Make a desk the one of a sweep in this process."""
    _desks[sweep.folder] = desk


def close_desk(sweep: Sweep) -> None:
    """A sweep has no desk any more."""
    _desks.pop(sweep.folder, None)


def desk_of(sweep: Sweep) -> "Desk":
    """The desk of a sweep in this process.

    Raises:
        RuntimeError: there is none: Tune was not started by `tuning.run`.
    """
    if sweep.folder not in _desks:
        raise RuntimeError(f"The sweep {sweep.name!r} is not under way in this process. Start it with `m2mkd sweep`.")
    return _desks[sweep.folder]


class Bell(tune.Callback):
    """Tells the desk what Tune does."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Between two of Tune's steps."""
        desk_of(self._sweep).tick()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial's actor is up."""
        desk_of(self._sweep).begin(trial.trial_id, active(self._sweep.space, trial.config[POINT]))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """The scheduler has decided; `done` is true where the trial ends."""
        desk_of(self._sweep).reported(trial.trial_id, is_done=bool(result.get("done")))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has failed, and Tune tries it no more."""
        desk_of(self._sweep).end(trial.trial_id, "failed", "its actor in Ray Tune died again and again")


class Ending(tune.Stopper):
    """Ends the search when the budget is used up."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped by what it reports."""
        return False

    def stop_all(self) -> bool:
        """Whether all are."""
        return bool(desk_of(self._sweep).over)
