# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The processes of a job, as Monarch meshes, and calls on them that always end."""

import asyncio
import logging
from typing import Any

import monarch.actor
import torch
from monarch.actor import ActorError, MeshFailure, this_host
from monarch.spmd import setup_torch_elastic_env_async
from torchtitan.experiments.rl.unified.actors.generator import GeneratorActor
from torchtitan.experiments.rl.unified.actors.trainer import TrainerActor
from torchtitan.experiments.rl.unified.infra.weight_transport import WeightUpdate
from torchtitan.experiments.rl.unified.job_config import JobConfig
from torchtitan.experiments.rl.unified.preflight import trainer_ranks
from torchtitan.experiments.rl.unified.rollout.trajectory import Request, Trajectory

logger = logging.getLogger(__name__)


class Meshes:
    """Trainer mesh and generator of one job; an async context manager that starts and stops them.

    Args:
        config: the job.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config

    async def __aenter__(self) -> "Meshes":
        # Monarch would interrupt this process when an actor fails; here the call that waits for the actor fails.
        self._fault_hook, monarch.actor.unhandled_fault_hook = monarch.actor.unhandled_fault_hook, _log_fault
        host = this_host()
        self._trainer_procs = host.spawn_procs(per_host={"ranks": trainer_ranks(self.config)}, name="trainer")
        self._generator_procs = host.spawn_procs(per_host={"ranks": 1}, name="generator")
        try:
            await setup_torch_elastic_env_async(self._trainer_procs)
            self._trainer = self._trainer_procs.spawn("trainer", TrainerActor, self.config)
            self._generator = self._generator_procs.spawn("generator", GeneratorActor, self.config)
            limit = self.config.comm.init_timeout_seconds
            steps, _ = await asyncio.gather(
                _answer(self._trainer.setup.call(), limit, "the trainer to start"),
                _answer(self._generator.setup.call_one(), limit, "the generator to start"),
            )
            self.first_step, self.task_state = _rank0(steps)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, kind, error, traceback) -> None:
        if kind is None:
            await _answer(self._trainer.close.call(), self.config.trainer.timeout_seconds, "the trainer to close")
        await self._stop()

    async def generate(self, requests: list[Request]) -> list[Trajectory]:
        """One completion for each request, in their order."""
        limit = self.config.generator.timeout_seconds
        return await _answer(self._generator.generate.call_one(requests), limit, f"{len(requests)} completions")

    async def train(
        self, trajectories: list[Trajectory], advantages: torch.Tensor, task_state: dict[str, Any]
    ) -> list[Any]:
        """One optimizer step, and a checkpoint if one is due; returns each rank's trainer.StepResult."""
        limit = self.config.trainer.timeout_seconds
        results = await _answer(self._trainer.step.call(trajectories, advantages, task_state), limit, "a training step")
        return [result for _, result in results.items()]

    async def sync_weights(self) -> int:
        """Brings the trainer's weights to the generator; returns the policy version that both have now.

        Raises:
            RuntimeError: the generator ended up on another version.
        """
        limit = self.config.trainer.timeout_seconds
        update: WeightUpdate = _rank0(await _answer(self._trainer.send_weights.call(), limit, "the trainer's weights"))
        version = await _answer(self._generator.update_weights.call_one(update), limit, "the generator's weight update")
        if version != update.version:
            raise RuntimeError(f"the generator runs policy version {version}, the trainer sent {update.version}")
        return version

    async def _stop(self) -> None:
        await self._generator_procs.stop()
        await self._trainer_procs.stop()
        monarch.actor.unhandled_fault_hook = self._fault_hook


def _log_fault(failure: MeshFailure) -> None:
    logger.warning("an actor failed: %s", failure)


def _rank0(values) -> Any:
    return next(iter(values.items()))[1]


async def _answer(future, seconds: float, what: str) -> Any:
    """What `future` gives; raises what the actor raised, or TimeoutError that says what was waited for."""

    async def wait():
        return await future

    try:
        return await asyncio.wait_for(wait(), seconds)
    except asyncio.TimeoutError as error:
        raise TimeoutError(f"waited {seconds:.0f} s for {what}; nothing came") from error
    except ActorError as error:
        raise error.exception from error
