# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The two loops of a job, `generate` and `train`, that meet in a TrajectoryQueue."""

import asyncio
from typing import Any

from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.errors import ParityError, WeightTransferError
from torchtitan.experiments.rl.unified.messages import ParityReport, StepResult
from torchtitan.experiments.rl.unified.record.timing import timed


async def generate(config: JobConfig, meshes, queue, task, evaluation) -> None:
    """The generators' loop: takes policy versions from `queue`, puts batches and evaluations into it.

    It waits for the version that its next batch is due under, which `train` publishes; it ends on the last version.
    """
    from torchtitan.experiments.rl.unified.controller.queue import Batch

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


def check_compared(config: JobConfig, results: list[StepResult]) -> None:
    """Raises ParityError if `[parity] check` is "assert" and a step's results say that nothing was compared.

    Tokens whose weights are gone are reported as such, and no excuse for the others.
    """
    parity = sum((result.parity for result in results), start=ParityReport())
    if config.parity.check == "assert" and not parity.tokens_compared and not parity.tokens_unverifiable:
        raise ParityError(f"step {results[0].step}: not one of its tokens was compared: the parity check is empty")


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
    check_compared(config, results)
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
        update = await meshes.trainer.send_weights()
        step.weights_changed = update.changed
        await queue.publish(update)


async def _uninterrupted(work) -> Any:
    """What `work` returns; Ctrl-C ends the job after it, a second Ctrl-C at once."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
