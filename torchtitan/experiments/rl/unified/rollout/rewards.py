# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rewards (first form)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardInput:
    prompt: str
    completion: str
    answer: str
    completion_tokens: int
    truncated: bool
    max_completion_tokens: int


@dataclass(frozen=True)
class RewardResult:
    total: float
    parts: dict[str, float]


class Rewards:
    def __init__(self, weights: dict[str, float], timeout_seconds: float) -> None:
        self.weights = weights

    def score(self, samples: list[RewardInput]) -> list[RewardResult]:
        result = []
        for s in samples:
            _, mark, got = s.completion.rpartition("####")
            right = float(bool(mark) and got.strip() == s.answer.rpartition("####")[2].strip())
            result.append(RewardResult(right, {"gsm8k": right}))
        return result
