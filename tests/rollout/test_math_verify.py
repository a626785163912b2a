# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The reward math_verify: pairs of answers, and answers that mean harm."""

import random
import sys
import threading
import time

import pytest
from torchtitan.experiments.rl.unified.rollout.rewards import RewardError, RewardInput, Rewards

# Answers and references of GSM8K's, MATH's and AIME's kinds, behind "#### " unless they bring a mark of their own.
EQUAL = [
    ("1e3", "1000"),
    ("-1.5e-3", "-0.0015"),
    ("1 000", "1000"),
    ("18", "18"),
    ("$1,250.00", "1250"),
    ("1250 dollars", "\\$1250"),
    ("72\\text{ apples}", "72"),
    ("60 km/h", "60"),
    ("12\\text{ cm}^2", "12"),
    ("30^\\circ", "30"),
    ("75\\%", "75"),
    ("20%", "0.2"),
    ("1{,}000{,}000", "10^6"),
    ("073", "73"),
    ("3 + 4 * 5", "23"),
    ("2(3)", "6"),
    ("(2)(3)(4)", "24"),
    ("5!", "120"),
    ("5\\binom{4}{2}", "30"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("\\log_2 8", "3"),
    ("\\log_2(8)", "3"),
    ("\\sin\\frac{\\pi}{6}", "\\frac{1}{2}"),
    ("\\cos 60^\\circ", "\\frac12"),
    ("e^{\\ln 7}", "7"),
    ("\\sum_{k=1}^{10} k", "55"),
    ("1/3", "0.333333"),
    ("4\\frac{2}{3}", "\\frac{14}{3}"),
    ("2 3/4", "2.75"),
    ("\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt{3}}{3}"),
    ("\\sqrt{72}", "6\\sqrt{2}"),
    ("\\sqrt[3]{54}", "3\\sqrt[3]{2}"),
    ("2\\sqrt2+3\\sqrt3", "3\\sqrt{3}+2\\sqrt{2}"),
    ("\\sqrt{5}+\\sqrt{3}+\\sqrt{2}", "\\sqrt{2}+\\sqrt{3}+\\sqrt{5}"),
    ("\\frac{5\\pi}{3}", "\\frac{5}{3}\\pi"),
    ("a^2+2ab+b^2", "(a+b)^2"),
    ("x^3-1", "(x-1)(x^2+x+1)"),
    ("\\frac{x+1}{x-1}", "\\frac{-x-1}{1-x}"),
    ("\\frac{a}{b}+\\frac{c}{d}", "\\frac{ad+bc}{bd}"),
    ("n(n+1)/2", "\\frac{n^2+n}{2}"),
    ("yx", "xy"),
    ("\\tan^2 x + 1", "\\sec^2 x"),
    ("4i + 3", "3+4i"),
    ("(2, -3)", "\\left(2,-3\\right)"),
    ("[(2)(3),7)", "[6, 7)"),
    ("(3,\\infty)\\cup(-\\infty,-2)", "(-\\infty, -2) \\cup (3, \\infty)"),
    ("2<x<5", "(2,5)"),
    ("x<4", "4>x"),
    ("\\{3,2,1\\}", "\\{1,2,3\\}"),
    ("x=1 \\text{ or } x=2", "1, 2"),
    ("\\pm 3", "-3,3"),
    ("y = 2+3x", "y=3x+2"),
    ("x=\\frac{7}{2}", "3.5"),
    ("y=2, x=0.5", "x = \\frac{1}{2}, y = 2"),
    ("\\begin{bmatrix} 1 \\\\ 2 \\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ \\frac{4}{2} \\end{pmatrix}"),
    ("\\varnothing", "\\emptyset"),
    ("C", "\\text{(C)}"),
    ("Saturday", "\\text{Saturday}"),
    ("3 : 4", "3:4"),
    ("AB", "A B"),
    ("k\\pi, k\\in\\mathbb{Z}", "k\\pi, k \\in \\mathbb{Z}"),
    ("9^{9^{9}}", "9^{9^{9}}"),
    ("\\boxed{x^2+2x+1}", "#### (x+1)^2"),
    ("9 * 2 is $1,800\n#### 1800", "9*200=<<9*200=1800>>1800\n#### 1,800"),
    ("the answer is 18", "18"),
    ("The final answer is $\\frac{6}{3}$.", "2"),
]
UNEQUAL = [
    ("1 2", "12"),
    ("34", "3 4"),
    ("1 00", "100"),
    ("19", "18"),
    ("-7", "7"),
    ("1000", "10000"),
    ("1267650600228229401496703205377", "2^{100}"),
    ("5!", "5"),
    ("5x", "5"),
    ("5i", "5"),
    ("3t", "3d"),
    ("3y^2", "3"),
    ("2\\pi", "2"),
    ("6\\sqrt{2}", "6"),
    ("2(3)", "5"),
    ("5\\binom{4}{2}", "11"),
    ("2 3/4", "\\frac{5}{4}"),
    ("2\\frac12", "1"),
    ("\\log_2 8", "8"),
    ("2^3", "23"),
    ("0.66", "\\frac{2}{3}"),
    ("3.14", "\\pi"),
    ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5}"),
    ("2\\sqrt3+3\\sqrt2", "2\\sqrt2+3\\sqrt3"),
    ("a^2+b^2", "(a+b)^2"),
    ("x^2+2x+2", "(x+1)^2"),
    ("x^2", "y^2"),
    ("p-q", "q-p"),
    ("\\frac{1}{x}", "x"),
    ("e^x", "e^{-x}"),
    ("\\sin x", "\\cos x"),
    ("3-4i", "3+4i"),
    ("2", "1:2"),
    ("1:2", "2"),
    ("2:1", "1:2"),
    ("2:30", "3:30"),
    ("BA", "AB"),
    ("silent", "listen"),
    ("1011_2", "1011_3"),
    ("(3,2)", "(2,3)"),
    ("[2,3]", "(2,3)"),
    ("(1,2)", "\\{1,2\\}"),
    ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("1,2", "1.2"),
    ("5 or 6", "6"),
    ("\\pm 3", "3"),
    ("x\\ge 2", "x>2"),
    ("x<4", "x>4"),
    ("x=2", "y=2"),
    ("x=1,y=2", "x=2,y=1"),
    ("(-\\infty,2)", "(-\\infty,2]"),
    ("\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"),
    ("\\frac{1}{0}", "0"),
    ("\\infty", "0"),
    ("none", "0"),
    ("D", "\\text{(C)}"),
    ("Sunday", "\\text{Monday}"),
    ("$", "18"),
    ("the answer is 19", "18"),
    ("\\boxed{}", "18"),
    ("\ud800", "18"),
    ("\x00", "18"),
    ("x" * 100_000, "18"),
    ("\\boxed{" + "\\frac{" * 1000, "18"),
]


def sample(completion: str, answer: str, truncated: bool = False) -> RewardInput:
    marked = any(mark in completion for mark in ("####", "\\boxed", "answer"))
    return RewardInput("", completion if marked else f"We see.\n#### {completion}", answer, 10, truncated, 64)


@pytest.fixture(scope="module")
def mathematics():
    rewards = Rewards({"math_verify": 1.0}, timeout_seconds=30.0)
    yield rewards
    rewards.close()


def test_answers(mathematics):
    pairs = EQUAL + UNEQUAL
    found = [result.total for result in mathematics.score([sample(*pair) for pair in pairs])]
    wrong = [
        (pair, reward) for pair, reward in zip(pairs, found, strict=True) if reward != (1.0 if pair in EQUAL else 0.0)
    ]
    assert len(EQUAL) >= 40 and len(UNEQUAL) >= 40 and not wrong
    assert mathematics.timeouts == 0


def test_works_off_the_main_thread_and_from_several(mathematics):
    samples = [sample(*pair) for pair in (*EQUAL[:40], *UNEQUAL[:40])]
    results = [[] for _ in range(3)]

    def work(place: list) -> None:
        place.extend(result.total for result in mathematics.score(samples))

    threads = [threading.Thread(target=work, args=(place,)) for place in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0] * 40 + [0.0] * 40] * 3


def test_does_not_credit_an_expression_that_was_cut_off(mathematics):
    cut = [("#### 2^3", "8"), ("\\boxed{2^3}", "8"), ("the answer is 18", "18"), ("#### 18", "18")]
    rewards = mathematics.score([sample(*pair, truncated=True) for pair in cut])
    assert [result.total for result in rewards] == [0.0, 1.0, 0.0, 0.0]


def test_reads_random_bytes(mathematics):
    source = random.Random(0)
    samples = []
    for _ in range(200):
        text = source.randbytes(source.randrange(60)).decode("utf-8", "surrogateescape")
        samples += [sample(f"{mark}{text}", "x+1") for mark in ("#### ", "\\boxed{")]
    assert {result.total for result in mathematics.score(samples)} == {0.0}


def test_what_cannot_be_judged_in_time_is_worth_0_and_counted(caplog):
    rewards = Rewards({"math_verify": 1.0}, timeout_seconds=1.0)
    rewards.score([sample("2^3", "8"), sample("2^4", "8")])
    endless = ["9^{9^{9}}", "(" * 60 + "1" + ")" * 60]
    start = time.monotonic()
    scored = rewards.score([*[sample(text, "x+\\pi") for text in endless], sample("\\sqrt{16}", "4")])
    assert time.monotonic() - start < 60
    assert [result.total for result in scored] == [0.0] * 2 + [1.0]
    assert rewards.timeouts == 2 and Rewards({"format": 1.0}, timeout_seconds=1.0).timeouts is None
    assert all(f"'math_verify' is 0 for the answer {ascii(text)[:20]}" in caplog.text for text in endless)
    rewards.close()


def test_is_refused_if_it_cannot_run(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    rewards = Rewards({"math_verify": 1.0}, timeout_seconds=1.0)
    with pytest.raises(RewardError, match="'math_verify' failed on sample 0 .* No module named 'math_verify'"):
        rewards.score([sample("2^3", "8")])
    rewards.close()
