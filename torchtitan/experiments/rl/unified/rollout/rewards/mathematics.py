# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

r"""Equal values in other forms, judged by the math-verify library in a few processes (equivalence.py is what they run).

Where the answer is, is answers.py's: behind the last mark (`####`, `\boxed{}`); a text without one is the library's to
search, its end at least. Two integers, and the same answer twice, need no library.
"""

import logging
import os
import queue
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torchtitan.experiments.rl.unified.rollout.answers import final_segment
from torchtitan.experiments.rl.unified.rollout.rewards.base import RewardInput
from torchtitan.experiments.rl.unified.rollout.rewards.user import ProcessEnded, RewardProcess

MAX_PROCESSES = 4
# Of a text without a mark.
SEARCHED_CHARS = 1000

_INTEGER = re.compile(r"-?(?:\d{1,3}(?:[, ]\d{3})+|\d+)")
# Spaces count between digits alone.
_DRESS = re.compile(
    r"(?<!\d)\s+|\s+(?!\d)|\\left(?![a-z])|\\right(?![a-z])|^\$+|\$+$|^\\\(|\\\)$|\*\*$|^\*\*|[.`]+$|^`+"
)

logger = logging.getLogger(__name__)


class MathVerify:
    """1 for a completion whose final answer equals the reference's, else 0, as where that cannot be found out in time.

    A truncated completion must show that its answer had ended.

    Args:
        timeout_seconds: longest time for one sample.

    Attributes:
        timeouts: samples so far that took too long, or ended their process.
    """

    def __init__(self, timeout_seconds: float) -> None:
        path = str(Path(__file__).with_name("equivalence.py"))
        count = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
        self._processes = [RewardProcess(path, timeout_seconds, quiet=True) for _ in range(count)]
        self._idle: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self.timeouts = 0

    def __call__(self, samples: Sequence[RewardInput]) -> list[float]:
        """The rewards of `samples`, in their order."""
        found = [_judge(sample) for sample in samples]
        questions = list(dict.fromkeys(question for question in found if not isinstance(question, float)))
        with ThreadPoolExecutor(len(self._processes)) as threads:
            answers = dict(zip(questions, threads.map(self._ask, questions), strict=True))
        return [question if isinstance(question, float) else answers[question] for question in found]

    def close(self) -> None:
        """Ends the processes. A later call starts them again."""
        for process in self._processes:
            process.close()

    def _ask(self, question: RewardInput) -> float:
        process = self._idle.get()
        try:
            return process.value(question)
        except ProcessEnded as error:
            self.timeouts += 1
            given, expected = (ascii(text[:80]) for text in (question.completion, question.answer))
            logger.warning(f"reward 'math_verify' is 0 for the answer {given}, the reference being {expected}: {error}")
            process.restart()
            return 0.0
        finally:
            self._idle.put(process)


def _judge(sample: RewardInput) -> float | RewardInput:
    """The reward, or what to ask the library: equivalence.py says how it is put."""
    given, complete = final_segment(sample.completion)
    marked = bool(given)
    given = given.split("\n")[0] if marked else sample.completion.strip()[-SEARCHED_CHARS:]
    expected = final_segment(sample.answer)[0] or sample.answer.strip()
    if not given or not expected or (sample.truncated and not complete):
        return 0.0
    one, other = (_DRESS.sub("", answer) for answer in (given, expected))
    if one == other:
        return 1.0
    if _INTEGER.fullmatch(one) and _INTEGER.fullmatch(other):
        return float(_digits(one) == _digits(other))
    return RewardInput("" if marked else "text", given, expected, 0, False, 0)


def _digits(integer: str) -> str:
    """`integer` in one spelling; a text, as it may have more digits than Python makes a number of."""
    digits = re.sub("[, ]", "", integer).lstrip("-0")
    return f"-{digits}" if digits and integer.startswith("-") else digits
