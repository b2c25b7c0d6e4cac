"""The layer map is exact integer arithmetic with 1-based layer numbers."""

from fractions import Fraction

import pytest

from megatron_oprd.models.layer_pairs import layer_pairs, map_layer, select_layers
from megatron_oprd.types import LayerPair, UserError


@pytest.mark.parametrize("student", range(1, 40))
@pytest.mark.parametrize("teacher", [1, 2, 5, 28, 36, 62])
def test_the_map_rounds_half_up_exactly(student, teacher):
    for layer in range(1, student + 1):
        if student == teacher:
            expected = layer
        elif student == 1:
            expected = teacher
        else:
            expected = (Fraction((layer - 1) * (teacher - 1), student - 1) + Fraction(1, 2)).__floor__() + 1
        assert map_layer(layer, student, teacher) == expected


def test_the_map_of_28_to_36_layers_is_the_papers():
    expected = "0 1 3 4 5 6 8 9 10 12 13 14 16 17 18 19 21 22 23 25 26 27 29 30 31 32 34 35"
    assert " ".join(str(map_layer(layer, 28, 36) - 1) for layer in range(1, 29)) == expected


def test_even_and_odd_count_layers_from_zero():
    assert select_layers("even", 5) == [1, 3, 5]
    assert select_layers("odd", 5) == [2, 4]
    assert select_layers("last", 5) == [5]
    assert select_layers("all", 3) == [1, 2, 3]
    assert select_layers([4, 2], 5) == [2, 4]


def test_explicit_pairs_replace_the_map():
    assert layer_pairs(4, 6, pairs=[(2, 6), (1, 3)]) == (LayerPair(1, 3), LayerPair(2, 6))


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [([0], None), ([6], None), ([2, 2], None), ([], None), ("all", []), ("all", [(1, 7)]), ("all", [(6, 1)])],
)
def test_layers_that_do_not_exist_are_refused(layers, pairs):
    with pytest.raises(UserError, match=r"loss\.representation"):
        layer_pairs(5, 6, layers, pairs)
