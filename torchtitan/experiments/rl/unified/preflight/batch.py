# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Whether the step's batch can be shared."""

from torchtitan.experiments.rl.unified.algorithms.losses import policy_loss
from torchtitan.experiments.rl.unified.config.derived import data_parallel_degree
from torchtitan.experiments.rl.unified.config.load import JobConfig


def check_batch(config: JobConfig) -> None:
    """The step's batch can be shared by the trainer's ranks, and its loss exists.

    Raises:
        ValueError: says which setting to change.
    """
    batch, degree = config.rl.prompts_per_step * config.rl.group_size, data_parallel_degree(config)
    sizes = f"[rl] prompts_per_step {config.rl.prompts_per_step} x group_size {config.rl.group_size}"
    if batch < 1:
        raise ValueError(f"{sizes}: nothing to train on; both must be at least 1")
    if batch % degree:
        raise ValueError(
            f"{batch} completions a step ({sizes}) cannot be shared equally by {degree} data-parallel trainer ranks "
            f"([parallelism] data_parallel_*_degree): make the one a multiple of the other"
        )
    policy_loss(config.policy_loss)
