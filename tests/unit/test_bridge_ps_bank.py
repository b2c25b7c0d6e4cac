"""The authors' bridge files are read with layers counted from 1, and incomplete files are refused."""

import pytest
import torch

from megatron_oprd.bridge.origin import unrecorded_properties
from megatron_oprd.bridge.ps_bank import read_ps_bank, write_ps_bank
from megatron_oprd.bridge.record import ModelOrigin
from megatron_oprd.bridge.store import read_bridge
from megatron_oprd.types import LayerPair, UserError
from tests.unit.test_bridge_store import PAIRS, some_bridge

FIELDS = ("student_map", "teacher_map", "teacher_mean")


def bank(legacy=False):
    """Return the content of a file of the authors' script, with the pairs (0, 0) and (3, 2)."""
    generator = torch.Generator().manual_seed(0)
    keys = {(0, 0): "0_0" if legacy else "s0_t0", (3, 2): "3_2" if legacy else "s3_t2"}
    orthonormal = {key: torch.linalg.qr(torch.randn(5, 3, generator=generator)).Q.T for key in keys.values()}
    return {
        "rank": 3,
        "best_epoch": 7,
        "saved_from": "best_val",
        "projector_type": "linear",
        "mlp_hidden_mult": 4,
        "layer_pairs": [{"student_layer": s, "teacher_layer": t} for s, t in keys],
        "state_dict": {f"projectors.{key}.weight": torch.randn(3, 6, generator=generator) for key in keys.values()},
        "frozen_pt_weights": orthonormal,
        "frozen_pt_means": {key: torch.randn(5, generator=generator) for key in keys.values()},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_layers_counted_from_zero_become_layers_from_one(legacy, listed, tmp_path):
    saved = bank(legacy)
    if not listed:
        del saved["layer_pairs"]
    torch.save(saved, tmp_path / "ps_bank.pt")
    bridge = read_bridge(tmp_path / "ps_bank.pt")
    assert list(bridge.maps) == [LayerPair(1, 1), LayerPair(4, 3)]
    key = "3_2" if legacy else "s3_t2"
    maps = bridge.maps[LayerPair(4, 3)]
    assert torch.equal(maps.student_map, saved["state_dict"][f"projectors.{key}.weight"])
    assert torch.equal(maps.teacher_map, saved["frozen_pt_weights"][key])
    assert torch.equal(maps.teacher_mean, saved["frozen_pt_means"][key])
    assert (bridge.rank, bridge.statistics) == (3, {})
    assert bridge.origin.student == ModelOrigin(None, None, None, 6, None)
    assert bridge.origin.teacher == ModelOrigin(None, None, None, 5, None)
    assert "the student's weights" in unrecorded_properties(bridge)


def test_the_written_file_has_the_authors_format(tmp_path):
    maps = some_bridge().maps
    write_ps_bank(tmp_path / "rank_3", maps)
    saved = torch.load(tmp_path / "rank_3" / "ps_bank.pt", weights_only=True)
    assert saved.keys() == bank().keys() - {"best_epoch", "saved_from", "mlp_hidden_mult"} | {"subspace_mode"}
    assert saved["rank"] == 3
    assert saved["layer_pairs"][2] == {"student_layer": 3, "teacher_layer": 2}
    assert torch.equal(saved["state_dict"]["projectors.s3_t2.weight"], maps[PAIRS[2]].student_map)
    assert saved["frozen_pt_weights"]["s3_t2"].shape == (3, 5)
    assert saved["frozen_pt_means"].keys() == {"s0_t0", "s1_t0", "s3_t2"}
    again = read_bridge(tmp_path / "rank_3" / "ps_bank.pt").maps
    assert list(again) == list(maps)
    for pair in maps:
        assert all(torch.equal(getattr(again[pair], name), getattr(maps[pair], name)) for name in FIELDS)


def without(part, key):
    return lambda saved: saved[part].pop(key)


def put(part, key, value):
    return lambda saved: saved[part].__setitem__(key, value)


BROKEN = {
    "mlp": (lambda s: s.update(projector_type="mlp"), "projector_type=mlp, subspace_mode=full; only linear"),
    "direct": (lambda s: s.update(subspace_mode="direct"), "subspace_mode=direct; only linear"),
    "residual": (lambda s: s.update(subspace_mode="residual"), "subspace_mode=residual; only linear"),
    "P_S": (without("state_dict", "projectors.s3_t2.weight"), r"state_dict lacks projectors\.s3_t2\.weight.* layer 4 "),
    "P_T": (without("frozen_pt_weights", "s3_t2"), "frozen_pt_weights lacks s3_t2, of student layer 4 and teacher lay"),
    "mean": (
        without("frozen_pt_means", "s0_t0"),
        "frozen_pt_means lacks s0_t0, of student layer 1 and teacher layer 1",
    ),
    "listed": (lambda s: s["layer_pairs"].pop(), "layer_pairs lacks the pair of student layer 4 and teacher layer 3"),
    "layers": (lambda s: s.update(layer_pairs=[1]), "layer_pairs must be a list of"),
    "other": (put("state_dict", "projectors.s1_t1.0.weight", torch.zeros(1)), r"holds projectors\.s1_t1\.0\.weight"),
    "part": (lambda s: s.pop("frozen_pt_means"), "frozen_pt_means must be a dictionary of tensors"),
    "values": (put("frozen_pt_means", "s0_t0", 3), "frozen_pt_means must be a dictionary of tensors"),
    "empty": (lambda s: s.update(layer_pairs=[], state_dict={}), "holds no pair of layers"),
    "shape": (put("frozen_pt_means", "s0_t0", torch.zeros(4)), r"student_1\.teacher_1\.teacher_mean is .*\(4,\)"),
    "ranks": (put("state_dict", "projectors.s3_t2.weight", torch.zeros(2, 6)), r"student_map is .*\(2, 6\).*\(3, 6\)"),
    "flat": (put("state_dict", "projectors.s0_t0.weight", torch.zeros(3)), "no pair of layers with two matrices"),
    "unlike": (put("frozen_pt_weights", "s0_t0", torch.ones(3, 5)), "not orthonormal"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_an_incomplete_or_unsupported_bank_is_refused(damage, message, tmp_path):
    saved = bank()
    damage(saved)
    torch.save(saved, tmp_path / "ps_bank.pt")
    with pytest.raises(UserError, match=message) as caught:
        read_bridge(tmp_path / "ps_bank.pt")
    assert str(tmp_path / "ps_bank.pt") in str(caught.value)


class Attack:
    def __reduce__(self):
        return print, ("code of the file ran",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read .*: No such file"),
        (lambda path: path.write_text("no tensors"), "torch.load cannot read .* with weights_only=True"),
        (lambda path: path.write_bytes(b""), "torch.load cannot read .* with weights_only=True"),
        (
            lambda path: torch.save(bank(), path) or path.write_bytes(path.read_bytes()[:900]),
            "torch.load cannot read .* with weights_only=True",
        ),
        (lambda path: torch.save([1], path), "is not a ps_bank file: it contains a list, not a dictionary"),
        (lambda path: torch.save(Attack(), path), "torch.load cannot read .* with weights_only=True"),
        (lambda path: path.mkdir(), "cannot read .*: Is a directory"),
    ],
)
def test_another_file_is_refused_in_one_line_and_its_code_does_not_run(make, message, tmp_path, capsys):
    make(tmp_path / "ps_bank.pt")
    with pytest.raises(UserError, match=message) as caught:
        read_ps_bank(tmp_path / "ps_bank.pt")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
