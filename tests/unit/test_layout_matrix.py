"""The matrix of layouts has every feature alone, and every pair of features that a layout can have."""

import itertools
from collections import Counter, defaultdict

import pytest

from megatron_oprd.models.layer_plan import even_stages
from tests.helpers.layouts import (
    COMPANIONS,
    CUTS,
    FAMILIES,
    FEATURES,
    LIKE_ANOTHER,
    MATRIX,
    OBJECTIVES,
    OF_NAMES_AND_ANGLES,
    WITHOUT_CONTEXT,
    covered,
    covering,
    pairs,
    pairs_that_cannot_be,
    parse,
    two_cuts_each,
)


def test_there_are_many_cases_of_different_names_on_up_to_eight_ranks():
    assert len({case.name for case in MATRIX}) == len(MATRIX)
    assert sum(case.world <= 4 for case in MATRIX) >= 48
    assert sum(case.world == 8 for case in MATRIX) >= 8
    assert all(case.world <= 8 and case.data_size >= 1 for case in MATRIX)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_has_a_case_without_other_features(feature):
    assert any(case.features == {feature, *COMPANIONS.get(feature, ())} for case in MATRIX)


@pytest.mark.parametrize("cases", [MATRIX, covering()], ids=["matrix", "covering"])
def test_every_possible_pair_of_features_has_a_case(cases):
    covered_pairs = set().union(*map(covered, cases))
    assert [sorted(pair) for pair in pairs() if pair not in covered_pairs] == []


@pytest.mark.parametrize("cases", [MATRIX, covering()], ids=["matrix", "covering"])
def test_every_feature_has_a_case_in_every_family(cases):
    for feature, family in itertools.product(FEATURES, FAMILIES.values()):
        present = any(feature in case.features and case.family == family for case in cases)
        if family in LIKE_ANOTHER:
            impossible = feature == "context" and family in WITHOUT_CONTEXT
            assert present or impossible or feature not in OF_NAMES_AND_ANGLES, (feature, family)
        else:
            assert present == (feature != "expert" or family == "Qwen3Moe"), (feature, family)


def test_impossible_pairs_have_no_case():
    assert all(len(pair) == 2 and pair <= set(FEATURES) for pair in pairs_that_cannot_be())
    assert len(pairs()) + len(pairs_that_cannot_be()) == len(FEATURES) * (len(FEATURES) - 1) // 2
    for case in MATRIX:
        assert not covered(case) & pairs_that_cannot_be().keys(), case.name


def test_uneven_stages_are_never_all_divided_by_two():
    for layers, pipeline in itertools.product(range(1, 33), range(1, 9)):
        stages = even_stages(layers, pipeline) if pipeline <= layers else ()
        assert len(set(stages)) < 2 or any(blocks % 2 for blocks in stages)


def test_the_covering_part_is_small_and_always_the_same():
    assert len(covering()) <= len(MATRIX) // 2
    assert covering() == covering()


def test_every_objective_runs_with_a_cut_vocabulary_and_with_cut_tokens_and_every_cut_has_several():
    chosen = {case.name for case in two_cuts_each()}
    of_objective, of_cut = defaultdict(list), Counter()
    for cut, objective in itertools.product(CUTS, OBJECTIVES):
        case = parse(f"{cut} {objective}")
        if case.name in chosen:
            of_objective[objective].append(case.config.parallel.tensor > 1)
            of_cut[cut] += 1
    assert all(sorted(of_objective[objective]) == [False, True] for objective in OBJECTIVES), of_objective
    assert all(of_cut[cut] >= 4 for cut in CUTS), of_cut
