"""Loss, norm and every gradient are the one-process reference's in every layout of the covering part of the matrix, for
every objective however its vocabulary or its tokens are cut, and where communication overlaps with computation.

`benchmarks/parity.py` runs the whole matrix.
"""

import functools

import pytest

from tests.helpers.layouts import OBJECTIVE_CASES, OVERLAP_CASES, covering
from tests.helpers.run_layouts import References, run_cases


@pytest.fixture(scope="module")
def outcome_of(request, tmp_path_factory):
    """The outcome of a case. The cases asked for run together, on one set of processes for each number of ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    references = References(folder / "models")
    cases = [item.callspec.params["case"] for item in request.session.items if item.path == request.path]

    @functools.cache
    def of_world(world):
        chosen = [case for case in cases if case.world == world]
        return {outcome.case.name: outcome for outcome in run_cases(chosen, references, folder / "runs")}

    return lambda case: of_world(case.world)[case.name]


@pytest.mark.parametrize("case", [*covering(), *OBJECTIVE_CASES, *OVERLAP_CASES], ids=lambda case: case.name)
def test_the_update_does_not_depend_on_the_layout(case, outcome_of):
    outcome = outcome_of(case)
    assert outcome.failure is None, f"{outcome.failure}\n{outcome.details}"
