# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a trainer rank observes of a step's tokens, as sums that add up over microbatches and ranks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepStats:
    """Sums over sampled tokens; in nats where not a count.

    Attributes:
        tokens: sampled tokens.
        stale_tokens: those of a policy version older than the trainer's.
        truncated_weights: stale tokens whose importance weight was cut to `[policy_loss] tis_cap`.
        clipped_tokens: whose gradient the loss's clip range stopped.
        entropy: of the distributions that the tokens were sampled from, under the trainer's policy.
        kl_generator_trainer: k3 estimates of KL(generator, trainer): exactly 0 where all log-probs are equal.
        kl_reference: k3 estimates of KL(trainer, reference policy); None without a reference.
    """

    tokens: int = 0
    stale_tokens: int = 0
    truncated_weights: int = 0
    clipped_tokens: int = 0
    entropy: float = 0.0
    kl_generator_trainer: float = 0.0
    kl_reference: float | None = None

    def __add__(self, other: "StepStats") -> "StepStats":
        values = {name: _add(value, getattr(other, name)) for name, value in vars(self).items()}
        return StepStats(**values)

    def means(self) -> dict[str, float]:
        """Metrics by name: means over the tokens, and the number of stale ones; `kl_reference` only if there is one."""
        tokens = max(self.tokens, 1)
        means = {
            "kl_generator_trainer": self.kl_generator_trainer / tokens,
            "clip_fraction": self.clipped_tokens / tokens,
            "entropy": self.entropy / tokens,
            "stale_tokens": float(self.stale_tokens),
            "tis_truncated_fraction": self.truncated_weights / max(self.stale_tokens, 1),
        }
        if self.kl_reference is not None:
            means["kl_reference"] = self.kl_reference / tokens
        return means


def _add(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else one + other
