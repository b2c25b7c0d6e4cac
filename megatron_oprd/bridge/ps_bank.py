"""Read and write the bridge files of the paper's authors, `ps_bank.pt`. Layers in these files are counted from 0."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_oprd.runtime.files import write_folder
from megatron_oprd.types import LayerPair, PairBridge, UserError

FILE = "ps_bank.pt"
_PROJECTOR = re.compile(r"projectors\.s?(\d+)_t?(\d+)\.weight")


def write_ps_bank(folder: str | Path, maps: Mapping[LayerPair, PairBridge]) -> None:
    """Write `ps_bank.pt` into a new folder, in the format of the authors' scripts. No communication.

    Raises:
        UserError: the folder is not empty or the disk cannot be written.
    """
    bank: dict[str, Any] = {
        "rank": len(next(iter(maps.values())).student_map),
        "subspace_mode": "full",
        "projector_type": "linear",
        "layer_pairs": [{"student_layer": p.student - 1, "teacher_layer": p.teacher - 1} for p in maps],
        "state_dict": {},
        "frozen_pt_weights": {},
        "frozen_pt_means": {},
    }
    for pair, bridge in maps.items():
        key = f"s{pair.student - 1}_t{pair.teacher - 1}"
        bank["state_dict"][f"projectors.{key}.weight"] = bridge.student_map.cpu()
        bank["frozen_pt_weights"][key] = bridge.teacher_map.cpu()
        bank["frozen_pt_means"][key] = bridge.teacher_mean.cpu()
    with write_folder(folder) as partial:
        torch.save(bank, partial / FILE)


def read_ps_bank(path: str | Path) -> dict[LayerPair, PairBridge]:
    """Read the maps of a `ps_bank.pt`. Only tensors and plain values are unpickled. No communication.

    Returns:
        The maps by layer pair (layers counted from 1), float32, on the CPU. Shapes are not checked.

    Raises:
        UserError: the file cannot be read, a projector is not linear, or a part of a pair is missing. One line that
            names the file.
    """
    bank = _load(Path(path))
    kind, mode = bank.get("projector_type", "linear"), bank.get("subspace_mode", "full")
    if kind != "linear" or mode != "full":
        raise UserError(
            f"{path} has projector_type={kind}, subspace_mode={mode}; only linear projectors with subspace_mode=full "
            "are supported"
        )
    parts = {name: _tensors(path, bank, name) for name in ("state_dict", "frozen_pt_weights", "frozen_pt_means")}
    pairs = _pairs(path, bank, parts["state_dict"])

    def part(name: str, pair: LayerPair, form: str) -> torch.Tensor:
        student, teacher = pair.student - 1, pair.teacher - 1
        keys = [
            form.format(f"s{student}_t{teacher}"),
            form.format(f"{student}_{teacher}"),
        ]  # the second is the key of older files
        for key in keys:
            if key in parts[name]:
                return parts[name][key].float()
        raise UserError(
            f"{path}: {name} lacks {keys[0]}, of student layer {pair.student} and teacher layer {pair.teacher}"
        )

    return {
        pair: PairBridge(
            student_map=part("state_dict", pair, "projectors.{}.weight"),
            teacher_map=part("frozen_pt_weights", pair, "{}"),
            teacher_mean=part("frozen_pt_means", pair, "{}"),
        )
        for pair in pairs
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        bank = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"torch.load cannot read {path} with weights_only=True: {reason}") from None
    if not isinstance(bank, dict):
        raise UserError(f"{path} is not a ps_bank file: it contains a {type(bank).__name__}, not a dictionary")
    return bank


def _tensors(path: str | Path, bank: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
    part = bank.get(name)
    if not isinstance(part, dict) or not all(isinstance(value, torch.Tensor) for value in part.values()):
        raise UserError(f"{path} is not a ps_bank file: {name} must be a dictionary of tensors")
    return part


def _pairs(path: str | Path, bank: Mapping[str, Any], projectors: Mapping[str, torch.Tensor]) -> list[LayerPair]:
    """Return the layer pairs of the file: those of `layer_pairs`, or those of the projectors if that key is missing.

    Raises UserError for a projector whose pair is not in `layer_pairs`.
    """
    names = {name: _PROJECTOR.fullmatch(name) for name in projectors}
    unknown = [name for name, match in names.items() if match is None]
    if unknown:
        raise UserError(f"{path}: state_dict holds {unknown[0]}, which is not the weight of a linear projector")
    with_projector = {LayerPair(int(match[1]) + 1, int(match[2]) + 1) for match in names.values() if match}
    try:
        listed = [LayerPair(int(p["student_layer"]) + 1, int(p["teacher_layer"]) + 1) for p in bank["layer_pairs"]]
    except KeyError:
        listed = sorted(with_projector, key=lambda pair: (pair.student, pair.teacher))
    except (TypeError, ValueError):
        raise UserError(f"{path}: layer_pairs must be a list of student_layer and teacher_layer") from None
    for pair in with_projector - set(listed):
        raise UserError(
            f"{path}: layer_pairs lacks the pair of student layer {pair.student} and teacher layer {pair.teacher}"
        )
    return listed
