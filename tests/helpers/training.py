"""One update of a tiny student by the package, and by Hugging Face's models under the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from megatron_oprd.config import Config, load_config
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.convert import from_megatron, unshard
from megatron_oprd.hf.load import global_name, parameter_table
from megatron_oprd.models.build import DTYPES, build_model
from megatron_oprd.models.layer_plan import make_plan
from megatron_oprd.models.weights import load_weights
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.platform import choose_device
from megatron_oprd.training.global_batch import pack_global_batch
from megatron_oprd.training.student import build_student
from megatron_oprd.training.student_step import student_step
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import Rollout
from tests.helpers.reference import oprd_loss

# A rate at which one step moves the weights by far more than a float32 rounding of them: the change is the gradient.
LEARNING_RATE = 1e4
SETTINGS = (
    "train.run_dir=unused",
    "rollout.engine=replay",
    "rollout.path=unused",
    "precision.dtype=fp32",
    "optimizer.name=sgd",
    f"optimizer.lr={LEARNING_RATE}",
    "optimizer.schedule=constant",
    "optimizer.clip_grad=0",
    "train.steps=1",
    "batch.max_tokens_per_micro_batch=16",
)


def some_rollouts(vocab_size: int, seed: int = 5) -> list[Rollout]:
    """Uneven lengths, an empty response, and one with tokens in between that the student did not sample."""
    generator = torch.Generator().manual_seed(seed)
    masks = [(1,) * 7, (), (1,), (1, 1, 0, 0, 1, 1, 1, 1, 0, 1), (1,) * 5]
    rollouts = []
    for number, mask in enumerate(masks):
        prompt = torch.randint(0, vocab_size, (1 + number,), generator=generator).tolist()
        response = torch.randint(0, vocab_size, (len(mask),), generator=generator).tolist()
        rollouts.append(Rollout(tuple(prompt), tuple(response), mask, "replay"))
    return rollouts


@dataclass(frozen=True)
class Update:
    """What one step did: the change over -lr of every Hugging Face tensor that moved, the loss and the norm."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]


def make_config(student: Path, teacher: Path, *overrides: str) -> Config:
    return load_config(None, [f"student.path={student}", f"teacher.path={teacher}", *SETTINGS, *overrides])


def megatron_update(rank: int, student: Path, teacher: Path, *overrides: str) -> Update:
    """One step of the package on this rank; the gradients, whole, on every rank."""
    config = make_config(student, teacher, *overrides)
    device = choose_device(config.train.device)
    start_process(device)
    topology = build_topology(config.parallel, device, seed=0)
    student_spec, teacher_spec = read_model_spec(student), read_model_spec(teacher)
    representation = config.loss.representation
    plan = make_plan(representation, student_spec, teacher_spec, config.parallel.pipeline)
    dtype = DTYPES[config.precision.dtype]
    model = build_model(student_spec, topology, dtype, stages=plan.student_stages, recompute=config.recompute)
    load_weights(model, student, student_spec, topology)
    frozen = build_model(
        teacher_spec,
        topology,
        dtype,
        stages=plan.teacher_stages,
        lm_head=False,
        final_norm=plan.teacher_normed_layer is not None,
    ).eval()
    load_weights(frozen, teacher, teacher_spec, topology)
    trained = build_student(model, config, plan)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mine = some_rollouts(student_spec.vocab_size)[topology.data_rank :: topology.data_size]
    batches, counts = pack_global_batch(mine, representation, topology, config.batch.max_tokens_per_micro_batch)
    targets = teacher_pass(frozen, topology, plan, batches)
    report = student_step(trained, topology, plan, representation, batches, targets, counts)
    changes = {
        global_name(name, model.first_layer): (before[name] - parameter.detach()) / LEARNING_RATE
        for name, parameter in model.named_parameters()
    }
    return Update(report.loss, report.grad_norm, report.metrics, _whole(changes, student_spec, topology))


def _whole(changes, spec, topology):
    """Hugging Face tensors from the shards of all tensor ranks and the stages of all pipeline ranks."""
    table = parameter_table(spec)
    shards = gather_objects(changes, topology.groups.tp)
    tensors: dict[str, torch.Tensor] = {}
    for name in changes:
        whole = unshard(table[name], [shard[name] for shard in shards])
        tensors |= from_megatron(table[name], whole, spec)
    merged: dict[str, torch.Tensor] = {}
    for stage in gather_objects(tensors, topology.groups.pp):
        merged |= {name: tensor for name, tensor in stage.items() if name not in merged}
    return merged


def reference_update(student: Path, teacher: Path, *overrides: str) -> Update:
    """The same step on Hugging Face's models in float64, one sequence at a time."""
    config = make_config(student, teacher, *overrides).loss.representation
    student_model, teacher_model = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (student, teacher)
    )
    plan = make_plan(config, read_model_spec(student), read_model_spec(teacher))
    sequences = []
    for rollout in some_rollouts(student_model.config.vocab_size):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        states = _states(student_model, ids, config.final_norm)
        with torch.no_grad():
            targets = _states(teacher_model, ids, config.final_norm)
        sequences.append((states, targets, len(rollout.prompt_ids), rollout.response_mask))
    loss = config.weight * oprd_loss(
        [(pair.student, pair.teacher) for pair in plan.pairs],
        sequences,
        mode=config.positions,
        k=config.k,
        normalize=config.normalize,
        aggregation=config.aggregation,
        shift=config.shift,
    )
    loss.backward()
    gradients = {name: p.grad for name, p in student_model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return Update(loss.item(), norm.item(), {}, gradients)


def _states(model, ids, final_norm):
    """{layer: [tokens, hidden]}; layer L before the final norm is what the norm is given."""
    before_norm = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    states = model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    last = len(states) - 1
    return {
        layer: (before_norm[0] if layer == last and not final_norm else states[layer])[0]
        for layer in range(1, last + 1)
    }


def assert_same_update(actual: Update, expected: Update, tolerance: float = 1e-5) -> None:
    """Loss, norm and every parameter's gradient; what has no gradient in the reference must not have moved."""
    assert abs(actual.loss - expected.loss) <= 1e-6 * expected.loss, (actual.loss, expected.loss)
    assert abs(actual.grad_norm - expected.grad_norm) <= tolerance * expected.grad_norm
    for name, change in actual.gradients.items():
        gradient = expected.gradients.get(name)
        if gradient is None or not gradient.any():
            assert not change.any(), f"{name} moved without a gradient"
            continue
        error = ((change.double() - gradient).norm() / gradient.norm()).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
