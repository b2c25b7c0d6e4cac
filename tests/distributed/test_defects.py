"""The covering part of the matrix sees mistakes: cells that feel one turn red, and the others stay green."""

import pytest

from tests.helpers.defects import DEFECTS
from tests.helpers.layouts import covering
from tests.helpers.run_layouts import References, run_cases

RANKS = 4
OF_EACH_COLOUR = 2


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("models"))


def handful(defect):
    """A few cells that feel a mistake and a few that do not."""
    cells = [case for case in covering() if case.world == RANKS]
    felt = [case for case in cells if defect.felt_by(case)]
    unfelt = [case for case in cells if not defect.felt_by(case)]
    return felt[:OF_EACH_COLOUR] + unfelt[:OF_EACH_COLOUR]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_mistake_turns_red_the_cells_that_feel_it_and_no_others(defect, references, tmp_path):
    outcomes = list(run_cases(handful(defect), references, tmp_path, defect.install))
    red = [outcome.case.name for outcome in outcomes if outcome.failure is not None]
    assert red == [outcome.case.name for outcome in outcomes if defect.felt_by(outcome.case)]
    assert red
