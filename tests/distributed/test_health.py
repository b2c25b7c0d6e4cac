"""Perplexities, KL, agreement and cosines of stored answers equal those of transformers in float64 in every layout.

Measuring them does not change training.
"""

import math

import pytest
import torch
import transformers

from megatron_oprd.evaluation.measure import measure_answers
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.measured import measured_models
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.replayed_run import some_rollouts
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import LayerPair
from tests.helpers.bridges import random_maps, save_bridge
from tests.helpers.training import make_run

VOCABULARY = 131  # of the teacher; not divisible by any layout
MASKS = ((1,) * 9, (1,), (1,) * 4, (1,) * 12, (1,) * 2, (1,) * 7)
LAYERS = 4
# The number of processes, and the settings. Without an output objective only hidden states are compared.
LAYOUTS = {
    "one rank, recomputed": (1, "recompute.granularity=full"),
    "a teacher below its top": (1, "loss.representation.layers=[1,2]"),
    "tensor and sequence": (2, "parallel.tensor=2", "parallel.sequence=true"),
    "pipeline": (2, "parallel.pipeline=2"),
    "context": (2, "parallel.context=2"),
    "data": (2, "loss.output.objective=sampled", "loss.representation.weight=0"),
    "virtual pipeline": (2, "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "the teacher in another layout": (
        2,
        "parallel.tensor=2",
        "teacher.parallel={tensor: 1, pipeline: 2}",
        "loss.output.objective=full_kl",
    ),
    "three at once": (4, "parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"),
    "pipeline and data": (4, "parallel.pipeline=2", "teachers_in_memory=one"),
    "bridge": (2, "parallel.pipeline=2", "loss.representation.layers=[1,4]", "loss.representation.bridge={bridge}"),
    "experts": (2, "parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return student and teacher of each family. The student has a larger vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": LAYERS, "num_key_value_heads": 4}

    def model(family, name, seed, vocabulary):
        return save(random_hf_model(family, seed, vocab_size=vocabulary, **sizes), folder / f"{family}-{name}")

    return {
        family: (model(family, "student", 0, VOCABULARY + 6), model(family, "teacher", 1, VOCABULARY))
        for family in ("Qwen3", "Qwen3Moe")
    }


def reference(student, teacher, maps=None):
    """Return the means over all tokens by name, computed one answer at a time in float64.

    `maps`: of a bridge, by pair of layers, through which hidden states are compared.
    """
    student_model, teacher_model = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
        for path in (student, teacher)
    )
    values = {name: [] for name in ("loss", "entropy", "reverse_kl", "forward_kl", "teacher_loss", "argmax_agreement")}
    cosines = {layer: [] for layer in range(1, LAYERS + 1)}
    for answer in some_rollouts(VOCABULARY, masks=MASKS):
        ids, start = torch.tensor([[*answer.prompt_ids, *answer.response_ids]]), len(answer.prompt_ids)
        with torch.no_grad():
            outputs = [model(ids, output_hidden_states=True) for model in (student_model, teacher_model)]
        logits, teacher_logits = (output.logits[0, start - 1 : -1] for output in outputs)
        tokens = range(len(logits)), list(answer.response_ids)
        log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        values["loss"] += (-log_p[tokens]).tolist()
        values["entropy"] += (-log_p.exp() * log_p).sum(-1).tolist()
        log_p = logits[:, :VOCABULARY].log_softmax(-1)  # over the token ids of both models
        values["reverse_kl"] += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        values["forward_kl"] += (log_q.exp() * (log_q - log_p)).sum(-1).tolist()
        values["teacher_loss"] += (-log_q[tokens]).tolist()
        values["argmax_agreement"] += (log_p.argmax(-1) == log_q.argmax(-1)).double().tolist()
        for layer, found in cosines.items():
            states = [output.hidden_states[layer][0, start:] for output in outputs]
            if maps is not None:
                own = maps[LayerPair(layer, layer)]
                states = [
                    states[0] @ own.student_map.double().T,
                    (states[1] - own.teacher_mean.double()) @ own.teacher_map.double().T,
                ]
            found += torch.nn.functional.cosine_similarity(*states, dim=-1).tolist()
    means = {name: sum(found) / len(found) for name, found in values.items()}
    perplexities = {"perplexity": math.exp(means["loss"]), "teacher_perplexity": math.exp(means["teacher_loss"])}
    return means | perplexities, {layer: sum(found) / len(found) for layer, found in cosines.items()}


def measure_and_train(rank, student, teacher, overrides):
    """Return the measurement of a rank, and True if training gives the same losses without measuring."""

    def losses(measuring):
        run = make_run(student, teacher, *overrides, "optimizer.lr=0.01", rollouts=some_rollouts(VOCABULARY))
        models = measured_models(run, layers=True)
        state, found, values = TrainState(), None, []
        for _ in range(2):
            if measuring:
                now = measure_answers(models, some_rollouts(VOCABULARY, masks=MASKS))
                found = found or now
            # Step 0 is replayed twice; the weights differ.
            _, metrics, _ = one_step(run, state)
            values.append((metrics["loss"], metrics["grad_norm"]))
        return found, values

    (found, with_measuring), (_, without) = losses(True), losses(False)
    return found, with_measuring == without


@pytest.mark.parametrize("name", LAYOUTS)
def test_measurements_equal_the_reference_in_every_layout_and_do_not_change_training(name, models, tmp_path):
    world, *overrides = LAYOUTS[name]
    paths = models["Qwen3Moe" if name == "experts" else "Qwen3"]
    maps = None
    if name == "bridge":
        maps = random_maps(*map(read_model_spec, paths), 8)
        bridge = save_bridge(tmp_path, *paths, maps)
        overrides = [override.format(bridge=bridge) for override in overrides]
    expected, cosines = reference(*paths, maps)
    below = name == "a teacher below its top"
    layers = {"a teacher below its top": (1, 2), "data": (), "bridge": (1, 4)}.get(name, tuple(cosines))
    assert name == "experts" or 0 < expected["argmax_agreement"] < 1
    results = run_distributed(world, measure_and_train, *paths, overrides)
    for measurement, unchanged in results:
        assert measurement == results[0][0]
        assert unchanged
        for name in ("perplexity", "entropy"):
            assert getattr(measurement, name) == pytest.approx(expected[name], rel=1e-5)
        for name in ("reverse_kl", "forward_kl", "teacher_perplexity", "argmax_agreement"):
            assert getattr(measurement, name) == (None if below else pytest.approx(expected[name], rel=1e-5)), name
        assert measurement.cosine == pytest.approx({layer: cosines[layer] for layer in layers}, abs=1e-5)
