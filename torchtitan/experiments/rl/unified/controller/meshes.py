# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The processes of a job."""

import asyncio
import logging

import monarch.actor
from monarch.actor import MeshFailure
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.controller.generators import Generators
from torchtitan.experiments.rl.unified.controller.hosts import Hosts
from torchtitan.experiments.rl.unified.controller.trainer_mesh import TrainerMesh

logger = logging.getLogger(__name__)


class Meshes:
    """Trainer mesh and generators of one job; an async context manager that starts the generators and stops them all.

    Args:
        config: the job.

    Attributes:
        trainer: to be started by whoever trains, again if it was lost.
        generators: started.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config

    async def __aenter__(self) -> "Meshes":
        # Monarch would interrupt this process when an actor fails; here the call that waits for the actor fails.
        self._fault_hook, monarch.actor.unhandled_fault_hook = monarch.actor.unhandled_fault_hook, _log_fault
        hosts = Hosts(self.config)
        self.trainer = TrainerMesh(self.config, hosts.trainer)
        self.generators = Generators(self.config, hosts.generators)
        return self

    async def __aexit__(self, kind, error, traceback) -> None:
        await asyncio.gather(self.trainer.stop(), self.generators.stop())
        monarch.actor.unhandled_fault_hook = self._fault_hook


def _log_fault(failure: MeshFailure) -> None:
    logger.debug("Monarch: %s", failure)
