# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What rewards a completion: the sum of named rewards, each with a weight.

To add a reward, add an entry to REWARDS; anyone's own needs no entry, its dotted path is its name.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torchtitan.experiments.rl.unified.messages import RewardResult
from torchtitan.experiments.rl.unified.rollout.answers import reference_values
from torchtitan.experiments.rl.unified.rollout.rewards.base import Reward, RewardError, RewardInput
from torchtitan.experiments.rl.unified.rollout.rewards.builtin import format_reward, gsm8k, soft_overlong
from torchtitan.experiments.rl.unified.rollout.rewards.mathematics import MathVerify
from torchtitan.experiments.rl.unified.rollout.rewards.user import RewardProcess

__all__ = ["Reward", "RewardError", "RewardInput", "RewardResult", "Rewards", "REWARDS"]

# A function of one sample; or a class made with the time limit, whose objects take a batch.
REWARDS: dict[str, Reward | type[MathVerify]] = {
    "gsm8k": gsm8k,
    "math_verify": MathVerify,
    "format": format_reward,
    "soft_overlong": soft_overlong,
}


Batch = Callable[[Sequence[RewardInput]], Iterable[float]]
# Advantages are computed in fp32, squares and sums among them.
LARGEST = 1e15


class Rewards:
    """Several rewards as one.

    Args:
        weights: by name: one of REWARDS, or the dotted path of a function of the user's ("package.module:function" or
            "package.module.function") that takes a RewardInput and returns a number. Those run in a process of their
            own, where one that hangs can be ended.
        timeout_seconds: longest time a user's reward, or "math_verify", may take for one sample. Over it, the one is an
            error, the other 0.

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

    @property
    def timeouts(self) -> int | None:
        """Samples so far that got 0 from "math_verify" because it was not done with them in time; None without it."""
        return next((reward.timeouts for reward in self._rewards.values() if isinstance(reward, MathVerify)), None)

    def check_answers(self, answers: Iterable[tuple[str, str]]) -> None:
        """Each reference answer can be matched by some completion.

        Args:
            answers: where each is (file and line), and the answer.

        Raises:
            ValueError: names the first that no completion could match.
        """
        if "gsm8k" not in self.weights:
            return
        for place, answer in answers:
            if not reference_values(answer):
                raise ValueError(
                    f"{place}: the reference answer {answer[-80:]!r} has no number that the reward 'gsm8k' could "
                    "compare with; correct the row, or choose another reward in [reward.weights]"
                )

    def score(self, samples: Sequence[RewardInput]) -> list[RewardResult]:
        """Rewards of `samples`, in their order; depends on nothing but each sample.

        Raises:
            RewardError: a reward raised, took too long or returned no finite number; names it and the sample.
        """
        parts = {name: self._values(name, samples) for name in self.weights}
        results = []
        for index, sample in enumerate(samples):
            found = {name: values[index] for name, values in parts.items()}
            total = sum(self.weights[name] * value for name, value in found.items())
            if abs(total) > LARGEST:
                raise RewardError(f"rewards add up to {total:g}, beyond {LARGEST:g}, {_place(sample, index)}")
            results.append(RewardResult(total, found))
        return results

    def close(self) -> None:
        """Ends the rewards' processes. Not calling it leaves that to the interpreter's end."""
        for reward in self._rewards.values():
            if isinstance(reward, (MathVerify, RewardProcess)):
                reward.close()

    def _values(self, name: str, samples: Sequence[RewardInput]) -> list[float]:
        values: list[float] = []
        try:
            for value in self._rewards[name](samples):
                if not _is_finite(value):
                    raise ValueError(f"it returned {value!r}, which is not a finite number")
                if max(abs(value), abs(value * self.weights[name])) > LARGEST:
                    raise ValueError(f"it returned {value!r}, with its weight beyond {LARGEST:g}")
                values.append(float(value))
        except Exception as error:
            where, _, shown = _place(samples[len(values)], len(values)).partition("\n")
            raise RewardError(f"reward {name!r} failed {where}: {error}\n{shown}") from error
        return values


def _place(sample: RewardInput, index: int) -> str:
    return (
        f"on sample {index} of the batch\nprompt: {_excerpt(sample.prompt)}\n"
        f"completion: {_excerpt(sample.completion)}\nreference answer: {_excerpt(sample.answer)}"
    )


def _find(name: str, timeout_seconds: float) -> Batch:
    if name in REWARDS:
        reward = REWARDS[name]
        return reward(timeout_seconds) if isinstance(reward, type) else partial(map, reward)
    if "." in name or ":" in name:
        process = RewardProcess(name, timeout_seconds)
        process.wait()
        return process
    raise ValueError(
        f"[reward.weights] {name!r} does not exist; choose from {', '.join(REWARDS)}, or give the dotted path of a "
        'function of yours ("package.module:function")'
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _excerpt(text: str, length: int = 120) -> str:
    """`text` on one line of ASCII, its middle left out if it is long."""
    return ascii(text if len(text) <= length else f"{text[: length // 2]} [...] {text[-length // 2 :]}")
