r"""Write answers in one notation: LaTeX without styles, units and Unicode symbols.

`math_answer.py` compares the results.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SYMBOLS = str.maketrans(
    {chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
    | dict.fromkeys("\u2212\u2013\u2014\ufe63", "-")  # minus signs and dashes
    | dict.fromkeys("\u200b\u2060\ufeff\u20ac\u00a3\u00a5", "")  # characters without a width, currencies
    | {"\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "\\div ", "\u2044": "/"}
    | {"\u221e": "\\infty ", "\u03c0": "\\pi ", "\u00b1": "\\pm ", "\u2205": "\\emptyset ", "\u3002": "."}
    | {"\u2264": "\\le ", "\u2265": "\\ge ", "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in "}
    | {"\u00ba": "^\\circ", "\u00b0": "^\\circ"}
)
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f]+")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_ROOT = re.compile(r"√(?:\(([^()]*)\)|(\d+|[A-Za-z]))")

_DELIMITERS = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_ARGUMENT = r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
_STYLED = re.compile(r"\\(?:boldsymbol|bm|underline|emph|mathit|mathsf|mathtt|textcolor\s*\{\w+\})" + _ARGUMENT)
_STYLE = re.compile(r"\\color\s*\{\w+\}|\\(?:displaystyle|textstyle)(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|tt|sf)?|mathrm|mathbf|mbox)" + _ARGUMENT)
_LETTERS_OVER_LETTERS = re.compile(r"\\frac\s+([A-Za-z\d])\s*([A-Za-z\d])")
_SET_BUILDER = re.compile(r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid(?![a-z])|:|\|)(.*)\\\}")
_EMPTY_SET = re.compile(r"\\varnothing|\\\{\s*\\\}")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}")
_EXPONENT = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?\d{1,3})")

_SPACE = r"(?:\s|~|\\[,;: ]|\\quad)*"
_MAGNITUDE = re.compile(r"(?<=\d)" + _SPACE + r"(?:\\text\{\s*)?(thousand|million|billion|trillion)\b\s*")
_ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PERCENT = re.compile(r"(?<=[\d})])" + _SPACE + r"(?:\\text\{\s*percent\s*\}|percent)")
_TEMPERATURE = re.compile(r"(\^\s*\{?\s*\\circ\s*\}?)\s*(?:[CF]|\\(?:text|mathrm)\{\s*[CF]\s*\})")
_POWER = r"(?:\s*\^\s*(?:\d|\{\s*\d\s*\}))?"
# The time of a day is no unit: 5 AM is not 5 PM.
_UNIT_AS_TEXT = re.compile(
    r"(?<=[\w})])"
    + _SPACE
    + r"\\(?:text|textrm|mathrm|mbox)\{(?!\s*(?:[AaPp]\.?\s?[Mm]\b|or\b|and\b))[^{}\d]*(?:\^\d)?\}"
    + _POWER
    + r"\.?"
)
_NUMBER = r"[+-]?(?:\d[\d.,]*|\.\d+)(?:\s+\d+/\d+|/\d+|\s*\\frac\{\d+\}\{\d+\})?|[+-]?\\frac\{\d+\}\{\d+\}"
_NO_UNIT = r"(?!(?:sin|cos|tan|cot|sec|csc|log|exp|mod|and|dozen|hundred)\b)"
_UNIT = rf"(?:{_NO_UNIT}[A-Za-z]{{3,}}|[munck]m|sq|cu|in|ft|yd|mi|ml|mL|kg|mg|lb|oz|hr)(?![A-Za-z]){_POWER}"
# A single letter is a unit after a space or in a rate only: 5t is 5 times t.
_UNIT_AS_WORDS = re.compile(
    rf"({_NUMBER}){_SPACE}(?:{_UNIT}(?:(?:\s+|\s*/\s*){_UNIT})*(?:/[hs])?|(?<=\s)[mgshlLNJWV]|(?:m|km)/[hs]{_POWER})\.?"
)

_COMMON_WORDS = frozenset({"yes", "no", "true", "false", "none", "dne", "odd", "even"})


def plain_latex(answer: str) -> str:
    """Return an answer in plain LaTeX: without styles, and without Unicode symbols and number words."""
    text = _without_unicode(answer).strip()
    for old, new in (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\cfrac", "\\frac"), ("{,}", ",")):
        text = text.replace(old, new)
    text = _EMPTY_SET.sub(r"\\emptyset", text)
    if (delimited := _DELIMITERS.fullmatch(text)) is not None:
        text = (delimited[1] or delimited[2] or "").strip()
    text = _STYLE.sub("", _STYLED.sub(r"\1", text)).strip()
    if (wrapped := _TEXT.fullmatch(text)) is not None:
        text = wrapped[1].strip()
    text = _LETTERS_OVER_LETTERS.sub(r"\\frac{\1}{\2}", text)
    text = _SET_BUILDER.sub(r"\1", text)
    text = _REPEATING.sub(_as_fraction, text)
    if (number := _EXPONENT.fullmatch(text)) is not None:
        text = f"{number[1]}\\times10^{{{int(number[2])}}}"
    return _written_out(text)


def without_unit(text: str) -> str:
    """Return plain LaTeX without a unit at its end. The number stays as it is: `5 cm` and `5 m` are both `5`."""
    for found in _UNIT_AS_TEXT.finditer(text):
        if found.end() == len(text):
            return text[: found.start()]
    unit = _UNIT_AS_WORDS.fullmatch(text)
    return text if unit is None else unit[1]


def same_words(truth: str, answer: str) -> bool | None:
    r"""Compare two answers in words, such as `\text{New York}` and `new york`; return None if one is an expression.

    `ab` and `ba` may be products, so letters that differ are words only if one is marked as text or is a common answer.
    """
    first, second = _letters(truth), _letters(answer)
    if first is None or second is None:
        return None
    if first == second:
        return True
    return False if {first, second} & _COMMON_WORDS or "\\text" in truth or "\\text" in answer else None


def brackets(answer: str) -> tuple[str, str] | None:
    """Return the brackets around a tuple, an interval or a set; None for other answers.

    The braces of a set are returned as two control characters, because LaTeX writes each as two characters.
    """
    text = answer.replace("\\left", "").replace("\\right", "").replace("\\{", "\x00").replace("\\}", "\x01").strip()
    if len(text) < 2 or text[0] not in "([\x00" or text[-1] not in ")]\x01" or "," not in text:
        return None
    depth = 0
    for character in text[1:-1]:
        depth += (character in "([\x00") - (character in ")]\x01")
        if depth < 0:  # the first bracket is closed before the end, as in (0,1) or (2,3)
            return None
    return text[0], text[-1]


def _letters(answer: str) -> str | None:
    """Return the letters of an answer of at least two letters, in lower case; None if there are other characters."""
    text = "".join(_TEXT.sub(r"\1", answer).split()).removesuffix(".")
    return text.casefold() if len(text) > 1 and text.isalpha() else None


def _without_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPTS.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = _VULGAR_FRACTION.sub(lambda found: "\\frac{{{}}}{{{}}}".format(*_parts(found[0])), text)
    text = _ROOT.sub(lambda found: f"\\sqrt{{{found[1] or found[2]}}}", text)
    return text.translate(_SYMBOLS)


def _parts(fraction: str) -> list[str]:
    return unicodedata.normalize("NFKC", fraction).split("\u2044")


def _as_fraction(decimal: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction, exactly."""
    integer, start, period = decimal.groups()
    shift = 10 ** len(start)
    value = Fraction(int(integer or 0) * shift + int(start or 0)) + Fraction(int(period), 10 ** len(period) - 1)
    value /= shift
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _written_out(text: str) -> str:
    """Replace the words percent, million and the like by signs and digits, and remove the C or F after degrees."""
    text = _PERCENT.sub("\\%", text)
    text = _TEMPERATURE.sub(r"\1", text)
    found = _MAGNITUDE.search(text)
    if found is None:
        return text
    unit = text[found.end() :].strip().removesuffix("}")
    return f"{text[: found.start()]}\\times10^{{{_ZEROS[found[1]]}}}" + (f"\\text{{{unit}}}" if unit else "")
