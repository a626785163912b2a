# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The controller's side of all trainer ranks."""

from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from monarch.actor import HostMesh
from monarch.spmd import setup_torch_elastic_env_async
from torchtitan.experiments.rl.unified import isolation
from torchtitan.experiments.rl.unified.config.derived import on_many_hosts, trainer_ranks
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
        store = () if on_many_hosts(self.config) else (isolation.ADDRESS, isolation.free_port())
        await setup_torch_elastic_env_async(self._procs, *store)
        self._actors = self._procs.spawn("trainer", TrainerActor, self.config)
        limit = self.config.supervision.start_seconds
        answers = await self._call("the trainer to start", self._actors.setup, seconds=limit)
        self.arithmetic = one_arithmetic({f"trainer rank {rank}": a for rank, (*_, a) in enumerate(answers)})
        # Started again it goes on from what this run has saved since, not from the step that the run began with.
        self.config = replace(self.config, checkpoint=replace(self.config.checkpoint, load_step=-1))
        step, state, _ = answers[0]
        return step, state

    async def step(self, trajectories: list[Trajectory], advantages: torch.Tensor) -> list[Any]:
        """One optimizer step; returns each rank's trainer.StepResult."""
        return await self._call("a training step", self._actors.step, trajectories, advantages)

    async def save(self, task_state: dict[str, Any]) -> None:
        """Saves the checkpoint that is due, with the task's state."""
        await self._call("a checkpoint", self._actors.save, task_state)

    async def send_weights(self) -> WeightUpdate:
        """Makes the weights fetchable; what was sent before the last time is gone."""
        return (await self._call("the trainer's weights", self._actors.send_weights))[0]

    async def ping(self) -> None:
        """Returns if every rank answers, or if none is there any more because one of them failed."""
        if self._procs is not None:
            await self._call("the trainer to answer", self._actors.ping)

    async def close(self) -> None:
        """Ends the ranks in good order: a checkpoint that is being written is finished."""
        await self._call("the trainer to close", self._actors.close)
        await self.stop()

    async def stop(self) -> None:
        """Ends the ranks at once."""
        if self._procs is not None:
            procs, self._procs = self._procs, None
            await stop(procs)

    async def _call(self, what: str, endpoint, *args, seconds: float | None = None) -> list[Any]:
        """The ranks' answers in their order.

        The first error that one answers with ends them all: the others may be waiting for that rank in a collective.
        """

        async def collect() -> list[tuple[int, Any]]:
            return [await future for future in endpoint.stream(*args)]

        try:
            answers = await answer(collect(), seconds or self.config.trainer.timeout_seconds, what)
        except ProcessLost as error:
            raise TrainerLost(str(error)) from error
        except Exception:
            await self.stop()
            raise
        return [value for _, value in sorted(answers, key=itemgetter(0))]
