"""`rollout.horizon: auto` generates less, and leaves the sampled tokens, the loss and the gradients as they are."""

import dataclasses

import pytest
import torch

from megatron_oprd.launch.assemble import build_run
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_update
from megatron_oprd.testing.update import assert_same_update, measure_update
from megatron_oprd.train import one_step
from megatron_oprd.types import Prompt
from tests.helpers.generating import generating_inputs

EOS = [3, 17, 40, 90, 111]
LONGEST = 14
GENERATION = (
    "data.max_prompt_tokens=8",
    "rollout.samples_per_prompt=2",
    f"rollout.max_new_tokens={LONGEST}",
    "batch.max_tokens_per_micro_batch=48",
)
NO_STATES = "loss.representation.weight=0"
FIRST_STATES = ("loss.representation.positions=first_k", "loss.representation.k=3")
FIRST_OUTPUTS = ("loss.output.positions=first_k", "loss.output.positions_k=5")
# The settings of the loss, and the horizon.
CASES = {
    "states, mean of means": (FIRST_STATES, 3),
    "states before each token, mean over tokens": (
        (*FIRST_STATES, "loss.representation.shift=-1", "loss.representation.aggregation=token_mean"),
        3,
    ),
    "distributions": ((*FIRST_OUTPUTS, NO_STATES, "loss.output.objective=full_kl"), 5),
    "both, the longer one counts": ((*FIRST_STATES, *FIRST_OUTPUTS, "loss.output.objective=sampled"), 5),
}
LAYOUTS = {"one rank": (1, ()), "context parallelism": (2, ("parallel.context=2",))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, sizes = tmp_path_factory.mktemp("models"), {"num_hidden_layers": 2, "eos_token_id": EOS}
    return [save(random_hf_model("Qwen3", seed, **sizes), folder / str(seed)) for seed in range(2)]


def prompts():
    generator = torch.Generator().manual_seed(2)
    lengths = (1, 4, 7, 2)
    return [Prompt(i, tuple(torch.randint(0, 131, (n,), generator=generator).tolist())) for i, n in enumerate(lengths)]


def updates(rank, student, teacher, layout):
    """Return for each case the rollouts and the update with complete responses, and with the automatic horizon."""
    results = {}
    for name, (loss, _) in CASES.items():
        results[name] = []
        for horizon in ("null", "auto"):
            settings = (*GENERATION, *layout, *loss, f"rollout.horizon={horizon}")
            run = build_run(generating_inputs(student, teacher, prompts(), *settings))
            rollouts = []

            def step(run, state, rollouts=rollouts):
                result = one_step(run, state)
                rollouts.extend(result[2])
                return result

            update = measure_update(run, step)
            results[name].append((sorted(rollouts, key=lambda one: (one.prompt_index, one.sample_index)), update))
    return results if rank == 0 else None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_automatic_horizon_changes_neither_loss_nor_gradients(layout, models):
    world, settings = LAYOUTS[layout]
    results = run_distributed(world, updates, *models, settings)[0]
    for name, (loss, horizon) in CASES.items():
        (complete, expected), (cut, update) = results[name]
        lengths = [len(rollout.response_ids) for rollout in complete]
        assert min(lengths) < horizon < max(lengths), "some responses must end before the horizon and some after it"
        for rollout, shorter in zip(complete, cut, strict=True):
            is_cut = len(rollout.response_ids) > horizon
            assert shorter == dataclasses.replace(
                rollout,
                response_ids=rollout.response_ids[:horizon],
                response_mask=rollout.response_mask[:horizon],
                finish_reason="horizon" if is_cut else rollout.finish_reason,
            )
        reference = reference_update(*models, *GENERATION, *loss, rollouts=complete)
        for actual in (expected, update):
            assert_same_update(actual, reference)
        # A cosine near 0 has the absolute error of one near 1.
        same = [key for key in expected.metrics if key.startswith(("rep/", "output/")) or key == "grad_norm"]
        assert {key: update.metrics[key] for key in same} == pytest.approx(
            {key: expected.metrics[key] for key in same}, rel=1e-6, abs=1e-6
        )
        assert update.metrics["rollout/horizon"] == horizon and "rollout/horizon" not in expected.metrics
        assert update.metrics["rollout/horizon_fraction"] == sum(length > horizon for length in lengths) / len(lengths)
        assert update.metrics["rollout/truncated_fraction"] == 0
        assert update.metrics["rollout/length_mean"] < expected.metrics["rollout/length_mean"]
