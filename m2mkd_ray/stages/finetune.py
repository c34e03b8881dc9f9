"""Stage `finetune`: train the whole student with labels, through Ray Train and DeepSpeed.

The same loop as everywhere runs on every rank; DeepSpeed takes the steps. Ranks may
be on any node: weights travel through Ray's object store, checkpoints through Ray
Train to `context.durable`, the result comes back in the last checkpoint. With
`engine="torch"` the stage runs in this process instead, for laptops and tests.
"""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pyarrow import fs
from safetensors.torch import load_file, save
from torch import nn

from m2mkd_ray.errors import M2mkdError, TrainingError
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import num_active_parameters, num_parameters
from m2mkd_ray.stages.parts import HISTORY, WEIGHTS, fresh_student, save_weights, train_here
from m2mkd_ray.stages.ranks import METRICS, FinetuneConfig, FinetunePlacement, RankJob, train_on_this_rank
from m2mkd_ray.training import Classification

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

RUN_NAME = "ranks"
"""Ray Train's name of the run, below the stage's own folder."""


def run(config: FinetuneConfig, context: StageContext) -> Metrics:
    """Reads `data` and, unless it starts from scratch, `assembled`; writes `model.safetensors`, `history.json`."""
    placement = context.placement
    assert isinstance(placement, FinetunePlacement)
    model = fresh_student(
        config.blueprint,
        config.training.seed,
        drop_path=config.training.train.drop_path,
        keep_stitches=config.keep_stitches,
    )
    if config.start == "assembled":
        model.load_state_dict(load_file(context.inputs["assembled"] / WEIGHTS))
    if placement.engine == "torch":
        metrics: Metrics = train_here(Classification(model), config.training, context, validated=model)
        save_weights(model, context.out / WEIGHTS)
    else:
        metrics = _train_on_ranks(config, model, placement, context)
    return {
        **metrics,
        "num_parameters": num_parameters(model),
        "num_active_parameters": num_active_parameters(model),
    }


def _train_on_ranks(
    config: FinetuneConfig, model: nn.Module, placement: FinetunePlacement, context: StageContext
) -> Metrics:
    import os

    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from m2mkd_ray.execution.relay import relay

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(placement.start_timeout_s)
    environment = {"OMP_NUM_THREADS": str(max(1, round(placement.cpus_per_worker)))}
    if not placement.gpus_per_worker:
        # Ray leaves all GPUs visible to a worker that asked for none.
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    _set_aside_if_cut(context.durable)
    resources: dict[str, float] = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        resources["GPU"] = placement.gpus_per_worker
    with relay(context) as to_stage:
        trainer = TorchTrainer(
            train_on_this_rank,
            train_loop_config={
                "job": RankJob(config, placement, ray.put(save(model.state_dict())), to_stage, context.durable)
            },
            torch_config=TorchConfig(backend="nccl" if placement.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=placement.num_workers,
                use_gpu=placement.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=RUN_NAME,
                storage_path=context.durable,
                failure_config=FailureConfig(max_failures=placement.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]  # Train V2's; the stubs are V1's
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            _raise_what_a_rank_told(to_stage)
            raise TrainingError(f"The ranks of the fine-tuning failed: {error}") from error
        _raise_what_a_rank_told(to_stage)
    if result.checkpoint is None:
        raise TrainingError("Ray Train ended without a checkpoint, so there is no trained student. See its log above.")
    with result.checkpoint.as_directory() as folder:
        for name in (WEIGHTS, HISTORY):
            shutil.copyfile(Path(folder) / name, context.out / name)
        metrics: Metrics = json.loads((Path(folder) / METRICS).read_text())
    return metrics


def _raise_what_a_rank_told(relay: "ActorHandle") -> None:
    import ray

    if (failure := cast("M2mkdError | None", ray.get(relay.failure.remote()))) is not None:
        raise failure


def _set_aside_if_cut(durable: str) -> None:
    """Ray Train rewrites its snapshot in place: one that was cut by a kill would stop every later attempt."""
    files, root = fs.FileSystem.from_uri(durable) if "://" in durable else (fs.LocalFileSystem(), durable)
    snapshot = f"{root}/{RUN_NAME}/checkpoint_manager_snapshot.json"
    if files.get_file_info(snapshot).type == fs.FileType.NotFound:
        return
    with files.open_input_stream(snapshot) as stream:
        content = stream.read()
    try:
        json.loads(content)
    except ValueError:
        aside = f"{root}/{RUN_NAME}-cut-{int(time.time())}"
        logger.warning(
            "Ray Train's snapshot %s was cut off by a kill; fine-tuning anew, its folder is %s", snapshot, aside
        )
        files.move(f"{root}/{RUN_NAME}", aside)
