"""Equal values are equal answers in every notation, and no answer takes long or fails."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from math_verify import parse, verify

from megatron_oprd.data.ground_truth import read_ground_truth
from megatron_oprd.evaluation.math_answer import is_correct, last_boxed
from tests.fuzz.budget import examples

NUMBERS = st.fractions(-50, 50, max_denominator=16) | st.integers(-(10**12), 10**12).map(Fraction)


@st.composite
def notation(draw: st.DrawFn, value: Fraction) -> str:
    """Return a notation of a rational number."""
    sign, size = "-" if value < 0 else "", abs(value)
    top, bottom = size.numerator, size.denominator
    if bottom == 1:
        separator = draw(st.sampled_from(["", ",", "{,}", "\\,"]))
        grouped = f"{top:,}".replace(",", separator)
        return sign + draw(
            st.sampled_from([str(top), f"{top}.0", f"0{top}", grouped, f"{top}^\\circ", f"\\text{{{top}}}"])
        )
    integer, rest = divmod(top, bottom)
    forms = [f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{top}}}{{{bottom}}}"]
    if integer:
        forms += [f"{integer} {rest}/{bottom}", f"{integer}\\frac{{{rest}}}{{{bottom}}}"]
    if bottom in (2, 4, 5, 8, 10, 16):
        forms.append(f"{float(size)!r}")
    return sign + draw(st.sampled_from(forms))


def grade(answer: str, truth: str) -> bool:
    return is_correct(f"so \\boxed{{{answer}}}", truth).correct


@examples(150)
@given(st.data(), NUMBERS, NUMBERS)
def test_two_notations_are_equal_if_and_only_if_their_values_are(data, first, second):
    truth, same, other = (data.draw(notation(value)) for value in (first, first, second))
    assert grade(same, truth), (same, truth)
    assert grade(other, truth) is (first == second), (other, truth)


EXPRESSIONS = st.recursive(
    st.sampled_from(["x", "y", "2", "3", "\\pi"]),
    lambda inner: st.tuples(
        st.sampled_from(["({}+{})", "({}-{})", "{} \\cdot {}", "\\frac{{{}}}{{{}}}"]), inner, inner
    ).map(lambda parts: parts[0].format(*parts[1:])),
    max_leaves=3,
)


@examples(25)
@given(EXPRESSIONS, EXPRESSIONS)
def test_expressions_are_equal_if_math_verify_says_so(truth, answer):
    expected = verify(
        parse(f"${truth}$", parsing_timeout=None), parse(f"${answer}$", parsing_timeout=None), timeout_seconds=None
    )
    assert grade(answer, truth) is expected


@examples(150)
@given(st.text(max_size=40) | st.text("\\{}boxedfrac0123 ^_$%,.()[]", max_size=60), st.text(max_size=10))
def test_any_response_is_graded(response, truth):
    last_boxed(response)
    is_correct(response, truth, "exact")
    is_correct(f"\\boxed{{{response[:3]}", truth)


@examples(100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda i: st.lists(i, max_size=3) | st.dictionaries(st.text(max_size=2), i, max_size=2),
        max_leaves=4,
    )
)
def test_any_right_answer_is_text_or_refused(value):
    try:
        truth = read_ground_truth(value)
    except ValueError as error:
        assert str(error).startswith("is ")
        return
    assert truth is None or isinstance(truth, str) or (len(truth) > 1 and all(isinstance(one, str) for one in truth))
    if isinstance(value, int | float):
        assert Fraction(truth) == Fraction(str(value))


HOSTILE = {
    "nested braces": "{" * 100_000 + "}" * 100_000,
    "a million digits": "9" * 10**6,
    "nested fractions": "\\frac{1}{" * 150 + "2" + "}" * 150,
    "a null byte": "a\0b",
    "a long unit": "5 " + "km" * 30 + "!",
    "many units": "5 " + "cm / " * 150 + "!",
    "nested styles": "\\boldsymbol{" * 60 + "2" + "}" * 60,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_ends_in_time(name):
    started = time.perf_counter()
    assert not grade(HOSTILE[name], "7")
    assert time.perf_counter() - started < 60
