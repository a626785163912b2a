# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A TrainSpec as torchtitan's Trainer is to run it for a policy."""

import dataclasses
import functools

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.experiments.rl.unified.families import PolicyModel
from torchtitan.experiments.rl.unified.trainer.parallelize import parallelize_policy
from torchtitan.protocols import train_spec


class StepMetrics(MetricsProcessor):
    """torchtitan's metrics processor, keeping the last step's figures for whoever drives the trainer."""

    last: dict[str, float]

    def should_log(self, step: int) -> bool:
        return True

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None) -> None:
        self.last = {"loss": float(global_avg_loss), "grad_norm": float(grad_norm), "lr": float(extra_metrics["lr"])}
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()


def register_policy(model: PolicyModel) -> str:
    """Registers the model's TrainSpec as torchtitan's Trainer is to run it here, and returns its name there."""
    train_spec._extra_train_specs["policy"] = dataclasses.replace(
        model.train_spec(),
        parallelize_fn=functools.partial(parallelize_policy, family=model.family),
        # Prompts come from the controller; torchtitan's dataloader has nothing to load.
        build_dataloader_fn=None,
        build_metrics_processor_fn=lambda job_config, parallel_dims, _: StepMetrics(job_config, parallel_dims),
    )
    return "policy"
