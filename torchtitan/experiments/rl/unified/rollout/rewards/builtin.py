# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Rewards of this package that need nothing but the text and its length."""

import re

from torchtitan.experiments.rl.unified.rollout.answers import answer_values, reference_values
from torchtitan.experiments.rl.unified.rollout.rewards.base import RewardInput

_ANSWER_LINE = re.compile(r"#### ?-?\$?\d[\d,]{0,400}(?:\.\d{1,400})?")


def gsm8k(sample: RewardInput) -> float:
    """1 if the final answer has exactly the reference's value, else 0; see answers.py for what an answer is.

    Raises:
        ValueError: the reference answer is no number, so that no completion could be right.
    """
    reference = reference_values(sample.answer)
    if not reference:
        raise ValueError(
            f"the reference answer {sample.answer[-80:]!r} has no number; correct that row, or use a reward that "
            'compares other things than numbers ("math_verify", or your own)'
        )
    return float(not reference.isdisjoint(answer_values(sample.completion, sample.truncated)))


def format_reward(sample: RewardInput) -> float:
    """1 if the completion ends by itself and in GSM8K's form: one `####`, on the last line, and a plain number."""
    last_line = sample.completion.rstrip().rpartition("\n")[2]
    one_mark = sample.completion.count("####") == 1
    return float(one_mark and not sample.truncated and _ANSWER_LINE.fullmatch(last_line) is not None)


def soft_overlong(sample: RewardInput) -> float:
    """0 up to 4/5 of the token limit, then down a straight line to -1 at the limit.

    Source: DAPO, arXiv:2503.14476, eq. 13, whose cache is a fifth of the longest length (4,096 of 20,480 tokens).
    """
    return max(-1.0, min(0.0, 4 - 5 * sample.completion_tokens / sample.max_completion_tokens))
