"""Perplexity, entropy and KL of given answers are those of transformers in float64, in every layout, and reading them
leaves training as it is."""

import pytest
import torch
import transformers

from megatron_oprd.health.measure import can_be_asked, read_answers
from megatron_oprd.launch.assemble import load_heads
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from tests.helpers.distributed import run_distributed
from tests.helpers.models import random_hf_model, save
from tests.helpers.training import make_run, some_rollouts

VOCABULARY = 131  # of the teacher; no multiple of any layout
MASKS = ((1,) * 9, (1,), (1,) * 4, (1,) * 12, (1,) * 2, (1,) * 7)
LAYERS = 4
# The processes, and the settings; hidden states alone where an objective on distributions is not named.
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
    """Student and teacher of each family, the student with a longer vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": LAYERS, "num_key_value_heads": 4}

    def model(family, name, seed, vocabulary):
        return save(random_hf_model(family, seed, vocab_size=vocabulary, **sizes), folder / f"{family}-{name}")

    return {
        family: (model(family, "student", 0, VOCABULARY + 6), model(family, "teacher", 1, VOCABULARY))
        for family in ("Qwen3", "Qwen3Moe")
    }


def reference(student, teacher):
    """exp of the mean negative log-likelihood, mean entropy and mean KL, one answer at a time, in float64."""
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
        log_p = logits[:, :VOCABULARY].log_softmax(-1)  # of what both know
        divergences += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    loss, entropy, divergence = (sum(values) / len(values) for values in (losses, entropies, divergences))
    return torch.tensor(loss).exp().item(), entropy, divergence


def read(rank, student, teacher, overrides):
    """What a rank reads, and the losses of steps with readings in between and without."""

    def losses(reading):
        run = make_run(student, teacher, *overrides, "optimizer.lr=0.01", rollouts=some_rollouts(VOCABULARY))
        config = run.inputs.config
        heads = run.heads if config.loss.reads_output else load_heads(run.inputs, run.student.stage, run.topology)
        asked = can_be_asked(run.teachers)
        state, found, values = TrainState(), None, []
        for _ in range(2):
            if reading:
                now = read_answers(
                    run.student.stage,
                    run.inputs.student,
                    run.topology,
                    some_rollouts(VOCABULARY, masks=MASKS),
                    config.batch,
                    teacher=run.teachers[0] if asked else None,
                    heads=heads if asked else None,
                )
                found = found or now
            # A replayed step 0 twice: the weights differ.
            _, metrics, _ = one_step(run, state)
            values.append((metrics["loss"], metrics["grad_norm"]))
        return found, values

    (found, watched), (_, alone) = losses(True), losses(False)
    return found, watched == alone


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_read_alike_in_every_layout(name, models):
    world, *overrides = LAYOUTS[name]
    paths = models["Qwen3Moe" if name == "experts" else "Qwen3"]
    perplexity, entropy, reverse_kl = reference(*paths)
    below = "layers=[1,2]" in "".join(overrides)
    results = run_distributed(world, read, *paths, overrides)
    for reading, unmoved in results:
        assert reading == results[0][0]
        assert unmoved
        assert reading.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert reading.entropy == pytest.approx(entropy, rel=1e-5)
        if below:
            assert reading.reverse_kl is None
        else:
            assert reading.reverse_kl == pytest.approx(reverse_kl, rel=1e-5)
