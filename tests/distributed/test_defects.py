"""A mistake in the product makes the cases fail that can see it, and no others.

Each mistake runs in one case of each kind; benchmarks/parity.py --defects runs all cases of the covering part.
"""

import pytest

from tests.helpers.defects import DEFECTS
from tests.helpers.layouts import HYBRID_CASES, covering
from tests.helpers.run_layouts import References, run_cases

RANKS = 4
OF_EACH_COLOUR = 1

IN_CI = DEFECTS[:1]
CASES = [
    pytest.param(defect, id=defect.name, marks=[] if defect in IN_CI else [pytest.mark.nightly]) for defect in DEFECTS
]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("models"))


def handful(defect):
    """Return a few cases in which a mistake shows and a few in which it does not."""
    cells = [case for case in (*covering(), *HYBRID_CASES) if case.world == RANKS]
    felt = [case for case in cells if defect.felt_by(case)]
    unfelt = [case for case in cells if not defect.felt_by(case)]
    return felt[:OF_EACH_COLOUR] + unfelt[:OF_EACH_COLOUR]


@pytest.mark.parametrize("defect", CASES)
def test_a_mistake_turns_red_the_cells_that_feel_it_and_no_others(defect, references, tmp_path):
    outcomes = list(run_cases(handful(defect), references, tmp_path, defect.install))
    red = [outcome.case.name for outcome in outcomes if outcome.failure is not None]
    assert red == [outcome.case.name for outcome in outcomes if defect.felt_by(outcome.case)]
    assert red
