"""Pairs of a student layer and the teacher layer that it is compared with (OPRD eq. (11))."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.types import LayerPair, UserError


def map_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """Return the teacher layer phi(layer) of OPRD eq. (11). Layers count from 1; ties round up, in exact integers."""
    if student_layers == teacher_layers:
        return layer
    if student_layers == 1:
        return teacher_layers
    steps = 2 * (layer - 1) * (teacher_layers - 1) + (student_layers - 1)
    return steps // (2 * (student_layers - 1)) + 1


def select_layers(
    layers: str | Sequence[int], student_layers: int, key: str = "loss.representation.layers"
) -> list[int]:
    """Return the student layers of a mode (all, last, even, odd) or a list, in ascending order.

    Layers count from 1, but `even` and `odd` refer to layers counted from 0: even is 1, 3, 5, ... and odd 2, 4, 6, ...
    Errors name `key`.

    Raises:
        UserError: no layer is selected, a layer does not exist, or a layer is named twice.
    """
    modes = {
        "all": list(range(1, student_layers + 1)),
        "last": [student_layers],
        "even": list(range(1, student_layers + 1, 2)),
        "odd": list(range(2, student_layers + 1, 2)),
    }
    selected = modes[layers] if isinstance(layers, str) else sorted(layers)
    if not selected:
        raise UserError(
            f"{key}={layers} selects no layer of a student with {student_layers}; use all, last or a list of layers"
        )
    _check(selected, student_layers, key, "student")
    return selected


def layer_pairs(
    student_layers: int,
    teacher_layers: int,
    layers: str | Sequence[int] = "all",
    pairs: Sequence[tuple[int, int]] | None = None,
    key: str = "loss.representation.layers",
) -> tuple[LayerPair, ...]:
    """Return the pairs of layers to compare, sorted by student layer. Layers count from 1.

    Args:
        student_layers, teacher_layers: the number of layers of each model.
        layers: the student layers to compare, as in `select_layers`; `map_layer` finds their teacher layers.
        pairs: (student layer, teacher layer) pairs that replace `layers` and the map.
        key: the key of `layers`, which errors name.

    Raises:
        UserError: a layer does not exist or is named twice, or nothing is selected.
    """
    if pairs is None:
        chosen = [
            (layer, map_layer(layer, student_layers, teacher_layers))
            for layer in select_layers(layers, student_layers, key)
        ]
    else:
        chosen = sorted(pairs)
        if not chosen:
            raise UserError("loss.representation.pairs is empty; give [student, teacher] pairs or null")
        _check([student for student, _ in chosen], student_layers, "loss.representation.pairs", "student")
        for _, teacher in chosen:
            _check([teacher], teacher_layers, "loss.representation.pairs", "teacher")
    return tuple(LayerPair(student, teacher) for student, teacher in chosen)


def pairs_of_kept_blocks(kept: Sequence[int], teacher_layers: int, kind: str) -> list[tuple[int, int]]:
    """Return the (student layer, teacher layer) pairs of a student that has the teacher's blocks `kept`.

    The last layers of both models, after the final norm, are always a pair.

    Args:
        kept: blocks of the teacher, numbered from 1, ascending.
        kind: "output" compares each block with the block that it was. "next_input" compares it with the input of the
            next kept block, so that a block before a gap takes over the work of the dropped blocks.
    """
    inputs = [block - 1 for block in kept[1:]]
    layers = kept[:-1] if kind == "output" else inputs
    return list(enumerate([*layers, teacher_layers], start=1))


def _check(layers: Sequence[int], depth: int, key: str, model: str) -> None:
    for layer in layers:
        if not 1 <= layer <= depth:
            raise UserError(f"{key}: {model} layer {layer} does not exist; layers go from 1 to {depth}")
    if len(set(layers)) != len(layers):
        raise UserError(f"{key}: a {model} layer is named twice in {list(layers)}; name each layer once")
