# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The controller's side of the generators."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

from monarch.actor import HostMesh
from torchtitan.experiments.rl.unified.config.derived import trainer_ranks
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.controller.calls import all_or_none, answer, stop
from torchtitan.experiments.rl.unified.controller.hosts import bind_to_cores
from torchtitan.experiments.rl.unified.errors import ActorFailed, ProcessLost, WeightTransferError
from torchtitan.experiments.rl.unified.generator.actor import GeneratorActor
from torchtitan.experiments.rl.unified.messages import Request, Trajectory, WeightUpdate

logger = logging.getLogger(__name__)


class Replica:
    """One generator, from the controller's side; a lost one is started again with the weights it had.

    A completion is a function of weights, prompt and seed: what a lost generator was asked for comes out the same of
    its successor.

    Args:
        config: the job.
        host: where it runs.
        name: for its process and in messages.
        first_gpu: number of the first GPU it takes, on a machine with so many.
    """

    def __init__(self, config: JobConfig, host: HostMesh, name: str, first_gpu: int) -> None:
        self.config, self.host, self.name, self.first_gpu = config, host, name, first_gpu
        self._procs = None
        self._restarts = 0
        self._update: WeightUpdate | None = None

    async def start(self) -> None:
        """Starts the engine unless it runs, on the checkpoint's weights; what a trainer sent before may be gone."""
        self._update = None
        await self._surviving(self._ready)

    async def _ready(self) -> None:
        """The engine runs, on the weights of the last update if there was one."""
        if self._procs is not None:
            return
        binding = bind_to_cores(self.config.generator.cores, 1)
        self._procs = self.host.spawn_procs(per_host={"ranks": 1}, name=self.name, proc_bind=binding)
        self._actor = self._procs.spawn(self.name, GeneratorActor, self.config, self.first_gpu)
        limit = self.config.supervision.start_seconds
        self.arithmetic = await answer(self._actor.setup.call_one(), limit, f"{self.name} to start")
        if self._update is not None:
            await self._fetch()

    async def generate(self, requests: list[Request]) -> list[Trajectory]:
        """One completion for each request, in their order."""
        # An evaluation may ask for many batches at once.
        batch = self.config.rl.prompts_per_step * self.config.rl.group_size / self.config.generator.replicas
        limit = self.config.generator.timeout_seconds * max(1.0, len(requests) / batch)
        what = f"{len(requests)} completions of {self.name}"
        return await self._surviving(lambda: answer(self._actor.generate.call_one(requests), limit, what))

    async def update_weights(self, update: WeightUpdate) -> None:
        """Brings the weights of `update` to the engine, which runs no request meanwhile.

        Raises:
            WeightTransferError: they did not arrive as they were sent; the engine keeps its old ones.
        """
        self._update = update
        await self._surviving(self._fetch)

    async def stop(self) -> None:
        """Ends the engine's process at once."""
        if self._procs is not None:
            procs, self._procs = self._procs, None
            await stop(procs)

    async def _fetch(self) -> None:
        limit = self.config.trainer.timeout_seconds
        what = f"the weight update of {self.name} to version {self._update.version}"
        version = await answer(self._actor.update_weights.call_one(self._update), limit, what)
        if version != self._update.version:
            raise WeightTransferError(f"{self.name} runs policy version {version} after {what}")

    async def _surviving(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                await self._ready()
                return await attempt()
            except (WeightTransferError, ValueError):  # A refusal, not a crash: another engine would say the same.
                raise
            except Exception as error:
                await self.stop()
                # Of several ranks one may have been killed; one alone that raises would do so again.
                if isinstance(error, ActorFailed) and self.config.generator.tensor_parallel_degree == 1:
                    raise ActorFailed(f"{self.name} failed: {error}") from error
                if self._restarts == self.config.supervision.max_restarts:
                    raise ProcessLost(
                        f"{self.name} failed and [supervision] max_restarts = {self._restarts} is used up: {error}"
                    ) from error
                self._restarts += 1
                logger.warning("%s failed (%s): starting it again, restart %d", self.name, error, self._restarts)


class Generators:
    """The replicas, as one generator.

    Args:
        config: the job.
        hosts: one for each replica.
    """

    def __init__(self, config: JobConfig, hosts: list[HostMesh]) -> None:
        # The trainer's GPUs come first where it shares a machine with the generators.
        first = 0 if config.cluster.generators else trainer_ranks(config)
        degree, machines = config.generator.tensor_parallel_degree, max(1, len(config.cluster.generators))
        # Replicas take the machines in turn: on each its GPUs are counted from the first one on.
        self.replicas = [
            Replica(config, host, f"generator{index}", first + index // machines * degree)
            for index, host in enumerate(hosts)
        ]

    async def start(self) -> None:
        """Starts every engine that does not run, for a trainer that starts too."""
        await all_or_none(replica.start() for replica in self.replicas)

    async def generate(self, requests: list[Request]) -> list[Trajectory]:
        """One completion for each request, in their order; the replicas take equal runs of neighbours."""
        count = len(self.replicas)
        bounds = [index * len(requests) // count for index in range(count + 1)]
        shares = [requests[start:end] for start, end in pairwise(bounds)]
        parts = await all_or_none(r.generate(share) for r, share in zip(self.replicas, shares, strict=True))
        return [trajectory for part in parts for trajectory in part]

    async def update_weights(self, update: WeightUpdate) -> None:
        """Brings the weights of `update` to every engine; errors as Replica's."""
        await all_or_none(replica.update_weights(update) for replica in self.replicas)

    async def stop(self) -> None:
        """Ends every engine's process at once."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
