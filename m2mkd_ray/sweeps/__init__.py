"""Sweeps: searches over settings of a recipe with Ray Tune, whose trials share what they can.

`sweep` says what a sweep is and `space` what it varies; `points` makes recipes of
points and finds what is wrong; `shipped` has those that have a name.
"""

from m2mkd_ray.sweeps.shipped import SWEEPS, find_sweep
from m2mkd_ray.sweeps.sweep import Sweep

__all__ = ["SWEEPS", "Sweep", "find_sweep"]
