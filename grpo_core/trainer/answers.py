"""Whether two answers are mathematically equal.

Delimiters, markdown and spacing are removed first. Numbers are parsed with label and unit (`x = 5`,
`£5`, `72 pens`, `90^\\circ`) and compared exactly, as fractions. Everything else is compared by
math-verify, in another process, see `math_verify`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from grpo_core.trainer.math_verify import MATH_VERIFY

LONGEST = 1000  # characters; longer answers are compared as text

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
# brackets and quotes around a whole answer, which have no meaning
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
# where a unit may begin after a formula
BEFORE_UNIT = re.compile(r"\s*\\text\s*\{|\s+(?=[a-z]{2})|°|\\?%")
# units and their other names; other words of three letters or more are units as well
UNIT_NAMES = (
    "millimeter mm, centimeter cm, meter m metre, kilometer km, inch in inches, foot ft feet, "
    "yard yd, mile mi, milligram mg, gram g, kilogram kg, ounce oz, lb lbs, millisecond ms, "
    "second s sec, minute min, hour h hr hrs, liter L litre, milliliter ml mL, mph, hertz Hz, "
    "volt V, watt W, joule J, newton N, dollar $ USD, pound £, euro € EUR, yen ¥, rupee ₹, "
    "won ₩, ruble ₽, cent ¢, percent % pct percentage, degree ° deg, °C, °F, man men, "
    "woman women, child children, person people"
)
SHORT = {name: unit[0] for unit in map(str.split, UNIT_NAMES.split(",")) for name in unit}
# words that change the number before them, or comment on it
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
# times, ratios, numbers in another base, repeating decimals and words: compared as text
AS_TEXT = re.compile(
    r":|\d\s*_|\\overline|\\[lc]?dots|\.\.\.|\\text|"
    r"(?<![\\A-Za-z{])(?!sqrt|infinity|arc)[A-Za-z]{4}|^[A-Za-z]{2,3}$"
)


class Quantity(NamedTuple):
    """A number with label and unit."""

    value: Fraction
    is_fraction: bool  # 144/2, \frac{1}{2}
    label: str  # "x" of x = 5, or ""
    unit: str  # "pen" of 72 pens, "dollar" of £5, or ""


def same_answer(given: str, true: str) -> bool:
    """Whether two answers are mathematically equal.

    If the true answer is a number, the given one must be a number as well: neither a calculation
    nor a fraction that makes a whole number counts. Labels and units must agree where both answers
    have them; a percent sign is a unit.
    """
    given, true = given.strip(), true.strip()
    if not given or given == true:
        return bool(given)
    if max(len(given), len(true)) > LONGEST:
        return False
    given, true = _clean(given), _clean(true)
    expected, number = read_quantity(true), read_quantity(given)
    if expected is not None:
        return number is not None and _same_quantity(number, expected)
    (given, given_unit), (true, true_unit) = _split_unit(given), _split_unit(true)
    if not _agree(given_unit, true_unit):
        return False
    if len(given) == len(true) == 1:
        return given.casefold() == true.casefold()
    if given == true or AS_TEXT.search(true) or AS_TEXT.search(given):
        return given == true or ("\\" not in true and given.casefold() == true.casefold())
    return MATH_VERIFY.same(given, true)


def read_quantity(text: str) -> Quantity | None:
    """Parses a cleaned text that is a number with at most a label and a unit; else None."""
    named = LABEL.match(text)
    body = _unwrap(text[named.end() :] if named else text)
    match = NUMBER.match(FRACTION.sub(r" \1\2/\3 ", body).strip())
    if match is None:
        return None
    unit = _unit(match.string[match.end() :])
    amount = match["decimal"] or match["above"]
    if unit is None or (match["sign"] and amount[0] in "-+"):
        return None
    value, below = _fraction(amount), _fraction(match["below"] or "1")
    if match["power"]:
        # 8 x 10^3 is a number, 24 x 10^0 a calculation
        if not 1 <= abs(value) < 10:
            return None
        value *= Fraction(10) ** int(match["power"])
    if below == 0 or (match["whole"] and not 0 < value < below):
        return None
    value = _fraction(match["whole"] or "0") + value / below
    if match["currency"]:
        currency = SHORT[match["currency"].strip("\\ ")]
        unit = unit if unit.startswith(currency) else currency + unit
    return Quantity(
        -value if match["sign"] == "-" else value,
        bool(match["below"]),
        re.sub(r"[\s{}]", "", named[0][: named[0].rindex("=")]) if named else "",
        unit,
    )


def _same_quantity(given: Quantity, true: Quantity) -> bool:
    if not _agree(given.label, true.label) or not _agree(given.unit, true.unit):
        return False
    if given.is_fraction and given.value.denominator == 1 and not true.is_fraction:
        return False
    may_be_share = true.unit == "percent" and not given.unit
    return given.value == true.value or (may_be_share and 100 * given.value == true.value)


def _agree(one: str, other: str) -> bool:
    return not one or not other or one == other


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _clean(text: str) -> str:
    """Removes delimiters, markdown, spacing and phrases such as "the answer is"."""
    text = text.translate(UNICODE)
    for pattern, replacement in CLEANING:
        text = pattern.sub(replacement, text)
    return _unwrap(text)


def _unwrap(text: str) -> str:
    """Removes a full stop and brackets around the whole text."""
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
    """Whether all brackets are paired."""
    depth = 0
    for character in text:
        depth += (character in "{(") - (character in ")}")
        if depth < 0:
            return False
    return depth == 0 and bool(text.strip()) and not text.endswith("\\")


def _unit(tail: str) -> str | None:
    """The unit in `tail`; "" for an empty text, None for anything else."""
    spaced = tail.startswith(" ")
    as_text = "\\text" in tail
    match = UNIT.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", tail).strip())
    if match is None:
        return None
    squared, name, power, per, per_power = match.groups()
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
    """Splits a formula from a unit after it."""
    for start in BEFORE_UNIT.finditer(text):
        if start.start() and (unit := _unit(text[start.start() :])):
            return text[: start.start()].strip(), unit
    return text, ""
