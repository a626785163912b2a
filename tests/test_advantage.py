# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Advantage estimators against plain loops, and the groups that must give no gradient."""

import math

import pytest
import torch
from torchtitan.experiments.rl.unified.algorithms.advantages import (
    advantage_estimator,
    ADVANTAGES,
    share_without_signal,
    STD_EPSILON,
)

REWARDS_PG = torch.tensor(
    [[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [-3.0, 2.5, 0.25, 1e6], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64
)


def reference(name: str, rewards: list[list[float]]) -> list[list[float]]:
    """The estimators' definitions, one number at a time."""
    everything = [reward for group in rewards for reward in group]
    result = []
    for group in rewards:
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in group) / len(group))
        row = []
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            row.append(
                {
                    "grpo": (reward - mean) / (std + STD_EPSILON),
                    "dr_grpo": reward - mean,
                    "rloo": reward - math.fsum(others) / max(len(others), 1),
                    "reinforce": reward - math.fsum(everything) / len(everything),
                }[name]
            )
        result.append(row)
    return result


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equals_the_definition(name):
    expected_PG = torch.tensor(reference(name, REWARDS_PG.tolist()), dtype=torch.float64)
    torch.testing.assert_close(ADVANTAGES[name](REWARDS_PG), expected_PG, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_shape_and_dtype_and_repeats_to_the_bit(name, dtype):
    rewards_PG = torch.rand(7, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    advantages_PG = ADVANTAGES[name](rewards_PG)
    assert advantages_PG.shape == (7, 5) and advantages_PG.dtype == dtype
    assert torch.equal(advantages_PG, ADVANTAGES[name](rewards_PG.clone()))


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(name, group, dtype):
    # The mean of three times 0.1 is not 0.1.
    rewards_PG = torch.full((2, group), 0.1, dtype=dtype)
    assert torch.equal(ADVANTAGES[name](rewards_PG), torch.zeros(2, group, dtype=dtype))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_group_depends_on_nothing_but_itself(name):
    rewards_PG = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    alone_PG = torch.cat([ADVANTAGES[name](rewards_PG[i : i + 1]) for i in range(6)])
    assert torch.equal(ADVANTAGES[name](rewards_PG), alone_PG)


def test_grpo_does_not_blow_up_rounding():
    rewards_PG = torch.tensor([[1.0, 1.0 + 1e-15]], dtype=torch.float64)
    assert ADVANTAGES["grpo"](rewards_PG).abs().max() < 1e-6


def test_share_without_signal():
    assert share_without_signal(REWARDS_PG) == 0.25
    assert share_without_signal(REWARDS_PG[1:2]) == 1.0
    assert share_without_signal(REWARDS_PG[2:]) == 0.0
    assert share_without_signal(torch.tensor([[0.1], [0.3]])) == 1.0


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'gae' does not exist; choose one of: grpo, dr_grpo, rloo, reinforce"):
        advantage_estimator("gae", 8)


def test_a_group_of_one_needs_a_baseline_of_the_batch():
    with pytest.raises(ValueError, match="rl.group_size is 1"):
        advantage_estimator("grpo", 1)
    assert advantage_estimator("reinforce", 1) is ADVANTAGES["reinforce"]
    assert advantage_estimator("grpo", 2) is ADVANTAGES["grpo"]
