"""README is short, and the site has every page and no foreign host."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_readme_has_at_most_700_words():
    assert len(README.split()) <= 700


def test_the_first_screen_of_readme_has_both_commands():
    first_screen = "\n".join(README.splitlines()[:20])
    assert len(re.findall(r"^ {4}(?:bash|torchrun) ", first_screen, re.MULTILINE)) == 2


def pages_of(nav):
    """Yield the files that the navigation names."""
    for entry in nav:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from pages_of(target)


def test_the_navigation_has_every_page_once():
    docs = ROOT / "docs"
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(nav)) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))


def test_the_site_loads_no_font_from_another_host():
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False
