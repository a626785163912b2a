# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What rewards a completion: the sum of named rewards, each with a weight.

To add a reward, add an entry to REWARDS; anyone's own needs no entry, its dotted path is its name.
"""

import math
import numbers
from collections.abc import Iterable, Sequence

from torchtitan.experiments.rl.unified.messages import RewardResult
from torchtitan.experiments.rl.unified.rollout.answers import reference_values
from torchtitan.experiments.rl.unified.rollout.rewards.base import Reward, RewardError, RewardInput
from torchtitan.experiments.rl.unified.rollout.rewards.builtin import format_reward, gsm8k, soft_overlong
from torchtitan.experiments.rl.unified.rollout.rewards.equivalence import math_verify, warm_up
from torchtitan.experiments.rl.unified.rollout.rewards.user import UserReward

__all__ = ["Reward", "RewardError", "RewardInput", "RewardResult", "Rewards", "REWARDS"]

REWARDS: dict[str, Reward] = {
    "gsm8k": gsm8k,
    "math_verify": math_verify,
    "format": format_reward,
    "soft_overlong": soft_overlong,
}


class Rewards:
    """Several rewards as one.

    Args:
        weights: by name: one of REWARDS, or the dotted path of a function of the user's ("package.module:function" or
            "package.module.function") that takes a RewardInput and returns a number. Those run in a process of their
            own, where one that hangs can be ended.
        timeout_seconds: longest time a user's reward may take for one sample.

    Raises:
        ValueError: no rewards, one that does not exist or cannot be imported, a weight that is no finite number.
    """

    def __init__(self, weights: dict[str, float], timeout_seconds: float) -> None:
        if not weights:
            raise ValueError(f"no rewards: give [reward.weights] at least one of {', '.join(REWARDS)}")
        if not timeout_seconds > 0:
            raise ValueError(f"[reward] timeout_seconds = {timeout_seconds}: it must be above 0")
        for name, weight in weights.items():
            if not _is_finite(weight):
                raise ValueError(f"[reward.weights] {name!r} = {weight!r}: a weight must be a finite number")
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self._rewards = {name: _find(name, timeout_seconds) for name in weights}
        if "math_verify" in weights:
            warm_up()

    def check_answers(self, answers: Iterable[str]) -> None:
        """Raises ValueError for the first reference answer that no completion could match, naming its row (from 0)."""
        if "gsm8k" not in self.weights:
            return
        for row, answer in enumerate(answers):
            if not reference_values(answer):
                raise ValueError(
                    f"row {row}: the reference answer {answer[-80:]!r} has no number that the reward 'gsm8k' could "
                    "compare with; correct the row, or choose another reward in [reward.weights]"
                )

    def score(self, samples: Sequence[RewardInput]) -> list[RewardResult]:
        """Rewards of `samples`, in their order; depends on nothing but each sample.

        Raises:
            RewardError: a reward raised, took too long or returned no finite number; names it and the sample.
        """
        return [self._score(index, sample) for index, sample in enumerate(samples)]

    def close(self) -> None:
        """Ends the processes of users' rewards. Not calling it leaves that to the interpreter's end."""
        for reward in self._rewards.values():
            if isinstance(reward, UserReward):
                reward.close()

    def _score(self, index: int, sample: RewardInput) -> RewardResult:
        parts = {name: self._part(name, index, sample) for name in self.weights}
        return RewardResult(sum(self.weights[name] * part for name, part in parts.items()), parts)

    def _part(self, name: str, index: int, sample: RewardInput) -> float:
        try:
            value = self._rewards[name](sample)
            if not _is_finite(value):
                raise ValueError(f"it returned {value!r}, which is not a finite number")
            return float(value)
        except Exception as error:
            raise RewardError(
                f"reward {name!r} failed on sample {index} of the batch: {error}\n"
                f"prompt: {_excerpt(sample.prompt)}\ncompletion: {_excerpt(sample.completion)}\n"
                f"reference answer: {_excerpt(sample.answer)}"
            ) from error


def _find(name: str, timeout_seconds: float) -> Reward:
    if name in REWARDS:
        return REWARDS[name]
    if "." in name or ":" in name:
        return UserReward(name, timeout_seconds)
    raise ValueError(
        f"[reward.weights] {name!r} does not exist; choose from {', '.join(REWARDS)}, or give the dotted path of a "
        'function of yours ("package.module:function")'
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _excerpt(text: str, length: int = 120) -> str:
    """`text` on one line of ASCII, its middle left out if it is long."""
    return ascii(text if len(text) <= length else f"{text[: length // 2]} [...] {text[-length // 2 :]}")
