"""Written answers against an oracle that knows what it wrote."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import pytest

from grpo_core.trainer import answers
from grpo_core.trainer.answers import same_answer
from grpo_core.trainer.math_verify import MathVerify

pytest.importorskip("math_verify")

# (given, true, same)
PAIRS = [
    # numbers compare exactly, however small, and so do numbers that are no decimals
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False),
    ("0.0000004", "0.0000003", False),
    ("0.333333", "1/3", False),
    (r"3.4641016", r"2\sqrt{3}", False),
    (r"1.414213562373095048801688724209698", r"\sqrt{2}", False),
    ("3.14159265", r"\pi", False),
    (r"\{0.0000004\}", r"\{0.0000003\}", False),
    (r"x + 0.0000004", r"x + 0.0000003", False),
    # a percentage is its number, and a true percentage its hundredth as well
    ("50 percent", "0.5", False),
    ("50%", "0.5", False),
    (r"50\%", "0.5", False),
    ("50 percent", "50", True),
    ("50%", "50", True),
    ("0.5", "50%", True),
    ("1/2", "50 percent", True),
    ("0.05", "50%", False),
    # units: left out, or the same
    ("72 pens", "72", True),
    ("72", "72 pens", True),
    ("1 pen", "1 pens", True),
    ("72 pens", "72 pencils", False),
    ("1000 dollars", "1000", True),
    ("£5", "5", True),
    ("-$5", "-5", True),
    ("£5", "$5", False),
    (r"\$5 per hour", "5", True),
    (r"5\,\mathrm{cm}^2", "5", True),
    ("5 square centimeters", "5 cm^2", True),
    ("5 cm^2", "5 cm", False),
    ("5 km", "5 m", False),
    ("60 km/h", "60 kilometers per hour", True),
    (r"90^\circ", "90", True),
    (r"90^{\circ}", "90", True),
    ("90°", "90", True),
    ("90 degrees", r"90^\circ", True),
    ("32°F", "32°C", False),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}", True),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}\text{ km}", False),
    # words that are no units, and letters that may be variables
    ("72 thousand", "72", False),
    ("5 halves", "5", False),
    ("72 pi", "72", False),
    ("72 is wrong", "72", False),
    ("72 or more", "72", False),
    ("about 72", "72", False),
    ("5x", "5", False),
    ("5m", "5", False),
    ("5", "5m", False),
    ("x+3", "x+3t", False),
    # delimiters, markdown and labels
    (r"\(72\)", "72", True),
    (r"\[72\]", "72", True),
    ("(72)", "72", True),
    ("**72**", "72", True),
    (r"\boxed{72} pens", "72", True),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    ("The answer is $72$.", "72", True),
    ("x = 5", "5", True),
    (r"\text{Area} = 5", "5", True),
    ("5", "x = 5", True),
    ("y = 5", "x = 5", False),
    ("2x = 10", "10", False),
    # thousands, fractions, powers of ten
    ("72{,}000", "72000", True),
    (r"72,\!000", "72000", True),
    ("1,2,3", "123", False),
    ("123", "1,2,3", False),
    ("(1,234)", "1234", False),
    ("1234", "(1,234)", False),
    (r"\frac{ 1 }{ 2 }", "1/2", True),
    (r"\frac{1}{-2}", "-0.5", True),
    (r"1\frac{1}{2}", "1.5", True),
    (r"2\frac12", "1", False),
    (r"\frac{1}{0}", "0", False),
    (r"3 \times 10^8", "300000000", True),
    (r"24 \times 10^0", "24", False),
    ("2**3", "23", False),
    ("−5", "-5", True),
    ("--5", "5", False),
    # a calculation is no answer where a number is asked for
    ("48+24", "72", False),
    (r"5!", "120", False),
    ("120", "5!", True),
    # other answers are compared as mathematics
    ("[2, +\\infty)", r"[2, \infty)", True),
    ("[2, 3)", "[2, 3]", False),
    (r"2 \cdot \sqrt{3}", r"2\sqrt{3}", True),
    (r"\sqrt{12}", r"2\sqrt{3}", True),
    ("x^2 - 1", "(x-1)(x+1)", True),
    ("0.5x", r"\frac{x}{2}", True),
    ("25pi", r"25\pi", True),
    ("2√3 - x**2", r"2\sqrt{3} - x^2", True),
    ("(–∞, 2) ∪ (3, ∞)", r"(-\infty, 2) \cup (3, \infty)", True),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False),
    ("(1, 2)", "(2, 1)", False),
    # capitals are other letters, but for a choice
    ("0", r"\pi(R^2 - r^2)", False),
    ("2a", "2A", False),
    (r"\pi (R - r)(R + r)", r"\pi(R^2 - r^2)", True),
    ("b", "B", True),
    ("a", "B", False),
    # and some as they stand: words, times, ratios, other bases, periods
    ("silent", "listen", False),
    (r"\text{East}", "east", True),
    ("(A)", "A", True),
    ("52", "52_8", False),
    ("52_{8}", "52_8", True),
    ("0.3", r"0.\overline{3}", False),
    ("0.333...", "0.333", False),
    ("1:6", "1:2:3", False),
]


@pytest.mark.parametrize(("given", "true", "same"), PAIRS)
def test_pairs(given: str, true: str, same: bool) -> None:
    assert same_answer(given, true) == same


@pytest.mark.parametrize("text", ["9" * 5000, "(" * 500 + ")" * 500, "$" * 999, "1e999"])
def test_a_hostile_answer_is_wrong(text: str) -> None:
    assert not same_answer(text, "72") and not same_answer(text, r"\sqrt{2}")


TOKENS = r"23.,/^-+=%$()[]{}!***:_£°√π²\frac\frac{\text{\boxed{\sqrt\(\)\$\£\,\%\circ\ \\ "
WRITTEN = ["x = ", "e", " pens", " cm", " per ", "square ", "answer is ", "2{,}333", "^{2}", "10^"]


def test_no_text_without_the_answer_is_the_answer() -> None:
    """Nor does any raise: tokens that mean something here, in any order, and no digit of 7919."""
    rng = random.Random(0)
    tokens = re.findall(r"\\[a-z]+\{?|\*\*|\\?[^a-z]", TOKENS) + WRITTEN
    for _ in range(5000):
        text = "".join(rng.choices(tokens, k=rng.randint(1, 8)))
        assert not same_answer(text, "7919"), text


def test_a_limit_of_time_holds_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would go on for minutes; what comes after them is still compared."""
    mine = MathVerify(patience=0.5)
    monkeypatch.setattr(answers, "MATH_VERIFY", mine)
    hard = [("9999999999!", r"\sqrt{2}"), ("99999999!", "72")]
    found: list[bool] = []
    work = threading.Thread(target=lambda: found.extend(same_answer(*pair) for pair in hard))
    start = time.monotonic()
    work.start()
    work.join(60)
    assert found == [False] * 2
    assert time.monotonic() - start < 30
    assert same_answer(r"\sqrt{8}", r"2\sqrt{2}")
    mine.close()


def test_a_verdict_that_nobody_waited_for_is_not_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = MathVerify()
    assert mine.same(r"\sqrt{8}", r"2\sqrt{2}")
    process = mine._process
    assert process is not None and process.stdout is not None

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(process.stdout, "readline", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        mine.same(r"\sqrt{8}", r"2\sqrt{2}")
    assert not mine.same(r"\sqrt{8}", r"2\sqrt{3}")
    mine.close()


class Written(NamedTuple):
    text: str
    value: Fraction
    unit: str = ""
    label: str = ""
    disguised: bool = False  # a whole number as a fraction


def grouped(number: int, comma: str) -> str:
    return f"{number:,}".replace(",", comma)


def write_number(value: Fraction, rng: random.Random) -> tuple[str, bool]:
    """One of the ways to write it, and whether that makes a fraction of a whole number."""
    sign = rng.choice(["-", "−"]) if value < 0 else rng.choice(["", "", "", "+"])
    size = abs(value)
    above, below = size.numerator, size.denominator
    ways: list[tuple[str, bool]] = []
    decimal = exact_decimal(size)
    if decimal is not None:
        whole, _, part = decimal.partition(".")
        ends = ["", "0", "00"] if part else ["", ".0", ".00"]
        for comma in ("", ",", "{,}", r"\,", r",\!", "\u202f"):
            end = rng.choice(ends)
            ways.append((grouped(int(whole), comma) + ("." + part if part else "") + end, False))
        if whole == "0" and part:
            ways.append(("." + part, False))
        digits = (whole + part).strip("0")
        if digits:
            power = len(whole.lstrip("0")) - 1 if whole != "0" else -1 - leading_zeros(part)
            mantissa = digits[0] + ("." + digits[1:] if digits[1:] else "")
            ways.append((rf"{mantissa} \times 10^{{{power}}}", False))
            ways.append((f"{mantissa}e{power}", False))
    times = rng.choice([1, 1, 2, 3])
    a, b = above * times, below * times
    if b > 1:
        disguise = below == 1
        ways += [(f"{a}/{b}", disguise), (f"{a} / {b}", disguise)]
        ways += [(rf"\frac{{{a}}}{{{b}}}", disguise), (rf"\dfrac{{ {a} }}{{ {b} }}", disguise)]
        if a < 10 and b < 10:
            ways += [(rf"\frac{a}{b}", disguise), (rf"\tfrac {a} {b}", disguise)]
        if above > below > 1:
            ways += [(f"{above // below} {above % below}/{below}", False)]
            ways += [(rf"{above // below}\frac{{{above % below}}}{{{below}}}", False)]
    text, disguise = rng.choice(ways)
    return sign + text, disguise


def exact_decimal(size: Fraction) -> str | None:
    """Its decimal digits, if they end."""
    for places in range(10):
        scaled = size * 10**places
        if scaled.denominator == 1:
            digits = str(scaled.numerator).rjust(places + 1, "0")
            return digits[: len(digits) - places] + ("." + digits[-places:] if places else "")
    return None


def leading_zeros(digits: str) -> int:
    return len(digits) - len(digits.lstrip("0"))


UNITS = {
    "": ["{}"] * 4,
    "pen": ["{} pens", "{} pen", r"{} \text{{ pens}}", r"{}\text{{ pens}}"],
    "dollar": ["{} dollars", "{} USD", r"{}\$", "{} dollar"],
    "cent": ["{} cents", "{}¢"],
    "percent": ["{}%", r"{}\%", "{} percent", r"{}\text{{ percent}}", "{} pct"],
    "degree": ["{}°", r"{}^\circ", r"{}^{{\circ}}", "{} degrees"],
    "cm": ["{} cm", "{}cm", r"{}\,\mathrm{{cm}}", r"{}\text{{ cm}}", "{} centimeters"],
    "m": ["{} m", r"{}\text{{ m}}", "{} meters", "{} metres"],
    "m2": ["{} m^2", r"{}\text{{ m}}^2", "{} square meters", "{} m²", r"{}\mathrm{{m}}^{{2}}"],
    "km/h": ["{} km/h", "{} kilometers per hour", r"{}\text{{ km/h}}"],
}
DELIMITERS = [
    *["{}"] * 4,
    *[" {} ", "${}$", "$${}$$", r"\({}\)", r"\[ {} \]", "**{}**", "`{}`", r"\boxed{{{}}}"],
    *[r"$\boxed{{{}}}$", r"\(\boxed{{{}}}\)", "{}.", "The answer is {}.", "**Answer:** {}", "({})"],
    *["Answer: ${}$", r"\displaystyle {}", r"\left({}\right)", "= {}", "**${}$**", r"\fbox{{{}}}"],
]
LABELS = {"": ["{}"] * 6, "x": ["x = {}", "x={}"], "A": [r"\text{{A}} = {}"]}


def write(value: Fraction, rng: random.Random, plain: bool = False) -> Written:
    """A number in one of its formats, with a unit, a label and delimiters."""
    if plain:
        number, disguised = write_number(value, rng)
        return Written(number, value, disguised=disguised)
    unit, label = rng.choice(list(UNITS)), rng.choice(list(LABELS))
    number, disguised = write_number(value, rng)
    text = rng.choice(LABELS[label]).format(rng.choice(UNITS[unit]).format(number))
    # (1,234) is a pair
    delimiters = [form for form in DELIMITERS if "," not in text or "(" not in form]
    return Written(rng.choice(delimiters).format(text), value, unit, label, disguised)


def draw_value(rng: random.Random) -> Fraction:
    whole = rng.choice([rng.randint(0, 12), rng.randint(0, 2000), rng.randint(0, 10**7)])
    below = rng.choice([1, 1, 1, 10, 100, 10**7, rng.randint(2, 12)])
    return rng.choice([1, 1, -1]) * Fraction(whole, below)


def others(value: Fraction) -> list[Fraction]:
    """Close to it, or its digits in another order."""
    reverse = Fraction(int(str(abs(value.numerator))[::-1]), value.denominator)
    tiny = Fraction(1, 10**7)
    near = [value + 1, value + tiny, value * 10, value / 10, value * 100, value / 100, -value]
    return [other for other in (*near, reverse, 1 / value if value else value) if other != value]


def same_written(given: Written, true: Written) -> bool:
    """The rules of the docstring, on what was meant."""
    for one, other in ((given.unit, true.unit), (given.label, true.label)):
        if one and other and one != other:
            return False
    if given.disguised and not true.disguised:
        return False
    share = given.value * 100 if true.unit == "percent" and not given.unit else given.value
    return true.value in (given.value, share)


# no answers to a number, whatever the number; of these no pair is equal
SPOILED = [
    *["{0} or {1}", "{0}, {1}", "{0} and {1}", "{0} {1}", "{0};{1}", "{0} < {1}", "{0} = {1}"],
    *["{0}+0", "{0}-0", "{0}*1", r"{0} \cdot 1", "{0}^1", "{0}!", "{0}/1/1", r"\sqrt{{{0}}}"],
    *["{0} thousand", "{0} million", "{0} dozen", "{0} halves", "{0} times", "{0} pi", "{0}x"],
    *["{0} y", r"{0}\pi", "not {0}", "about {0}", "less than {0}", "{0} or more", "{0} is wrong"],
    *[r"\max({0}, {1})", "|{0}|", r"{0} \pm 0", "[{0}, {1}]", "({0}, {1})", r"\{{{0}, {1}\}}"],
    *["2x = {0}", r"x \approx {0}", "x > {0}", "{0}_8", "{0}...", "{0} squared", "--{0}", "1({0})"],
    *[
        r"\overline{{{0}}}",
        r"\boxed{{{0}}} or \boxed{{{1}}}",
        "${0}$ or ${1}$",
        "{0}{1}x",
        "{0}:00",
    ],
]


def draw_numbers(rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    """Pairs of written numbers (given, true, same), true and false ones."""
    while True:
        value = draw_value(rng)
        true = write(value, rng, plain=rng.random() < 0.5)
        other = write(rng.choice([value, value, rng.choice(others(value) or [value + 1])]), rng)
        yield other.text, true.text, same_written(other, true)
        number, _ = write_number(abs(value), rng)
        second, _ = write_number(rng.choice([abs(value), abs(value) + 1]), rng)
        spoiled = rng.choice(SPOILED).format(number, second)
        yield rng.choice(DELIMITERS[:12]).format(spoiled), true.text, False


def root(a: int, b: int, c: int) -> list[str]:
    """a√b + c"""
    return [
        rf"{a}\sqrt{{{b}}} + {c}",
        rf"{c} + {a} \cdot \sqrt{{{b}}}",
        rf"{c} + {a}*\sqrt {{{b}}}",
        rf"\sqrt{{{a * a * b}}} + {c}",
        rf"\frac{{{2 * a}\sqrt{{{b}}} + {2 * c}}}{{2}}",
    ]


def polynomial(a: int, b: int, c: int) -> list[str]:
    """(x + a)(bx + c)"""
    return [
        f"(x + {a})({b}x + {c})",
        f"{b}x^2 + {c + a * b}x + {a * c}",
        rf"{b} \cdot x^{{2}} + {c + a * b} \cdot x + {a * c}",
        f"y = {b}x^2 + {c + a * b}x + {a * c}",
        f"{a * c} + {c + a * b} x + {b}.0 x^2",
    ]


def interval(a: int, b: int, c: int) -> list[str]:
    """[a, a + b) or unbounded"""
    if c % 2:
        return [rf"[{a}, \infty)", rf"[{a},+\infty)", rf"\left[ {a}, \infty \right)", f"[{a}, ∞)"]
    return [f"[{a}, {a + b})", rf"\left[{a}, {a + b}\right)", f"[{a}.0,{a + b})"]


def pair(a: int, b: int, c: int) -> list[str]:
    return [f"({a}, {b}, {c})", rf"\left({a},{b},{c}\right)", f"({a}.0, {b}, {c})"]


def roots(a: int, b: int, c: int) -> list[str]:
    """x = a ± √b"""
    return [
        rf"\{{{a} + \sqrt{{{b}}}, {a} - \sqrt{{{b}}}\}}",
        rf"{a} - \sqrt{{{b}}}, {a} + \sqrt{{{b}}}",
        rf"{a} \pm \sqrt{{{b}}}",
    ]


def multiple_of_pi(a: int, b: int, c: int) -> list[str]:
    return [
        rf"\frac{{{a}\pi}}{{{b + 1}}}",
        rf"\frac{{{a}}}{{{b + 1}}}\pi",
        rf"{a}\pi/{b + 1}",
        rf"\dfrac{{ {2 * a} \pi }}{{ {2 * b + 2} }}",
    ]


# what was meant by a, b, c, where several of them are the same
MEANT: dict[Callable[[int, int, int], list[str]], Callable[[int, int, int], object]] = {
    root: lambda a, b, c: (a * a * b, c),
    polynomial: lambda a, b, c: (b, c + a * b, a * c),
    interval: lambda a, b, c: (a,) if c % 2 else (a, b),
    pair: lambda a, b, c: (a, b, c),
    roots: lambda a, b, c: (a, b),
    multiple_of_pi: lambda a, b, c: Fraction(a, b + 1),
}


def draw_formulas(rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    while True:
        family = rng.choice(list(MEANT))
        draws = [[rng.choice([2, 3, 5, 6, 7]) for _ in "abc"] for _ in "gt"]
        if rng.random() < 0.6:
            draws[1] = draws[0]
        given, true = (rng.choice(family(*draw)) for draw in draws)
        same = MEANT[family](*draws[0]) == MEANT[family](*draws[1])
        form = rng.choice(["{}", "${}$", r"\({}\)", r"\[{}\]", r"\boxed{{{}}}", "**{}**", "{}."])
        yield form.format(given), true, same


def wrong_verdicts(
    draw: Callable[[random.Random], Iterator[tuple[str, str, bool]]], count: int, seed: int
) -> list[tuple[str, str, bool]]:
    drawn = itertools.islice(draw(random.Random(seed)), count)
    return [(given, true, same) for given, true, same in drawn if same_answer(given, true) != same]


def test_no_written_number_is_taken_for_another_or_missed() -> None:
    assert wrong_verdicts(draw_numbers, 4000, seed=0) == []


def test_no_formula_is_taken_for_another_or_missed() -> None:
    assert wrong_verdicts(draw_formulas, 40, seed=0) == []
