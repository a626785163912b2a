# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

r"""The number that a worked solution ends in, exactly, whatever it is dressed in.

Where the answer is: after the last `####` or in the last `\boxed{}` that closes, whichever comes later; marks with
nothing after them say nothing. Without a mark there is no answer.

Which number it is: the first on the line. What follows it (units, words, a remark) is commentary, so that listing
several numbers wins nothing. An equation's answer is its right side, a label's what follows the label ("Answer:",
"the total is"). A line of prose with several numbers and no label names none of them as the answer: rejected.

What a number is: optional sign and currency, thousands grouped by commas, spaces, apostrophes or underscores (Western
or Indian), decimals, `a/b`, `3 1/2`, `\frac{a}{b}`, vulgar fractions, `1e3`, `1.2 x 10^3`, digits of any script. A
comma before one or two last digits is a decimal comma. A percent sign is a unit: 18% is 18. Magnitude words may be
units ("2 dozen" where dozens were asked for) or factors (24), so both readings count.

What is rejected: arithmetic left undone (3 + 4, 2^5, roots: math-verify's business), lists, ranges and ratios (5 or 6,
5-6, 3:4), inequalities, malformed numbers (1,2345 or 1.2.3), division by zero, number words ("eighteen"), numbers
longer than a line of MAX_CHARS characters. A truncated completion must show that its number had ended.

Every function takes any str, raises nothing, and takes time linear in the text: only MAX_CHARS characters behind a mark
are looked at closely.
"""

import re
import unicodedata
from fractions import Fraction

# Far longer than any answer. It bounds the patterns below, some of which are quadratic in a line's length.
MAX_CHARS = 1000
# Boxes that never close are passed over; a text of nothing else must not cost a scan for each of them.
MAX_BOXES = 16
MAX_EXPONENT = 400

_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "k": 10**3,
    "thousand": 10**3,
    "m": 10**6,
    "million": 10**6,
    "b": 10**9,
    "billion": 10**9,
    "trillion": 10**12,
}

# One character for another, so that the patterns below need to know ASCII alone.
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2018\u2019\u02bc", "'"),
        **dict.fromkeys("\u2044\u2215\uff0f", "/"),
        **dict.fromkeys("\u00d7\u22c5\u00b7\u2217", "*"),
        **dict.fromkeys("\u2248\u2245\u2192\u21d2\uff1d", "="),
        **{"\u00f7": "/", "\uff0b": "+", "\uff0e": ".", "\uff0c": ",", "\uff05": "%", "\uff1a": ":"},
        **{"\u066b": ".", "\u066c": ",", "\uff03": "#"},
    }
)
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[,;: ]|~", " "),
        (r"\\!", ""),
        (r"\{,\}", ","),
        (r"\\[()\[\]]|\\left|\\right|\\displaystyle|\\q?quad", " "),
        (r"\\times|\\cdot", "*"),
        (r"\\approx|\\to\b|\\[rR]ightarrow", "="),
        (r"\\div", "/"),
        (r"\\(?:text|math)\w*|\\(?:boxed|fbox|mbox)", " "),
        (r"\^?\s?\{?\\circ\}?", " "),
        (r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r" \1/\2 "),
        (r"\\[dt]?frac\s?(\d)\s?(\d)", r" \1/\2 "),
        (r"\\([$%&#_])", r"\1"),
        (r"[{}]", " "),
    ]
]
_MARKUP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"<[|/]?[a-zA-Z][^<>]{0,30}>", " "),  # <b>, </s>, <|im_end|>
        (r"[-=]+>", "="),  # arrows
        (r"\b[A-Z]{1,3}(?=\$)|\b(?:USD|EUR|GBP|INR|CAD|AUD|Rs\b\.?)(?=[ $]*[-+.]?\d)", ""),
        (r"\$", " "),
        (r"(?i)\b(?:minus|negative)\s+(?=[.\d])", "-"),
    ]
]

_DIGITS = r"(?:\d{1,3}(?: \d{3})+(?:\.\d+)?(?![\d,'_]|\s?/)|\.?\d+(?:[.,'_]\d+)*)"
_NUMBER = re.compile(
    r"(?P<whole>\d+)[ -](?P<top>\d+)\s?/\s?(?P<bottom>\d+)"
    rf"|(?P<value>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d+))?"
    rf"(?:\s?/\s?(?P<divisor>-?{_DIGITS}))?(?:\s?[*xX]\s?10\s?\^\s?(?P<power>[-+]?\s?\d+))?"
)
# The groupings of an integer and the ways to write a decimal fraction, and what is left of them without the grouping.
_WRITTEN = [
    (re.compile(r"\d*\.?\d+"), str),
    (re.compile(r"(?=.*,)\d{1,3}(?:,\d{3})*(?:\.\d+)?"), lambda text: text.replace(",", "")),
    (re.compile(r"\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?"), lambda text: text.replace(",", "")),
    (re.compile(r"\d{1,3}(?:['_ ]\d{3})+(?:\.\d+)?"), lambda text: re.sub("['_ ]", "", text)),
    (re.compile(r"\d+,\d{1,2}"), lambda text: text.replace(",", ".")),
    (re.compile(r"\d{1,3}(?:\.\d{3})+,\d+"), lambda text: text.replace(".", "").replace(",", ".")),
    (re.compile(r"\d{1,3}(?:\.\d{3}){2,}"), lambda text: text.replace(".", "")),
]

# What may stand right before a number and its sign, and what must not follow it: more digits, more arithmetic, a
# second number.
_BEFORE = re.compile(r"(?:^|[\s(\[\"'*_`:=#|])\s*(?P<sign>[-+]?)\s*$")
_CONTINUES = re.compile(
    r"\d|[.,:/'_]\d|[\u00b2\u00b3\u00b9\u2070-\u2079]|\s*(?:\^|\\|\u221a|\u03c0|\u00b1)|\s*\(\s*\d"
    r"|(?:\s*[a-zA-Z%]{1,20}[.]?)?\s*(?:[-+*/]|[xX](?![a-wyzA-WYZ]))\s*[-(]?\s*[.\d]"
    r"|\s*(?:[,;&]|,?\s*\b(?:to|or|and)\b)?\s*[-+]?[.]?\d"
)
_SCALE = re.compile(rf"[\s-]*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_ASIDE = re.compile(r"(?<=\d)\s+[(\[].*")
_LABEL = re.compile(r".*(?::\s|:(?=\$)|:$|\b(?:is|are|was|equals|be)\b)(?=.*\d)\s*")
_OPERATOR = re.compile(r"[-+*/^]|[\dA-Za-z]\s*[xX]\s*\d")


def answer_values(text: str, truncated: bool = False) -> frozenset[Fraction]:
    """The values that the final answer of `text` may be read as: one, two with a magnitude word, or none.

    Args:
        text: a worked solution.
        truncated: the text was cut off, so a number at its very end may have lost digits.
    """
    segment, boxed = _final_segment(text)
    return _read_segment(segment, open_ended=truncated and not boxed)


def reference_values(answer: str) -> frozenset[Fraction]:
    """The values of a reference answer: a worked solution with a mark, or the bare number."""
    return answer_values(answer) or _read_segment(answer[:MAX_CHARS], open_ended=False)


def _final_segment(text: str) -> tuple[str, bool]:
    """What stands behind the last mark that has something behind it, and whether that mark is a box."""
    text = text.rstrip(" \t\r\n#\uff03")
    hashes = text.rfind("####")
    box, end = len(text), 0
    for _ in range(MAX_BOXES):
        box = text.rfind("\\boxed", max(hashes, 0), box)
        if box < 0:
            break
        content = _braced(text[box + len("\\boxed") :][: MAX_CHARS + 1])
        if content.strip():
            return content, True
    if hashes < 0:
        return "", False
    return text[hashes + 4 :].lstrip("# \t\r\n")[:MAX_CHARS], False


def _braced(text: str) -> str:
    """The content of the braces that `text` starts with; empty where they never close."""
    text = text.lstrip()
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i]
    return ""


def _read_segment(segment: str, open_ended: bool) -> frozenset[Fraction]:
    lines = [line for line in _plain(segment).split("\n") if line.strip()]
    # A first line without a digit is a heading ("Final answer") of the next.
    place = next((i for i, line in enumerate(lines[:2]) if re.search(r"\d", line)), None)
    if place is None:
        return frozenset()
    return _read_line(lines[place].strip(), open_ended and place == len(lines) - 1)


def _plain(text: str) -> str:
    """`text` in ASCII where it matters, without LaTeX and markup."""
    if not text.isascii():
        text = "".join(map(_plain_character, text.translate(_CHARACTERS)))
    for pattern, replacement in _LATEX + _MARKUP:
        text = pattern.sub(replacement, text)
    return text


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    category = unicodedata.category(character)
    if category == "No" and "\u2044" in (fraction := unicodedata.normalize("NFKC", character)):
        return f" {fraction}".replace("\u2044", "/")
    return {"Zs": " ", "Sc": "$", "Cf": ""}.get(category, character)


def _read_line(line: str, open_ended: bool) -> frozenset[Fraction]:
    line = _answer_part(line)
    number = _NUMBER.search(line)
    if number is None:
        return frozenset()
    head, tail = line[: number.start()], line[number.end() :]
    before = _BEFORE.search(head)
    value = _value(number)
    names_several = re.search(r"[a-zA-Z]{2}", head) and re.search(r"\d", tail)
    unfinished = open_ended and not re.search(r"[^\W\d_]", tail)
    if before is None or value is None or _CONTINUES.match(tail) or "\\" in head or names_several or unfinished:
        return frozenset()
    if before["sign"] == "-":
        value = -value
    scale = _SCALE.match(tail)
    return frozenset({value, value * _SCALES[scale[1].lower()]} if scale else {value})


def _answer_part(line: str) -> str:
    """The part of `line` that gives the answer: behind a label, right of an equation, without an aside."""
    line = _ASIDE.sub("", line)
    left, equals, right = line.rpartition("=")
    if equals and re.search(r"\d", right) and (_OPERATOR.search(left) or not re.search(r"\d", left)):
        line = right
    if re.match(r"\W*[a-zA-Z]", line):
        line = _LABEL.sub("", line, count=1)
    return line


def _value(number: re.Match[str]) -> Fraction | None:
    if number["whole"]:
        bottom = int(number["bottom"])
        return int(number["whole"]) + Fraction(int(number["top"]), bottom) if bottom else None
    value, divisor = _decimal(number["value"]), _decimal(number["divisor"] or "1")
    exponents = [int(number[name].replace(" ", "")) for name in ("exponent", "power") if number[name]]
    if value is None or not divisor or any(abs(exponent) > MAX_EXPONENT for exponent in exponents):
        return None
    return value / divisor * Fraction(10) ** sum(exponents)


def _decimal(text: str) -> Fraction | None:
    """The value of an unsigned decimal in one of the groupings, None for a malformed one."""
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("-")
    ungroup = next((ungroup for pattern, ungroup in _WRITTEN if pattern.fullmatch(text)), None)
    return None if ungroup is None else sign * Fraction(ungroup(text))
