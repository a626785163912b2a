# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A trainer rank as a Monarch actor."""

import os
from typing import Any

import torch
from monarch.actor import Actor, endpoint
from torchtitan.experiments.rl.unified.infra.device import prepare_torchtitan
from torchtitan.experiments.rl.unified.infra.process import quiet_libraries, threads_of_rank
from torchtitan.experiments.rl.unified.infra.weight_transport import build_transport, WeightUpdate
from torchtitan.experiments.rl.unified.job_config import JobConfig
from torchtitan.experiments.rl.unified.rollout.trajectory import Trajectory


class TrainerActor(Actor):
    """One rank of the trainer mesh; every endpoint is called on all ranks at once.

    Args:
        config: the job.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config

    @endpoint
    def setup(self) -> tuple[int, dict[str, Any]]:
        """Builds the trainer and loads its state; returns the step it stands at and the task's state there."""
        quiet_libraries()
        torch.set_num_threads(self.config.trainer.num_threads or threads_of_rank(int(os.environ["LOCAL_WORLD_SIZE"])))
        prepare_torchtitan()
        from torchtitan.experiments.rl.unified.trainer import RLTrainer

        self.trainer = RLTrainer(self.config)
        self.trainer.load()
        self.transport = build_transport(self.config.weight_sync.transport)
        return self.trainer.step, self.trainer.task_state

    @endpoint
    def step(self, trajectories: list[Trajectory], advantages: torch.Tensor, task_state: dict[str, Any]):
        """One optimizer step on this rank's share; returns a trainer.StepResult."""
        return self.trainer.step_on(trajectories, advantages, task_state)

    @endpoint
    def send_weights(self) -> WeightUpdate | None:
        """Puts the weights where generators can fetch them; rank 0 returns what they need for that."""
        weights = self.trainer.policy_weights(getattr(torch, self.config.generator.dtype))
        if int(os.environ["RANK"]) == 0:
            return self.transport.send(self.trainer.step, weights)
        for _ in weights:  # Gathering shards takes every rank.
            pass
        return None

    @endpoint
    def close(self) -> None:
        """Frees shared memory and ends the process group."""
        self.transport.close()
        self.trainer.close()
        torch.distributed.destroy_process_group()
