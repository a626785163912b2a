# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

r"""Whether two mathematical answers are equal, by the math-verify library, in a process that may be killed.

sympy is asked anything that a policy may write: it may take for ever, or all the memory there is. Run by its path, so
that no torch is imported (see user_process.py).

What is done to an answer before the library sees it are repairs of what its parser misreads without a word: products
read as mixed numbers (`2(3)` as 5), letters after a number as units (`3t` as 3), `60^\circ` as 60 in a cosine.
"""

import functools
import logging
import re
import resource
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 2 << 30

# The library's list of units has single letters in it, which are variables more often.
_UNIT = re.compile(
    r"(?<=[\d)}])(?:\s+[a-zA-Z]{2,}[a-zA-Z /.]*|[\s~]*\\(?:text|mathrm|mbox)\s*\{[^{}]*\})(?:\s*\^\s*\{?\d\}?)?\.?$"
)
_REPAIRS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!_\d)(?<=[\d)])\s*(?=\(|\\(?:[dt]?binom|gcd|lcm|lfloor|lceil|max|min)\b)", r"\\cdot "),
        (r"(\d) (\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"^(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)$", r"\1\\cdot 10^{\2}"),
        (r"(\\(?:sin|cos|tan|cot|sec|csc)\b[^,;]*?)(\d+)\s*\^\s*\{?\s*\\circ\s*\}?", r"\1(\\frac{\2\\pi}{180})"),
        (r"\\varnothing\b", r"\\emptyset "),
    ]
]
_LETTERS = re.compile(r"[\s~{}]|\\(?:text|math)[a-z]*(?=\s*\{)")
_BASE = re.compile(r"\d_\{?(\d+)")
# Ways through parser and sympy; each first time takes up to half a second.
_WARM_UP = [
    (r"2\frac{1}{2} + 0.5", "3"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{3}}"),
    (r"(-\infty, 2] \cup (3,4)", r"(-\infty, 2) \cup (3,4)"),
    (r"\{1, 2\}", "3, 4"),
    ("(1, 2)", "(2, 1)"),
    ("y = 2x + 1", "y = 2x + 3"),
    (r"x \le 2", "x < 2"),
    (r"\sin x + \log_2 8", r"e^{x}"),
    (r"\binom{5}{2}", "5!"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"),
    (r"\pm 3", "2, 3"),
]


def make() -> Callable[[Any], float]:
    """Prepares this process and returns the reward: 1 if `completion` equals `answer`, both bare expressions, else 0.

    A completion that is a whole text (`prompt` says "text") is searched by the library for its answer.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.ERROR)  # The library warns that its own time limits are off.
    for pair in _WARM_UP:
        equal(*pair)
    return lambda sample: float(equal(sample.completion, sample.answer, search=sample.prompt == "text"))


@functools.lru_cache(maxsize=4096)
def equal(given: str, expected: str, search: bool = False) -> bool:
    """Whether `given`, an expression or with `search` a text that holds one, is worth what `expected` is."""
    from math_verify import parse, verify

    if search:
        return verify(_expression(expected), parse(given, parsing_timeout=None), timeout_seconds=None)
    names = [_LETTERS.sub("", text) for text in (given, expected)]
    if all(_is_name(name) for name in names):
        return names[0].casefold() == names[1].casefold()
    bases = [set(_BASE.findall(text)) for text in (given, expected)]
    if all(bases) and bases[0] != bases[1]:
        return False
    one, other = _expression(expected), _expression(given)
    if _is_pair(one) != _is_pair(other) and (_is_list(one) or _is_list(other)):
        return False
    return verify(one, other, timeout_seconds=None, allow_set_relation_comp=True)


@functools.lru_cache(maxsize=4096)
def _expression(text: str) -> Any:
    """`text` as sympy has it; what cannot be parsed stays text, which equals nothing but itself."""
    from latex2sympy2_extended import latex2sympy, NormalizationConfig
    from latex2sympy2_extended.math_normalization import normalize_latex

    text = normalize_latex(
        _UNIT.sub("", text), NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    )
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    try:
        return latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None)
    except Exception:
        return text


def _is_name(letters: str) -> bool:
    """Points (AB) and words (even), whose letters are not factors that may change places, as those of xy are."""
    return letters.isalpha() and (len(letters) > 3 or len(letters) > 1 and letters != letters.lower())


def _is_pair(expression: Any) -> bool:
    """(1, 2), which the library takes for an interval, and that for a list of two in any order."""
    return type(expression).__name__ == "Interval"


def _is_list(expression: Any) -> bool:
    return type(expression).__name__ == "FiniteSet"
