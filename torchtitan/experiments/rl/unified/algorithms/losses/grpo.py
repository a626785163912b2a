# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""GRPO."""

from torchtitan.experiments.rl.unified.algorithms.losses.base import ClippedLoss


class GRPO(ClippedLoss):
    """The clipped surrogate with one clip range for both sides, averaged over all tokens of the step.

    Source: DeepSeekMath, arXiv:2402.03300, eq. 3, whose KL term is `[policy_loss] kl_weight` here. The paper averages
    over each completion first, which makes a token of a long one weigh less; the mean over all tokens is that of
    arXiv:2503.14476, section 3.3.

    Raises:
        ValueError: for two clip ranges.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2) -> None:
        super().__init__(clip_low, clip_high)
        if clip_low != clip_high:
            raise ValueError(
                f"policy_loss.clip_low = {clip_low}, clip_high = {clip_high}: GRPO has one clip range for both sides; "
                'make them equal or choose "dapo"'
            )
