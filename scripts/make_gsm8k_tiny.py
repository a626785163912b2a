# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Write ``gsm8k_tiny``: short word problems in GSM8K's format, the same for the same seed.

Each row is ``{"question", "answer"}`` and each answer ends in "#### n", as in openai/gsm8k. Some of
the answers (40%) show their working, one operation a line; the others state the result at once. A
model that imitates them does both, and is right far more often when it shows its working: that is
what reinforcement learning on this task can find out.

    python scripts/make_gsm8k_tiny.py --out tests/assets/gsm8k_tiny
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivan Jill Kofi Lena Max Nina Omar Pia Ravi Sara Tom Yuki".split()
THINGS = "apples beads books cards coins cups eggs flowers hats kites lemons marbles nuts pens plums rings".split()
THINGS += "shells stamps toys".split()

# A step is one operation, (left, operator, right); the last one's result is the answer.
Step = tuple[int, str, int]
Problem = tuple[str, list[Step]]


def bags(r: random.Random, name: str, friend: str, things: str) -> Problem:
    have, count, each = r.randint(2, 9), r.randint(2, 4), r.randint(2, 4)
    total = have + count * each
    given = r.randint(1, total - 1)
    question = (
        f"{name} has {have} {things}, buys {count} bags of {each} {things} and gives {given} to {friend}. "
        f"How many {things} does {name} have now?"
    )
    return question, [(count, "*", each), (have, "+", count * each), (total, "-", given)]


def earnings(r: random.Random, name: str, friend: str, things: str) -> Problem:
    count, price = r.randint(2, 5), r.randint(2, 5)
    spent = r.randint(1, count * price - 1)
    question = f"{name} sells {count} {things} for ${price} each and spends ${spent}. How many dollars are left?"
    return question, [(count, "*", price), (count * price, "-", spent)]


def sharing(r: random.Random, name: str, friend: str, things: str) -> Problem:
    friends, share = r.randint(2, 4), r.randint(2, 6)
    total = friends * share
    red = r.randint(1, total - 1)
    question = (
        f"{name} shares {red} red and {total - red} blue {things} among {friends} friends. "
        f"How many {things} does each get?"
    )
    return question, [(red, "+", total - red), (total, "/", friends)]


def ages(r: random.Random, name: str, friend: str, things: str) -> Problem:
    age, times, years = r.randint(2, 9), r.randint(2, 4), r.randint(2, 5)
    question = f"{name} is {age}. {friend} is {times} times as old. How old will {friend} be in {years} years?"
    return question, [(age, "*", times), (age * times, "+", years)]


def two_days(r: random.Random, name: str, friend: str, things: str) -> Problem:
    first, more = r.randint(2, 9), r.randint(2, 9)
    question = (
        f"{name} finds {first} {things} on Monday and {more} more than that on Tuesday. "
        f"How many {things} does {name} find in all?"
    )
    return question, [(first, "+", more), (first, "+", first + more)]


KINDS: list[Callable[[random.Random, str, str, str], Problem]] = [bags, earnings, sharing, ages, two_days]
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def make_rows(seed: int) -> Iterator[dict[str, str]]:
    """Endless rows, no question twice."""
    r = random.Random(seed)
    seen = set()
    while True:
        name, friend = r.sample(NAMES, 2)
        question, steps = r.choice(KINDS)(r, name, friend, r.choice(THINGS))
        shows_working = r.random() < 0.4
        if question in seen:
            continue
        seen.add(question)
        results = [OPERATIONS[operator](left, right) for left, operator, right in steps]
        lines = [f"{left}{operator}{right}={n}" for (left, operator, right), n in zip(steps, results, strict=True)]
        reasoning = "\n".join(lines) if shows_working else "That makes"
        yield {"question": question, "answer": f"{reasoning}\n#### {results[-1]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests/assets/gsm8k_tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_rows", type=int, default=6000)
    parser.add_argument("--test_rows", type=int, default=500)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    rows = make_rows(args.seed)
    for split, count in (("train", args.train_rows), ("test", args.test_rows)):
        path = args.out / f"{split}.jsonl"
        path.write_text("".join(json.dumps(next(rows)) + "\n" for _ in range(count)))
        print(f"{path}: {count} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
