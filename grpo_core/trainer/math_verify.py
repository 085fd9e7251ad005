"""math-verify in a child process, which a comparison that takes too long ends.

math-verify's own time limit is a signal, which only the main thread may set.
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
from typing import Any

PATIENCE = 5  # seconds for one comparison
DIGITS = 100  # that two irrational numbers must have in common

CAPITAL = re.compile(r"(?<![\\A-Za-z])([A-Z])(?![a-z]|\s*_)")
DECIMAL = re.compile(r"(\d*)\.(\d+)")


class MathVerify:
    """The child process, started at the first comparison."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def same(self, given: str, true: str) -> bool:
        """Whether math-verify finds two formulas equal within the time limit.

        Raises:
            RuntimeError: the process does not start.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            verdict = ""
            try:
                process.stdin.write(json.dumps([given, true]) + "\n")
                process.stdin.flush()
                verdict = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                # a late verdict would be taken for the next one
                if not verdict:
                    self.close()
            return verdict == "True\n"

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _running(self) -> subprocess.Popen[str]:
        """The process; a new one if it has ended, or was started before a fork."""
        is_ours = self._owner == os.getpid()
        if self._process is not None and is_ours and self._process.poll() is None:
            return self._process
        self.close()
        # importing this module does not import torch
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {__name__} import _serve; _serve({self.patience})"
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
            raise RuntimeError("math-verify: the process does not start; see its error above")
        return self._process


MATH_VERIFY = MathVerify()
atexit.register(MATH_VERIFY.close)


def _same_to_math_verify(given: str, true: str) -> bool:
    """math-verify's verdict; two numbers are compared here, since it takes 10⁻⁷ for 2 · 10⁻⁷."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    rules = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)
    # the parser lowercases letters: R² - r² would become 0
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


def _as_fraction(decimal: re.Match[str]) -> str:
    """0.25 as \\frac{025}{100}, which is exact."""
    return rf"\frac{{{decimal[1]}{decimal[2]}}}{{1{'0' * len(decimal[2])}}}"


def _same_number(one: Any, other: Any) -> bool:
    """Whether two sympy constants are equal: exactly if rational, else to `DIGITS` digits."""
    one, other = one.doit(), other.doit()
    if one == other or (one.is_Rational and other.is_Rational):
        return bool(one == other)
    one, other = (number.evalf(2 * DIGITS, maxn=20 * DIGITS) for number in (one, other))
    largest = max(abs(one), abs(other))
    return bool(abs(one - other) < largest * Fraction(1, 10**DIGITS))


def _serve(patience: float) -> None:
    """Compares lines of [given, true] until the input ends or a comparison takes too long."""
    logging.disable(logging.CRITICAL)
    _same_to_math_verify("1", "x")
    print("ready", flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            # ends the process even while sympy does not return to the interpreter
            faulthandler.dump_traceback_later(patience, exit=True, file=nowhere)
            try:
                same = _same_to_math_verify(*json.loads(line))
            # sympy and the parser raise all kinds of errors on generated text
            except Exception:
                same = False
            faulthandler.cancel_dump_traceback_later()
            print(same, flush=True)
