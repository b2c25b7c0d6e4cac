"""Whether a response answers its problem: the last boxed answer compared mathematically, or the exact string."""

from __future__ import annotations

import atexit
import json
import os
import re
import selectors
import subprocess
import sys
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(/\d+)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\\frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}\\]*)\}")
_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\^\{?\\circ\}?|\\degree|°|\$|\\\$|\s|~")
_MIXED_NUMBER = re.compile(r"\d\s+\d")  # 1 1/2 is not 11/2: the spaces matter
_MAX_ANSWER_CHARACTERS = 1000  # longer ones are not answers, and a parser may take exponentially long over them
_MAX_DIGITS = 200


@dataclass(frozen=True)
class Grade:
    """`answered`: the response has an answer at all; `correct`: it is the right one."""

    correct: bool
    answered: bool


def is_correct(response_text: str, ground_truth: str | None, style: Literal["rule", "exact"] = "rule") -> Grade:
    r"""Grades a response. `rule`: the last `\boxed{}` (or `\fbox{}`) with balanced braces against the ground truth,
    as strings after normalisation, then exactly as numbers, then symbolically. `exact`: equal strings after stripping.

    Works in any thread and takes at most a few seconds, whatever the response says. Without a ground truth nothing is
    correct. May start one helper process; no communication between ranks.
    """
    answer = response_text.strip() if style == "exact" else last_boxed(response_text)
    if not answer:
        return Grade(correct=False, answered=False)
    if ground_truth is None:
        return Grade(correct=False, answered=True)
    if style == "exact":
        return Grade(correct=answer == ground_truth.strip(), answered=True)
    return Grade(correct=_same_answer(ground_truth, answer), answered=True)


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the `\boxed{}` or `\fbox{}` that opens last among those that are closed, or None.

    One pass with a stack: linear even in a response that repeats an unclosed `\boxed{` thousands of times.
    """
    open_braces: list[tuple[bool, int]] = []  # (is a box, where its content starts)
    best_start, best_end = -1, -1
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            is_box, start = open_braces.pop() if open_braces else (False, -1)
            if is_box and start > best_start:
                best_start, best_end = start, match.start()
        elif token.endswith("{") and token != "\\{":
            open_braces.append((token != "{", match.end()))
    return text[best_start:best_end].strip() if best_start >= 0 else None


def normalize(answer: str) -> str:
    """The answer without what does not change its value: spaces, delimiters, degree signs, thousands separators."""
    for old, new in (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("{,}", ","), ("\u2212", "-")):
        answer = answer.replace(old, new)
    if _MIXED_NUMBER.search(answer) is None:
        answer = _DROPPED.sub("", answer)
    answer = _WRAPPED.sub(r"\1", answer).removesuffix(".")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def _same_answer(ground_truth: str, answer: str) -> bool:
    truth = last_boxed(ground_truth) or ground_truth.strip()
    if max(len(truth), len(answer)) > _MAX_ANSWER_CHARACTERS:
        return truth == answer
    plain_truth, plain_answer = normalize(truth), normalize(answer)
    if plain_truth == plain_answer:
        return bool(plain_truth)
    number_truth, number_answer = _number(plain_truth), _number(plain_answer)
    if number_truth is not None and number_answer is not None:
        return number_truth == number_answer
    return _verifier.verify(truth, answer)


def _number(text: str) -> Fraction | None:
    """The exact value of a plain integer, decimal or fraction of integers, else None."""
    if (fraction := _FRACTION.fullmatch(text)) is not None:
        sign, top, bottom, short_top, short_bottom = fraction.groups()
        text = f"{sign}{top or short_top}/{bottom or short_bottom}"
    if len(text) > _MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    top, _, bottom = text.partition("/")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / (int(bottom) if bottom else 1)


class _Verifier:
    """Symbolic comparison in a helper process that is killed when it takes too long.

    math-verify interrupts itself by an alarm signal, which works in no thread but the main one, disarms the alarms of
    others (a test's time-out), and cannot stop a long computation inside one C call (large powers).
    """

    start_seconds = 120.0  # importing sympy on a busy machine
    answer_seconds = 15.0  # above math-verify's own limits of 5 s for each parse and comparison

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def verify(self, ground_truth: str, answer: str) -> bool:
        """Whether math-verify finds them equal; one that times out or breaks the helper is not."""
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
        """BridgeModels the helper; the next comparison starts another one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _forget(self) -> None:
        """A forked child must neither read its parent's replies nor end its helper."""
        self._lock, self._process = threading.Lock(), None

    def _start(self) -> subprocess.Popen[str]:
        # -P: the folder of the script must not come first on the path, its modules could hide installed ones.
        command = [sys.executable, "-P", str(Path(__file__).with_name("answer_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if _read_line(self._process, self.start_seconds) != "ready":
            self.close()
            raise RuntimeError("the helper that compares answers did not start; does `import math_verify` work?")
        return self._process


def _read_line(process: subprocess.Popen[str], timeout_seconds: float) -> str:
    """The next line of the helper, or an empty string when it died or the time is over."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline().strip() if selector.select(timeout_seconds) else ""


_verifier = _Verifier()
