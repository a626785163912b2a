# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The claim of this experiment, checked: each sampled token's log-prob is the same bits in generator and trainer."""

from dataclasses import dataclass

import torch


class ParityError(RuntimeError):
    """A sampled token whose log-prob differs between generator and trainer."""


@dataclass(frozen=True)
class ParityReport:
    """Outcome of one comparison; reports add up.

    Attributes:
        tokens_compared: sampled tokens looked at.
        mismatched_tokens: those whose fp32 log-probs differ in any bit.
        max_difference: largest absolute difference, nats; NaN counts as infinite.
        first: description of the first mismatch, empty without one.
    """

    tokens_compared: int = 0
    mismatched_tokens: int = 0
    max_difference: float = 0.0
    first: str = ""

    def __add__(self, other: "ParityReport") -> "ParityReport":
        return ParityReport(
            self.tokens_compared + other.tokens_compared,
            self.mismatched_tokens + other.mismatched_tokens,
            max(self.max_difference, other.max_difference),
            self.first or other.first,
        )


def compare(generator_T: torch.Tensor, trainer_T: torch.Tensor, where) -> ParityReport:
    """Compares log-probs of the same tokens under the same weights, by their bits.

    Args:
        generator_T, trainer_T: fp32 (tokens,).
        where: called with a token's index, says in words which token it is.
    """
    assert generator_T.dtype == trainer_T.dtype == torch.float32 and generator_T.shape == trainer_T.shape
    # As integers: NaN equals the same NaN, and 0.0 does not equal -0.0.
    differs_T = generator_T.view(torch.int32) != trainer_T.view(torch.int32)
    mismatched = int(differs_T.sum())
    if not mismatched:
        return ParityReport(tokens_compared=len(generator_T))
    first = int(differs_T.nonzero()[0])
    difference = (generator_T - trainer_T).abs().nan_to_num(nan=torch.inf).max()
    return ParityReport(
        len(generator_T),
        mismatched,
        float(difference),
        f"{where(first)}: generator {generator_T[first].item()!r}, trainer {trainer_T[first].item()!r}",
    )
