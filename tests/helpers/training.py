"""One update of a tiny student by the package, and by Hugging Face's models under the float64 reference."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from megatron.core import parallel_state

from megatron_oprd import assemble
from megatron_oprd.assemble import Run, build_run
from megatron_oprd.config import Config, load_config
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.export import gather_hf_tensors
from megatron_oprd.hf.load import named_parameters, parameter_table
from megatron_oprd.inputs import Inputs
from megatron_oprd.layouts import plan_teacher
from megatron_oprd.models.layer_plan import LayerPlan, make_plan
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.train import one_step
from megatron_oprd.training import student as student_module
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import Rollout
from tests.helpers.output_reference import token_loss, token_metrics
from tests.helpers.reference import aggregate, oprd_loss, selected_indices

# A rate at which one step moves the weights by far more than a float32 rounding of them: the change is the gradient.
LEARNING_RATE = 1e4
LOSS_TOLERANCE = 1e-6
SETTINGS = (
    "train.run_dir=unused",
    "rollout.engine=replay",
    "rollout.path=unused",
    "rollout.samples_per_prompt=1",
    "precision.dtype=fp32",
    "optimizer.name=sgd",
    f"optimizer.lr={LEARNING_RATE}",
    "optimizer.schedule=constant",
    "optimizer.clip_grad=0",
    "train.steps=1",
    "batch.max_tokens_per_micro_batch=16",
)


# AdamW without memory or decay, under an epsilon far above any gradient: its step is the gradient too.
ADAM_EPSILON = 2.0**27
ADAMW = (
    "optimizer.name=adamw",
    "optimizer.betas=[0.0,0.0]",
    "optimizer.weight_decay=0",
    f"optimizer.lr={LEARNING_RATE * ADAM_EPSILON}",
)

# Response masks. Uneven lengths, an empty response, and one with tokens in between that the student did not sample.
SOME = ((1,) * 7, (), (1,), (1, 1, 0, 0, 1, 1, 1, 1, 0, 1), (1,) * 5)
FEW = ((1,) * 6, ())  # one sequence to learn from
MANY = (*SOME, *((1,) * (3 * number % 11) for number in range(1, 36)))  # several micro-batches on each of eight ranks


def some_rollouts(vocab_size: int, seed: int = 5, masks: Sequence[tuple[int, ...]] = SOME) -> list[Rollout]:
    """Random token ids under the given response masks, after prompts of one to five tokens."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for number, mask in enumerate(masks):
        prompt = torch.randint(0, vocab_size, (1 + number % 5,), generator=generator).tolist()
        response = torch.randint(0, vocab_size, (len(mask),), generator=generator).tolist()
        rollouts.append(Rollout(tuple(prompt), tuple(response), mask, "replay"))
    return rollouts


@dataclass(frozen=True)
class Update:
    """What one step did: the change over -lr of every Hugging Face tensor that moved, the loss and the norm.

    `magnitude`, of the reference: the loss with the absolute value of every token's term. It is larger where terms have
    both signs (`sampled`, `topk_surrogate`) and may nearly cancel; rounding goes by it, not by what they leave.
    """

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    magnitude: float | None = None


Teachers = Path | dict[str, Path]  # one, or several by the data_source that they teach


def make_config(student: Path, teacher: Teachers, *overrides: str) -> Config:
    named = {f"teachers.{name}": path for name, path in teacher.items()} if isinstance(teacher, dict) else {}
    paths = [f"{key}.path={path}" for key, path in (named or {"teacher": teacher}).items()]
    return load_config(None, [f"student.path={student}", *paths, *SETTINGS, *overrides])


def make_inputs(config: Config, rollouts: Sequence[Rollout]) -> Inputs:
    """What `read_inputs` makes of a replayed run, the rollouts given instead of read."""
    student = read_model_spec(config.student.path)
    teachers = {
        name: plan_teacher(config, student, read_model_spec(teacher.path), name)
        for name, teacher in config.named_teachers.items()
    }
    return Inputs(config, student, teachers, None, None, None, list(rollouts))


def megatron_update(
    rank: int, student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None
) -> Update:
    """One step of the package on this rank, from rollouts to the moved weights; the gradients, whole, on rank 0."""
    return update_of(make_run(student, teacher, *overrides, rollouts=rollouts))


def make_run(student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None) -> Run:
    """A run that has not stepped yet. Collective over the world."""
    rollouts = some_rollouts(read_model_spec(student).vocab_size) if rollouts is None else rollouts
    config = make_config(student, teacher, *overrides, f"rollout.prompts_per_step={len(rollouts)}")
    with _adam_epsilon() if config.optimizer.name == "adamw" else contextlib.nullcontext():
        return build_run(make_inputs(config, rollouts))


def update_of(run: Run) -> Update:
    """The first step of a run. Collective over the world."""
    parameters = named_parameters(run.student.stage)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _, metrics, _ = one_step(run, TrainState())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_((before[name] - parameter) / LEARNING_RATE)
    assert_copies_agree(parameters, run)
    changes = dict(gather_hf_tensors(run.student.stage, run.inputs.student, run.topology))
    return Update(metrics["loss"], metrics["grad_norm"], metrics, changes)


@contextlib.contextmanager
def groups_made_once() -> Iterator[None]:
    """Runs built inside share the process groups of equal layouts; their own would be dozens, with threads each."""
    made_once = functools.cache(assemble.build_topology)

    def build(*layout: Any) -> Topology:
        topology = made_once(*layout)
        vars(parallel_state).update(topology.megatron_state)  # in force, as a new one would be
        return topology

    with mock.patch.object(assemble, "build_topology", build):
        yield


@contextlib.contextmanager
def _adam_epsilon() -> Iterator[None]:
    """Optimizers built inside have ADAM_EPSILON, which no key of the configuration sets."""
    original = student_module.MegatronOptimizerConfig
    patched = functools.partial(original, adam_eps=ADAM_EPSILON)
    with mock.patch.object(student_module, "MegatronOptimizerConfig", patched):
        yield


def assert_copies_agree(parameters: dict[str, torch.Tensor], run: Run) -> None:
    """What several ranks hold is the same on all of them, bit for bit."""
    table, topology = parameter_table(run.inputs.student), run.topology
    mine = {}
    for name, parameter in parameters.items():
        entry = table[name]
        digest = hashlib.sha256(parameter.detach().float().contiguous().numpy().tobytes()).hexdigest()
        mine[entry.megatron, topology.tensor_rank if entry.cut else 0, digest] = topology.rank
    held = {}
    for of_rank in gather_objects(mine, torch.distributed.group.WORLD):
        for (name, shard, digest), rank in of_rank.items():
            first, owner = held.setdefault((name, shard), (digest, rank))
            assert digest == first, f"{name} differs between ranks {owner} and {rank}"


def reference_update(
    student: Path,
    teacher: Teachers,
    *overrides: str,
    rollouts: Sequence[Rollout] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Update:
    """The same step on Hugging Face's models in float64, one sequence at a time. With another `dtype` the models are in
    that one, for what rounding does to them."""
    config = make_config(student, teacher, *overrides)
    student_model = _open_model(student, dtype)
    for matrix in config.student.freeze:
        of_model = student_model.get_input_embeddings if matrix == "embedding" else student_model.get_output_embeddings
        of_model().weight.requires_grad_(False)
    plan, sequences, logits = _read(student_model, config, rollouts)
    loss = magnitude = torch.zeros((), dtype=torch.float64)
    if plan.pairs:
        loss = magnitude = _representation_loss(config, plan.student_layers, sequences)
    if plan.output:
        of_tokens = _of_tokens(token_loss, config, logits)
        loss = loss + _output_loss(config, of_tokens)
        magnitude = magnitude + _output_loss(config, [[abs(value) for value in values] for values in of_tokens])
    loss.backward()
    gradients = _by_checkpoint_name(student_model)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return Update(loss.item(), norm.item(), {}, gradients, magnitude.item())


def reference_metrics(
    student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None
) -> dict[str, float]:
    """The metrics of the output-space objective on the same models: means over the tokens that it reads."""
    config = make_config(student, teacher, *overrides)
    with torch.no_grad():
        _, _, logits = _read(_open_model(student), config, rollouts)
    every = [values for sequence in _of_tokens(token_metrics, config, logits) for values in sequence]
    return {f"output/{name}": sum(values[name] for values in every) / len(every) for name in every[0]}


def _read(
    student: transformers.PreTrainedModel, config: Config, rollouts: Sequence[Rollout] | None
) -> tuple[LayerPlan, list, list]:
    """What student and teachers make of each rollout: for the loss on hidden states, and for that on distributions the
    logits of both at the response tokens, up to the end of the shortest vocabulary."""
    named = config.named_teachers
    teachers = {name: _open_model(of.path, student.dtype) for name, of in named.items()}
    vocab_size = min(model.config.vocab_size for model in (student, *teachers.values()))
    sequences, logits = [], []
    for rollout in some_rollouts(student.config.vocab_size) if rollouts is None else rollouts:
        name = rollout.data_source if len(teachers) > 1 else next(iter(teachers))
        states, of_student = _states(student, rollout.prompt_ids, rollout, config)
        with torch.no_grad():
            prompt_ids = rollout.prompt_ids if rollout.teacher_prompt_ids is None else rollout.teacher_prompt_ids
            targets, of_teacher = _states(teachers[name], prompt_ids, rollout, config)
        plan = make_plan(config.loss, read_model_spec(config.student.path), read_model_spec(named[name].path))
        sequences.append(
            (states, {pair.student: targets[pair.teacher] for pair in plan.pairs}, 0, rollout.response_mask)
        )
        logits.append((of_student[:, :vocab_size], of_teacher[:, :vocab_size], rollout))
    return plan, sequences, logits


def _representation_loss(config: Config, layers: Sequence[int], sequences: list) -> torch.Tensor:
    term = config.loss.representation
    return term.weight * oprd_loss(
        [(layer, layer) for layer in layers],
        sequences,
        mode=term.positions,
        k=term.k,
        normalize=term.normalize,
        aggregation=term.aggregation,
        shift=0,
    )


def _output_loss(config: Config, of_tokens: list[list[torch.Tensor]]) -> torch.Tensor:
    term = config.loss.output
    return term.weight * aggregate([values for values in of_tokens if values], term.aggregation)


def _of_tokens(function: Callable[..., Any], config: Config, logits: list) -> list[list]:
    """What a function of both models' logits, the token and the objective makes of each token that is read."""
    term = config.loss.output
    per_sequence = []
    for of_student, of_teacher, rollout in logits:
        student, teacher = of_student / config.rollout.temperature, of_teacher / term.teacher_temperature
        chosen = selected_indices(rollout.response_mask, term.positions, term.positions_k)
        per_sequence.append([function(student[t], teacher[t], rollout.response_ids[t], term) for t in chosen])
    return per_sequence


def _open_model(path: str | Path, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    # The grouped products of experts know no float64.
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")


def _states(model, prompt_ids, rollout, config):
    """Of the response tokens: {layer: [response, hidden]} and the logits [response, vocabulary] that predicted them.
    Layer L before the final norm is what the norm is given."""
    before_norm = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    output = model(torch.tensor([prompt_ids + rollout.response_ids]), output_hidden_states=True)
    handle.remove()
    term, last = config.loss.representation, len(output.hidden_states) - 1
    start = len(prompt_ids)
    rows = slice(start + term.shift, start + term.shift + len(rollout.response_ids))
    states = {
        layer: (before_norm[0] if layer == last and not term.final_norm else output.hidden_states[layer])[0, rows]
        for layer in range(1, last + 1)
    }
    return states, output.logits[0, start - 1 : start - 1 + len(rollout.response_ids)]


def _by_checkpoint_name(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients under the names of the checkpoint, where every expert has tensors of its own."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        layer, expert_matrix, kind = name.partition(".experts.")
        if not expert_matrix:
            gradients[name] = gradient
            continue
        for expert, of_expert in enumerate(gradient):
            parts = of_expert.chunk(2) if kind == "gate_up_proj" else (of_expert,)
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for part, of_kind in zip(parts, kinds, strict=True):
                gradients[f"{layer}.experts.{expert}.{of_kind}.weight"] = part
    return gradients


@dataclass(frozen=True)
class Difference:
    """How far one update is from another, relative to the other; `parameter` is the one of the worst gradient."""

    loss: float
    grad_norm: float
    gradient: float  # infinite: a parameter that moved without a gradient, or is not there
    parameter: str
    cosine: float  # the smallest of a parameter

    def explain(self, tolerance: float = 1e-5) -> str | None:
        """The first thing that is too far off, or None."""
        if not self.loss <= LOSS_TOLERANCE:
            return f"loss: relative error {self.loss:.1e}"
        if not self.gradient <= tolerance:
            return f"{self.parameter}: relative error {self.gradient:.1e}"
        return None if self.grad_norm <= tolerance else f"gradient norm: relative error {self.grad_norm:.1e}"


def difference(actual: Update, expected: Update) -> Difference:
    """Between the update of rank 0 and the reference's. What has no gradient there must not have moved."""
    worst, parameter, cosine = -1.0, "", 1.0
    for name in sorted({*actual.gradients, *expected.gradients}):
        gradient, change = expected.gradients.get(name), actual.gradients.get(name)
        if gradient is None or not gradient.any():
            error = float("inf") if change is not None and change.any() else 0.0
        elif change is None or change.shape != gradient.shape:
            error = float("inf")
        else:
            change, scale = change.double(), gradient.norm()
            error = torch.nan_to_num((change - gradient).norm() / scale, nan=float("inf")).item()
            cosine = min(cosine, ((change * gradient).sum() / (change.norm() * scale).clamp_min(1e-300)).item())
        if error > worst:
            worst, parameter = error, name
    loss = (actual.loss - expected.loss) / (expected.magnitude or expected.loss)
    norm = (actual.grad_norm - expected.grad_norm) / expected.grad_norm
    return Difference(abs(loss), abs(norm), worst, parameter, cosine)


def assert_same_update(actual: Update, expected: Update, tolerance: float = 1e-5) -> None:
    """Loss, norm and every parameter's gradient, of the update of rank 0."""
    found = difference(actual, expected)
    assert found.explain(tolerance) is None, found
