"""Nodes that are being drained: about to be taken away, with notice.

A spot machine's last minutes begin with a notice, which a watcher or KubeRay turns into
`ray drain-node`; an autoscaler drains a node that it stops. Ray gives such a node no new
actors, but tells those that are on it nothing. So workers ask, at most once a second:
one small question to the head, which is how Ray Train's own watcher does it
(ray/train/v2/_internal/execution/preemption.py). There is no public way in Ray 2.60.

Turned down: a word from the driver through the store (it comes later, and not at all from
a driver that is cut off), and an actor a node that listens (it would die with the node).
"""

import logging
import time
from collections.abc import Mapping

import ray.util.client

logger = logging.getLogger(__name__)

_EVERY_S = 1.0


class LeavingNodes:
    """The nodes that are being drained, as of a second ago at most."""

    def __init__(self) -> None:
        self._known: Mapping[str, float] = {}
        self._next_look = 0.0

    def look(self) -> Mapping[str, float]:
        """Their ids, with the time at which each goes (seconds since 1970; 0: not known).

        Where the head does not answer, what was known stays, and the log says so.
        """
        if time.monotonic() >= self._next_look:
            try:
                self._known = leaving_nodes()
            except Exception:  # of Ray's private accessor: a head that starts again must not end a training
                logger.warning("Which nodes are being drained is not known for now", exc_info=True)
            self._next_look = time.monotonic() + _EVERY_S
        return self._known


def leaving_nodes() -> Mapping[str, float]:
    """The ids of nodes that are being drained now, with the time at which each goes, as `LeavingNodes.look` has it.

    A driver behind `ray://` sees no state: it knows of none.
    """
    if ray.util.client.ray.is_connected():
        return {}
    from ray._private.state import state

    return {node: deadline_ms / 1000 for node, deadline_ms in state.get_draining_nodes().items()}
