"""Perplexity, entropy and KL of stored answers equal those of transformers in float64 in every layout.

Measuring them does not change training.
"""

import pytest
import torch
import transformers

from megatron_oprd.health.measure import MeasuredModels, has_teacher_distribution, measure_answers
from megatron_oprd.launch.models import load_heads
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.replayed_run import some_rollouts
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
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


def reference(student, teacher):
    """Return perplexity, mean entropy and mean KL, computed one answer at a time in float64."""
    student_model, teacher_model = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
        for path in (student, teacher)
    )
    losses, entropies, divergences = [], [], []
    for answer in some_rollouts(VOCABULARY, masks=MASKS):
        ids = torch.tensor([[*answer.prompt_ids, *answer.response_ids]])
        rows = slice(len(answer.prompt_ids) - 1, -1)
        with torch.no_grad():
            logits, teacher_logits = (model(ids).logits[0, rows] for model in (student_model, teacher_model))
        log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        losses += (-log_p[range(len(log_p)), list(answer.response_ids)]).tolist()
        entropies += (-log_p.exp() * log_p).sum(-1).tolist()
        log_p = logits[:, :VOCABULARY].log_softmax(-1)  # over the token ids of both models
        divergences += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    loss, entropy, divergence = (sum(values) / len(values) for values in (losses, entropies, divergences))
    return torch.tensor(loss).exp().item(), entropy, divergence


def measure_and_train(rank, student, teacher, overrides):
    """Return the measurement of a rank, and True if training gives the same losses without measuring."""

    def losses(measuring):
        run = make_run(student, teacher, *overrides, "optimizer.lr=0.01", rollouts=some_rollouts(VOCABULARY))
        config = run.inputs.config
        heads = run.heads
        if not config.loss.reads_output:
            heads = load_heads(run.inputs.model_inputs, run.student.stage, run.topology)
        with_teacher = has_teacher_distribution(run.teachers)
        models = MeasuredModels(
            run.student.stage,
            run.inputs.setup.student,
            run.topology,
            config.batch,
            teacher=run.teachers[0] if with_teacher else None,
            load_heads=lambda: heads if with_teacher else None,
        )
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
def test_measurements_equal_the_reference_in_every_layout_and_do_not_change_training(name, models):
    world, *overrides = LAYOUTS[name]
    paths = models["Qwen3Moe" if name == "experts" else "Qwen3"]
    perplexity, entropy, reverse_kl = reference(*paths)
    below = "layers=[1,2]" in "".join(overrides)
    results = run_distributed(world, measure_and_train, *paths, overrides)
    for measurement, unchanged in results:
        assert measurement == results[0][0]
        assert unchanged
        assert measurement.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert measurement.entropy == pytest.approx(entropy, rel=1e-5)
        if below:
            assert measurement.reverse_kl is None
        else:
            assert measurement.reverse_kl == pytest.approx(reverse_kl, rel=1e-5)
