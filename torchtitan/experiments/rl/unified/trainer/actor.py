# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A rank of the trainer as a Monarch actor."""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from monarch.actor import Actor, endpoint
from torchtitan.experiments.rl.unified.config.derived import threads_of_rank
from torchtitan.experiments.rl.unified.config.environment import exit_at_once, prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.isolation import keep_stores_on_loopback
from torchtitan.experiments.rl.unified.messages import Trajectory, WeightUpdate
from torchtitan.experiments.rl.unified.trainer.verdict import error_to_tell
from torchtitan.experiments.rl.unified.weights.changes import Changes
from torchtitan.experiments.rl.unified.weights.transports import build_transport

logger = logging.getLogger(__name__)


def of_every_rank(method: Callable) -> Any:
    """An endpoint that answers (rank, what `method` returns), or with an error that any process can read."""

    @endpoint
    @functools.wraps(method)
    def answer(self, *args):
        rank = int(os.environ["RANK"])
        try:
            return rank, method(self, *args)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # DCP's CheckpointException and SystemExit are no Exceptions.
            logger.info("rank %d", rank, exc_info=True)
            raise error_to_tell(error, rank) from None

    return answer


class TrainerActor(Actor):
    """One rank of the trainer mesh; every endpoint is called on all ranks at once.

    Args:
        config: the job.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config

    @of_every_rank
    def setup(self) -> tuple[int, dict[str, Any], str]:
        """Builds the trainer and loads its state; returns its step, the task's state there and its arithmetic."""
        prepare_environment()
        keep_stores_on_loopback()
        torch.set_num_threads(self.config.trainer.num_threads or threads_of_rank(int(os.environ["LOCAL_WORLD_SIZE"])))
        this_device().prepare_trainer()
        from torchtitan.experiments.rl.unified.trainer.trainer import RLTrainer

        self.trainer = RLTrainer(self.config)
        self.trainer.load()
        self.transport, self.changes = build_transport(self.config), Changes()
        exit_at_once()
        return self.trainer.step, self.trainer.task_state, this_device().arithmetic()

    @of_every_rank
    def step(self, trajectories: list[Trajectory], advantages: torch.Tensor):
        """One optimizer step on this rank's share; returns a trainer.StepResult."""
        return self.trainer.step_on(trajectories, advantages)

    @of_every_rank
    def save(self, task_state: dict[str, Any]) -> None:
        """Saves the checkpoint that is due."""
        self.trainer.save(task_state)

    @of_every_rank
    def send_weights(self) -> WeightUpdate | None:
        """Puts the weights where generators can fetch them; rank 0 returns what they need for that."""
        weights = self.trainer.policy_weights(getattr(torch, self.config.generator.dtype))
        if int(os.environ["RANK"]) == 0:
            update = self.transport.send(self.trainer.step, self.changes.watch(weights))
            return replace(update, changed=self.changes.share())
        for _ in weights.stream:  # Gathering shards takes every rank.
            pass
        return None

    @of_every_rank
    def ping(self) -> None:
        """Answers."""

    @of_every_rank
    def close(self) -> None:
        """Frees shared memory and ends the process group."""
        self.transport.close()
        self.trainer.close()
        torch.distributed.destroy_process_group()
