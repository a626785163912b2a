# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""An engine as a Monarch actor."""

from monarch.actor import Actor, endpoint
from torchtitan.experiments.rl.unified.config.environment import exit_at_once, prepare_environment
from torchtitan.experiments.rl.unified.config.load import JobConfig
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.errors import crosses_as_text
from torchtitan.experiments.rl.unified.generator.generator import Generator
from torchtitan.experiments.rl.unified.messages import Request, Trajectory, WeightUpdate


class GeneratorActor(Actor):
    """One vLLM engine.

    Args:
        config: the job.
        first_gpu: number of the first GPU it takes, on a machine with so many.
    """

    def __init__(self, config: JobConfig, first_gpu: int) -> None:
        self.config, self.first_gpu = config, first_gpu

    @endpoint
    @crosses_as_text
    def setup(self) -> str:
        """Starts the engine on the checkpoint's weights; returns its arithmetic."""
        prepare_environment()
        this_device().use_cards(self.first_gpu, self.config.generator.tensor_parallel_degree)
        self.generator = Generator(self.config)
        exit_at_once()
        return this_device().arithmetic()

    @endpoint
    @crosses_as_text
    def generate(self, requests: list[Request]) -> list[Trajectory]:
        """Samples one completion for each request."""
        return self.generator.generate(requests)

    @endpoint
    @crosses_as_text
    def update_weights(self, update: WeightUpdate) -> int:
        """Replaces the weights; returns the version the engine runs now."""
        return self.generator.update_weights(update)
