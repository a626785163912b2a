# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

r"""The number that a worked solution ends in, exactly, whatever it is dressed in.

Where the answer is: after the last `####` or in the last `\boxed{}` that closes, whichever comes later; marks with
nothing after them say nothing. Without a mark there is no answer.

Which number it is: the first on the line. What follows it (units, words, a remark) is commentary, so that listing
several numbers wins nothing. Where words come first, a label says where the number is ("Answer:", "x =", "the total
is"); prose with several numbers and no label names none of them: rejected. Arithmetic counts by what it comes to: what
is right of its equals sign.

What a number is: optional sign and currency, thousands grouped by commas, spaces, apostrophes or underscores (Western
or Indian), decimals, `a/b`, `3 1/2`, `\frac{a}{b}`, vulgar fractions, `1e3`, `1.2 x 10^3`, digits of any script. A
comma before one or two last digits is a decimal comma. A percent sign is a unit: 18% is 18. Magnitude words may be
units ("2 dozen" where dozens were asked for) or factors (24), so both readings count.

What is rejected: arithmetic left undone (3 + 4, 2^5, roots: math-verify's business), lists, ranges and ratios (5 or 6,
5-6, 3:4), pairs such as (1,2), inequalities, malformed numbers (1,2345 or 1.2.3), division by zero, number words
("eighteen"), numbers of more than MAX_CHARS characters. A truncated completion must show that its number had ended.

Every function takes any str, raises nothing, and takes time linear in the text: only MAX_CHARS characters behind a mark
are looked at closely.
"""

import re
import unicodedata
from fractions import Fraction

# Far longer than any answer. It bounds the patterns below, some of which are quadratic in a line's length.
MAX_CHARS = 500
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
        **{"\u066b": ".", "\u066c": ","},
    }
)
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[,;: \\]|~", " "),
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
        (r"[\x00-\x08\x0b-\x1f\x7f]", " "),
        (r"<[|/]?[a-zA-Z][^<>]{0,30}>", " "),  # <b>, </s>, <|im_end|>
        (r"[-=]+>", "="),  # arrows
        (r"\b[A-Z]{1,3}(?=\$)|\b(?:USD|EUR|GBP|INR|CAD|AUD|Rs\b\.?)(?=[ $]*[-+.]?\d)", ""),
        (r"\$", " "),
        (r"(?i)\b(?:minus|negative)\s+(?=[.\d])", "-"),
        # One space may group digits, more cannot; and a bound on runs of them is one on backtracking below.
        (r"[^\S\n]{2,}", "  "),
    ]
]

_DIGITS = r"(?:\d{1,3}(?: \d{3})+(?:\.\d+)?(?![\d,'_]|\s?/)|\.?\d+(?:[.,'_]\d+)*)"
_NUMBER = re.compile(
    r"(?P<whole>\d+) (?P<top>\d+)\s?/\s?(?P<bottom>\d+)"
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

# What may stand right before a number and its sign; letters, hyphens, inequalities and operators make it another thing.
_BEFORE = " \t\r([\"'*_`:=#|"
_RELATIONS = ("<", ">", "\u2260", "\u2264", "\u2265", "\u00b1", "\u221a")
# What makes a number part of something longer: more digits, arithmetic, a second number beside it.
_CONTINUES = re.compile(
    r"\d|[.,:/'_]\d|[\u00b2\u00b3\u00b9\u2070-\u2079]|\s*[\^\\\u221a\u03c0\u00b1]|\(\s*\d|\s*%\s*of\s+[.\d]"
    r"|(?:\s*[a-zA-Z%]{1,20}[.]?)?\s*(?:\+/-|\*\*|[-+*/]|[xX](?![a-wyzA-WYZ]))\s*[-(]?\s*[.\d]"
    r"|\s*(?:[,;&]|,?\s*\b(?:to|or|and)\b)?\s*[-+]?[.]?\d"
)
_LABEL = re.compile(r".*?(?:=|:(?!\d)|\b(?:is|are|was|be|equals)\b)(?=.*\d)")
_SCALE = re.compile(rf"[\s-]*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)


def answer_values(text: str, truncated: bool = False) -> frozenset[Fraction]:
    """The values that the final answer of `text` may be read as: one, two with a magnitude word, or none.

    Args:
        text: a worked solution.
        truncated: the text was cut off, so a number at its very end may have lost digits.
    """
    segment, complete = final_segment(text)
    return _read_segment(segment, open_ended=truncated and not complete)


def reference_values(answer: str) -> frozenset[Fraction]:
    """The values of a reference answer: a worked solution with a mark, or the bare number."""
    segment, _ = final_segment(answer)
    return _read_segment(segment or _head(answer), open_ended=False)


def final_segment(text: str) -> tuple[str, bool]:
    """What stands behind the last mark that has something behind it, and whether it is seen to be all there."""
    stripped = text.rstrip(" \t\r\n#")
    hashes = stripped.rfind("####")
    box = len(stripped)
    for _ in range(MAX_BOXES):
        box = stripped.rfind("\\boxed", max(hashes, 0), box)
        if box < 0:
            break
        if content := _braced(stripped[box + len("\\boxed") :][: MAX_CHARS + 2]):
            return content, True
    segment = _head(stripped[hashes + len("####") :].lstrip("# \t\r\n")) if hashes >= 0 else ""
    return segment, not set("\n#").isdisjoint(text[len(stripped) :])


def _head(text: str) -> str:
    """The first MAX_CHARS characters of `text`, less the word that this would cut in two."""
    if len(text) <= MAX_CHARS:
        return text
    head = text[:MAX_CHARS]
    return head.removesuffix(head.split()[-1]) if head.strip() else ""


def _braced(text: str) -> str:
    """The content of the braces that `text` starts with; empty where they never close or hold only blanks."""
    text = text.lstrip()
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i].strip()
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
    return {"Zs": " ", "Cc": " ", "Sc": "$", "Cf": ""}.get(category, character)


def _read_line(line: str, open_ended: bool) -> frozenset[Fraction]:
    number = _answer_number(line)
    if number is None:
        return frozenset()
    head, tail = number.string[: number.start()], number.string[number.end() :]
    sign, value = _sign(head), _value(number)
    names_several = re.search(r"[^\W\d_]{2}", head) and re.search(r"\d", tail)
    unfinished = open_ended and not re.search(r"[^\W\d_]", tail)
    pair = head.endswith(("(", "[")) and re.fullmatch(r"\d+,\d{1,2}", number[0])
    if not sign or value is None or names_several or unfinished or pair:
        return frozenset()
    scale = _SCALE.match(tail)
    return frozenset({sign * value, sign * value * _SCALES[scale[1].lower()]} if scale else {sign * value})


def _answer_number(line: str) -> re.Match[str] | None:
    """The number that `line` gives as its answer: the first, or the first behind labels and arithmetic."""
    while number := _NUMBER.search(line):
        label = _LABEL.match(line) if re.search(r"[^\W\d_]", line[: number.start()]) else None
        tail = line[number.end() :]
        if label:
            line = line[label.end() :]
        elif _CONTINUES.match(tail) or ("/" in number[0] and re.match(r"\s*=.*\d", tail)):
            line = tail.partition("=")[2]
        else:
            return number
    return None


def _sign(head: str) -> int:
    """1 or -1 for what stands before a number, 0 if it makes it something else than a number."""
    bare = head.rstrip()
    if bare.endswith(_RELATIONS) or "\\" in head:
        return 0
    if not bare.endswith(("-", "+")):
        return int(not head or head[-1] in _BEFORE)
    rest = bare[:-1]
    if rest and rest[-1] not in _BEFORE:
        return 0
    # "Answer - 5": a dash with space on both sides, behind a word, is punctuation.
    dash = bare != head and re.search(r"[^\W\d_]", rest)
    return -1 if bare[-1] == "-" and not dash else 1


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
    """The value of a decimal in one of the groupings, None for a malformed one."""
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("-")
    ungroup = next((ungroup for pattern, ungroup in _WRITTEN if pattern.fullmatch(text)), None)
    return None if ungroup is None else sign * Fraction(ungroup(text))
