# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The controller's side of all trainer ranks."""

from dataclasses import replace
from typing import Any

import torch
from monarch.actor import HostMesh
from monarch.spmd import setup_torch_elastic_env_async
from torchtitan.experiments.rl.unified.config.derived import trainer_ranks
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.controller.calls import answer, stop
from torchtitan.experiments.rl.unified.controller.hosts import bind_to_cores, one_arithmetic
from torchtitan.experiments.rl.unified.errors import ProcessLost, TrainerLost
from torchtitan.experiments.rl.unified.messages import Trajectory, WeightUpdate
from torchtitan.experiments.rl.unified.trainer.actor import TrainerActor


class TrainerMesh:
    """All ranks of the trainer, from the controller's side.

    Args:
        config: the job.
        host: where the ranks run.

    Raises:
        TrainerLost: from every call, if a rank ended or did not answer in time; `start` begins anew.
    """

    def __init__(self, config: JobConfig, host: HostMesh) -> None:
        self.config, self.host = config, host
        self._procs = None
        self.arithmetic = ""

    async def start(self) -> tuple[int, dict[str, Any]]:
        """Starts the ranks, again if they ran; returns the step they stand at and the task's state there.

        Raises:
            ParityError: their hosts compute by different instructions.
        """
        await self.stop()
        ranks = trainer_ranks(self.config) // len(self.config.cluster.trainer or [None])
        binding = bind_to_cores(self.config.trainer.cores, ranks)
        self._procs = self.host.spawn_procs(per_host={"ranks": ranks}, name="trainer", proc_bind=binding)
        await setup_torch_elastic_env_async(self._procs)
        self._actors = self._procs.spawn("trainer", TrainerActor, self.config)
        limit = self.config.comm.init_timeout_seconds
        answers = await self._call(self._actors.setup.call(), "the trainer to start", limit)
        self.arithmetic = one_arithmetic({f"trainer rank {i}": a for i, (_, (*_, a)) in enumerate(answers.items())})
        # Started again it goes on from what this run has saved since, not from the step that the run began with.
        self.config = replace(self.config, checkpoint=replace(self.config.checkpoint, load_step=-1))
        step, state, _ = _rank0(answers)
        return step, state

    async def step(self, trajectories: list[Trajectory], advantages: torch.Tensor) -> list[Any]:
        """One optimizer step; returns each rank's trainer.StepResult."""
        results = await self._call(self._actors.step.call(trajectories, advantages), "a training step")
        return [result for _, result in results.items()]

    async def save(self, task_state: dict[str, Any]) -> None:
        """Saves the checkpoint that is due, with the task's state."""
        await self._call(self._actors.save.call(task_state), "a checkpoint")

    async def send_weights(self) -> WeightUpdate:
        """Makes the weights fetchable; what was sent before the last time is gone."""
        return _rank0(await self._call(self._actors.send_weights.call(), "the trainer's weights"))

    async def ping(self) -> None:
        """Returns if every rank answers."""
        await self._call(self._actors.ping.call(), "the trainer to answer")

    async def close(self) -> None:
        """Ends the ranks in good order: a checkpoint that is being written is finished."""
        await self._call(self._actors.close.call(), "the trainer to close")
        await self.stop()

    async def stop(self) -> None:
        """Ends the ranks at once."""
        if self._procs is not None:
            procs, self._procs = self._procs, None
            await stop(procs)

    async def _call(self, future, what: str, seconds: float | None = None) -> Any:
        try:
            return await answer(future, seconds or self.config.trainer.timeout_seconds, what)
        except ProcessLost as error:
            raise TrainerLost(str(error)) from error


def _rank0(values) -> Any:
    return next(iter(values.items()))[1]
