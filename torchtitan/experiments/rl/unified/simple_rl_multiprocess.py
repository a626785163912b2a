# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The RL job: `python simple_rl_multiprocess.py [--dry_run] [--job.config_file X.toml] [--section.key value ...]`.

Sample a group of completions for each prompt, reward them, take one optimizer step on their group-relative
advantages, send the new weights to the generators, and again. The trainer is a mesh of Monarch actors over torchtitan's
Trainer, the generators are actors over vLLM's engine. Two loops, `generate` and `train`, meet in a TrajectoryQueue.
"""

import asyncio
import logging
import sys
from contextlib import closing
from typing import Any

from torchtitan.experiments.rl.unified.checkpoint import CheckpointError, find_start
from torchtitan.experiments.rl.unified.infra.process import (
    honour_environment,
    ProcessLost,
    quiet_libraries,
    TrainerLost,
)
from torchtitan.experiments.rl.unified.infra.weight_transport import WeightTransferError
from torchtitan.experiments.rl.unified.job_config import JobConfig, load_job_config
from torchtitan.experiments.rl.unified.nonfinite import NonFiniteError
from torchtitan.experiments.rl.unified.parity import ParityError
from torchtitan.experiments.rl.unified.timing import timed

logger = logging.getLogger(__name__)


async def generate(config: JobConfig, meshes, queue, task, evaluation) -> None:
    """The generators' loop: takes policy versions from `queue`, puts batches and evaluations into it.

    It waits for the version that its next batch is due under, which `train` publishes; it ends on the last version.
    """
    from torchtitan.experiments.rl.unified.rollout.queue import Batch

    try:
        for batch in range(queue.sampled, config.training.steps + 1):
            seconds: dict[str, float] = {}
            at_end = batch == config.training.steps
            while queue.generator_version < (batch if at_end else queue.version_of(batch)):
                async with queue.next_version() as update:
                    with timed(seconds, "update"):
                        await meshes.generators.update_weights(update)
                # What a run goes on from has its evaluation on record.
                if evaluation.due(update.version) and (update.version > queue.first or queue.first == 0):
                    answers = await meshes.generators.generate(evaluation.requests())
                    await queue.report(update.version, await asyncio.to_thread(evaluation.score, answers))
            if not at_end:
                with timed(seconds, "generate"):
                    trajectories = await meshes.generators.generate(task.next_requests())
                check_version(trajectories, queue.generator_version)
                await queue.put(Batch(trajectories, seconds))
    except Exception as error:
        await queue.fail(error)


def check_version(trajectories, version: int) -> None:
    """Raises WeightTransferError unless `version` sampled all of them; old weights would look like staleness."""
    if wrong := [t for t in trajectories if t.policy_version != version]:
        raise WeightTransferError(
            f"{len(wrong)} of {len(trajectories)} completions were sampled under policy version "
            f"{wrong[0].policy_version}, not {version}: a weight update did not reach a generator"
        )


async def train(config: JobConfig, meshes, queue, task, evaluation, record) -> None:
    """The trainer's loop, GRPO (arXiv:2402.03300): takes batches from `queue`, publishes a policy version after each.

    It waits for the next batch, and for the generators to have taken the version before; `generate` brings both.
    """
    step = record.first()
    await publish(meshes, queue, step)
    if queue.first == 0 and evaluation.due(0):
        with timed(step.phases, "evaluate"):
            step.evaluation |= await queue.evaluation(0)
    while queue.published < config.training.steps:
        with timed(step.phases, "wait"):
            batch = await queue.get()
        with timed(step.phases, "reward"):
            scored = await asyncio.to_thread(task.score, batch.trajectories)
        step = await _uninterrupted(take_step(config, meshes, queue, task, evaluation, record, step, batch, scored))
    await queue.taken()


async def take_step(config: JobConfig, meshes, queue, task, evaluation, record, step, batch, scored):
    """Trains on one batch, publishes what came of it, records it and then saves it: what is saved is on record.

    Returns:
        The record of the next step.
    """
    with timed(step.phases, "train"):
        results = await meshes.trainer.step(batch.trajectories, scored.advantages)
    version, due = results[0].step, results[0].checkpoint_due
    if due:
        with timed(step.phases, "wait"):
            waiting = await queue.settled(version, config.training.steps)
        batches = [[trajectory.to_dict() for trajectory in batch.trajectories] for batch in waiting]
        state = {"task": task.state_dict(), "batches": batches}
    await publish(meshes, queue, step)
    if evaluation.due(version):
        with timed(step.phases, "evaluate"):
            step.evaluation |= await queue.evaluation(version)
    step.phases |= batch.seconds
    step.finish(batch.trajectories, scored, results)
    step = record.write(step)
    if due:
        with timed(step.phases, "save"):
            await meshes.trainer.save(state)
    return step


async def publish(meshes, queue, step) -> None:
    """Hands the trainer's weights to the generators, once those have taken the version before."""
    with timed(step.phases, "wait"):
        await queue.taken()
    with timed(step.phases, "sync"):
        await queue.publish(await meshes.trainer.send_weights())


async def _uninterrupted(work) -> Any:
    """What `work` returns; Ctrl-C ends the job after it, a second Ctrl-C at once."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def attempt(config: JobConfig, meshes, task, evaluation) -> str:
    """Trains from the last checkpoint, or from the start, to the end; returns the summary.

    Raises:
        TrainerLost: a rank of the trainer was lost; another attempt may follow.
    """
    from torchtitan.experiments.rl.unified.metrics import RunRecord
    from torchtitan.experiments.rl.unified.plan import lead
    from torchtitan.experiments.rl.unified.rollout.queue import Batch, TrajectoryQueue
    from torchtitan.experiments.rl.unified.rollout.trajectory import Trajectory

    (step, state), _ = await asyncio.gather(meshes.trainer.start(), meshes.generators.start())
    batches = [Batch([Trajectory.from_dict(values) for values in batch]) for batch in state.get("batches", [])]
    queue = TrajectoryQueue(lead(config), step, batches)
    task.load_state_dict(state.get("task"))
    with RunRecord(config, step) as record:
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


async def run(config: JobConfig, dry_run: bool = False) -> str:
    """Checks the job, starts its processes, trains; returns the summary (the plan if `dry_run`)."""
    from torchtitan.experiments.rl.unified.plan import plan_job
    from torchtitan.experiments.rl.unified.rollout.evaluation import Evaluation
    from torchtitan.experiments.rl.unified.rollout.task import Task

    with closing(Task(config)) as task, closing(Evaluation(config)) as evaluation:
        plan = plan_job(config)
        if dry_run:
            return plan.text()
        for warning in plan.warnings():
            print(f"warning: {warning}", file=sys.stderr)
        if find_start(config).finished:
            return f"no step was taken: {config.job.dump_folder} stands at its last step"
        # Monarch starts threads at import: only a job that can run gets that far.
        from torchtitan.experiments.rl.unified.actors.hosts import check_cluster
        from torchtitan.experiments.rl.unified.actors.mesh import Meshes
        from torchtitan.experiments.rl.unified.metrics import set_aside

        if dropped := task.prompts.dropped:
            print(f"left out {dropped} prompts that are too long; {len(task.prompts.prompts)} are there to train on")
        check_cluster(config)
        if aside := set_aside(config):
            print(f"{config.job.dump_folder} holds an earlier run: moved to {aside}")
        async with Meshes(config) as meshes:
            for restart in range(config.supervision.max_restarts + 1):
                try:
                    return await attempt(config, meshes, task, evaluation)
                except TrainerLost as error:
                    if not config.checkpoint.enable or restart == config.supervision.max_restarts:
                        raise
                    logger.warning("%s: going on from the last checkpoint, restart %d", error, restart + 1)


def main(args: list[str]) -> int:
    """Exit status: 0 after the last step, 1 for a job that cannot run or that failed, 130 after Ctrl-C."""
    quiet_libraries()
    try:
        config = load_job_config([arg for arg in args if arg != "--dry_run"])
        honour_environment(config)
        print(asyncio.run(run(config, dry_run="--dry_run" in args)))
    except (ValueError, CheckpointError, NonFiniteError, ParityError, ProcessLost, WeightTransferError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
