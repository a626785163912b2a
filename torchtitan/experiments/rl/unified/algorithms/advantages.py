# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Advantage estimators: what a completion's reward is worth beside the others'.

An estimator maps rewards_PG, a float tensor of P prompts with G completions each, to advantages of the same shape and
dtype. It is deterministic, and a group (for `reinforce`: a batch) of equal rewards has advantages of exactly 0.
To add one: write the function and give it a name in ADVANTAGES.
"""

from collections.abc import Callable

import torch

Estimator = Callable[[torch.Tensor], torch.Tensor]

# Keeps groups whose rewards differ by rounding alone from being blown up to unit spread.
STD_EPSILON = 1e-6


def grpo(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards relative to their group, in its standard deviations (the group's own, not an estimate of a larger one's).

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2.
    """
    centred_PG = _centred(rewards_PG.double(), dim=1)
    std_P1 = centred_PG.square().mean(dim=1, keepdim=True).sqrt()
    return (centred_PG / (std_P1 + STD_EPSILON)).to(rewards_PG.dtype)


def dr_grpo(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards less their group's mean, not divided by its spread, which would favour very easy and very hard prompts.

    Source: Understanding R1-Zero-Like Training, arXiv:2503.20783, section 3.
    """
    return _centred(rewards_PG.double(), dim=1).to(rewards_PG.dtype)


def rloo(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards less the mean of the group's other rewards, an unbiased baseline; a group of one has none and gets 0.

    Source: Back to Basics, arXiv:2402.14740, section 2.3.
    """
    group = rewards_PG.shape[1]
    return (_centred(rewards_PG.double(), dim=1) * (group / max(group - 1, 1))).to(rewards_PG.dtype)


def reinforce(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards less the mean of the whole batch.

    Source: Williams, Simple statistical gradient-following algorithms, Machine Learning 8 (1992), with the average
    reward as baseline.
    """
    return _centred(rewards_PG.double().flatten(), dim=0).view_as(rewards_PG).to(rewards_PG.dtype)


ADVANTAGES: dict[str, Estimator] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce": reinforce}


def advantage_estimator(name: str, group_size: int) -> Estimator:
    """The estimator called `name`.

    Raises:
        ValueError: no estimator has that name, or all its advantages would be 0 with groups of `group_size`.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"advantage.name = {name!r} does not exist; choose one of: {', '.join(ADVANTAGES)}")
    if group_size == 1 and name != "reinforce":
        raise ValueError(
            f"advantage.name = {name!r} compares completions of one prompt, but rl.group_size is 1: every advantage "
            'would be 0; raise rl.group_size or choose "reinforce"'
        )
    return ADVANTAGES[name]


def share_without_signal(rewards_PG: torch.Tensor) -> float:
    """The share of groups whose rewards are all equal, which have nothing to tell completions apart by."""
    return (rewards_PG.amax(dim=1) == rewards_PG.amin(dim=1)).double().mean().item()


def _centred(rewards: torch.Tensor, dim: int) -> torch.Tensor:
    """`rewards` less their mean over `dim`; exactly 0 where all are equal, whose mean may be a rounding error away."""
    equal = rewards.amax(dim, keepdim=True) == rewards.amin(dim, keepdim=True)
    return (rewards - rewards.mean(dim, keepdim=True)).masked_fill(equal, 0.0)
