# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

r"""Equal values in other forms, judged by the math-verify library, in bounded time and from any thread.

math-verify bounds its time with SIGALRM, which exists on the main thread alone, and a time limit would let a machine's
load decide a reward. So its limits are off, and what reaches it is bounded instead: few numbers, symbols and known
LaTeX commands, without towers of powers, factorials, sums or integrals; symbols in polynomials alone; relations of
plain numbers. Others are worth 0, unless they read the same. Sets, intervals and the like are number_sets.py's.
"""

import contextlib
import functools
import itertools
import logging
import math
import re
import threading
from collections.abc import Iterator

from torchtitan.experiments.rl.unified.rollout.answers import answer_values, final_segment, reference_values
from torchtitan.experiments.rl.unified.rollout.rewards.base import RewardInput
from torchtitan.experiments.rl.unified.rollout.rewards.number_sets import number_set, number_values

MAX_CHARS = 80
# Each level of brackets doubles, in the worst case, what the parser tries.
MAX_DEPTH = 4
MAX_DIGITS = 40
# The product of the exponents of an expression of numbers, as powers may stand on one another; with symbols and roots,
# which sympy multiplies out, their sum.
MAX_EXPONENTS = 10_000
MAX_SYMBOLIC_EXPONENTS = 6
MAX_SYMBOLS = 2
# Numbers, symbols and commands: sympy's work grows with them, with symbols or in a relation several times as fast.
MAX_ATOMS = 8
MAX_ATOMS_OF_BOTH = 10
MAX_SYMBOLIC_ATOMS = 6
MAX_ROOTS = 2

_COMMANDS = frozenset("cdot dfrac div frac left pi right sqrt tfrac times ge geq le leq".split())
_ATOM = re.compile(r"\\(?!left|right|cdot|times|div)[a-zA-Z]+|\d+(?:\.\d+)?|[a-zA-Z]")
_RELATION = re.compile(r"[=<>]|\\[gl]eq?(?![a-zA-Z])")
_OF_NUMBERS = re.compile(r"(?:[-+/\d.=<>\s]|\\(?:[gl]eq?)(?![a-zA-Z])|[a-zA-Z])*")
_LAYOUT = re.compile(r"\s+|\\(?:left|right)(?![a-zA-Z])")
_DIVISION_BY_A_NUMBER = re.compile(r"/\s*\d|frac\s*\{[^{}]*\}\s*\{\s*\d+\s*\}")
_ASSIGNMENT = re.compile(r"^([a-zA-Z])\s*=\s*(?=[^=<>]*$)")
_DRESS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|boxed)\s*(?=\{)|\\[!,;: ]|\\?\$|\*\*(?!\s*\d)|[`.]+$")
_UNIT = re.compile(r"(?<=[\d)}\s])\s*\{?\s*[a-zA-Z]{3,}[a-zA-Z .}]*$")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*\{?\s*\(?\s*(-?\d{1,4}(?:/\d{1,2})?)\s*(\)?\s*\}?)(?!\s*[\d^*])")
_WARM_UP = [
    ("2^3+4*5-6/2", "25"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x+1", "2(x-1)/3"),
    ("(x+3)(x-7/5)", "x^6-77.14"),
    ("\\frac{x+85.7}{7}", "2(x+\\frac{4}{3})/2"),
    ("x<2", "x\\le 2"),
    ("x=7.5", "x\\ge 83/4"),
    ("-3\\le x<28.2", "x=-3"),
    ("\\frac{8/7}{76.51-\\frac{9}{9}}", "4\\pi--12"),
    ("(22)(4.18)-\\sqrt{\\frac{26}{7}}", "\\frac{1/2+8/9}{6/2}"),
    ("24", "((9/9)(\\frac{6}{5}))(1\\sqrt{25})"),
    ("\\frac{\\sqrt{7/5}}{(4/4)(76)}", "8/5"),
    ("((\\frac{3}{7})(-4))(5^{1/3})", "-(-(7\\pi))"),
    ("-16+14.8+98", "2((\\sqrt{21})(7^{5}))/2"),
    ("\\pi-3.14", "(5\\pi)\\cdot 2"),
]
# sympy's caches and math-verify's parser are shared by all threads.
_LOCK = threading.Lock()


def math_verify(sample: RewardInput) -> float:
    r"""1 if the final answer equals the reference: as a number (answers.py says how), or as an expression.

    Without a mark (`####`, `\boxed{}`) the answer is the last line. A truncated completion must show that its answer
    had ended.
    """
    wanted = reference_values(sample.answer)
    if not wanted.isdisjoint(answer_values(sample.completion, sample.truncated)):
        return 1.0
    given, complete = _expression(sample.completion)
    if sample.truncated and not complete:
        return 0.0
    expected, _ = _expression(sample.answer)
    if "=" not in expected or _name(given) == _name(expected):
        given, expected = (_ASSIGNMENT.sub("", expression) for expression in (given, expected))
    if not number_values(given).isdisjoint(number_values(expected)):
        return 1.0
    if given and _LAYOUT.sub("", given) == _LAYOUT.sub("", expected):
        return 1.0
    sets = number_set(given), number_set(expected)
    if sets != (None, None):
        return float(sets[0] == sets[1])
    alike = _symbols(given) == _symbols(expected) and _is_relation(given) == _is_relation(expected)
    few = len(_ATOM.findall(given)) + len(_ATOM.findall(expected)) <= MAX_ATOMS_OF_BOTH
    return float(alike and few and is_bounded(given) and is_bounded(expected) and _equal(given, expected))


def is_bounded(expression: str) -> bool:
    """Whether math-verify is done with `expression`, beside another such, in less than 50 ms."""
    if not expression or len(expression) > MAX_CHARS or not expression.isascii():
        return False
    commands = set(re.findall(r"\\([a-zA-Z]+)", expression))
    bare = re.sub(r"\\[a-zA-Z]+", " ", expression)
    symbols = _symbols(expression)
    powers = _EXPONENT.findall(expression)
    relation = _is_relation(expression)
    roots = expression.count("sqrt") + sum("/" in power for power, _ in powers)
    symbolic = symbols or roots or "pi" in commands
    divisions = expression.count("/") + expression.count("frac")
    exponents = [abs(int(part)) for power, _ in powers for part in power.split("/")]
    return (
        commands <= _COMMANDS
        and not re.search(rf"[!_&@#?|'\"%\[\],;]|\\[^a-zA-Z]|\d{{{MAX_DIGITS + 1}}}", bare)
        and len(powers) == expression.count("^") + expression.count("**")
        and _depth(expression) <= MAX_DEPTH
        and len(symbols) <= MAX_SYMBOLS
        and len(_ATOM.findall(expression)) <= (MAX_SYMBOLIC_ATOMS if symbols or relation else MAX_ATOMS)
        and roots <= (0 if symbols else MAX_ROOTS)
        and not (symbols and divisions != len(_DIVISION_BY_A_NUMBER.findall(expression)))
        and not (relation and not _OF_NUMBERS.fullmatch(expression))
        and math.prod(max(exponent, 1) for exponent in exponents) <= MAX_EXPONENTS
        and (not symbolic or sum(exponents) <= MAX_SYMBOLIC_EXPONENTS)
    )


def _is_relation(expression: str) -> bool:
    return _RELATION.search(expression) is not None


def _name(expression: str) -> str | None:
    """What an assignment gives a value to."""
    assignment = _ASSIGNMENT.match(expression)
    return assignment[1] if assignment else None


def _symbols(expression: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", expression)))


def _depth(expression: str) -> int:
    return max(itertools.accumulate((c in "([{") - (c in ")]}") for c in expression))


def _expression(text: str) -> tuple[str, bool]:
    """The final answer without its dress, and whether it is seen to have ended."""
    segment, complete = final_segment(text)
    lines = (segment or text.rstrip()[-2 * MAX_CHARS :]).strip().split("\n")
    line = lines[0] if segment else re.sub(r".*(?:\b(?:is|are|be)\b|:)(?=.*\S)", "", lines[-1])
    return _without_outer_brackets(_UNIT.sub("", _DRESS.sub("", line.strip()).strip()).strip()), complete


def _without_outer_brackets(expression: str) -> str:
    """`expression`, or what its round brackets hold if the first closes last: the parser is slow with those."""
    while expression.startswith("(") and expression.endswith(")") and "," not in expression:
        inner = expression[1:-1]
        if min(itertools.accumulate(((c == "(") - (c == ")") for c in inner), initial=0)) < 0:
            break
        expression = inner.strip()
    return expression


@functools.lru_cache(maxsize=4096)
def _equal(given: str, expected: str) -> bool:
    from math_verify import parse, verify

    with _LOCK, _quiet(logging.getLogger("math_verify")):
        pair = [parse(f"${text}$", parsing_timeout=None) for text in (expected, given)]
        if _far_apart(*pair):
            return False
        # A form that could not be parsed is left as its string, which equals nothing but itself.
        return bool(verify(*pair, timeout_seconds=None))


def warm_up() -> None:
    """Lets sympy and the parser load what they load at the first expressions of a kind, a second or two in all."""
    for given, expected in _WARM_UP:
        _equal(given, expected)


def _far_apart(expected: list, given: list) -> bool:
    """Whether two parsed expressions differ so much at one point that nothing needs to be simplified to see it."""
    try:
        one, other = (_somewhere(parsed[0]) for parsed in (expected, given))
    except (IndexError, TypeError, ValueError, ArithmeticError, AttributeError):
        return False
    return abs(one - other) > 1e-5 * max(1, abs(one), abs(other))


def _somewhere(expression) -> complex:
    """The value of a sympy expression, with numbers in the place of its symbols that no polynomial is written for."""
    names = sorted(expression.free_symbols, key=str)
    return complex(expression.subs({name: 0.8737 + 0.2931 * index for index, name in enumerate(names)}))


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """math-verify warns that its time limits are off, which they are on purpose."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
