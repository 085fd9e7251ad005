"""Whether two written answers are the same mathematics.

An answer is cleaned of delimiters, markdown and spacing. A number is read with its label and unit
(`x = 5`, `£5`, `72 pens`, `90^\\circ`), and numbers compare exactly, as fractions. Other answers go
to math-verify, in a process that ends itself when one comparison takes too long.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction
from typing import Any, NamedTuple

PATIENCE = 5  # seconds for one comparison by math-verify
LONGEST = 1000  # characters; a longer answer is right only if it is the same text
DIGITS = 100  # of two irrational numbers that have to agree

UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "∞": "\\infty ",
        "π": "\\pi ",
        "×": "\\times ",
        "·": "\\cdot ",
        "≤": "\\le ",
    }
    | {"≥": "\\ge ", "≠": "\\ne ", "∈": "\\in ", "∪": "\\cup ", "²": "^2", "³": "^3"}
    | dict.fromkeys("\u00a0\u2009\u202f", "\\,")
)
CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # 72{,}000 and 72\,000 are 72000
        (r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3}(?!\d))", ""),
        (r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle(?![a-z])|\\!|`", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-z])|\s+", " "),
        (r"(?<!\S)(\*\*|__|\*)(\S(?:.*?\S)?)\1(?!\w)", r"\2"),
        (r"\*\*", "^"),
        (r"(?<!\\)(?:\$\$|\\[()[\]])", " "),
        (r"(?<!\\)\$((?:[^$\\]|\\.)*)\$", r" \1 "),
        (r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:math(?:rm|bf|it|sf)|text(?:rm|bf|it|normal)|mbox)\s*\{", r"\\text{"),
        (r"\\text\s*\{\s*(and|or)\s*\}", r" \1 "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        # \frac12, \frac1{2}, \frac{1}2
        (r"\\frac\s*(\d)\s*(?=[\d{])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?=[\s.)}]*$|\\text)|\\degree\b", "°"),
        (r"(?<=[,(\[])\s*\+\s*\\infty", r"\\infty"),
        (r"_\{(\w)\}", r"_\1"),
        (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?i)^\s*(?:the )?(?:final |correct )?answer ?(?:is\b|:|=)\s*:?|^\s*=(?!=)", ""),
    ]
]
# what may stand around the whole of an answer and says nothing
WRAPPER = re.compile(r'((?:\\boxed|\\fbox|\\text)?\s*\{|\(|")(.*)[)}"]')

INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
FRACTION = re.compile(rf"\\frac\s*\{{\s*([-+]?)\s*({INTEGER})\s*\}}\s*\{{\s*([-+]?{INTEGER})\s*\}}")
NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<currency>\\?[$£€¥₹₩₽]\s*)?(?:"
    rf"(?:(?P<whole>{INTEGER})\s+)?(?P<above>[-+]?{INTEGER})\s*/\s*(?P<below>[-+]?{INTEGER})"
    rf"|(?P<decimal>[-+]?(?:{INTEGER}(?:\.\d+)?|\.\d+))"
    r"(?:(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*|[eE])"
    r"(?P<power>[-+]?\d{1,3})(?:\s*\})?)?)"
)
# x =, x_1 =, f(2) =, \text{Area} =
LABEL = re.compile(r"(\\?[^\W\d_]+|\\text\{[^{}=]*\})(_\{?\w+\}?|'|\(\w\))?\s*=(?!=)\s*")

NAME = r"(?:\\?%|°\s*[CF]?|\\?[$£€¥₹₩₽¢]|[^\W\d_]+)"
POWER = r"(?:\s*\^\s*\{?([23])\}?)?"
UNIT = re.compile(
    rf"(?:(?:(square|sq|cubic|cu)\.?\s+)?({NAME}){POWER})?(?:\s*(?:/|per\s)\s*({NAME}){POWER})?\s*"
)
# where a unit may begin behind something that is no number
BEFORE_UNIT = re.compile(r"\s*\\text\s*\{|\s+(?=[a-z]{2})|°|\\?%")
# a unit and its other names; without any of these, a word of three letters is a unit
UNIT_NAMES = (
    "millimeter mm, centimeter cm, meter m metre, kilometer km, inch in inches, foot ft feet, "
    "yard yd, mile mi, milligram mg, gram g, kilogram kg, ounce oz, lb lbs, millisecond ms, "
    "second s sec, minute min, hour h hr hrs, liter L litre, milliliter ml mL, mph, hertz Hz, "
    "volt V, watt W, joule J, newton N, dollar $ USD, pound £, euro € EUR, yen ¥, rupee ₹, "
    "won ₩, ruble ₽, cent ¢, percent % pct percentage, degree ° deg, °C, °F, man men, "
    "woman women, child children, person people"
)
SHORT = {name: unit[0] for unit in map(str.split, UNIT_NAMES.split(",")) for name in unit}
# words that change the number before them, or say something of it
NO_UNIT = re.compile(
    r"(?i)(?:hundred|thousand|[mbtr]+illion|mil|grand|lakh|crore|dozen|score|gross|"
    r"half|halve|third|fourth|quarter|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|"
    r"millionth|squared|cubed|factorial|time|plus|minus|negative|mod|modulo|base|"
    r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|"
    r"sixty|seventy|eighty|ninety|infinity|sqrt|sin|cos|tan|log|ln|exp|inf|pi|tau|alpha|beta|gamma|"
    r"delta|epsilon|zeta|eta|theta|kappa|lambda|rho|sigma|phi|chi|psi|omega|"
    r"and|or|nor|not|no|but|more|less|fewer|over|under|above|below|wrong|false|incorrect|"
    r"is|isn|was|are|if|to|the|per)s?"
)
# times, ratios, numbers in another base, periods and words: compared as they stand
AS_TEXT = re.compile(
    r":|\d\s*_|\\overline|\\[lc]?dots|\.\.\.|\\text|"
    r"(?<![\\A-Za-z{])(?!sqrt|infinity|arc)[A-Za-z]{4}|^[A-Za-z]{2,3}$"
)


class Quantity(NamedTuple):
    """A number as it was written."""

    value: Fraction
    fraction: bool  # 144/2, \frac{1}{2}
    label: str  # "x" of x = 5, or ""
    unit: str  # "pen" of 72 pens, "dollar" of £5, or ""


def same_answer(given: str, true: str) -> bool:
    """Whether two answers are the same mathematics.

    Where the true one is a number, the other has to be one: a calculation that yields it is no
    answer, and neither is a fraction that makes a whole number. Labels and units have to agree
    where both have them; a percent sign is a unit.
    """
    given, true = given.strip(), true.strip()
    if not given or given == true:
        return bool(given)
    if max(len(given), len(true)) > LONGEST:
        return False
    given, true = _clean(given), _clean(true)
    wanted, found = read_quantity(true), read_quantity(given)
    if wanted is not None:
        return found is not None and _same_quantity(found, wanted)
    (given, given_unit), (true, true_unit) = _split_unit(given), _split_unit(true)
    if not _agree(given_unit, true_unit):
        return False
    if len(given) == len(true) == 1:
        return given.casefold() == true.casefold()
    if given == true or AS_TEXT.search(true) or AS_TEXT.search(given):
        return given == true or ("\\" not in true and given.casefold() == true.casefold())
    return MATH_VERIFY.same(given, true)


def read_quantity(text: str) -> Quantity | None:
    """A cleaned text as a number, if it is one with nothing but a label and a unit around it."""
    named = LABEL.match(text)
    body = _unwrap(text[named.end() :] if named else text)
    found = NUMBER.match(FRACTION.sub(r" \1\2/\3 ", body).strip())
    if found is None:
        return None
    unit = _unit(found.string[found.end() :])
    amount = found["decimal"] or found["above"]
    if unit is None or (found["sign"] and amount[0] in "-+"):
        return None
    value, below = _fraction(amount), _fraction(found["below"] or "1")
    if found["power"]:
        # 8 x 10^3 is a way to write a number, 24 x 10^0 is a calculation
        if not 1 <= abs(value) < 10:
            return None
        value *= Fraction(10) ** int(found["power"])
    if below == 0 or (found["whole"] and not 0 < value < below):
        return None
    value = _fraction(found["whole"] or "0") + value / below
    if found["currency"]:
        currency = SHORT[found["currency"].strip("\\ ")]
        unit = unit if unit.startswith(currency) else currency + unit
    return Quantity(
        -value if found["sign"] == "-" else value,
        bool(found["below"]),
        re.sub(r"[\s{}]", "", named[0][: named[0].rindex("=")]) if named else "",
        unit,
    )


def _same_quantity(found: Quantity, wanted: Quantity) -> bool:
    if not _agree(found.label, wanted.label) or not _agree(found.unit, wanted.unit):
        return False
    if found.fraction and found.value.denominator == 1 and not wanted.fraction:
        return False
    as_part = wanted.unit == "percent" and not found.unit
    return found.value == wanted.value or (as_part and 100 * found.value == wanted.value)


def _agree(one: str, other: str) -> bool:
    return not one or not other or one == other


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _clean(text: str) -> str:
    """Without what says nothing: delimiters, markdown, spacing, words that announce an answer."""
    text = text.translate(UNICODE)
    for pattern, replacement in CLEANING:
        text = pattern.sub(replacement, text)
    return _unwrap(text)


def _unwrap(text: str) -> str:
    """Without a full stop, and without brackets around the whole that say nothing."""
    while True:
        text = text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        wrapped = WRAPPER.fullmatch(text)
        # (1,234) is a pair
        if not wrapped or not _balanced(wrapped[2]) or (wrapped[1] == "(" and "," in wrapped[2]):
            return text
        text = wrapped[2]


def _balanced(text: str) -> bool:
    """Whether every bracket in it is closed in it."""
    depth = 0
    for character in text:
        depth += (character in "{(") - (character in ")}")
        if depth < 0:
            return False
    return depth == 0 and bool(text.strip()) and not text.endswith("\\")


def _unit(tail: str) -> str | None:
    """The unit that `tail` writes, "" if there is nothing, None if that is no unit."""
    spaced = tail.startswith(" ")
    as_text = "\\text" in tail
    found = UNIT.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", tail).strip())
    if found is None:
        return None
    squared, name, power, per, per_power = found.groups()
    names = [_unit_name(part, spaced, as_text) if part else "" for part in (name, per)]
    if names[0] is None or names[1] is None:
        return None
    power = {"s": "2", "c": "3"}[squared[0]] if squared else power or ""
    return names[0] + power + (f"/{names[1]}{per_power or ''}" if per else "")


def _unit_name(name: str, spaced: bool, as_text: bool) -> str | None:
    name = re.sub(r"[\s\\]", "", name)
    if name in SHORT and (len(name) > 1 or not name.isalpha() or spaced or as_text):
        return SHORT[name]
    if NO_UNIT.fullmatch(name):
        return None
    single = name.casefold().removesuffix("s")
    single = SHORT.get(single, single)
    return single if as_text or (spaced and len(name) > 2) else None


def _split_unit(text: str) -> tuple[str, str]:
    """A formula and the unit behind it, if there is one."""
    for start in BEFORE_UNIT.finditer(text):
        if start.start() and (unit := _unit(text[start.start() :])):
            return text[: start.start()].strip(), unit
    return text, ""


class MathVerify:
    """math-verify in a process of its own, which is started when it is first asked.

    Its own limit of time is a signal, which no thread but the main one may set.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def same(self, given: str, true: str) -> bool:
        """Whether math-verify says so in time.

        Raises:
            RuntimeError: the process does not start.
        """
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            verdict = ""
            try:
                process.stdin.write(json.dumps([given, true]) + "\n")
                process.stdin.flush()
                verdict = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                # its verdict would be taken for the next one's
                if not verdict:
                    self.close()
            return verdict == "True\n"

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _started(self) -> subprocess.Popen[str]:
        """The process; a new one where it has ended, or was started before a fork."""
        mine = self._owner == os.getpid()
        if self._process is not None and mine and self._process.poll() is None:
            return self._process
        self.close()
        # by its path: as a module it would import this package, and with it torch
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; import runpy; "
            f"runpy.run_path({__file__!r})['_serve']({self.patience})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._owner = os.getpid()
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("math-verify: its process does not start; its error is above")
        return self._process


MATH_VERIFY = MathVerify()
atexit.register(MATH_VERIFY.close)


def _same_to_math_verify(given: str, true: str) -> bool:
    """math-verify's verdict, and our own on two numbers: it takes 10⁻⁷ for 2 · 10⁻⁷."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    rules = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)
    # the parser lowers capitals, and would take R² - r² for 0
    letters = set(re.sub(r"\\[A-Za-z]+", "", given + true))
    if any(letter != letter.lower() and letter.lower() in letters for letter in letters):
        given, true = (CAPITAL.sub(r"\1_{u}", text) for text in (given, true))
    parsed = [
        parse(
            f"${DECIMAL.sub(_as_fraction, text)}$",
            extraction_config=[config],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        for text in (true, given)
    ]
    if not all(parsed):
        return False
    expected, got = (found[0] for found in parsed)
    if all(isinstance(one, Expr) and one.is_number for one in (expected, got)):
        return _same_number(expected, got)
    return bool(verify(expected, got, numeric_precision=2 * DIGITS, timeout_seconds=None))


CAPITAL = re.compile(r"(?<![\\A-Za-z])([A-Z])(?![a-z]|\s*_)")
DECIMAL = re.compile(r"(\d*)\.(\d+)")


def _as_fraction(decimal: re.Match[str]) -> str:
    """0.25 as \\frac{025}{100}, which no rounding can touch."""
    return rf"\frac{{{decimal[1]}{decimal[2]}}}{{1{'0' * len(decimal[2])}}}"


def _same_number(one: Any, other: Any) -> bool:
    """Whether two constants of sympy are equal: exactly if rational, else to `DIGITS` digits."""
    one, other = one.doit(), other.doit()
    if one == other or (one.is_Rational and other.is_Rational):
        return bool(one == other)
    one, other = (number.evalf(2 * DIGITS, maxn=20 * DIGITS) for number in (one, other))
    largest = max(abs(one), abs(other))
    return bool(abs(one - other) < largest * Fraction(1, 10**DIGITS))


def _serve(patience: float) -> None:
    """Answers lines of [given, true] until the input ends, or one takes too long."""
    logging.disable(logging.CRITICAL)
    _same_to_math_verify("1", "x")
    print("ready", flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            # a watchdog that ends the process even where sympy never returns to the interpreter
            faulthandler.dump_traceback_later(patience, exit=True, file=nowhere)
            try:
                same = _same_to_math_verify(*json.loads(line))
            # sympy and the parser raise what they like at what a model writes
            except Exception:
                same = False
            faulthandler.cancel_dump_traceback_later()
            print(same, flush=True)
