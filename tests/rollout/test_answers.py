# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

r"""Final answers: a table of texts, right and wrong, random numbers in random dress, and text that means harm.

The table holds (text, reference, right): the text stands behind "#### " unless it brings a mark of its own.
"""

import random
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st
from torchtitan.experiments.rl.unified.rollout.answers import answer_values, MAX_BOXES, MAX_CHARS, reference_values

# The same examples in every run, however busy the machine.
REPEATABLE = settings(deadline=None, derandomize=True, database=None)
NINES = "9" * 30

PLAIN = [
    ("18", "18", True),
    ("18", "19", False),
    ("18", "1", False),
    ("18", "8", False),
    ("0", "0", True),
    ("-0", "0", True),
    ("00018", "18", True),
    ("018", "18", True),
    ("18.0", "18", True),
    ("18.00", "18", True),
    ("18.01", "18", False),
    ("17.999999999999999999999", "18", False),
    ("18", "18.00", True),
    ("18.", "18", True),
    ("18!", "18", True),
    ("18;", "18", True),
    (".5", "0.5", True),
    ("0.50", "0.5", True),
    ("5.", "5", True),
    ("0.1", "1/10", True),
    (NINES, NINES, True),
    (NINES, NINES[:-1] + "8", False),
    (f"{NINES}.5", f"{NINES}.5", True),
    ("100000000000000000000000000001", "100000000000000000000000000000", False),
    ("123,456,789,012,345,678,901,234,567,890", "123456789012345678901234567890", True),
    ("\uff11\uff18", "18", True),
    ("\u0661\u0668", "18", True),
    ("\uff11\uff0c\uff12\uff13\uff14", "1234", True),
]
SIGNS = [
    ("-5", "-5", True),
    ("-5", "5", False),
    ("5", "-5", False),
    ("+5", "5", True),
    ("- 5", "-5", True),
    ("**- 5**", "-5", True),
    ("\u22125", "-5", True),
    ("\u22125", "5", False),
    ("\u20135", "-5", True),
    ("\ufe635", "-5", True),
    ("\uff0d5", "-5", True),
    ("minus 5", "-5", True),
    ("negative 5", "-5", True),
    ("Minus $5", "-5", True),
    ("--5", "-5", False),
    ("--5", "5", False),
    ("-1,234.50", "-1234.5", True),
    ("The change is -3", "-3", True),
    ("Answer - 18", "18", True),
    ("Answer: -18", "-18", True),
    ("COVID-19", "19", False),
    ("COVID-19", "-19", False),
]
GROUPS = [
    ("1,234", "1234", True),
    ("1234", "1,234", True),
    ("1,234", "1", False),
    ("1,234", "234", False),
    ("1,234,567", "1234567", True),
    ("1,234.56", "1234.56", True),
    ("12,34,567", "1234567", True),
    ("1 234 567", "1234567", True),
    ("1\u00a0234\u00a0567", "1234567", True),
    ("1\u202f234", "1234", True),
    ("1'234", "1234", True),
    ("1\u2019234", "1234", True),
    ("1_234", "1234", True),
    ("1.234.567", "1234567", True),
    ("1.234,56", "1234.56", True),
    ("1,23", "1.23", True),
    ("1,23", "123", False),
    ("0,5", "0.5", True),
    ("1,2345", "12345", False),
    ("1,2345", "1", False),
    ("1234,567", "1234567", False),
    ("1,234,56", "123456", False),
    ("1,000,", "1000", True),
    ("1,000, because 5", "1000", True),
]
CURRENCY = [
    ("$18", "18", True),
    ("$18.", "18", True),
    ("$ 18", "18", True),
    ("18$", "18", True),
    ("-$5", "-5", True),
    ("$-5", "-5", True),
    ("$1,000,000.00", "1000000", True),
    ("US$18", "18", True),
    ("A$18", "18", True),
    ("USD 18", "18", True),
    ("18 USD", "18", True),
    ("Rs. 500", "500", True),
    ("\u20ac5", "5", True),
    ("5\u20ac", "5", True),
    ("\u00a35.50", "5.5", True),
    ("\u00a51000", "1000", True),
    ("18", "$18", True),
    ("$5 $6", "56", False),
    ("$5 $600", "5600", False),
    ("18%", "18", True),
    ("18 %", "18", True),
    ("18 percent", "18", True),
    ("18%", "0.18", False),
    ("12.5%", "12.5", True),
]
UNITS = [
    ("18 dollars", "18", True),
    ("18 dollars.", "18", True),
    ("18km", "18", True),
    ("18 km/h", "18", True),
    ("$18/hour", "18", True),
    ("18 dollars per 3 days", "18", True),
    ("18-inch", "18", True),
    ("18th", "18", True),
    ("18\u00b0", "18", True),
    ("5 km\u00b2", "5", True),
    ("5 apples and 6", "5", True),
    ("5 apples and 6", "6", False),
    ("18 (9 x 2)", "18", True),
    ("18 (since 27/3 = 9)", "18", True),
    ("18 (since 27/3 = 9)", "9", False),
    ("7 (seven)", "7", True),
    ("18 since the rest is 5", "18", True),
    ("18 since the rest is 5", "5", False),
    ("18 = 18", "18", True),
    ("18 dollars = 1800 cents", "18", True),
    ("18<|im_end|>", "18", True),
    ("18</s>", "18", True),
    ("18\nI hope that helps 19 times", "18", True),
    ("18\nI hope that helps 19 times", "19", False),
    ("3 out of 5", "3", True),
    ("2 dozen", "24", True),
    ("2 dozen", "2", True),
    ("2 dozen", "12", False),
    ("5 million", "5000000", True),
    ("5 million", "5", True),
    ("2.5 thousand", "2500", True),
    ("18k", "18000", True),
    ("3 hundred", "300", True),
]
MARKUP = [
    ("**18**", "18", True),
    ("*18*", "18", True),
    ("__18__", "18", True),
    ("`18`", "18", True),
    ('"18"', "18", True),
    ("(18)", "18", True),
    ("[18]", "18", True),
    ("<b>18</b>", "18", True),
    ("| 18 |", "18", True),
    ("~18", "18", True),
    ("-> 18", "18", True),
    ("\u2192 18", "18", True),
    ("#5", "5", True),
    ("$18$", "18", True),
    ("$$18$$", "18", True),
    ("\\$18", "18", True),
    ("18\\%", "18", True),
    ("\\(18\\)", "18", True),
    ("1{,}234", "1234", True),
    ("1\\,234", "1234", True),
    ("1,\\!234", "1234", True),
    ("\\text{18}", "18", True),
    ("18\\text{ dollars}", "18", True),
    ("\\mathrm{18}", "18", True),
    ("90^\\circ", "90", True),
    ("90^{\\circ}", "90", True),
    ("18 \\\\", "18", True),
    ("\u200b18\ufeff", "18", True),
]
FRACTIONS = [
    ("1/2", "0.5", True),
    ("1/2", "1", False),
    ("1/2", "2", False),
    ("2/4", "1/2", True),
    ("1 / 2", "0.5", True),
    ("-1/2", "-0.5", True),
    ("3 1/2", "3.5", True),
    ("3 1/2", "3", False),
    ("-3 1/2", "-3.5", True),
    ("3\u00bd", "3.5", True),
    ("\u00be", "0.75", True),
    ("1\u20442", "0.5", True),
    ("\\frac{1}{2}", "0.5", True),
    ("\\dfrac{7}{2}", "3.5", True),
    ("\\frac12", "0.5", True),
    ("-\\frac{1}{2}", "-0.5", True),
    ("\\frac{-1}{2}", "-0.5", True),
    ("3\\frac{1}{2}", "3.5", True),
    ("1,000/4", "250", True),
    ("1/3", "0.333333", False),
    ("1/0", "1", False),
    ("1/0", "0", False),
    ("1 1/0", "1", False),
    ("1/2/3", "1", False),
    ("1/2/3", "0.5", False),
    ("3/4 cup", "0.75", True),
    ("1e3", "1000", True),
    ("1E3", "1000", True),
    ("1.5e-2", "0.015", True),
    ("1.8 x 10^3", "1800", True),
    ("1.8 \\times 10^{3}", "1800", True),
    ("1.8\u00d710^-3", "0.0018", True),
    ("1e9999999", "1", False),
    ("1e3", "1", False),
]
ARITHMETIC = [
    ("3 + 4 = 7", "7", True),
    ("3 + 4 = 7", "3", False),
    ("x = 5", "5", True),
    ("Total = 18", "18", True),
    ("Total = 9*2 = 18", "18", True),
    ("5*3 = 15 + 2 = 17", "17", True),
    ("3 apples + 4 apples = 7 apples", "7", True),
    ("20% of 50 = 10", "10", True),
    ("20% of 50", "20", False),
    ("37/2 \u2248 18", "18", True),
    ("2^3 = 8", "8", True),
    ("\\sqrt{16} = 4", "4", True),
    ("3 + 4", "3", False),
    ("3 + 4", "4", False),
    ("3 + 4", "7", False),
    ("18 - 3", "18", False),
    ("5 x 3", "5", False),
    ("5 \u00d7 3", "5", False),
    ("2*3", "2", False),
    ("2^3", "2", False),
    ("2**3", "2", False),
    ("10\u00b2", "10", False),
    ("10\u00b2", "102", False),
    ("2\\sqrt{3}", "2", False),
    ("\\sqrt{3}", "3", False),
    ("2\\pi", "2", False),
    ("2\u03c0", "2", False),
    ("2(9)", "2", False),
    ("5 \u00b1 1", "5", False),
]
LISTS = [
    ("5 or 6", "5", False),
    ("5 or 6", "6", False),
    ("5, 6", "5", False),
    ("5; 6; 7", "5", False),
    ("5 and 6", "5", False),
    ("5 6 7", "5", False),
    ("(1,2)", "1.2", False),
    ("[1, 2]", "1", False),
    ("5-6", "5", False),
    ("5\u20136", "5", False),
    ("18 to 20", "18", False),
    ("3:4", "3", False),
    ("10:30", "10", False),
    ("> 5", "5", False),
    ("x < 5", "5", False),
    ("\u2265 5", "5", False),
    ("\\geq 5", "5", False),
    ("1.2.3", "1", False),
    ("2023-05-06", "2023", False),
    ("A5", "5", False),
    ("CO2", "2", False),
    ("5'6", "5", False),
    ("0x10", "16", False),
    ("eighteen", "18", False),
    ("nan", "0", False),
    ("inf", "0", False),
    ("", "0", False),
    ("$", "0", False),
    ("-", "0", False),
    ("\ud800", "0", False),
    ("\x00", "0", False),
    ("1\x008", "18", False),
    ("\x0018\x00", "18", True),
    ("\ud80018", "18", False),
]
PROSE = [
    ("The answer is 18", "18", True),
    ("The answer is 18.", "18", True),
    ("The final answer is: $18.00", "18", True),
    ("Answer: 18", "18", True),
    ("Answer:18", "18", True),
    ("**Answer:** 18", "18", True),
    ("**Answer: 18**", "18", True),
    ("Step 2: 18", "18", True),
    ("In 2020, the total is 18", "18", True),
    ("In 2020, the total is 18", "2020", False),
    ("Total is 18 since 9*2=18", "18", True),
    ("Janet makes $18 every day", "18", True),
    ("Janet's 16 eggs make $18", "16", False),
    ("Final answer\n\n18", "18", True),
    ("Final Answer:\n18", "18", True),
    ("\n18", "18", True),
    ("   18   ", "18", True),
    ("\t18", "18", True),
]
MARKS = [
    ("So 9 * 2 = 18.\n#### 18", "18", True),
    ("So 9 * 2 = 18.\n####18", "18", True),
    ("##### 18", "18", True),
    ("#### 12 #### 13", "13", True),
    ("#### 12 #### 13", "12", False),
    ("#### 12\n#### 13", "13", True),
    ("#### 12\n####", "12", True),
    ("#### 18 ####", "18", True),
    ("#### 12 #### cats", "12", False),
    ("18", "18", True),
    ("The answer is 18", "18", True),
    ("### 18", "18", False),
    ("\\boxed{18}", "18", True),
    ("\\boxed{ 18 }", "18", True),
    ("\\boxed {18}", "18", True),
    ("$\\boxed{18}$.", "18", True),
    ("\\boxed{\\frac{7}{2}}", "3.5", True),
    ("\\boxed{\\text{18 dollars}}", "18", True),
    ("\\boxed{\\boxed{18}}", "18", True),
    ("\\boxed{x = 18}", "18", True),
    ("\\boxed{5} and \\boxed{6}", "6", True),
    ("\\boxed{5} and \\boxed{6}", "5", False),
    ("\\boxed{5} and \\boxed{}", "5", True),
    ("\\boxed{5} and \\boxed{6", "5", True),
    ("\\boxed{5", "5", False),
    ("\\boxed{1{,}234}", "1234", True),
    ("\\boxed{5} #### 6", "6", True),
    ("#### 5\n\\boxed{6}", "6", True),
    ("#### $\\boxed{18}$", "18", True),
    ("#### Step 2: add\n5 + 6 = 11\n\\boxed{11}", "11", True),
    ("#### " + "because " * 20_000 + "18", "18", False),
    ("#### 18 " + "because " * 20_000, "18", True),
    ("x" * 100_000 + "#### 18", "18", True),
]
BEHIND_A_MARK = PLAIN + SIGNS + GROUPS + CURRENCY + UNITS + MARKUP + FRACTIONS + ARITHMETIC + LISTS + PROSE
TABLE = [(f"He thinks.\n#### {text}", *row) for text, *row in BEHIND_A_MARK]
# Without a mark there is no answer, whatever else the text says.
TABLE += [(text, answer, right and ("####" in text or "\\boxed" in text)) for text, answer, right in MARKS]


def test_the_table_is_as_long_as_promised():
    assert len(TABLE) >= 150 and len(set(TABLE)) == len(TABLE)
    assert sum(right for _, _, right in TABLE) >= 100 and sum(not right for _, _, right in TABLE) >= 50


@pytest.mark.parametrize("text, answer, right", TABLE, ids=lambda value: ascii(value)[:40])
def test_table(text, answer, right):
    reference, *_ = reference_values(answer)
    assert (reference in answer_values(text)) == right


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("#### 18", "18", False),
        ("#### 18 ", "18", False),
        ("#### 18.", "18", False),
        ("#### $1,2", "1.2", False),
        ("#### 12\n#### 18", "12", False),
        ("#### 18\n", "18", True),
        ("#### 18\nand", "18", True),
        ("#### 18 dol", "18", True),
        ("\\boxed{18}", "18", True),
        ("\\boxed{18", "18", False),
    ],
)
def test_a_truncated_number_must_have_ended(text, answer, right):
    assert (Fraction(answer) in answer_values(text, truncated=True)) == right


@pytest.mark.parametrize(
    "answer, value",
    [
        ("18", 18),
        ("He has 5.\n#### 18", 18),
        ("1,234", 1234),
        ("$18.50", Fraction(37, 2)),
        ("The answer is 18", 18),
        ("Paris", None),
        ("He has 5.\n#### Paris", None),
        ("", None),
    ],
)
def test_references_may_come_without_a_mark(answer, value):
    assert reference_values(answer) == (frozenset() if value is None else {Fraction(value)})


@st.composite
def dressed_numbers(draw) -> tuple[str, Fraction]:
    """A number as someone may write it, and its value."""
    whole = draw(st.integers(0, 10**30))
    decimals = draw(st.sampled_from(["", ".0", ".50", ".25", ".000001", ".123456789"]))
    negative = draw(st.booleans())
    digits = draw(st.sampled_from([str(whole), f"{whole:,}", f"{whole:,}".replace(",", "\u00a0"), f"{whole:_}"]))
    number = digits + decimals
    if draw(st.booleans()):
        number = "".join(chr(0xFF10 + int(c)) if c.isdigit() else c for c in number)
    minus = draw(st.sampled_from(["-", "\u2212", "minus ", "- "])) if negative else draw(st.sampled_from(["", "+"]))
    before, after = draw(
        st.sampled_from(
            [("", ""), ("**", "**"), ("$", "$"), ("\\text{", "}"), ("`", "`"), ("(", ")"), ("the answer is ", ".")]
            + [("", " dollars"), ("", "%"), ("", " km per 2 hours"), ("x = ", ""), ("Answer: ", "!"), ("", "\nDone 7")]
        )
    )
    mark = draw(st.sampled_from(["#### {}", "####{}", "\\boxed{{{}}}", "#### 7\n#### {}", "\\boxed{{7}} #### {}"]))
    value = Fraction(f"{whole}{decimals}")
    return f"{draw(st.text(max_size=20))}\n{mark.format(before + minus + number + after)}", (
        -value if negative else value
    )


@REPEATABLE
@given(dressed_numbers())
def test_random_numbers_in_random_dress(case):
    text, value = case
    assert answer_values(text) == {value}


@REPEATABLE
@given(st.fractions(max_denominator=10**12).filter(lambda value: value >= 0))
def test_random_fractions(value):
    top, bottom = value.numerator, value.denominator
    for text in (f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"{top // bottom} {top % bottom}/{bottom}"):
        assert answer_values(f"#### {text}") == {value}


@REPEATABLE
@given(st.text())
def test_any_text(text):
    for mark in ("####", "\\boxed{"):
        answer_values(mark + text)
        answer_values(mark + text + "}", truncated=True)


def test_random_bytes():
    source = random.Random(0)
    for _ in range(10_000):
        raw = source.randbytes(source.randrange(200))
        for text in (raw.decode("latin-1"), raw.decode("utf-8", "surrogateescape")):
            answer_values(f"#### {text}")
            reference_values(text)


def test_random_fragments():
    fragments = ["####", " ", "\\boxed{", "}", "{", "12", "9", ",", ".", "-", "/", "e", "$", "%", "=", "x", "+", "\n"]
    fragments += ["\\frac{", "is ", "\u00bd", "\u2212", "dozen", "^", "(", ")", "'", "*", "minus ", "\\", "<", ">", "|"]
    source = random.Random(0)
    for _ in range(10_000):
        answer_values("".join(source.choices(fragments, k=25)))


def line_of(unit: str, end: str = "5") -> str:
    """As much of `unit` as still leaves `end` within what is looked at."""
    return "#### " + unit * ((MAX_CHARS - len(end)) // len(unit)) + end


LONG = 100_000
HARMFUL = [
    *[unit * (LONG // len(unit)) for unit in ("####", "#", "\n", " ", "a", "9", "\\boxed", "\\boxed{", "\\boxed{}")],
    *[unit * (LONG // len(unit)) for unit in ("\\boxed{{", "#### 5\n", "####\n", "\ud800", "\x00", "#### \\boxed{")],
    "\\boxed{" + "{" * LONG,
    "#### " + " " * LONG + "5",
    "#### " + "9" * LONG,
    "#### " + "1 " * LONG,
    *[line_of(unit) for unit in ("is ", "x=", "x: ", "1=", "1+1=", "1/2=", "1+", "- ", "-", "1,", "1 ", "1_", "1.")],
    *[line_of(unit) for unit in ("\\frac{", "\\frac{1}{", "{", "(", "<a", "^ {", "\\circ", "minus ", "A", "A$", "$")],
    *[line_of(unit) for unit in (" ", "\t", "\u00a0", "\u00bd", "\u2212", "1 000 ", "1 (2) ", "5 a", "1e9", "'")],
    *[line_of("a ", f"5{' ' * 200}{end}") for end in ("x", "to 6", "- 6", "x 6", "dozens", "= 6", "% of 6")],
    "#### " + "9" * (MAX_CHARS - 5) + "e400",
    "#### 1e400/1e-400",
]


def test_every_text_is_read_in_bounded_time():
    def seconds(text: str) -> float:
        start = time.thread_time()
        answer_values(text)
        reference_values(text)
        return time.thread_time() - start

    slowest = max(min(seconds(text) for _ in range(3)) for text in HARMFUL)
    assert slowest < 0.05


def test_boxes_that_never_close_are_passed_over_up_to_a_bound():
    assert answer_values("\\boxed{5}" + "\\boxed{" * (MAX_BOXES - 1)) == {5}
    assert answer_values("\\boxed{5}" + "\\boxed{" * MAX_BOXES) == frozenset()


def test_numbers_longer_than_the_bound_are_rejected_not_cut():
    assert answer_values("#### " + "9" * MAX_CHARS) == {Fraction("9" * MAX_CHARS)}
    assert answer_values("#### " + "9" * (MAX_CHARS + 1)) == frozenset()


def test_another_thread_reads_the_same():
    results = []
    thread = threading.Thread(target=lambda: results.extend(answer_values(text) for text, _, _ in TABLE))
    thread.start()
    thread.join()
    assert results == [answer_values(text) for text, _, _ in TABLE]
