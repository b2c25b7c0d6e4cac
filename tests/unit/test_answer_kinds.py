"""Answers in every notation are graded by their value.

The expected grades of the first list of a kind are also those of the authors' grader, `grade_answer_verl`, which grades
the answers of the second list otherwise. docs/prompts.md names the differences.
"""

import pytest

from megatron_oprd.evaluation.math_answer import is_correct

# kind -> cases (right answer, given answer, whether they are equal): as the authors grade them, and as only we do
KINDS = {
    "a box that is never closed": (
        [
            ("5", "\\boxed{5} then \\boxed{6", False),
            ("5", "\\boxed{5} so \\boxed{\\frac{1}{", False),
            ("6", "\\boxed{6", False),
            ("5", "\\boxed{5} or \\boxed 6", False),
            ("5", "\\boxed{5}, as asked in a \\boxed", False),
            ("5", "\\boxed{5} and {more", True),
        ],
        [],
    ),
    "mixed numbers": (
        [
            ("8/3", "2 2/3", True),
            ("8/3", "2\\frac{2}{3}", True),
            ("2/3", "2 2/3", False),
        ],
        [
            ("-\\frac{5}{2}", "-2\\tfrac12", True),
            ("2.5", "2\u00bd", True),
            ("22/3", "2 2/3", False),
        ],
    ),
    "fractions and decimals": (
        [
            ("\\frac12", "0.5", True),
            ("0.5", "1/2", True),
            ("\\dfrac{3}{4}", "\\frac34", True),
            ("\\frac ab", "\\frac{a}{b}", True),
            ("0", "0.\\overline{3}", False),
            ("0.\\overline{3}", "0.\\overline{6}", False),
            ("1/3", "0.3333", False),
            ("1/2", "\u2153", False),
        ],
        [
            ("\\frac{1}{3}", "0.\\overline{3}", True),
            ("14/11", "1.\\overline{27}", True),
            ("1/2", "\u00bd", True),
        ],
    ),
    "powers of ten": (
        [
            ("1000", "1e3", True),
            ("0.001", "1\\times10^{-3}", True),
            ("1e3", "1001", False),
            ("3", "3 dozen", False),
        ],
        [
            ("6.02e23", "6.02\\times10^{23}", True),
            ("5000000", "5 million", True),
            ("5", "5\\text{ million}", False),
        ],
    ),
    "percent": (
        [
            ("50\\%", "50", True),
            ("50", "50%", True),
            ("50", "0.5", False),
            ("50\\%", "5000", False),
        ],
        [
            ("50", "50 percent", True),
            ("50\\%", "0.5", True),
            ("\\frac18", "12.5\\%", True),
        ],
    ),
    "thousands": (
        [
            ("1,234.50", "1234.5", True),
            ("1234", "1{,}234", True),
            ("1234", "{1,234}", True),
            ("1234", "12,34", False),
        ],
        [
            ("1000000", "1\\,000\\,000", True),
            ("12345", "12\u2009345", True),
            ("12345", "123 45", False),
            ("1020", "10 20", False),
        ],
    ),
    "units": (
        [
            ("5", "5 cm", True),
            ("5", "5\\text{ cm}^2", True),
            ("12\\pi", "12\\pi \\text{ cm}^2", True),
            ("12", "\\$12", True),
            ("5", "6\\text{ cm}", False),
            ("5", "5t", False),
            ("2x+3", "2x+3t", False),
        ],
        [
            ("5", "5 people", True),
            ("5", "5 km/h", True),
            ("12", "\u20ac12", True),
            ("1234", "1,234\\text{ people}", True),
            ("5", "5\\text{ PM}", False),
        ],
    ),
    "degrees": (
        [
            ("90^\\circ", "90", True),
            ("90", "90 degrees", True),
            ("90", "91^\\circ", False),
        ],
        [
            ("90", "90\u00b0", True),
            ("-5", "-5^\\circ\\text{C}", True),
        ],
    ),
    "intervals": (
        [
            ("(1,2]", "(1, 2]", True),
            ("[1,2]", "(1,2]", False),
            ("[0,\\infty)", "[0,\\infty]", False),
            ("(0,1)\\cup(2,3)", "(0,3)", False),
        ],
        [
            ("(1,2]", "1<x\\le2", True),
            ("[0,\u221e)", "x\\ge0", True),
            ("(0,1)\\cup(2,3)", "(2,3)\\cup(0,1)", True),
        ],
    ),
    "sets": (
        [
            ("\\{1,2\\}", "1,2", True),
            ("\\varnothing", "\u2205", True),
            ("\\{1,2\\}", "(1,2)", False),
            ("(0,1)", "\\{0,1\\}", False),
            ("\\emptyset", "0", False),
        ],
        [
            ("\\{1,2\\}", "\\{2,1\\}", True),
            ("\\emptyset", "\\{ \\}", True),
        ],
    ),
    "tuples": (
        [
            ("(1/2,3)", "(0.5,3)", True),
            ("(1,2)", "\\left(1,2\\right)", True),
            ("(1,2)", "(2,1)", False),
            ("(1,2)", "(1,2,3)", False),
            ("(1,2)", "[1,2]", False),
        ],
        [],
    ),
    "words": (
        [
            ("Monday", "\\text{monday}", True),
            ("True", "true", True),
            ("\\text{even}", "odd", False),
            ("yes", "\\text{No}", False),
        ],
        [
            ("New York", "\\text{New}\\text{ York}", True),
            ("no", "on", False),
        ],
    ),
    "choices": (
        [
            ("A", "\\text{(A)}", True),
            ("(B)", "\\textbf{(B)}", True),
            ("B", "\\text{(A)}", False),
        ],
        [
            ("C", "C.", True),
        ],
    ),
    "styles and delimiters": (
        [
            ("7", "\\boldsymbol{7}", True),
            ("7", "\\textcolor{red}{7}", True),
            ("7", "\\[7\\]", True),
            ("\\frac{1}{2}", "\\displaystyle\\frac{1}{2}", True),
            ("7", "{7}", True),
            ("7", "\\underline{8}", False),
        ],
        [],
    ),
    "symbols of Unicode": (
        [
            ("12", "\uff11\uff12", True),
            ("x^3", "x\u00b2", False),
        ],
        [
            ("-5", "\u22125", True),
            ("-5", "\u20135", True),
            ("2\\sqrt{3}", "2\u221a3", True),
            ("x^2", "x\u00b2", True),
            ("\\frac{\\pi}{2}", "\u03c0/2", True),
            ("6", "2\u00b73", True),
        ],
    ),
    "equations": (
        [
            ("5", "x=5", True),
            ("x=5", "5", True),
            ("5", "x<5", False),
            ("x=5", "y=6", False),
        ],
        [
            ("y=2x+1", "1+2x", True),
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_graded_by_their_value_in_every_notation(kind):
    cases = [case for cases in KINDS[kind] for case in cases]
    assert len(cases) >= 3 and {equal for _, _, equal in cases} == {True, False}
    grades = {}
    for truth, answer, _ in cases:
        response = answer if "boxed" in answer else f"so \\boxed{{{answer}}}"
        grades[truth, answer] = is_correct(response, truth).correct
    assert grades == {(truth, answer): equal for truth, answer, equal in cases}
