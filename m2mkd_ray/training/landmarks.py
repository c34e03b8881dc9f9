"""What of a history says whether a training is worth going on with.

Whoever watches from outside sees a report now and then; of these points it has to see
every one, so each report carries all of them.
"""

from collections.abc import Sequence

from m2mkd_ray.training.seams import Point

MEASURED = ("loss", "ce", "val_top1")
"""What a landmark has of a point, beside its step and epoch."""

COUNTED = ("flops", "teacher_calls", "cache_hits", "decodes")
"""What a landmark has the sums of, from the first step on (`m2mkd_ray.training.counters`).

`counted_steps` says up to which one: steps are counted when they are logged, and a validation may be between two.
"""


class Landmarks:
    """Every validation but that of step 0, and the first losses that are logged when another epoch is over."""

    def __init__(self, history: Sequence[Point] = ()) -> None:
        """`history`: of a training that is taken up."""
        self.points: list[Point] = []
        self._sums: Point = {}
        self._logged_epoch = 0.0
        for point in history:
            self.see(point)

    def see(self, point: Point) -> bool:
        """Take the next point of the history in; whether it is a landmark."""
        for name in COUNTED:
            if "loss" in point and name in point:
                self._sums[name] = self._sums.get(name, 0.0) + point[name]
                self._sums["counted_steps"] = point["step"]
        if not self._is_landmark(point):
            return False
        measured = {name: point[name] for name in MEASURED if name in point}
        self.points.append({"step": point["step"], "epoch": point["epoch"], **measured, **self._sums})
        return True

    def _is_landmark(self, point: Point) -> bool:
        if "val_top1" in point:
            return point["step"] > 0
        is_first = "loss" in point and int(point["epoch"]) > int(self._logged_epoch)
        if is_first:
            self._logged_epoch = point["epoch"]
        return is_first
