# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The RL job: `python simple_rl_multiprocess.py [--job.config_file X.toml] [--section.key value ...]`.

Sample a group of completions for each prompt, reward them, take one optimizer step on their group-relative
advantages, send the new weights to the generator, and again. The trainer is a mesh of Monarch actors over torchtitan's
Trainer, the generator one over vLLM's engine.
"""

import asyncio
import sys
from contextlib import closing

from torchtitan.experiments.rl.unified.infra.process import honour_environment, quiet_libraries
from torchtitan.experiments.rl.unified.infra.weight_transport import WeightTransferError
from torchtitan.experiments.rl.unified.job_config import JobConfig, load_job_config
from torchtitan.experiments.rl.unified.parity import ParityError


async def train(config: JobConfig, meshes, record, task) -> None:
    """GRPO (arXiv:2402.03300): each step samples, rewards, trains and sends the new weights, one after the other.

    Args:
        config: the job.
        meshes: actors.mesh.Meshes, entered.
        record: metrics.RunRecord.
        task: rollout.task.Task: prompts, rewards and advantages.
    """
    if meshes.first_step:
        task.load_state_dict(meshes.task_state)
    await meshes.sync_weights()
    for _ in range(meshes.first_step, config.training.steps):
        with record.step() as step:
            with step.phase("generate"):
                trajectories = await meshes.generate(task.next_requests())
            with step.phase("reward"):
                scored = task.score(trajectories)
            with step.phase("train"):
                results = await meshes.train(trajectories, scored.advantages, task.state_dict())
            with step.phase("sync"):
                version = await meshes.sync_weights()
            step.finish(trajectories, scored, results, version)


async def run(config: JobConfig) -> str:
    """Checks the job, starts its processes, trains; returns the summary."""
    from torchtitan.experiments.rl.unified.rollout.task import Task

    with closing(Task(config)) as task:
        # Monarch starts threads at import: only a job that can run gets that far.
        from torchtitan.experiments.rl.unified.actors.mesh import Meshes
        from torchtitan.experiments.rl.unified.metrics import RunRecord, set_aside

        if aside := set_aside(config):
            print(f"{config.job.dump_folder} holds an earlier run: moved to {aside}")
        async with Meshes(config) as meshes:
            with RunRecord(config, meshes.first_step) as record:
                await train(config, meshes, record, task)
                return record.summary()


def main(args: list[str]) -> int:
    """Exit status: 0 after the last step, 1 for a job that cannot run or that failed, 130 after Ctrl-C."""
    quiet_libraries()
    try:
        config = load_job_config(args)
        honour_environment(config)
        print(asyncio.run(run(config)))
    except (ValueError, ParityError, WeightTransferError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
