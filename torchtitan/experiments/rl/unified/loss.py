# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Policy losses, a value for each sampled token.

Shape suffix: T sampled tokens. Behavior log-probs are those the tokens were sampled with. A loss returns its terms
per token, so that whoever packs and shards the tokens decides where they are summed; `normalization` says what that sum
is divided by: the number of the step's sampled tokens, or a constant (completions times their token limit).
To add one: write its terms and give it a name in LOSSES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

# exp(20) is 5e8: far beyond any clip range, and its square is still finite in fp32, in gradients too. Without a bound a
# ratio overflows to inf, and an inf that the clip discards comes back in the backward pass as 0 * inf.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """A loss by its per-token terms.

    Attributes:
        terms: (logprobs_T, ratio_T, advantages_T, clip_low, clip_high) to loss_T.
        clips: whether the clip range is used.
        normalization: what the sum of the terms is to be divided by.
    """

    terms: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float], torch.Tensor]
    clips: bool
    normalization: Literal["tokens", "constant"] = "tokens"

    def __call__(
        self,
        logprobs_T: torch.Tensor,
        behavior_logprobs_T: torch.Tensor,
        advantages_T: torch.Tensor,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each token, to be minimised, and statistics of it.

        Args:
            logprobs_T: of the sampled tokens under the policy being trained; the only input with a gradient.
            behavior_logprobs_T: under the policy that sampled them.
            advantages_T: of the completions they belong to.
            clip_low: the ratio is clipped at 1 - clip_low.
            clip_high: and at 1 + clip_high.

        Returns:
            loss_T, and detached per-token statistics: "ratio" (policy over behavior), "clipped" (1 where the clip
            stops the gradient) and "kl" (k3 estimate of KL(behavior, policy)).
        """
        assert logprobs_T.shape == behavior_logprobs_T.shape == advantages_T.shape, "one value a token in each"
        ratio_T = _ratio(logprobs_T, behavior_logprobs_T)
        loss_T = self.terms(logprobs_T, ratio_T, advantages_T, clip_low, clip_high)
        with torch.no_grad():
            too_high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
            too_low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
            stats = {
                "ratio": ratio_T.detach(),
                "clipped": (too_high_T | too_low_T).to(ratio_T.dtype) * self.clips,
                "kl": kl_k3(behavior_logprobs_T, logprobs_T),
            }
        return loss_T, stats


def kl_k3(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy, reference) from tokens the policy sampled: r - 1 - log r with r = ref / policy.

    Never negative, unbiased, of low variance. Source: http://joschu.net/blog/kl-approx.html, "k3".
    """
    log_ratio_T = (ref_logprobs_T - logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio_T) - log_ratio_T


def tis_weight(logprobs_old_T: torch.Tensor, behavior_T: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance weight min(old / behavior, cap) of each token, without gradient.

    Args:
        logprobs_old_T: log-probs under the policy as it was before this step.
        behavior_T: log-probs under the (older) policy that sampled the tokens.
        cap: largest weight; bounds the variance at the price of some bias.

    Source: Ionides, Truncated Importance Sampling, J. Comput. Graph. Stat. 17 (2008); as used for stale actors in
    IMPALA, arXiv:1802.01561.
    """
    return _ratio(logprobs_old_T, behavior_T).detach().clamp(max=cap)


def policy_loss(name: str, clip_low: float, clip_high: float) -> PolicyLoss:
    """The loss called `name`, its clip range checked.

    Raises:
        ValueError: no loss has that name, or it cannot have that clip range.
    """
    if name not in LOSSES:
        raise ValueError(f"policy_loss.name = {name!r} does not exist; choose one of: {', '.join(LOSSES)}")
    if not (0 <= clip_low <= 1 and 0 <= clip_high < float("inf")):
        raise ValueError(
            f"policy_loss.clip_low = {clip_low}, clip_high = {clip_high}: a ratio is clipped to "
            "[1 - clip_low, 1 + clip_high]; clip_low must be between 0 and 1, clip_high not below 0"
        )
    if name in ("grpo", "dr_grpo") and clip_low != clip_high:
        raise ValueError(
            f"policy_loss.clip_low = {clip_low}, clip_high = {clip_high}: {name!r} has one clip range for both sides; "
            'make them equal or choose "dapo"'
        )
    return LOSSES[name]


def _ratio(logprobs_T: torch.Tensor, behavior_logprobs_T: torch.Tensor) -> torch.Tensor:
    return (logprobs_T - behavior_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped_terms(
    logprobs_T: torch.Tensor, ratio_T: torch.Tensor, advantages_T: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


def _reinforce_terms(
    logprobs_T: torch.Tensor, ratio_T: torch.Tensor, advantages_T: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    return -advantages_T * logprobs_T


LOSSES: dict[str, PolicyLoss] = {
    # DeepSeekMath, arXiv:2402.03300, eq. 3, its KL term apart (kl_k3), averaged over all tokens of the step.
    "grpo": PolicyLoss(_clipped_terms, clips=True),
    # Understanding R1-Zero-Like Training, arXiv:2503.20783: divided by a constant, long answers weigh what they are.
    "dr_grpo": PolicyLoss(_clipped_terms, clips=True, normalization="constant"),
    # DAPO, arXiv:2503.14476, eq. 8 and section 3.1: a higher upper clip range leaves room for unlikely tokens to grow.
    "dapo": PolicyLoss(_clipped_terms, clips=True),
    # Williams, Simple statistical gradient-following algorithms, Machine Learning 8 (1992).
    "reinforce": PolicyLoss(_reinforce_terms, clips=False),
}
