# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A job from its first process to its last."""

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

from torchtitan.experiments.rl.unified.config.derived import steps_ahead
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.controller.hosts import one_arithmetic
from torchtitan.experiments.rl.unified.controller.loops import generate, train
from torchtitan.experiments.rl.unified.controller.queue import Batch, TrajectoryQueue
from torchtitan.experiments.rl.unified.errors import TrainerLost, WeightTransferError
from torchtitan.experiments.rl.unified.messages import Trajectory
from torchtitan.experiments.rl.unified.record.checkpoints import find_start
from torchtitan.experiments.rl.unified.record.owner import owned
from torchtitan.experiments.rl.unified.record.provenance import check_reference, checkpoint_digests
from torchtitan.experiments.rl.unified.record.run import RunRecord, set_aside
from torchtitan.experiments.rl.unified.rollout.evaluation import Evaluation
from torchtitan.experiments.rl.unified.rollout.task import Task

logger = logging.getLogger(__name__)


async def run_job(config: JobConfig, task: Task, evaluation: Evaluation) -> str:
    """Starts the processes of a checked job, trains, again from the last checkpoint if the trainer was lost.

    Returns:
        The summary.
    """
    if find_start(config).finished:
        return f"no step was taken: {config.job.dump_folder} stands at its last step"
    # Monarch starts threads at import: only a job that can run gets that far.
    from torchtitan.experiments.rl.unified.controller.meshes import Meshes

    folder = Path(config.job.dump_folder)
    async with AsyncExitStack() as stack:
        stack.enter_context(owned(folder))
        if aside := set_aside(config):
            print(f"{folder} holds an earlier run: moved to {aside}")
            stack.enter_context(owned(folder))  # The other lock went with it.
        meshes = await stack.enter_async_context(Meshes(config))
        for restart in range(config.supervision.max_restarts + 1):
            try:
                return await attempt(config, meshes, task, evaluation)
            except TrainerLost as error:
                if not config.checkpoint.enable or restart == config.supervision.max_restarts:
                    raise
                logger.warning("%s: going on from the last checkpoint, restart %d", error, restart + 1)
    raise AssertionError("each attempt returns or raises")


async def attempt(config: JobConfig, meshes, task: Task, evaluation: Evaluation) -> str:
    """Trains from the last checkpoint, or from the start, to the end; returns the summary.

    Raises:
        TrainerLost: a rank of the trainer was lost; another attempt may follow.
    """
    digesting = asyncio.to_thread(checkpoint_digests, config)
    (step, state), _, digests = await asyncio.gather(meshes.trainer.start(), meshes.generators.start(), digesting)
    if config.parity.check != "off":
        engines = {replica.name: replica.arithmetic for replica in meshes.generators.replicas}
        one_arithmetic({"the trainer": meshes.trainer.arithmetic} | engines)
    if step and config.policy_loss.kl_weight:
        check_reference(config, digests)
    batches = [Batch([Trajectory.from_dict(values) for values in batch]) for batch in state.get("batches", [])]
    queue = TrajectoryQueue(steps_ahead(config), step, batches)
    task.load_state_dict(state.get("task"))
    with RunRecord(config, step, digests) as record:
        generating = asyncio.ensure_future(generate(config, meshes, queue, task, evaluation))
        try:
            await train(config, meshes, queue, task, evaluation, record)
        except WeightTransferError:
            await meshes.trainer.ping()  # If it is lost, that is why its weights did not arrive.
            raise
        finally:
            generating.cancel()
        await meshes.trainer.close()
        return record.summary()
