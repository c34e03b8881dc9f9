"""A group of ranks through Ray Train: how many processes, on what, and what to do when one fails.

This is no stage. The fine-tuning and pairs over several devices start their ranks
here. Ray Train reserves a placement group a job, makes the process group, and starts
all ranks again when one is lost; what a rank raises on purpose reaches the stage
through the relay and is told once.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from m2mkd_ray.errors import M2mkdError, TrainingError
from m2mkd_ray.execution.feasibility import label_selector
from m2mkd_ray.execution.stage import Resources

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train import Result

RUN_NAME = "ranks"
"""Ray Train's name of the run, below the stage's own folder."""


@dataclass(frozen=True)
class Group:
    """The processes of a job."""

    num_ranks: int
    cpus: float
    """Of each rank."""
    gpus: float
    """Of each rank."""
    max_failures: int
    """How often the ranks are started again."""
    start_timeout_s: float
    """How long to wait for the ranks' resources before trying again (a cluster may have to grow)."""
    node_group: str = ""
    """Only on nodes of this group, as in `Resources`."""

    @property
    def each(self) -> Resources:
        """What each rank holds, and where."""
        return Resources(cpus=self.cpus, gpus=self.gpus, node_group=self.node_group)


def run_ranks(
    loop: Callable[[dict[str, Any]], None],
    job: object,
    group: Group,
    *,
    durable: str,
    to_stage: "ActorHandle",
    what: str,
    keep_checkpoints: int | None = None,
) -> "Result":
    """Run `loop({"job": job})` on every rank, to its end.

    Args:
        loop: what a rank does; a function of a file, since ranks import it.
        job: what it is given; small and picklable.
        durable: path or URI below which Ray Train keeps what it needs.
        to_stage: the relay (`execution/relay.py`) to which ranks tell expected errors.
        what: for messages: "the fine-tuning".
        keep_checkpoints: how many of Ray Train's own checkpoints are kept; None: there are none.

    Raises:
        M2mkdError: what a rank raised on purpose.
        TrainingError: the ranks failed, more often than `max_failures`.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(group.start_timeout_s)
    environment = {"OMP_NUM_THREADS": str(max(1, round(group.cpus)))}
    if not group.gpus:
        # Ray leaves all GPUs visible to a worker that asked for none.
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    resources: dict[str, float] = {"CPU": group.cpus}
    if group.gpus:
        resources["GPU"] = group.gpus
    trainer = TorchTrainer(
        loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if group.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=group.num_ranks,
            use_gpu=group.gpus > 0,
            resources_per_worker=resources,
            label_selector=label_selector(group.each) or None,  # type: ignore[call-arg]  # as below
        ),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=durable,
            failure_config=FailureConfig(max_failures=group.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=keep_checkpoints),
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]  # Train V2's; the stubs are V1's
        ),
    )

    def raise_what_a_rank_told() -> None:
        if (failure := cast("M2mkdError | None", ray.get(to_stage.failure.remote()))) is not None:
            raise failure

    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise_what_a_rank_told()
        raise TrainingError(f"The ranks of {what} failed: {error}") from error
    raise_what_a_rank_told()
    return result


def has_notice() -> bool:
    """On a rank: whether Ray Train knows that a node of the ranks is being drained. All ranks have to ask, as often as
    each other; each is told what the first one knows."""
    import ray.train

    return ray.train.get_preemption_info() is not None


def tell_errors(to_stage: "ActorHandle", train: Callable[[], None]) -> None:
    """Do a rank's work; an expected error reaches the stage through the relay.

    Ray Train starts the ranks again after any error. What is raised for the same reason again
    is told once: ranks that find it told end at once.
    """
    import ray

    if ray.get(to_stage.failure.remote()) is not None:
        return
    try:
        train()
    except M2mkdError as error:
        ray.get(to_stage.fail.remote(error))
        raise
