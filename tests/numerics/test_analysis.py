"""The analyses equal a direct computation with transformers in float64, in every layout."""

import pytest
import torch
import transformers

from megatron_oprd.analysis.before import build_before
from megatron_oprd.analysis.gradients import measure_gradients
from megatron_oprd.analysis.objectives import OBJECTIVES
from megatron_oprd.analysis.procedure import analyse_states
from megatron_oprd.bridge.store import read_bridge
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_update
from megatron_oprd.testing.replayed_run import build_replayed_run
from megatron_oprd.types import LayerPair, Rollout
from tests.helpers.bridges import save_random_bridge

LAYERS = (1, 2, 3, 4)
LAYOUTS = {
    "tensor and sequence parallel": ("parallel.tensor=2", "parallel.sequence=true"),
    "pipeline": ("parallel.pipeline=2",),
    "data parallel": (),
    "context parallel, teacher in its own layout": ("parallel.context=2", "teacher.parallel.tensor=2"),
}
SETTINGS = (
    "loss.representation.positions=all",
    "loss.output.objective=full_kl",
    "loss.output.k=4",
    "batch.max_tokens_per_micro_batch=24",
)


def rollouts_of(vocab_size):
    """Return rollouts of uneven lengths; two of them share a prompt, one has no response."""
    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return tuple(torch.randint(0, vocab_size, (count,), generator=generator).tolist())

    prompts = [ids(3), ids(5), ids(2), ids(4)]
    prompts[1] = prompts[0]
    return [
        Rollout(prompt, ids(length), (1,) * length, "replay")
        for prompt, length in zip(prompts, (9, 18, 5, 0), strict=True)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folders of a student before and after its training, and of its teacher."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": len(LAYERS), "hidden_size": 48}
    return [save(random_hf_model("Qwen3", seed=seed, **sizes), folder / str(seed)) for seed in range(3)]


def analyses_in(rank, folders, layouts):
    """Return the analyses of the hidden states and of the gradients in each layout."""
    before, after, teacher = folders
    rollouts, found = rollouts_of(read_model_spec(after).vocab_size), []
    for layout in layouts:
        run = build_replayed_run(after, teacher, *SETTINGS, *layout, rollouts=rollouts)
        states = analyse_states(run, build_before(run, str(before)), rollouts)
        found.append((states, [measure_gradients(run, name, rollouts) for name in OBJECTIVES]))
    return found


@pytest.fixture(scope="module")
def analyses(folders):
    """Return the analyses by the name of the layout, as the last rank has them."""
    of_ranks = run_distributed(2, analyses_in, folders, list(LAYOUTS.values()))
    return dict(zip(LAYOUTS, of_ranks[1], strict=True))


def response_states(model, rollouts, layers):
    """Return the states [tokens, hidden] of all response tokens by layer."""
    with torch.no_grad():
        outputs = [
            model(torch.tensor([one.prompt_ids + one.response_ids]), output_hidden_states=True).hidden_states
            for one in rollouts
        ]
    return {
        layer: torch.cat([of[layer][0, len(one.prompt_ids) :] for of, one in zip(outputs, rollouts, strict=True)])
        for layer in layers
    }


@pytest.fixture(scope="module")
def states(folders):
    """Return transformers' states [tokens, hidden] by model and layer, and the position of each token."""
    found, rollouts = {}, rollouts_of(read_model_spec(folders[0]).vocab_size)
    for name, folder in zip(("before", "after", "teacher"), folders, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        found[name] = response_states(model, rollouts, LAYERS)
    return found, torch.cat([torch.arange(len(one.response_ids)) for one in rollouts])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cosine_and_error_by_layer_and_position_are_those_of_transformers(layout, analyses, states):
    found, (models, positions) = analyses[layout][0]["positions"], states
    width = found["first_positions"][1]
    for name in ("before", "after"):
        for layer in found[name]:
            student, teacher = models[name][layer["layer"]], models["teacher"][layer["layer"]]
            cosine, error = torch.cosine_similarity(student, teacher, dim=-1), (student - teacher).pow(2).mean(-1)
            relative = (student - teacher).norm() / teacher.norm()
            expected = {"cosine": cosine.mean(), "error": error.mean(), "relative_error": relative}
            assert {key: layer[key] for key in expected} == pytest.approx(
                {key: value.item() for key, value in expected.items()}, rel=1e-5
            )
            for number, first in enumerate(found["first_positions"]):
                inside = (positions >= first) & (positions < first + width)
                assert found["tokens"][number] == inside.sum()
                assert layer["cosine_by_position"][number] == pytest.approx(cosine[inside].mean().item(), abs=1e-5)
                assert layer["error_by_position"][number] == pytest.approx(error[inside].mean().item(), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_directions_are_those_of_transformers(layout, analyses, states):
    models, _ = states
    for found in analyses[layout][0]["directions"]:
        before, after, teacher = (models[name][found["layer"]] for name in ("before", "after", "teacher"))
        differences = {"before": before - teacher, "after": after - teacher, "drift": after - before}
        for name, difference in differences.items():
            squares = torch.linalg.svdvals(difference).pow(2)
            explained = squares.cumsum(0) / squares.sum()
            curve = found[name]
            assert curve["mean_square"] == pytest.approx(squares.sum().item() / len(difference), rel=1e-5)
            of_ranks = [explained[min(rank, len(explained)) - 1].item() for rank in curve["ranks"]]
            assert curve["explained"] == pytest.approx(of_ranks, rel=1e-5)
            assert curve["effective_rank"] == pytest.approx(
                (squares.sum() ** 2 / squares.pow(2).sum()).item(), rel=1e-5
            )
            mean_share = difference.mean(0).pow(2).sum() / difference.pow(2).sum(1).mean()
            assert curve["mean_share"] == pytest.approx(mean_share.item(), rel=1e-5)
        leading = torch.linalg.svd(differences["before"]).Vh[: len(found["directions"])]
        along = {name: (difference @ leading.T).pow(2).sum(0) for name, difference in differences.items()}
        for name, expected in {
            "share": along["before"] / differences["before"].pow(2).sum(),
            "left": along["after"] / along["before"],
            "drift_share": along["drift"] / differences["drift"].pow(2).sum(),
        }.items():
            # States in float32 turn directions of nearly equal eigenvalues into each other.
            assert [one[name] for one in found["directions"]] == pytest.approx(expected.tolist(), rel=1e-4)
        shares = differences["before"].pow(2).sum(0) / differences["before"].pow(2).sum()
        top = shares.topk(len(found["coordinates"]))
        assert [one["coordinate"] for one in found["coordinates"]] == top.indices.tolist()
        assert [one["share"] for one in found["coordinates"]] == pytest.approx(top.values.tolist(), rel=1e-5)


@pytest.fixture(scope="module")
def expected_variance(folders):
    """Return the variance of transformers' gradients by objective: over rollouts, and among those of one prompt."""
    _, after, teacher = folders
    rollouts = rollouts_of(read_model_spec(after).vocab_size)[:-1]  # without the empty response

    def gradient(objective, rollout):
        weight, output = (1, "none") if objective == "hidden_states" else (0, objective)
        settings = (f"loss.representation.weight={weight}", f"loss.output.objective={output}")
        update = reference_update(
            after, teacher, *SETTINGS, "loss.output.aggregation=sequence_mean", *settings, rollouts=[rollout]
        )
        return torch.cat([update.gradients[name].flatten() for name in sorted(update.gradients)])

    found = {}
    for objective in OBJECTIVES:
        gradients = torch.stack([gradient(objective, rollout) for rollout in rollouts])
        within = (gradients[:2] - gradients[:2].mean(0)).pow(2).sum()
        found[objective] = gradients.var(0).sum().item(), gradients.mean(0).pow(2).sum().item(), within.item()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_variance_of_gradients_is_that_of_transformers(layout, analyses, expected_variance):
    for found in analyses[layout][1]:
        variance, squared_mean, within = expected_variance[found["objective"]]
        assert (found["rollouts"], found["prompts"]) == (3, 2)
        assert found["variance"] == pytest.approx(variance, rel=1e-5)
        assert found["squared_norm_of_mean"] == pytest.approx(squared_mean, rel=1e-5)
        assert found["variance_within_prompts"] == pytest.approx(within, rel=1e-5)
        signal = squared_mean - variance / 3
        assert found["signal"] == pytest.approx(signal, rel=1e-5)
        assert found["noise"] == (pytest.approx(variance / signal, rel=1e-5) if signal > 0 else None)


def test_a_bridge_compares_projections_of_models_of_unlike_width(folders, states, tmp_path):
    before, after, _ = folders
    teacher = save(random_hf_model("Qwen3", hidden_size=64, num_hidden_layers=5, seed=7), tmp_path / "teacher")
    bridge = save_random_bridge(tmp_path / "bridge", after, teacher, rank=3, positions=None)
    rollouts = rollouts_of(read_model_spec(after).vocab_size)
    found = run_distributed(1, analyse_with_bridge, before, after, teacher, bridge, rollouts)[0]
    maps = read_bridge(bridge).maps
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    of_teacher = response_states(model, rollouts, range(1, 6))
    for number, (student_layer, teacher_layer) in enumerate(found["pairs"]):
        one = maps[LayerPair(student_layer, teacher_layer)]
        target = (of_teacher[teacher_layer] - one.teacher_mean.double()) @ one.teacher_map.double().T
        projected = {name: states[0][name][student_layer] @ one.student_map.double().T for name in ("before", "after")}
        for name, student in projected.items():
            layer = found["positions"][name][number]
            assert layer["cosine"] == pytest.approx(torch.cosine_similarity(student, target).mean().item(), abs=1e-5)
            assert layer["error"] == pytest.approx((student - target).pow(2).mean().item(), rel=1e-5)
            assert layer["relative_error"] == pytest.approx(
                ((student - target).norm() / target.norm()).item(), rel=1e-5
            )
        drift = found["directions"][number]["drift"]
        change = projected["after"] - projected["before"]
        assert drift["ranks"] == [1, 2, 3]
        assert drift["mean_square"] == pytest.approx(change.pow(2).sum(1).mean().item(), rel=1e-5)


def analyse_with_bridge(rank, before, student, teacher, bridge, rollouts):
    settings = ("loss.representation.positions=all", "batch.max_tokens_per_micro_batch=64")
    run = build_replayed_run(student, teacher, *settings, f"loss.representation.bridge={bridge}", rollouts=rollouts)
    return analyse_states(run, build_before(run, str(before)), rollouts)


def test_without_an_earlier_student_only_its_present_state_is_described(folders):
    _, after, teacher = folders
    rollouts = rollouts_of(read_model_spec(after).vocab_size)
    (found,) = run_distributed(1, present_state, after, teacher, rollouts)
    assert "before" not in found["positions"]
    assert all({"before", "drift", "directions"}.isdisjoint(layer) for layer in found["directions"])


def present_state(rank, student, teacher, rollouts):
    run = build_replayed_run(student, teacher, *SETTINGS, rollouts=rollouts)
    return analyse_states(run, None, rollouts)
