# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How long one sample's reward may take: random answers in the forms that mathematics takes, and random bytes.

    python scripts/benchmark_rewards.py [--samples 3000] [--seed 0]

Prints processor time of `gsm8k` and `math_verify` by kind of answer, the slowest and the median, and exits with 1 if
one took more than 50 ms. Half of the answers are compared with themselves in another dress.
"""

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable

from torchtitan.experiments.rl.unified.rollout.rewards import Rewards
from torchtitan.experiments.rl.unified.rollout.rewards.base import RewardInput
from torchtitan.experiments.rl.unified.rollout.rewards.builtin import gsm8k
from torchtitan.experiments.rl.unified.rollout.rewards.equivalence import math_verify

LIMIT_SECONDS = 0.05


class Answers:
    """Random answers.

    Args:
        chance: where the randomness comes from.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.choice, self.int = chance, chance.choice, chance.randint

    def number(self) -> str:
        a, b = self.int(-50, 99), self.int(2, 99)
        return self.choice([f"{a}", f"{b}", f"{b}.{self.int(0, 99)}", f"{b}/{self.int(2, 9)}", f"\\frac{{{b}}}{{7}}"])

    def numbers(self, depth: int = 2) -> str:
        """An expression of numbers."""
        if not depth:
            return self.number()
        a, b, n = self.numbers(depth - 1), self.numbers(depth - 1), self.int(2, 30)
        forms = [self.number(), f"{a}+{b}", f"{a}-{b}", f"({a})({b})", f"\\frac{{{a}}}{{{b}}}", f"{a}\\cdot {b}"]
        forms += [f"\\sqrt{{{self.number()}}}", f"{n}\\sqrt{{{n + 1}}}", f"{n}^{{{self.int(2, 6)}}}", f"{n}\\pi"]
        return self.choice([*forms, f"\\left({a}\\right)^{{2}}", f"{n}^{{1/{self.int(2, 3)}}}", f"{self.number()}%"])

    def polynomial(self) -> str:
        a, b, n = self.number(), self.number(), self.int(2, 9)
        forms = [f"x+{a}", f"x^2+{n}x+{n}", f"(x+{a})(x-{b})", f"{n}xy", f"(x+y)^{{{n}}}", f"\\frac{{x+{a}}}{{{n}}}"]
        return self.choice([*forms, f"(a+{n}b)^3(a-b)^3", f"x^6-{a}"])

    def collection(self) -> str:
        a, b, c = self.number(), self.number(), self.number()
        forms = [f"({a},{b})", f"[{a},{b})", f"\\{{{a}, {b}, {c}\\}}", f"({a},{b})\\cup({b},{c})", f"(-\\infty,{a}]"]
        forms += [f"x<{a}", f"{a}\\le x<{b}", f"x={a}", f"x={a}, y={b}", f"{a}, {b}", f"\\pm {a}", f"x\\ge {a}"]
        return self.choice(forms)

    def junk(self) -> str:
        return self.chance.randbytes(self.int(0, 200)).decode(errors="surrogateescape")

    def dressed(self, answer: str) -> str:
        """`answer` in another form; the same value where it has one."""
        forms = [f"{answer}+0", f"1\\cdot ({answer})", f"({answer})", f"\\frac{{{answer}}}{{1}}", f"2({answer})/2"]
        return self.choice([*forms, answer.replace("+", " + "), f"-(-({answer}))"])


def measure(make: Callable[[], str], answers: Answers, samples: int) -> list[tuple[float, str, str]]:
    """Seconds, reward and answer with its reference of each sample, the slowest first."""
    found = []
    for _ in range(samples):
        given = make()
        expected = make() if answers.chance.random() < 0.5 else answers.dressed(given)
        for name, reward in (("gsm8k", gsm8k), ("math_verify", math_verify)):
            reference = "\\boxed{1}" if name == "gsm8k" else f"\\boxed{{{expected}}}"
            sample = RewardInput("", f"so\n\\boxed{{{given}}}", reference, 10, False, 64)
            start = time.thread_time()
            reward(sample)
            found.append((time.thread_time() - start, name, f"{given!r} against {expected!r}"))
    return sorted(found, reverse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    Rewards({"gsm8k": 1.0, "math_verify": 1.0}, timeout_seconds=10)  # As a job does: it warms the parser up.
    gc.freeze()  # What the libraries allocated: the collector takes 0.2 s for it, in whoever's call it comes.
    answers, slow = Answers(random.Random(args.seed)), 0
    for make in (answers.numbers, answers.polynomial, answers.collection, answers.junk):
        found = measure(make, answers, args.samples // 4)
        seconds, name, what = found[0]
        median = statistics.median(row[0] for row in found)
        slow += sum(row[0] > LIMIT_SECONDS for row in found)
        print(
            f"{make.__name__:12} median {1e3 * median:5.2f} ms, slowest {1e3 * seconds:5.1f} ms: {name}, {what}"[:160]
        )
    gc.unfreeze()
    print(f"{slow} of {2 * args.samples} took more than {1e3 * LIMIT_SECONDS:.0f} ms")
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
