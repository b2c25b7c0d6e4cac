"""Grading of answers to mathematical problems. `grading.py` calls `is_correct`.

The last boxed answer of a response is compared with the ground truth mathematically, or the response as a string.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from megatron_oprd.evaluation.answer_notation import brackets, plain_latex, same_words, without_unit

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)(?![A-Za-z])|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(/\d+)?")
_SCIENTIFIC = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:\\times|\\cdot)10\^\{?([+-]?\d{1,3})\}?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\\frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?[.:]?")  # of several answers: (A), A), A.
_IN_BRACES = re.compile(r"\{([^{}]*)\}")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}\\]*)\}")
_SPACED_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?:\.\d+)?")
_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\^\{?\\circ\}?|\\degree|°|\$|\\\$|\s|~")
_TWO_NUMBERS = re.compile(r"\d\s+\d")  # "10 20" is not 1020: the space must stay
_MIXED_NUMBER = re.compile(r"([+-]?)(\d+)(?:\s+(\d+)/(\d+)|\s*\\frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d)))")
_MAX_ANSWER_CHARACTERS = 1000  # longer answers are compared as strings: parsing them can take exponential time
_MAX_DIGITS = 200


@dataclass(frozen=True)
class Grade:
    """The result of grading one response."""

    correct: bool  # the answer is the right one
    answered: bool  # the response contains an answer


def is_correct(
    response_text: str, ground_truth: str | Sequence[str] | None, style: Literal["rule", "exact"] = "rule"
) -> Grade:
    r"""Grade a response against the ground truth.

    Args:
        ground_truth: the right answer, several of which any is right, or None: then no answer is correct.
        style: "rule" compares the last `\boxed{}` or `\fbox{}`, first as a string after normalisation, then exactly as
            a number, then symbolically. A last box that is never closed is no answer, even after a closed box, as in
            the paper's grader. "exact" compares the stripped response.

    Works in any thread and takes at most a few seconds for any response. May start one helper process. No
    communication between ranks.
    """
    answer = response_text.strip() if style == "exact" else last_boxed(response_text)
    if not answer:
        return Grade(correct=False, answered=False)
    if ground_truth is None:
        return Grade(correct=False, answered=True)
    truths = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    if style == "exact":
        return Grade(correct=answer in [truth.strip() for truth in truths], answered=True)
    return Grade(correct=any(_same_answer(truth, answer) for truth in truths), answered=True)


def last_boxed(text: str) -> str | None:
    r"""Return the stripped content of the `\boxed{}` or `\fbox{}` that opens last, or None if it is not closed.

    A later `\boxed` without a brace is no answer either, as in the paper's grader.

    One pass with a stack takes linear time even for a response that repeats an unclosed `\boxed{` thousands of times.
    """
    open_braces: list[int] = []  # start of the content of each open brace
    last_start, last_end = -1, -1
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else -1
            if start == last_start:
                last_end = match.start()
        elif token.endswith("{") and token != "\\{":
            open_braces.append(match.end())
            if token != "{":
                last_start, last_end = match.end(), -1
        elif len(token) > 2:
            last_start, last_end = -2, -1
    return text[last_start:last_end].strip() if last_end >= 0 else None


def normalize(answer: str) -> str:
    """Remove everything that does not change the value: spaces, delimiters, degree signs, thousands separators."""
    answer = plain_latex(answer)
    if (in_braces := _IN_BRACES.fullmatch(answer)) is not None:
        answer = in_braces[1].strip()
    if _SPACED_THOUSANDS.fullmatch(answer):
        answer = "".join(answer.split())
    if _TWO_NUMBERS.search(answer) is None and _MIXED_NUMBER.fullmatch(answer) is None:
        answer = _DROPPED.sub("", answer)
    answer = _WRAPPED.sub(r"\1", answer).removesuffix(".")
    if (choice := _CHOICE.fullmatch(answer)) is not None:
        return choice[1]
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def _same_answer(ground_truth: str, answer: str) -> bool:
    truth = last_boxed(ground_truth) or ground_truth.strip()
    if max(len(truth), len(answer)) > _MAX_ANSWER_CHARACTERS:
        return truth == answer
    if (same := same_words(truth, answer)) is not None:
        return same
    truth, answer = plain_latex(truth), plain_latex(answer)
    if normalize(truth) == normalize(answer):
        return bool(normalize(truth))
    truth, answer = without_unit(truth), without_unit(answer)
    plain_truth, plain_answer = normalize(truth), normalize(answer)
    if plain_truth == plain_answer:
        return bool(plain_truth)
    number_truth, number_answer = _number(plain_truth), _number(plain_answer)
    if number_truth is not None and number_answer is not None:
        return number_truth == number_answer
    # math-verify takes a set for equal to a tuple and to an open interval with the same ends.
    if None not in (pair := (brackets(truth), brackets(answer))) and pair[0] != pair[1]:
        return False
    return _verifier.verify(truth, answer)


def _number(text: str) -> Fraction | None:
    """Return the exact value of a plain integer, decimal, fraction of integers or mixed number; None for other text."""
    if len(text) > _MAX_DIGITS:
        return None
    if (mixed := _MIXED_NUMBER.fullmatch(text)) is not None:
        sign, integer, *parts = mixed.groups()
        top, bottom = (int(part) for part in parts if part is not None)
        value = int(integer) + Fraction(top, bottom) if top < bottom else None
        return -value if value is not None and sign == "-" else value
    if (scientific := _SCIENTIFIC.fullmatch(text)) is not None:
        return Fraction(scientific[1]) * Fraction(10) ** int(scientific[2])
    if (fraction := _FRACTION.fullmatch(text)) is not None:
        sign, top, bottom, short_top, short_bottom = fraction.groups()
        text = f"{sign}{top or short_top}/{bottom or short_bottom}"
    if not _NUMBER.fullmatch(text):
        return None
    top, _, bottom = text.partition("/")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / (int(bottom) if bottom else 1)


class _Verifier:
    """Compares expressions symbolically in a helper process, which is killed when a comparison takes too long.

    math-verify's own time-out is an alarm signal. An alarm works in the main thread only, disarms other alarms (a
    test's time-out), and cannot stop a long computation inside one C call (large powers).
    """

    start_seconds = 120.0  # for importing sympy on a busy machine
    answer_seconds = 15.0  # above math-verify's own limits of 5 s for each parse and comparison

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def verify(self, ground_truth: str, answer: str) -> bool:
        """Return True if math-verify finds both equal. A comparison that times out or ends the helper returns False."""
        with self._lock:
            process = self._process or self._start()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps([ground_truth, answer]) + "\n")
                process.stdin.flush()
                reply = _read_line(process, self.answer_seconds)
            except BrokenPipeError:
                reply = ""
            if not reply:
                self.close()
            return reply == "1"

    def close(self) -> None:
        """End the helper process. The next comparison starts a new helper."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _forget(self) -> None:
        """Drop the helper in a forked child: only the parent may read its replies and end it."""
        self._lock, self._process = threading.Lock(), None

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps the script's folder off the import path: modules in it could hide installed packages.
        command = [sys.executable, "-P", str(Path(__file__).with_name("answer_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if _read_line(self._process, self.start_seconds) != "ready":
            self.close()
            raise RuntimeError("the helper that compares answers did not start; does `import math_verify` work?")
        return self._process


def _read_line(process: subprocess.Popen[str], timeout_seconds: float) -> str:
    """Return the next line of the helper, or an empty string when the helper died or the time is over."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline().strip() if selector.select(timeout_seconds) else ""


_verifier = _Verifier()
