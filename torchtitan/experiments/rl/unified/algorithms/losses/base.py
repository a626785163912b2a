# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What policy losses share.

Shape suffix: T sampled tokens. Old log-probs are those of the policy that a loss keeps the new one close to.
"""

from typing import Literal

import torch

# exp(20) is 5e8: far beyond any clip range, and its square is still finite in fp32, in gradients too. Without a bound a
# ratio overflows to inf, and an inf that the clip discards comes back in the backward pass as 0 * inf.
MAX_LOG_RATIO = 20.0


class PolicyLoss:
    """A loss by its terms, one a sampled token: whoever packs and shards the tokens decides where they are summed.

    Args:
        clip_low: the ratio of new to old probability is clipped at 1 - clip_low.
        clip_high: and at 1 + clip_high.

    Attributes:
        normalization: what the sum of a step's terms is divided by: the number of its sampled tokens, or a constant
            (completions times their token limit).

    Raises:
        ValueError: for a clip range that the loss cannot have.
    """

    normalization: Literal["tokens", "constant"] = "tokens"

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2) -> None:
        if not (0 <= clip_low <= 1 and 0 <= clip_high < float("inf")):
            raise ValueError(
                f"policy_loss.clip_low = {clip_low}, clip_high = {clip_high}: a ratio is clipped to "
                "[1 - clip_low, 1 + clip_high]; clip_low must be between 0 and 1, clip_high not below 0"
            )
        self.clip_low, self.clip_high = clip_low, clip_high

    def __call__(
        self, logprobs_T: torch.Tensor, old_logprobs_T: torch.Tensor, advantages_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The terms, to be minimised.

        Args:
            logprobs_T: of the sampled tokens under the policy being trained; the only input with a gradient.
            old_logprobs_T: under the old policy.
            advantages_T: of the completions they belong to.

        Returns:
            loss_T, and clipped_T: bool, where the clip stops the gradient.
        """
        raise NotImplementedError


class ClippedLoss(PolicyLoss):
    """The clipped surrogate -min(r A, clip(r) A) of the probability ratio r = new / old.

    Source: Proximal Policy Optimization Algorithms, arXiv:1707.06347, eq. 7.
    """

    def __call__(self, logprobs_T, old_logprobs_T, advantages_T):
        ratio_T = probability_ratio(logprobs_T, old_logprobs_T)
        clipped_ratio_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high)
        too_high_T = (ratio_T > 1 + self.clip_high) & (advantages_T > 0)
        too_low_T = (ratio_T < 1 - self.clip_low) & (advantages_T < 0)
        return -torch.minimum(ratio_T * advantages_T, clipped_ratio_T * advantages_T), too_high_T | too_low_T


def probability_ratio(logprobs_T: torch.Tensor, old_logprobs_T: torch.Tensor) -> torch.Tensor:
    """exp(new - old), kept within exp(-MAX_LOG_RATIO) and exp(MAX_LOG_RATIO)."""
    return (logprobs_T - old_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_k3(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy, reference) from tokens the policy sampled: r - 1 - log r with r = ref / policy.

    Never negative, unbiased, of low variance. Source: http://joschu.net/blog/kl-approx.html, "k3".
    """
    log_ratio_T = (ref_logprobs_T - logprobs_T).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio_T) - log_ratio_T


def tis_weight(logprobs_T: torch.Tensor, behavior_T: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance weight min(policy / behavior, cap) of each token, without gradient.

    Args:
        logprobs_T: log-probs under the policy as it is before this step.
        behavior_T: log-probs under the (older) policy that sampled the tokens.
        cap: largest weight; bounds the variance at the price of some bias.

    Source: Ionides, Truncated Importance Sampling, J. Comput. Graph. Stat. 17 (2008); as used for stale actors in
    IMPALA, arXiv:1802.01561.
    """
    return probability_ratio(logprobs_T, behavior_T).detach().clamp(max=cap)
