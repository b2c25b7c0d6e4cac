"""Docstrings begin with a verb, names are nouns of the field, and what the documents name exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [
    path
    for folder in ("megatron_oprd", "tests", "benchmarks", "examples", "tools")
    for path in (ROOT / folder).rglob("*.py")
]
PAGES = [ROOT / "ARCHITECTURE.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [
    path for folder in ("benchmarks", "ci", "examples", "tools") for path in sorted((ROOT / folder).rglob("README.md"))
]

# A docstring that begins with one of these points at something instead of saying what it is.
POINTERS = {
    "Of",
    "What",
    "Whether",
    "Where",
    "Which",
    "How",
    "Who",
    "One",
    "Those",
    "It",
    "Its",
    "By",
    "Beside",
    "They",
}
POINTERS |= {"Them", "That"}
# A function does something: its docstring begins with the verb.
NOT_A_VERB = POINTERS | {"The", "A", "An", "This", "These", "All", "Both", "None", "No", "Nothing", "Every", "Each"}
NOT_A_VERB |= {"Some", "Two", "Another", "As", "With", "From", "In", "On", "At", "For", "To", "Without"}
# Names without a noun, and words of our own for what the field has a word for.
BANNED_NAMES = {
    "whole",
    "mine",
    "held",
    "asked",
    "there",
    "together",
    "told",
    "reads_alike",
    "states_stay",
    "not_there",
}


def docstrings(path):
    """Yield (line, docstring, True for a function that is neither a test nor a property) of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            is_function = isinstance(node, ast.FunctionDef) and not node.name.startswith("test_")
            is_property = is_function and any("property" in ast.unparse(one) for one in node.decorator_list)
            yield getattr(node, "lineno", 1), text, is_function and not is_property


def unclear_docstrings(path):
    found = []
    for line, text, is_function in docstrings(path):
        first = text.split()[0].strip(".,:;'\"`")
        if first in (NOT_A_VERB if is_function else POINTERS):
            found.append(f"{path.name}:{line}: {text.splitlines()[0]}")
    return found


def names(path):
    """Yield every name that a file gives: functions, parameters, variables, fields."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_docstrings_begin_with_a_verb():
    assert [one for path in CODE for one in unclear_docstrings(path)] == []


def test_names_are_nouns_of_the_field():
    assert (
        sorted(f"{path.relative_to(ROOT)}: {name}" for path in CODE for name in set(names(path)) & BANNED_NAMES) == []
    )


@pytest.mark.parametrize(
    "source", ['def f():\n    """The rows."""\n', 'class A:\n    """What is kept."""\n', '"""Where a run stands."""\n']
)
def test_an_unclear_docstring_is_found(source, tmp_path):
    (tmp_path / "x.py").write_text(source)
    assert len(unclear_docstrings(tmp_path / "x.py")) == 1


@cache
def words_of_the_code():
    """Return every word in the repository's code, recipes and scripts, and every file name."""
    files = [*CODE, *ROOT.glob("ci/*"), *ROOT.glob("examples/**/*"), *ROOT.glob("*.toml"), ROOT / "Dockerfile"]
    text = " ".join(path.read_text(errors="replace") for path in files if path.is_file())
    return set(re.findall(r"\w+", text))


@cache
def file_names():
    return {
        path.name for folder in ("tests", "megatron_oprd", "benchmarks", "docs") for path in (ROOT / folder).rglob("*")
    }


def unknown_names(page):
    """Return what a page has in backticks and neither code nor files know."""
    unknown = []
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", text):
        for name in re.findall(r"(?<![\w>])[A-Za-z_][\w./-]*\w", span):
            if name.isupper() or "<" in span or name.partition("/")[2] in file_names() or name in file_names():
                continue  # an environment variable of another program, or a file by its name
            if any((base / name).exists() for base in (ROOT, page.parent, ROOT / "megatron_oprd")):
                continue
            if not all(word in words_of_the_code() for word in re.findall(r"[A-Za-z_]\w*", name)):
                unknown.append(f"{page.name}: {span}")
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page):
    assert unknown_names(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
