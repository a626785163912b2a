# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

r"""Plain numbers, and sets, lists, tuples, intervals and unions of them, compared exactly and at once.

math-verify knows them too, but its parser takes about 20 ms for each, whatever it holds: two of them and a comparison
are more than a sample's reward may take.
"""

import re
from fractions import Fraction

_NUMBER = re.compile(r"([-+]?)(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+(?:\.\d+)?)(?:/(\d+))?)")
_SPELLINGS = [(r"\s+|\\left|\\right", ""), (r"\\[dt]frac", r"\\frac"), (r"\\[{}]", "|"), (r"\+?\\infty", "inf")]
_ELEMENT = r"(?:[a-zA-Z]=)?-?(?:\d+/\d+|inf)"
_LIST = re.compile(rf"{_ELEMENT}(?:[,;]{_ELEMENT})*")
# Brackets around a single number are for multiplication.
_MEMBER = re.compile(rf"\|(?:{_LIST.pattern})?\||[(\[]{_ELEMENT}[,;]{_LIST.pattern}[)\]]")
_PLUS_MINUS = re.compile(rf"\\pm({_ELEMENT})")


def number_values(expression: str) -> frozenset[Fraction]:
    """What `expression` is worth if it is a plain number; a percentage is worth a hundredth, too."""
    number = _NUMBER.fullmatch(_respelled(expression.removesuffix("%")))
    try:
        value = Fraction(_as_fraction(number)) if number else None
    except ZeroDivisionError:
        return frozenset()
    if value is None:
        return frozenset()
    return frozenset({value, value / 100} if expression.endswith("%") else {value})


def number_set(expression: str) -> object | None:
    r"""What two expressions have in common exactly if they are the same set, list, tuple, interval or union of numbers.

    Numbers are integers, decimals, `a/b` and `\frac{a}{b}`. A set and a bare list have no order, a tuple or an interval
    has, a union has none. A list may be one of assignments to letters.

    Returns:
        None if `expression` is nothing of that kind. A single number is none.
    """
    try:
        text = _NUMBER.sub(_as_fraction, _respelled(expression))
    except ZeroDivisionError:
        return None
    text = _PLUS_MINUS.sub(lambda match: f"{match[1]},-{match[1]}".replace("--", ""), text)
    if _LIST.fullmatch(text) and re.search("[,;]", text):
        return _without_order(text)
    parts = text.split("\\cup")
    if not all(_MEMBER.fullmatch(part) for part in parts):
        return None
    members = frozenset(_without_order(part[1:-1]) if part.startswith("|") else part for part in parts)
    return next(iter(members)) if len(members) == 1 else members


def _respelled(text: str) -> str:
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    return text


def _without_order(elements: str) -> frozenset[str]:
    return frozenset(re.split("[,;]", elements))


def _as_fraction(number: re.Match[str]) -> str:
    sign, top, bottom, value, divisor = number.groups()
    fraction = Fraction(int(top), int(bottom)) if top else Fraction(value) / int(divisor or 1)
    return f"{'-' if sign == '-' and fraction else ''}{fraction.numerator}/{fraction.denominator}"
