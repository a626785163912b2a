# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Policy losses by name. To add one: write its file and give it a name in LOSSES."""

from torchtitan.experiments.rl.unified.algorithms.losses.base import kl_k3, PolicyLoss, tis_weight
from torchtitan.experiments.rl.unified.algorithms.losses.dapo import DAPO
from torchtitan.experiments.rl.unified.algorithms.losses.dr_grpo import DrGRPO
from torchtitan.experiments.rl.unified.algorithms.losses.grpo import GRPO
from torchtitan.experiments.rl.unified.algorithms.losses.reinforce import Reinforce
from torchtitan.experiments.rl.unified.config import sections

__all__ = ["kl_k3", "LOSSES", "policy_loss", "PolicyLoss", "tis_weight"]

LOSSES: dict[str, type[PolicyLoss]] = {"grpo": GRPO, "dr_grpo": DrGRPO, "dapo": DAPO, "reinforce": Reinforce}


def policy_loss(config: sections.PolicyLoss) -> PolicyLoss:
    """The loss that `[policy_loss]` asks for.

    Raises:
        ValueError: no loss has that name, or a setting is out of its range.
    """
    if config.name not in LOSSES:
        raise ValueError(f"policy_loss.name = {config.name!r} does not exist; choose one of: {', '.join(LOSSES)}")
    if not 0 <= config.kl_weight < float("inf"):
        raise ValueError(f"policy_loss.kl_weight = {config.kl_weight} must not be below 0; 0 is off")
    if not config.tis_cap > 0:
        raise ValueError(f"policy_loss.tis_cap = {config.tis_cap} must be above 0: it is the largest importance weight")
    return LOSSES[config.name](config.clip_low, config.clip_high)
