# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A TrainSpec as torchtitan's Trainer is to run it for a policy."""

import dataclasses

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.experiments.rl.unified.families.base import policy_train_spec
from torchtitan.experiments.rl.unified.trainer.parallelize import parallelize_policy
from torchtitan.protocols import train_spec


class StepMetrics(MetricsProcessor):
    """torchtitan's metrics processor, keeping the last step's figures for whoever drives the trainer."""

    last: dict[str, float]

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None) -> None:
        self.last = {"loss": float(global_avg_loss), "grad_norm": float(grad_norm), "lr": float(extra_metrics["lr"])}
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()


def register_policy(name: str) -> str:
    """Registers the TrainSpec `name` as torchtitan's Trainer is to run it here, and returns its name there."""
    registered = f"{name}_policy"
    if registered not in train_spec._extra_train_specs:
        train_spec.register_train_spec(
            registered,
            dataclasses.replace(
                policy_train_spec(name),
                parallelize_fn=parallelize_policy,
                # Prompts come from the controller; torchtitan's dataloader has nothing to load.
                build_dataloader_fn=None,
                build_metrics_processor_fn=lambda job_config, parallel_dims, _: StepMetrics(job_config, parallel_dims),
            ),
        )
    return registered
