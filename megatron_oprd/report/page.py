"""The parts of a report page: the document, tables, blocks of text and numbers, as escaped HTML without any request."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from megatron_oprd.report.charts import escape

NO_VALUE = "\u2013"


@dataclass(frozen=True)
class Raw:
    """A table cell whose text is HTML and is not escaped again."""

    html: str
    css_class: str = ""


def number(value: object) -> str:
    """Return a number with four significant digits, or a dash for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NO_VALUE
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def page(title: str, body: str, refresh: int | None = None) -> str:
    """Return a complete HTML document with its style and script inside.

    The policy in its head lets a browser run this one script and open no address, whatever a model has written.
    A browser loads the document again every `refresh` seconds.
    """
    script, style = _file("page.js"), _file("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    reload = f'<meta http-equiv="refresh" content="{refresh}">' if refresh is not None else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">{reload}<title>{escape(title)}</title><style>{style}</style></head>'
        f"<body>{body}<script>{script}</script></body></html>\n"
    )


def section(title: str, content: str, note: str = "") -> str:
    """Return a section of the page with its heading, or an empty string without content. `note` is plain text."""
    if not content:
        return ""
    below = f'<p class="muted">{escape(note)}</p>' if note else ""
    return f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{below}{content}</section>'


def navigation(sections: Mapping[str, str]) -> str:
    """Return links to the sections that have content, by their titles."""
    links = (f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, content in sections.items() if content)
    return f"<nav>{''.join(links)}</nav>"


def table(head: Sequence[object], rows: Sequence[Sequence[object]], text_columns: Sequence[str] = ()) -> str:
    """Return a table that scrolls sideways by itself; cells are escaped unless they are Raw.

    A row of one cell is a heading for the rows below it. Columns whose head is in `text_columns`
    are aligned to the left and wrap.
    """
    body = "".join(_row(row, [name in text_columns for name in head]) for row in rows)
    heads = "".join(f"<th{' class=text' if name in text_columns else ''}>{_content(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, text: str, *, is_open: bool = False) -> str:
    """Return a block of text that unfolds under its summary."""
    return folded(summary, f"<pre>{escape(text)}</pre>", is_open=is_open)


def folded(summary: str, content: str, *, is_open: bool = False) -> str:
    """Return HTML that unfolds under its summary."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{content}</details>"


def _row(row: Sequence[object], is_text: Sequence[bool]) -> str:
    if len(row) == 1 < len(is_text):
        return f'<tr><td class="group" colspan="{len(is_text)}">{escape(row[0])}</td></tr>'
    return f"<tr>{''.join(_cell(*both) for both in zip(row, is_text, strict=True))}</tr>"


def _cell(value: object, is_text: bool) -> str:
    css = value.css_class if isinstance(value, Raw) else ("text" if is_text else "")
    return f'<td class="{css}">{_content(value)}</td>' if css else f"<td>{_content(value)}</td>"


def _content(value: object) -> str:
    """Return the HTML of a cell: text is escaped, and may be broken inside of keys like `teacher_perplexity`."""
    return value.html if isinstance(value, Raw) else re.sub(r"([_/.])(?=[a-z])", r"\1<wbr>", escape(value))


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


@cache
def _file(name: str) -> str:
    return resources.files("megatron_oprd.report").joinpath(name).read_text(encoding="utf-8")
