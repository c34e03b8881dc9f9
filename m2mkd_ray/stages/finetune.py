"""Stage `finetune`: train the whole student with labels, through Ray Train and DeepSpeed.

The same loop as everywhere runs on every rank; DeepSpeed takes the steps. Ranks may
be on any node: weights travel through Ray's object store, checkpoints through Ray
Train to `context.durable`, the result comes back in the last checkpoint. With
`engine="torch"` the stage runs in this process instead, for laptops and tests.
"""

import json
import logging
import time

from pyarrow import fs
from safetensors.torch import load_file, save
from torch import nn

from m2mkd_ray.errors import TrainingError
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import num_active_parameters, num_parameters, student_with
from m2mkd_ray.stages.group import RUN_NAME, Group, run_ranks
from m2mkd_ray.stages.parts import HISTORY, WEIGHTS, files_of, fresh_student, save_weights, train_here
from m2mkd_ray.stages.ranks import METRICS, FinetuneConfig, FinetunePlacement, RankJob, train_on_this_rank
from m2mkd_ray.training import Classification

logger = logging.getLogger(__name__)


def run(config: FinetuneConfig, context: StageContext) -> Metrics:
    """Reads `data` and, unless it starts from scratch, `assembled`; writes `model.safetensors`, `history.json`."""
    placement = context.placement
    assert isinstance(placement, FinetunePlacement)
    blueprint, seed, drop_path = config.blueprint, config.training.seed, config.training.train.drop_path
    if config.start == "assembled":
        weights = load_file(context.inputs["assembled"] / WEIGHTS)
        model = student_with(blueprint, weights, drop_path=drop_path, keep_stitches=config.keep_stitches)
    else:
        model = fresh_student(blueprint, seed, drop_path=drop_path, keep_stitches=config.keep_stitches)
    if placement.group is None:
        metrics: Metrics = train_here(Classification(model), config.training, context, validated=model)
        save_weights(model, context.out / WEIGHTS)
    else:
        metrics = _train_on_ranks(config, model, placement, placement.group, context)
    return {
        **metrics,
        "num_parameters": num_parameters(model),
        "num_active_parameters": num_active_parameters(model),
    }


def _train_on_ranks(
    config: FinetuneConfig, model: nn.Module, placement: FinetunePlacement, group: Group, context: StageContext
) -> Metrics:
    import ray

    from m2mkd_ray.execution.relay import relay

    _set_aside_if_cut(context.durable)
    with relay(context) as to_stage:
        job = RankJob(config, placement, ray.put(save(model.state_dict())), to_stage, context.durable)
        result = run_ranks(
            train_on_this_rank,
            job,
            group,
            durable=context.durable,
            to_stage=to_stage,
            what="the fine-tuning",
            keep_checkpoints=2,
        )
    if result.checkpoint is None:
        raise TrainingError("Ray Train ended without a checkpoint, so there is no trained student. See its log above.")
    files, folder = result.checkpoint.filesystem, result.checkpoint.path
    for name in (WEIGHTS, HISTORY):
        fs.copy_files(f"{folder}/{name}", str(context.out / name), files, fs.LocalFileSystem())
    with files.open_input_stream(f"{folder}/{METRICS}") as stream:
        metrics: Metrics = json.loads(stream.read())
    return metrics


def _set_aside_if_cut(durable: str) -> None:
    """Ray Train rewrites its snapshot in place: one that was cut by a kill would stop every later attempt."""
    files, root = files_of(durable)
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
