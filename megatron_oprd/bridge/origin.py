"""Check that a bridge belongs to a configuration: same models, tokenizers, token positions and layer pairs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from megatron_oprd import __version__
from megatron_oprd.bridge.record import Bridge, ModelOrigin, Origin, Positions
from megatron_oprd.bridge.store import read_bridge
from megatron_oprd.checkpoint.weights import WeightHashes
from megatron_oprd.config import MAKE_A_BRIDGE, Config
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.types import LayerPair, UserError


def expected_origin(
    config: Config, student: ModelSpec, teacher: PlannedTeacher, tokenizers: tuple[str | None, str | None]
) -> Origin:
    """Return the origin of a bridge that is fitted for this configuration.

    The hashes of the weights, counts and coverage are None: `with_weight_hashes` adds the hashes, a fit adds the rest.

    Args:
        tokenizers: `tokenizer_hash` of the student's and of the teacher's tokenizer; None for a model without one.
    """
    (student_tokenizer, teacher_tokenizer), term = tokenizers, config.loss.representation
    teacher_spec = teacher.spec
    return Origin(
        ModelOrigin(config.student.path, None, student.num_layers, student.hidden_size, student_tokenizer),
        ModelOrigin(teacher.config.path, None, teacher_spec.num_layers, teacher_spec.hidden_size, teacher_tokenizer),
        Positions(term.positions, term.k, term.shift, term.final_norm),
        counts=None,
        method=config.bridge.method,
        coverage=None,
        seed=config.train.seed,
        version=__version__,
    )


def with_weight_hashes(origin: Origin, hashes: WeightHashes) -> Origin:
    """Return `origin` with the hash of each model's weights. Waits for `hashes`: call it on the rank that has them."""
    student, teacher = (
        dataclasses.replace(model, hash=hashes.of(str(model.path))) for model in (origin.student, origin.teacher)
    )
    return dataclasses.replace(origin, student=student, teacher=teacher)


def load_bridge(config: Config, pairs: Sequence[LayerPair], expected: Origin) -> Bridge:
    """Read `loss.representation.bridge` and return its maps for `pairs`. No communication.

    Weights are not compared here, because that reads all of them: see `check_bridge_weights`.

    Raises:
        UserError: the file cannot be read or does not belong to the configuration.
    """
    term = config.loss.representation
    assert term.bridge is not None  # a caller checks it
    bridge = check_bridge(read_bridge(term.bridge), term.bridge, pairs, expected)
    if bridge.rank == 1 and term.normalize == "l2":
        raise UserError(
            f"{term.bridge} has rank 1, and loss.representation.normalize=l2 leaves of one number its sign alone, "
            "without a gradient; use a bridge of a higher rank, or normalize=none"
        )
    return bridge


def check_bridge_weights(bridge: Bridge, config: Config, expected: Origin, hashes: WeightHashes) -> None:
    """Raise UserError if the bridge was fitted on other weights. Waits for `hashes`: call it on the rank with them."""
    path = config.loss.representation.bridge
    check_bridge(bridge, str(path), tuple(bridge.maps), with_weight_hashes(expected, hashes))


def check_bridge(bridge: Bridge, path: str, pairs: Sequence[LayerPair], expected: Origin) -> Bridge:
    """Return the bridge restricted to `pairs`, in their order. No communication.

    Properties that are None in `bridge.origin` or in `expected` are not compared: see `unrecorded_properties`.

    Raises:
        UserError: a model, a tokenizer or the token positions differ, or a pair is missing. Names `path` and the first
            difference.
    """
    origin = bridge.origin
    for model, fitted, run in (
        ("student", origin.student, expected.student),
        ("teacher", origin.teacher, expected.teacher),
    ):
        for name in ("num_layers", "hidden_size", "hash", "tokenizer"):
            before, now = getattr(fitted, name), getattr(run, name)
            if before is not None and now is not None and before != now:
                raise UserError(
                    f"{path} was fitted for another {model} ({fitted.path or 'of unknown path'}, {name} "
                    f"{_shortened(before)}) than {run.path} ({name} {_shortened(now)}); {MAKE_A_BRIDGE} for this one"
                )
    if origin.positions not in (None, expected.positions):
        for name, before in dataclasses.asdict(origin.positions).items():
            now = getattr(expected.positions, name)
            if before != now:
                key = "positions" if name == "mode" else name
                raise UserError(
                    f"{path} was fitted with {key}={json.dumps(before)}, the run has loss.representation.{key}="
                    f"{json.dumps(now)}; set it to that or {MAKE_A_BRIDGE}"
                )
    for pair in pairs:
        if pair not in bridge.maps:
            raise UserError(
                f"{path} has no maps for student layer {pair.student} and teacher layer {pair.teacher}; "
                f"{MAKE_A_BRIDGE} for the layers of this run"
            )
    return dataclasses.replace(
        bridge,
        maps={pair: bridge.maps[pair] for pair in pairs},
        statistics={pair: bridge.statistics[pair] for pair in pairs if pair in bridge.statistics},
    )


def unrecorded_properties(bridge: Bridge) -> list[str]:
    """Return the properties that `check_bridge` cannot compare because the bridge file does not contain them."""
    names = {"hash": "weights", "num_layers": "number of layers", "tokenizer": "tokenizer"}
    origin = bridge.origin
    missing = [
        f"the {title}'s {words}"
        for title, model in (("student", origin.student), ("teacher", origin.teacher))
        for name, words in names.items()
        if getattr(model, name) is None
    ]
    return missing + (["the positions"] if origin.positions is None else [])


def _shortened(value: Any) -> Any:
    return value[:19] if isinstance(value, str) else value
