"""Each page of figures in docs/results/ is what its JSON file makes, so text and figures cannot drift apart."""

import json
from pathlib import Path

import pytest

from benchmarks import bridge_page, cost_page, methods_page, objectives_page, parity, rollout_page, staleness_page
from benchmarks.pages import spread, table_lines

DOCS = Path(__file__).parents[2] / "docs" / "results"
MAKERS = {
    "cost": lambda figures: cost_page.markdown(figures, record("gpu")),
    "methods": methods_page.markdown,
    "objectives": objectives_page.markdown,
    "parity": parity.markdown,
    "staleness": staleness_page.markdown,
}


def record(name):
    return json.loads((DOCS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", MAKERS)
def test_a_page_is_what_its_figures_make(name):
    assert (DOCS / f"{name}.md").read_text() == MAKERS[name](record(name))


def test_the_measured_part_of_the_bridge_page_is_what_its_figures_make():
    assert (DOCS / "bridge.md").read_text().endswith(bridge_page.figures(record("bridge")))


def test_the_figures_of_the_page_on_rollouts_are_what_the_record_makes():
    assert (DOCS / "rollouts.md").read_text().endswith(rollout_page.runs(record("rollouts")))


@pytest.mark.parametrize("page", ["README.md", "docs/results/index.md"])
def test_pages_count_the_cases_of_the_parity_record(page):
    count = len(record("parity")["cases"])
    assert f"{count} layouts and losses" in (DOCS.parents[1] / page).read_text()


def test_plots_are_what_their_figures_make():
    figures = record("objectives")
    assert (DOCS / "objectives-accuracy.svg").read_text() == objectives_page.accuracy_plot(figures)
    assert (DOCS / "objectives-learning.svg").read_text() == objectives_page.learning_plot(figures)
    for kind, part in record("bridge")["kinds"].items():
        assert (DOCS / f"bridge-{kind.replace('_', '-')}.svg").read_text() == bridge_page.cosine_plot(part)


def test_table_rows_are_filled_to_the_width_of_the_head():
    assert table_lines(["a", "b"], [[1], [2, 3]]) == ["| a | b |", "| --- | --- |", "| 1 |  |", "| 2 | 3 |"]


def test_spread_is_mean_and_range():
    assert spread([1.0, 2.0, 6.0]) == "3.0 (1.0 to 6.0)"
