"""A bridge is fitted on the hidden states of Hugging Face's models, and is the same in every layout."""

import pytest
import torch

from megatron_oprd.bridge.fitting.adamw import initial_map
from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.bridge.fitting.procedure import share_teacher_maps
from megatron_oprd.bridge.fitting.solve import fit_pair
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import LayerPair
from tests.helpers.fits import RecordedFit, layer_map, recorded_fit, reference_states, write_replay
from tests.helpers.killable import Command, DieBefore
from tests.helpers.layouts import FEW_LAYOUTS

# Response lengths of 12 prompts with two answers each. Prompts 3, 7 and 11 are held out. Every other step holds out
# nothing, one step holds out only empty answers, and one a single token.
LENGTHS = (9, 14, 1, 7, 12, 10, 0, 0, 13, 8, 11, 0, 14, 9, 0, 1, 6, 13, 12, 1, 9, 10, 14, 11)
HELD_OUT = {6, 7, 14, 15, 22, 23}
K = 8
RANKS = (2, 5)
RIDGE = 1e-2
SEED = 3
LAYOUTS = {
    **FEW_LAYOUTS,
    "tensor": (2, ("parallel.tensor=2",)),
    "virtual pipeline": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "data, the teacher's own": (2, ("teacher.parallel={tensor: 2, pipeline: 1}",)),
    "tensor and pipeline, the teacher's own": (
        4,
        ("parallel.tensor=2", "parallel.pipeline=2", "teacher.parallel={tensor: 1, pipeline: 2}"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create a student, a deeper and wider teacher, and stored rollouts."""
    folder = tmp_path_factory.mktemp("fits")
    sizes = {"num_key_value_heads": 4, "intermediate_size": 64}
    save(random_hf_model("Qwen3", 0, num_hidden_layers=4, hidden_size=32, **sizes), folder / "student")
    save(random_hf_model("Qwen2", 1, num_hidden_layers=6, hidden_size=48, **sizes), folder / "teacher")
    write_replay(folder / "replay.jsonl", LENGTHS, 131)
    return folder


def arguments(folder, run_dir, *overrides):
    return [
        f"student.path={folder / 'student'}",
        f"teacher.path={folder / 'teacher'}",
        f"train.run_dir={run_dir}",
        f"train.seed={SEED}",
        "precision.dtype=fp32",
        "rollout.engine=replay",
        f"rollout.path={folder / 'replay.jsonl'}",
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        f"loss.representation.k={K}",
        "batch.max_tokens_per_micro_batch=24",
        "bridge.prompts=12",
        f"bridge.ranks={list(RANKS)}",
        f"bridge.ridges=[{RIDGE}]",
        "bridge.held_out_fraction=0.25",
        "bridge.save_every=4",
        *overrides,
    ]


@pytest.fixture(scope="module")
def fitted(folder):
    """Return the fit of a layout; each is made once."""
    made: dict[str, RecordedFit] = {}

    def fit(layout):
        if layout not in made:
            world, overrides = LAYOUTS[layout]
            made[layout] = recorded_fit(world, arguments(folder, folder / layout.replace(" ", "_"), *overrides))
        return made[layout]

    return fit


@pytest.fixture(scope="module")
def expected(folder):
    rows = write_replay(folder / "replay.jsonl", LENGTHS, 131)
    return reference_states(folder / "student", folder / "teacher", rows, layer_map(4, 6), k=K, held_out=HELD_OUT)


def relative(actual, wanted):
    return ((actual - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_equal_those_of_the_states_of_all_ranks(fitted, layout):
    found = fitted(layout)
    assert found.moments.keys() == found.states.keys()
    for pair, (student, teacher, held_out) in found.states.items():
        for part, chosen in (("train", ~held_out), ("held_out", held_out)):
            x, y, moments = student[chosen].double(), teacher[chosen].double(), found.moments[pair][part]
            assert moments.tokens == len(x) > max(RANKS)
            assert relative(moments.student_mean, x.mean(0)) < 1e-9
            assert relative(moments.teacher_mean, y.mean(0)) < 1e-9
            x, y = x - x.mean(0), y - y.mean(0)
            assert relative(moments.student_scatter, x.T @ x) < 1e-9
            assert relative(moments.teacher_scatter, y.T @ y) < 1e-9
            assert relative(moments.cross_scatter, x.T @ y) < 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fitted_states_equal_transformers(fitted, expected, layout):
    """Layers, tokens and the held-out split are right for both models, and each token occurs once."""
    found = fitted(layout).states
    assert found.keys() == expected.keys()
    for pair, (student, teacher, held_out) in found.items():
        of_student, of_teacher, judged = expected[pair]
        order = torch.cdist(student.double(), of_student).argmin(dim=1)
        assert sorted(order.tolist()) == list(range(len(of_student)))
        assert relative(student, of_student[order]) < 1e-5
        assert relative(teacher, of_teacher[order]) < 1e-5
        assert torch.equal(held_out, judged[order])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bridge_does_not_depend_on_the_layout(fitted, layout):
    """States differ by the rounding of float32 (1e-6); the maps of a positive ridge do not amplify it."""
    found, one = fitted(layout), fitted("one")
    assert found.reported_fits().keys() == one.reported_fits().keys()
    for key, row in found.reported_fits().items():
        for name in ("error", "total", "explained_variance", "cosine_before", "cosine_after"):
            assert row[name] == pytest.approx(one.reported_fits()[key][name], rel=1e-4, abs=1e-5), (key, name)
        assert row["ridge"] == RIDGE
    for rank in RANKS:
        for pair, maps in found.maps(rank).items():
            wanted = one.maps(rank)[pair]
            for name in ("student_map", "teacher_map", "teacher_mean"):
                assert relative(getattr(maps, name), getattr(wanted, name)) < 1e-4, (pair, name)


@pytest.mark.parametrize("layout", ["one", "tensor and sequence", "pipeline"])
def test_cosines_and_errors_equal_those_of_the_held_out_states(fitted, layout):
    found = fitted(layout)
    for (pair, rank), row in found.reported_fits().items():
        (student, teacher, held_out), maps = found.states[pair], found.maps(rank)[pair]
        x, y = student[held_out].double(), teacher[held_out].double()
        target = (y - maps.teacher_mean.double()) @ maps.teacher_map.double().T
        before = initial_map(rank, x.shape[1], SEED, pair.student, pair.teacher)
        for name, student_map in (("cosine_before", before), ("cosine_after", maps.student_map)):
            z = x @ student_map.double().T
            cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(z, target, strict=True)]
            assert row[name] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
        error = ((x @ maps.student_map.double().T - target) ** 2).sum(1).mean()
        assert row["error"] == pytest.approx(float(error), rel=1e-6)
        assert row["total"] == pytest.approx(float((target**2).sum(1).mean()), rel=1e-6)


def test_a_fit_without_ridge_is_least_squares(folder, fitted):
    """The second fit reuses the stored moments of the first, so it runs no model."""
    seen = fitted("one").states
    again = recorded_fit(1, arguments(folder, folder / "one", "bridge.ridges=[0.0]", "bridge.ranks=[5]"))
    assert not again.states
    for pair, maps in again.maps(5).items():
        student, teacher, held_out = seen[pair]
        x, y = student[~held_out].double(), teacher[~held_out].double()
        assert len(x) > 2 * x.shape[1]
        targets = (y - y.mean(0)) @ maps.teacher_map.double().T
        solution = torch.linalg.lstsq(x, targets).solution.T
        assert relative(maps.student_map.double(), solution) < 1e-5
        directions = torch.linalg.svd(y - y.mean(0), full_matrices=False).Vh[:5]
        assert relative((directions @ maps.teacher_map.double().T).abs(), torch.eye(5).double()) < 1e-5


@pytest.fixture(scope="module")
def related(folder):
    """Return the arguments of a fit between related models, on many more tokens than a map has columns.

    The teacher's embedding is a linear map of the student's. For unrelated random models the best map is almost zero,
    so a fit that stops early would look as good.
    """
    shared = {}
    for seed, (name, width) in enumerate({"student": 32, "teacher": 48}.items()):
        model = random_hf_model("Qwen3", seed, num_hidden_layers=3 + seed, hidden_size=width, num_key_value_heads=4)
        with torch.no_grad():
            for block in model.model.layers:
                for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                    projection.weight *= 0.3
            embedding = model.model.embed_tokens.weight
            shared[name] = embedding.copy_(embedding if seed == 0 else shared["student"] @ torch.randn(32, 48))
        save(model, folder / f"related_{name}")
    write_replay(folder / "many.jsonl", [40] * 60, 131)
    return [
        f"student.path={folder / 'related_student'}",
        f"teacher.path={folder / 'related_teacher'}",
        f"rollout.path={folder / 'many.jsonl'}",
        "rollout.prompts_per_step=10",
        "rollout.samples_per_prompt=1",
        "loss.representation.positions=all",
        "batch.max_tokens_per_micro_batch=512",
        "bridge.prompts=60",
        "bridge.held_out_fraction=0.3",
        "bridge.ridges=[0.0,1e-6,1e-5,1e-4,1e-3,1e-2,1e-1,1.0]",
    ]


def test_the_closed_form_is_no_worse_than_adamw(folder, related):
    run = arguments(folder, folder / "both", *related)
    closed = recorded_fit(1, run).reported_fits()
    adamw = recorded_fit(1, [*run, "bridge.method=adamw", "bridge.epochs=20", "bridge.lr=3e-3"]).reported_fits()
    assert closed.keys() == adamw.keys() == {(pair, rank) for pair in layer_map(3, 4) for rank in RANKS}
    for key, row in closed.items():
        assert row["error"] <= adamw[key]["error"] < 0.95 * row["total"], key  # both have found something
        assert adamw[key]["ridge"] is None and row["cosine_after"] > row["cosine_before"] + 0.1


def test_a_killed_data_parallel_fit_resumes_to_the_same_bytes(folder, fitted):
    """Some steps hold out nothing; answers have one token or none, and one empty answer is alone on its rank."""
    expected = fitted("data").folder
    actual = folder / "died" / "bridge"
    for number, point in enumerate((r"/step_0000004\.partial$", r"/step_0000006\.partial$", None)):
        die = DieBefore("os.rename", point) if point else None
        log = folder / f"{number}.log"
        run = Command(arguments(folder, folder / "died"), log, module="bridge.fit", world_size=2, die=die)
        assert (run.wait() == 0) == (point is None), log.read_text()
    names = ["fit.json", *(f"rank_{rank}/bridge.{end}" for rank in RANKS for end in ("json", "safetensors"))]
    for name in names:
        assert (actual / name).read_bytes() == (expected / name).read_bytes(), name


ADAMW = ("bridge.method=adamw", "bridge.epochs=3", "bridge.lr=1e-2")


@pytest.fixture(scope="module")
def by_adamw(folder):
    """Return the fit by AdamW in one process."""
    return recorded_fit(1, arguments(folder, folder / "adamw", *ADAMW))


@pytest.mark.parametrize("layout", ["data", "tensor and sequence", "pipeline", "context"])
def test_the_bridge_of_adamw_does_not_depend_on_the_layout(folder, by_adamw, layout):
    world, overrides = LAYOUTS[layout]
    run = arguments(folder, folder / f"adamw_{layout.replace(' ', '_')}", *overrides, *ADAMW)
    found = recorded_fit(world, run)
    for pair, maps in found.maps(5).items():
        assert relative(maps.student_map, by_adamw.maps(5)[pair].student_map) < 1e-4
        assert torch.equal(found.maps(2)[pair].teacher_map, maps.teacher_map[:2])
    for key, row in found.reported_fits().items():
        assert row["error"] == pytest.approx(by_adamw.reported_fits()[key]["error"], rel=1e-4)


def test_pairs_that_share_a_teacher_layer_share_its_map():
    """The maps differ by rounding if they were computed on two machines."""
    generator = torch.Generator().manual_seed(0)
    moments = [Moments.empty(6, 8) for _ in range(3)]
    for one in moments:
        one.add(torch.randn(40, 6, generator=generator), torch.randn(40, 8, generator=generator))
    pairs = LayerPair(1, 3), LayerPair(2, 3), LayerPair(4, 6)
    fits = {pair: fit_pair(one, one, (2, 3), (0.0,)) for pair, one in zip(pairs, moments, strict=True)}
    agreed = share_teacher_maps(fits)
    for rank in (2, 3):
        first, second, other = (agreed[pair][rank].bridge for pair in pairs)
        assert torch.equal(first.teacher_map, second.teacher_map)
        assert torch.equal(first.teacher_mean, second.teacher_mean)
        assert first is not second and torch.equal(second.student_map, fits[pairs[1]][rank].bridge.student_map)
        assert torch.equal(first.teacher_map, fits[pairs[0]][rank].bridge.teacher_map)
        assert torch.equal(other.teacher_map, fits[pairs[2]][rank].bridge.teacher_map)
        assert not torch.equal(other.teacher_map, first.teacher_map)
