"""Withdraws an autoscaler's request when its driver is killed, which can do nothing any more then.

The driver starts an actor beside itself that ends with it, however it ends (a *life*), and
a *heir* on the head that waits for that end, withdraws the request and ends too. The heir
is detached, as it has to outlive the driver, and is on the head, as an actor holds its node:
on any other one it would keep what it is there to let go. When a driver ends in order it
ends both.

Turned down: a process beside the driver (a machine that dies takes both, and a container's
end kills all of it), and a loop that asks which jobs run (it needs Ray's dashboard).
"""

import asyncio
import contextlib
import logging
import threading
from typing import Any

import ray
import ray.exceptions
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2mkd_ray.execution.node_groups import head_id

logger = logging.getLogger(__name__)


class Withdrawal:
    """Sees that what this driver requested of an autoscaler does not stay when the driver is gone."""

    def __init__(self) -> None:
        self._life: Any = None
        self._heir: Any = None

    def prepare(self) -> None:
        """Have a heir withdraw the request when this driver is killed; nothing where that is so already.

        Does not wait for it. Call it before the request: a driver may be killed between the two.
        """
        if self._heir is not None:
            return
        life, heir = _actors()
        head, here = head_id(), ray.get_runtime_context().get_node_id()
        # If its process dies, which is not the driver's end, it starts again, and who waits for it goes on waiting.
        beside = {"max_restarts": -1, "max_task_retries": -1, **_on(here)}
        self._life = life.options(num_cpus=0, **beside).remote()
        self._heir = heir.options(num_cpus=0, lifetime="detached", **(_on(head) if head else {})).remote(self._life)

    def cancel(self) -> None:
        """The request was withdrawn: end the heir, and what it waits for."""
        for actor in (self._heir, self._life):
            if actor is not None:
                ray.kill(actor)
        self._heir = self._life = None


def _on(node_id: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def _actors() -> tuple[Any, Any]:
    """The two actors. Their classes are a function's own, so that Ray sends them by value and their processes
    import nothing but Ray: they wait, on a head that may have little memory, and need nothing of this package."""

    class Life:
        """Is there as long as the driver that started it."""

        async def end(self) -> None:
            """Never comes back; who waits for it learns that this is gone."""
            await asyncio.Event().wait()

    class Heir:
        """Waits for a life's end, withdraws the autoscaler's request, and ends."""

        def __init__(self, life: Any) -> None:
            # Not a method that the driver calls: it may be killed before the call arrives.
            threading.Thread(target=self._wait, args=(life,), name="heir", daemon=True).start()

        def _wait(self, life: Any) -> None:
            try:
                with contextlib.suppress(ray.exceptions.RayActorError):  # which is what is waited for
                    ray.get(life.end.remote())
                logger.warning("A driver was killed: what it had requested of the autoscaler is withdrawn")
                request_resources(bundles=[])
            finally:
                ray.kill(ray.get_runtime_context().current_actor)

    return ray.remote(Life), ray.remote(Heir)
