"""Grading compares the last boxed answer: numbers exactly, other expressions symbolically, and never hangs."""

import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow.parquet
import pytest

from megatron_oprd.evaluation import math_answer
from megatron_oprd.evaluation.math_answer import Grade, is_correct, last_boxed, normalize
from tests.helpers.tokenizer import SHARED

CORRECT, WRONG, UNANSWERED = Grade(True, True), Grade(False, True), Grade(False, False)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\fbox{3}", "3"),
        ("\\boxed{1} then \\fbox{ 2 }", "2"),
        ("\\boxed{\\frac{1}{2}} and {more}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("} \\boxed{4}", "4"),
        ("\\boxed{3} or \\boxed{\\frac{1}{", None),  # the last box is cut off
        ("\\boxed{3} then \\boxed{4", None),
        ("\\boxed{3} then \\fbox{4", None),
        ("\\boxed{1} {2} \\boxed{{3}}", "{3}"),
        ("\\boxed{5} and a stray {", "5"),
        ("\\boxed{}", ""),
        ("\\boxed{1", None),
        ("the answer is 5", None),
        ("\\boxed 5", None),
        ("", None),
    ],
)
def test_the_last_box_with_balanced_braces_is_found(text, box):
    assert last_boxed(text) == box


def test_finding_the_box_takes_linear_time_for_unclosed_boxes():
    start = time.perf_counter()
    assert last_boxed("\\boxed{" * 200_000) is None
    assert last_boxed("\\boxed{1}" + "{" * 500_000) == "1"
    assert last_boxed("\\boxed{" * 100_000 + "}" * 100_000) == ""
    assert time.perf_counter() - start < 20  # a quadratic scan takes hours


@pytest.mark.parametrize(
    ("ground_truth", "answer"),
    [
        ("025", "25"),
        ("142.0", "142"),
        ("336^\\circ", "336"),
        ("336", "336^{\\circ}"),
        ("\\boxed{204}", "204"),
        ("204", "\\text{204}"),
        ("1234", "1,234"),
        ("1234", "1{,}234"),
        ("1234", "1\\,234"),
        ("5", "$5$."),
        ("-3", "\u22123"),
        ("1/2", "\\dfrac{1}{2}"),
        ("\\frac12", "0.5"),
        ("-\\frac{3}{4}", "-0.75"),
        ("0", "-0.0"),
        ("x + 1", "x+1"),
        ("8/3", "2 2/3"),
        ("8/3", "2\\frac{2}{3}"),
        ("\\frac{8}{3}", "2 \\dfrac23"),
        ("-5/2", "-2 1/2"),
        ("5 1/2", "11/2"),
        ("12345", "12 345"),
        ("12345", "12\u2009345"),
        ("1234567.5", "1\u00a0234\u202f567.5"),
        ("12 345", "12,345"),
    ],
)
def test_notation_that_does_not_change_the_value_is_ignored(ground_truth, answer, monkeypatch):
    monkeypatch.setattr(math_answer._verifier, "verify", lambda *_: pytest.fail("no symbolic comparison may be needed"))
    assert is_correct(f"so \\boxed{{{answer}}}", ground_truth) == CORRECT


@pytest.mark.parametrize(
    ("ground_truth", "answer"),
    [
        ("025", "52"),
        ("142.0", "14.2"),
        ("1", "1.0000001"),
        ("22099999999999998951424", "22099999999999998951425"),
        ("1/3", "0.333333"),
        ("5", "-5"),
        ("1/2", "1/0"),
        ("12", "1,2"),
        ("11/2", "1 1/2"),
        ("1020", "10 20"),
        ("2/3", "2 2/3"),
        ("22/3", "2 2/3"),
        ("2", "1 3/3"),  # a mixed number has a proper fraction
        ("12345", "123 45"),
    ],
)
def test_numbers_are_compared_exactly(ground_truth, answer):
    assert is_correct(f"\\boxed{{{answer}}}", ground_truth) == WRONG


@pytest.mark.parametrize(
    ("ground_truth", "answer", "grade"),
    [
        ("x^2+2x+1", "(x+1)^2", CORRECT),
        ("2\\sqrt{3}", "\\sqrt{12}", CORRECT),
        ("5", "5 \\text{ cm}", CORRECT),
        ("5 \\text{ cm}", "5", CORRECT),
        ("5", "5\\text{ cm}^2", CORRECT),
        ("5", "5\\ \\mathrm{km/h}", CORRECT),
        ("30", "30 \\text{ degrees}", CORRECT),
        ("12", "\\$12", CORRECT),
        ("50\\%", "50", CORRECT),
        ("50", "50\\%", CORRECT),
        ("50", "50%", CORRECT),
        ("50", "51\\%", WRONG),
        ("[0,1)", "[0, 1)", CORRECT),
        ("[0,1)", "[0,1]", WRONG),
        ("(-\\infty, 2]", "(-\\infty,2]", CORRECT),
        ("(1,\\frac12)", "(1,0.5)", CORRECT),
        ("\\{1,2\\}", "1,2", CORRECT),
        ("\\{1,2\\}", "1,3", WRONG),
        ("Monday", "\\text{monday}", CORRECT),
        ("\\text{even}", "\\text{odd}", WRONG),
        ("East", "West", WRONG),
        ("50\\%", "0.5", CORRECT),
        ("\\{1,2\\}", "\\{2,1\\}", CORRECT),
        ("(A)", "\\text{A}", CORRECT),
        ("\\frac{\\pi}{4}", "\\frac{\\pi}{3}", WRONG),
        ("(1,2)", "(2,1)", WRONG),
        ("7", "\\frac{", UNANSWERED),
        ("7", "^_\\foo}{&", WRONG),
        ("7", "$'\"\\n$", WRONG),
    ],
)
def test_expressions_are_compared_symbolically(ground_truth, answer, grade):
    assert is_correct(f"\\boxed{{{answer}}}", ground_truth) == grade


def test_a_response_without_a_box_is_unanswered():
    assert is_correct("The answer is 5.", "5") == UNANSWERED
    assert is_correct("\\boxed{}", "5") == UNANSWERED
    assert is_correct("", "5") == UNANSWERED
    assert is_correct("\\boxed{5", "5") == UNANSWERED


def test_without_a_ground_truth_no_answer_is_correct():
    assert is_correct("\\boxed{5}", None) == WRONG
    assert is_correct("5", None, "exact") == WRONG


def test_any_of_several_ground_truths_is_right():
    assert is_correct("\\boxed{5}", ["4", "5.0"]) == CORRECT
    assert is_correct("\\boxed{6}", ["4", "5"]) == WRONG
    assert is_correct("5", ["4", " 5 "], "exact") == CORRECT
    assert is_correct("5", ("4", "5.0"), "exact") == WRONG


def test_exact_style_compares_stripped_strings():
    assert is_correct(" 042\n", "042", "exact") == CORRECT
    assert is_correct("42", "042", "exact") == WRONG
    assert is_correct("\\boxed{042}", "042", "exact") == WRONG
    assert is_correct(" \n", "042", "exact") == UNANSWERED


def test_a_very_long_answer_is_compared_as_a_string():
    assert is_correct("\\boxed{" + "x+" * 5000 + "x}", "5") == WRONG
    assert is_correct("\\boxed{" + "9" * 900 + "}", "9" * 900) == CORRECT


def test_an_endless_comparison_counts_as_wrong_and_later_ones_still_work():
    assert is_correct("\\boxed{9^{9^{9^9}}}", "7") == WRONG
    assert is_correct("\\boxed{(x+1)^2}", "x^2+2x+1") == CORRECT


def test_a_helper_that_stops_replying_is_replaced(monkeypatch):
    assert is_correct("\\boxed{(x+1)^2}", "x^2+2x+1") == CORRECT
    os.kill(math_answer._verifier._process.pid, signal.SIGSTOP)  # like a long C call that no alarm can interrupt
    monkeypatch.setattr(math_answer._verifier, "answer_seconds", 0.2)
    assert is_correct("\\boxed{(x+1)^2}", "x^2+2x+1") == WRONG
    monkeypatch.undo()
    assert is_correct("\\boxed{(x+1)^2}", "x^2+2x+1") == CORRECT


def test_a_helper_that_dies_is_replaced():
    assert is_correct("\\boxed{(x+1)^2}", "x^2+2x+1") == CORRECT
    process = math_answer._verifier._process
    process.kill()
    process.wait()
    assert is_correct("\\boxed{(x+1)^3}", "x^2+2x+1") == WRONG
    assert is_correct("\\boxed{(x+1)^2}", "x^2+2x+1") == CORRECT


def test_threads_do_not_mix_up_their_grades():
    grades = {}

    def work(i):
        grades[i] = is_correct(f"\\boxed{{(x+{i % 2})^2}}", "x^2+2x+1").correct

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grades == {i: i % 2 == 1 for i in range(8)}


def test_the_helper_ends_with_the_program():
    code = (
        "from megatron_oprd.evaluation import math_answer as m\n"
        "assert m.is_correct('\\\\boxed{(x+1)^2}', 'x^2+2x+1').correct\n"
        "print(m._verifier._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    pid = int(done.stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def ground_truths() -> list[str]:
    files = sorted((SHARED / "data" / "eval").glob("*/test.parquet"))
    if not files:
        pytest.skip(f"no evaluation files under {SHARED / 'data'}")
    columns = [pyarrow.parquet.read_table(file, columns=["reward_model"]).column(0).to_pylist() for file in files]
    return [row["ground_truth"] for column in columns for row in column]


def test_each_ground_truth_of_the_evaluation_files_matches_itself_and_no_changed_value():
    truths = ground_truths()
    assert len(truths) == 143
    for truth in truths:
        value = normalize(truth)
        plain = str(int(float(value))) if float(value).is_integer() else value
        for right in (truth, plain, f"{plain}.0", f"\\text{{{plain}}}"):
            assert is_correct(f"So \\boxed{{{right}}}.", truth) == CORRECT, (right, truth)
        for wrong in (str(float(plain) + 1), f"{plain}1", f"-{plain}1", f"\\sqrt{{{plain}}} + 2000"):
            assert is_correct(f"So \\boxed{{{wrong}}}.", truth) == WRONG, (wrong, truth)
        assert is_correct(f"So {truth}.", truth) == UNANSWERED
