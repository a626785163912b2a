# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A generator as a Monarch actor."""

from monarch.actor import Actor, endpoint
from torchtitan.experiments.rl.unified.generator import Generator
from torchtitan.experiments.rl.unified.infra.process import quiet_libraries
from torchtitan.experiments.rl.unified.infra.weight_transport import WeightUpdate
from torchtitan.experiments.rl.unified.job_config import JobConfig
from torchtitan.experiments.rl.unified.rollout.trajectory import Request, Trajectory


class GeneratorActor(Actor):
    """One vLLM engine.

    Args:
        config: the job.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config

    @endpoint
    def setup(self) -> None:
        """Starts the engine on the checkpoint's weights."""
        quiet_libraries()
        self.generator = Generator(self.config)

    @endpoint
    def generate(self, requests: list[Request]) -> list[Trajectory]:
        """Samples one completion for each request."""
        return self.generator.generate(requests)

    @endpoint
    def update_weights(self, update: WeightUpdate) -> int:
        """Replaces the weights; returns the version the engine runs now."""
        return self.generator.update_weights(update)
