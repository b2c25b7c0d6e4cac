"""A bridge file is read as it was written; a broken file, or one of other models, is refused in one line."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oprd.bridge.origin import check_bridge, unrecorded_properties
from megatron_oprd.bridge.record import Bridge, Counts, ModelOrigin, Origin, PairStatistics, Positions
from megatron_oprd.bridge.store import read_bridge, write_bridge
from megatron_oprd.data.tokenizer import load_tokenizer, tokenizer_hash
from megatron_oprd.types import LayerPair, PairBridge, UserError
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

RANK, WIDTHS = 3, (6, 5)
PAIRS = [LayerPair(1, 1), LayerPair(2, 1), LayerPair(4, 3)]
STUDENT = ModelOrigin("student", "sha256:" + "a" * 64, 4, WIDTHS[0], "sha256:" + "c" * 64)
TEACHER = ModelOrigin("teacher", "sha256:" + "b" * 64, 3, WIDTHS[1], None)
POSITIONS = Positions("last_k", 2000, 0, True)


def some_bridge(seed=0):
    generator = torch.Generator().manual_seed(seed)
    teachers = {
        layer: (
            torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q[:RANK],
            torch.randn(5, generator=generator),
        )
        for layer in (1, 3)
    }
    maps = {p: PairBridge(torch.randn(RANK, 6, generator=generator), *teachers[p.teacher]) for p in PAIRS}
    statistics = {p: PairStatistics((3.0, 2.0, 0.1 + p.student), 0.9, 1e-3, 0.5, 5.1, 0.01, 0.93) for p in PAIRS}
    counts = Counts(prompts=10, sequences=20, tokens=300, held_out_tokens=40)
    origin = Origin(STUDENT, TEACHER, POSITIONS, counts, "closed_form", 0.75, 1, "0.1.0")
    return Bridge(RANK, maps, statistics, origin)


def assert_same(found, expected):
    assert list(found.maps) == list(expected.maps)
    for pair, maps in expected.maps.items():
        for field in dataclasses.fields(PairBridge):
            assert torch.equal(getattr(found.maps[pair], field.name), getattr(maps, field.name))
    assert (found.rank, found.statistics, found.origin) == (expected.rank, expected.statistics, expected.origin)


def test_a_bridge_is_read_as_written(tmp_path):
    bridge = some_bridge()
    write_bridge(tmp_path / "bridge", bridge)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bridge", "bridge.json", "bridge.safetensors"]
    assert_same(read_bridge(tmp_path / "bridge"), bridge)
    assert "student_2.teacher_1.teacher_mean" in load_file(tmp_path / "bridge" / "bridge.safetensors")


def test_a_bridge_without_optional_content_is_read_as_written(tmp_path):
    bridge = some_bridge()
    student, teacher = (ModelOrigin(None, None, None, width, None) for width in WIDTHS)
    bridge = dataclasses.replace(
        bridge, statistics={}, origin=Origin(student, teacher, None, None, "adamw", None, None, None)
    )
    write_bridge(tmp_path / "bridge", bridge)
    assert_same(read_bridge(tmp_path / "bridge"), bridge)


def test_an_existing_bridge_is_not_overwritten(tmp_path):
    write_bridge(tmp_path / "bridge", some_bridge())
    with pytest.raises(UserError, match=r"bridge exists and is not empty"):
        write_bridge(tmp_path / "bridge", some_bridge(seed=1))
    assert_same(read_bridge(tmp_path / "bridge"), some_bridge())


def set_key(*path, value):
    """Return an edit of bridge.json that sets, or with KeyError deletes, the value at a path of keys."""

    def edit(folder):
        document = json.loads((folder / "bridge.json").read_text())
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        if value is KeyError:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        (folder / "bridge.json").write_text(json.dumps(document))

    return edit


def set_tensor(name, change):
    """Return an edit of bridge.safetensors that changes one tensor; if `change` returns None, the tensor is deleted."""

    def edit(folder):
        tensors = load_file(folder / "bridge.safetensors")
        changed = change(tensors.get(name))
        tensors.pop(name, None)
        save_file(tensors if changed is None else {**tensors, name: changed}, folder / "bridge.safetensors")

    return edit


P2 = "student_2.teacher_1"
BROKEN = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), r"no bridge at .*bridge\.fit"),
    "no document": (lambda f: (f / "bridge.json").unlink(), r"bridge\.json is missing; make a bridge with"),
    "no tensors": (lambda f: (f / "bridge.safetensors").unlink(), r"bridge\.safetensors is missing"),
    "no JSON": (lambda f: (f / "bridge.json").write_text("{"), r"bridge\.json is not JSON"),
    "no UTF-8": (lambda f: (f / "bridge.json").write_bytes(b"\xff\xfe"), r"bridge\.json is not JSON"),
    "JSON nested too deeply": (lambda f: (f / "bridge.json").write_text("[" * 100_000), r"bridge\.json is not JSON"),
    "a list": (lambda f: (f / "bridge.json").write_text("[]"), r"bridge\.json is not of format 1"),
    "format": (set_key("format", value=2), r"bridge\.json is not of format 1"),
    "no format": (set_key("format", value=KeyError), r"bridge\.json is not of format 1"),
    "truncated": (
        lambda f: (f / "bridge.safetensors").write_bytes((f / "bridge.safetensors").read_bytes()[:-9]),
        r"bridge\.safetensors is truncated or corrupt",
    ),
    "no key": (set_key("origin", "student", "hidden_size", value=KeyError), r"json: origin\.student\.hidden_size: fie"),
    "type": (set_key("origin", "teacher", "num_layers", value="3"), r"json: origin\.teacher\.num_layers: input"),
    "mode": (set_key("origin", "positions", "mode", value="some"), r"json: origin\.positions\.mode: input should be"),
    "method": (set_key("origin", "method", value="guess"), r"json: origin\.method: input should be"),
    "NaN": (set_key("pairs", 0, "statistics", "error", value=math.nan), r"pairs\.0\.statistics\.error: input"),
    "unknown key": (set_key("origin", "colour", value=1), r"json: origin\.colour: unexpected"),
    "unknown top": (set_key("colour", value=1), r"json: colour: unexpected"),
    "no pairs": (set_key("pairs", value=[]), r"holds student_1\.teacher_1\.student_map, which .* does not name"),
    "twice": (set_key("pairs", 1, "student", value=1), r"json: pairs names a pair of layers twice"),
    "rank": (
        set_key("rank", value=2),
        r"student_1\.teacher_1\.student_map is torch\.float32 of shape \(3, 6\), .*2, 6",
    ),
    "no rank": (set_key("rank", value=0), "rank 0 and 3 pairs"),
    "deep": (set_key("origin", "student", "num_layers", value=3), "student_4.teacher_3 names a layer that the student"),
    "lacks": (set_tensor(f"{P2}.student_map", lambda t: None), rf"lacks {P2}\.student_map"),
    "extra": (set_tensor("more", lambda t: torch.zeros(1)), "holds more, which bridge.json does not name"),
    "shape": (set_tensor(f"{P2}.teacher_mean", lambda t: t[:4].clone()), rf"{P2}\.teacher_mean is .*\(4,\).*\(5,\)"),
    "dtype": (set_tensor(f"{P2}.student_map", lambda t: t.double()), rf"{P2}\.student_map is torch\.float64"),
    "bad": (set_tensor(f"{P2}.student_map", lambda t: t * math.nan), rf"{P2}\.student_map has entries that are NaN"),
    "orthonormal": (set_tensor(f"{P2}.teacher_map", lambda t: t * 1.01), rf"rows of {P2}\.teacher_map are not ortho"),
    "two means": (
        set_tensor(f"{P2}.teacher_mean", lambda t: t + 1e-6),
        rf"student_1\.teacher_1 and {P2} share a teacher layer",
    ),
    "two maps": (set_tensor(f"{P2}.teacher_map", lambda t: -t), rf"student_1\.teacher_1 and {P2} share a teacher"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_the_error_of_a_broken_file_is_one_line_that_names_it(damage, message, tmp_path):
    write_bridge(tmp_path / "bridge", some_bridge())
    damage(tmp_path / "bridge")
    with pytest.raises(UserError, match=message) as caught:
        read_bridge(tmp_path / "bridge")
    assert str(tmp_path / "bridge") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_invalid_bridge_is_not_written(tmp_path):
    bridge = some_bridge()
    maps = {**bridge.maps, PAIRS[1]: dataclasses.replace(bridge.maps[PAIRS[1]], teacher_mean=torch.zeros(5))}
    with pytest.raises(UserError, match="share a teacher layer"):
        write_bridge(tmp_path / "bridge", dataclasses.replace(bridge, maps=maps))
    assert list(tmp_path.iterdir()) == []


def checked(bridge, pairs=PAIRS, **changes):
    expected = dataclasses.replace(some_bridge().origin, **changes)
    return check_bridge(bridge, "some/bridge", pairs, expected)


def test_a_bridge_is_restricted_to_the_pairs_of_the_run():
    bridge = some_bridge()
    assert_same(checked(bridge), bridge)
    fewer = checked(bridge, pairs=[PAIRS[2], PAIRS[0]])
    assert list(fewer.maps) == list(fewer.statistics) == [PAIRS[2], PAIRS[0]]
    assert fewer.maps[PAIRS[2]] is bridge.maps[PAIRS[2]]


def other(model, **changes):
    return dataclasses.replace(model, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pairs": [PAIRS[0], LayerPair(3, 2), LayerPair(4, 4)]},
            "no maps for student layer 3 and teacher layer 2; make a bridge",
        ),
        ({"student": other(STUDENT, num_layers=5)}, r"another student \(student, num_layers 4\) than .*num_layers 5"),
        ({"teacher": other(TEACHER, hidden_size=7)}, r"another teacher \(teacher, hidden_size 5\)"),
        (
            {"teacher": other(TEACHER, path="new", hash="sha256:f")},
            r"hash sha256:bbbbbbbbbbbb\) than new \(hash sha256",
        ),
        ({"student": other(STUDENT, tokenizer="sha256:d")}, r"another student .*tokenizer sha256:cccccccccccc\)"),
        ({"positions": Positions("all", 2000, 0, True)}, r'positions="last_k", the run has .*positions="all"'),
        ({"positions": Positions("last_k", 10, 0, True)}, r"k=2000, the run has loss\.representation\.k=10"),
        ({"positions": Positions("last_k", 2000, -1, True)}, r"shift=0, the run has loss\.representation\.shift=-1"),
        ({"positions": Positions("last_k", 2000, 0, False)}, r"final_norm=true, the run .*final_norm=false"),
    ],
)
def test_a_bridge_of_other_models_or_positions_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        checked(some_bridge(), **changes)
    assert str(caught.value).startswith("some/bridge ")
    assert "-m megatron_oprd.bridge.fit" in str(caught.value)


def test_unknown_properties_are_listed_and_not_compared():
    bridge = some_bridge()
    assert unrecorded_properties(bridge) == ["the teacher's tokenizer"]
    checked(bridge, teacher=other(TEACHER, tokenizer="sha256:d"))
    checked(bridge, student=other(STUDENT, tokenizer=None))
    student, teacher = (ModelOrigin(None, None, None, width, None) for width in WIDTHS)
    bridge = dataclasses.replace(
        bridge, origin=Origin(student, teacher, None, None, "adamw", None, None, None), statistics={}
    )
    assert checked(bridge, positions=Positions("all", 1, 0, True)).maps.keys() == set(PAIRS)
    assert unrecorded_properties(bridge) == [
        *(f"the student's {what}" for what in ("weights", "number of layers", "tokenizer")),
        *(f"the teacher's {what}" for what in ("weights", "number of layers", "tokenizer")),
        "the positions",
    ]
    with pytest.raises(UserError, match=r"of unknown path, hidden_size 6"):
        checked(bridge, student=other(STUDENT, hidden_size=8))


def test_k_is_compared_only_for_modes_that_use_it():
    assert Positions("all", 1, 0, True) == Positions("all", 2, 0, True)
    assert Positions("first_k", 1, 0, True) != Positions("first_k", 2, 0, True)


def test_the_tokenizer_hash_depends_on_behaviour_only(tmp_path):
    tokenizer = byte_tokenizer(chat=CHAT_TEMPLATE)
    digest = tokenizer_hash(tokenizer)
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=5)
    assert tokenizer_hash(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == digest
    others = [byte_tokenizer(), byte_tokenizer(chat=CHAT_TEMPLATE + " "), byte_tokenizer(chat=CHAT_TEMPLATE, bos=True)]
    more = byte_tokenizer(chat=CHAT_TEMPLATE)
    more.add_tokens(["<think>"])
    assert len({digest, *map(tokenizer_hash, [*others, more])}) == 5
