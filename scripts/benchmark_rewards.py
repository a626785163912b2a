# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How long rewards take: a batch of answers as policies give them, and answers that never end.

    python scripts/benchmark_rewards.py [--batches 5] [--seed 0] [--timeout_seconds 2]

Prints the seconds of each batch of 128 completions (16 prompts, 8 answers each) by `math_verify`, no two batches
of the same numbers, and of each answer that it cannot judge. Exits with 1 if the median batch took
more than a second, or an answer more than its time limit and 3 s.
"""

import argparse
import random
import statistics
import sys
import time

from torchtitan.experiments.rl.unified.rollout.rewards import RewardInput, Rewards

LIMIT_SECONDS = 1.0
PROMPTS, SAMPLES = 16, 8
# A reference and the answers that come with it, right and wrong, of numbers a < b < c and a sum s = a + b.
INTEGERS = [
    ("{s}", ["{s}", "{s}", "{s}", "{c}", "{s}.0", "\\${s}", "{s} dollars", "-{s}"]),
    ("#### {c},000", ["{c}000", "{c},000", "{c}", "{c}00", "{c},000 apples", "{c}{s}"]),
    ("{b}", ["{b}", "{b}", "x={b}", "{a}", "{c}", "\\frac{{{b}}}{{1}}"]),
]
EXPRESSIONS = [
    (
        "\\frac{{{a}}}{{{c}}}",
        ["\\frac{{{a}}}{{{c}}}", "{a}/{c}", "\\dfrac{{{a}}}{{{c}}}", "\\frac{{{c}}}{{{a}}}", "{a}"],
    ),
    ("{a}\\sqrt{{{b}}}", ["{a}\\sqrt{{{b}}}", "{a} \\sqrt{b}", "{b}\\sqrt{{{a}}}", "\\sqrt{{{c}}}", "{a}{b}"]),
    ("({a},-{b})", ["({a},-{b})", "({a}, -{b})", "(-{b},{a})", "({a},{b})"]),
    ("(x+{a})(x-{b})", ["(x+{a})(x-{b})", "(x-{b})(x+{a})", "x^2-{a}x-{b}", "(x-{a})(x+{b})"]),
    ("[{a},{c})", ["[{a},{c})", "({a},{c})", "[{a},\\infty)", "\\left[{a}, {c}\\right)"]),
    ("y={a}x+{b}", ["y={a}x+{b}", "y={b}+{a}x", "{a}x+{b}", "y={b}x+{a}"]),
    ("\\frac{{{a}\\pi}}{{{b}}}", ["\\frac{{{a}\\pi}}{{{b}}}", "{a}\\pi/{b}", "\\frac{{\\pi}}{{{b}}}", "{a}\\pi"]),
]
ENDLESS = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "100000000!",
    "(x+y+z)^{200}",
    "\\sum_{n=1}^{10^{20}} n^n",
    "(" * 60 + "1" + ")" * 60,
    "\\frac{" * 2000,
]


def batch(chance: random.Random) -> list[RewardInput]:
    """128 completions, two thirds of them answers to a question for an integer."""
    samples = []
    for _ in range(PROMPTS):
        a, b, c = sorted(chance.sample(range(2, 100), 3))
        reference, answers = chance.choice(INTEGERS if chance.random() < 2 / 3 else EXPRESSIONS)
        numbers = {"a": a, "b": b, "c": c, "s": a + b}
        for answer in chance.choices(answers, k=SAMPLES):
            text = f"We add them up. So the answer is $\\boxed{{{answer.format(**numbers)}}}$."
            samples.append(RewardInput("", text, reference.format(**numbers), 40, False, 64))
    return samples


def seconds(rewards: Rewards, samples: list[RewardInput]) -> float:
    start = time.perf_counter()
    rewards.score(samples)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout_seconds", type=float, default=2)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    rewards = Rewards({"math_verify": 1.0}, args.timeout_seconds)
    print(f"start and first batch: {seconds(rewards, batch(chance)):.2f} s")
    took = [seconds(rewards, batch(chance)) for _ in range(args.batches)]
    print(f"batches of {PROMPTS * SAMPLES}: {', '.join(f'{s:.2f}' for s in took)} s")
    late = 0
    for answer in ENDLESS:
        seconds(rewards, batch(chance))  # Processes that were ended have started again by its end.
        took_one = seconds(rewards, [RewardInput("", f"\\boxed{{{answer}}}", "x+\\pi", 40, False, 64)])
        late += took_one > args.timeout_seconds + 3
        print(f"{answer[:20]:20} {took_one:.2f} s")
    print(f"{rewards.timeouts} of {len(ENDLESS)} ended by the time limit")
    return int(statistics.median(took) > LIMIT_SECONDS or late > 0)


if __name__ == "__main__":
    sys.exit(main())
