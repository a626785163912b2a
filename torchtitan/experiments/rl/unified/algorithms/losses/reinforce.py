# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""REINFORCE."""

import torch
from torchtitan.experiments.rl.unified.algorithms.losses.base import PolicyLoss


class Reinforce(PolicyLoss):
    """-A log p: no ratio, no clip.

    Source: Williams, Simple statistical gradient-following algorithms, Machine Learning 8 (1992).
    """

    def __call__(self, logprobs_T, old_logprobs_T, advantages_T):
        return -advantages_T * logprobs_T, torch.zeros_like(advantages_T, dtype=torch.bool)
