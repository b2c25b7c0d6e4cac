"""Loss, gradient norm and every gradient equal the reference in one process, whatever the layout.

The cases are the covering part of the matrix, every objective in two of the six ways to cut vocabulary or tokens,
layouts whose communication overlaps with computation, and some methods beyond the paper. ci/nightly.sh runs each
objective in all six ways and the other methods, and benchmarks/parity.py the whole matrix.
"""

import functools

import pytest

from tests.helpers.layouts import (
    HYBRID_CASES,
    HYBRIDS_IN_CI,
    METHOD_CASES,
    METHODS_IN_CI,
    OBJECTIVE_CASES,
    OVERLAP_CASES,
    covering,
    two_cuts_each,
)
from tests.helpers.run_layouts import References, run_cases

IN_CI = (*covering(), *two_cuts_each(), *OVERLAP_CASES, *METHOD_CASES[:METHODS_IN_CI])
IN_CI += tuple(HYBRID_CASES[number] for number in HYBRIDS_IN_CI)
NIGHTLY = [case for case in (*OBJECTIVE_CASES, *METHOD_CASES, *HYBRID_CASES) if case not in IN_CI]
CASES = [
    *IN_CI,
    *(pytest.param(case, marks=pytest.mark.nightly) for case in NIGHTLY),
]


@pytest.fixture(scope="module")
def outcome_of(request, tmp_path_factory):
    """Return a function from a case to its outcome. All selected cases of one number of ranks share their processes."""
    folder = tmp_path_factory.mktemp("layouts")
    references = References(folder / "models")
    cases = [item.callspec.params["case"] for item in request.session.items if item.path == request.path]

    @functools.cache
    def of_world(world):
        chosen = [case for case in cases if case.world == world]
        return {outcome.case.name: outcome for outcome in run_cases(chosen, references, folder / "runs")}

    return lambda case: of_world(case.world)[case.name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_update_does_not_depend_on_the_layout(case, outcome_of):
    outcome = outcome_of(case)
    assert outcome.failure is None, f"{outcome.failure}\n{outcome.details}"
