# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a reward is given, and how its failures are reported."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RewardInput:
    """One completion to be judged.

    Attributes:
        prompt: what the model read, as text.
        completion: what it wrote, as text.
        answer: the dataset's reference answer, as it stands there.
        completion_tokens: sampled tokens, EOS included.
        truncated: the completion was cut off at its token limit.
        max_completion_tokens: that limit.
    """

    prompt: str
    completion: str
    answer: str
    completion_tokens: int
    truncated: bool
    max_completion_tokens: int


Reward = Callable[[RewardInput], float]


class RewardError(ValueError):
    """A reward raised, hung or returned something that is no finite number; names reward, sample and cause."""
