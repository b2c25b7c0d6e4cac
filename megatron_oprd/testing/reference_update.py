"""Compute an update of Hugging Face's models in float64, one sequence at a time: the reference of an update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

from megatron_oprd.bridge.record import Bridge
from megatron_oprd.bridge.store import read_bridge
from megatron_oprd.config import Config, OutputConfig, RepresentationConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.layer_plan import LayerPlan, make_plan
from megatron_oprd.models.state_map import make_maps
from megatron_oprd.testing.output_reference import token_loss, token_metrics
from megatron_oprd.testing.reference import aggregate, flow_parts, oprd_loss, selected_indices
from megatron_oprd.testing.replayed_run import Teachers, make_config, some_rollouts
from megatron_oprd.testing.update import Update
from megatron_oprd.types import Rollout


def reference_update(
    student: Path,
    teacher: Teachers,
    *overrides: str,
    rollouts: Sequence[Rollout] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Update:
    """Return the update that a run with these arguments must make.

    Args:
        teacher: a Hugging Face folder, or several by the data_source that they teach.
        overrides: keys of the configuration, as for `make_config`.
        rollouts: those of the step; without them `some_rollouts`.
        dtype: of the models. Another dtype than float64 shows the effect of rounding.
    """
    config = make_config(student, teacher, *overrides)
    config = config.model_copy(update={"loss": config.loss.at(0)})
    student_model = _open_model(student, dtype)
    for matrix in config.student.freeze:
        of_model = student_model.get_input_embeddings if matrix == "embedding" else student_model.get_output_embeddings
        of_model().weight.requires_grad_(False)
    plan, sequences, logits = _run_models(student_model, config, rollouts)
    loss = magnitude = torch.zeros((), dtype=torch.float64)
    if plan.pairs:
        loss = magnitude = _representation_loss(config, plan.student_layers, sequences)
    if plan.flow:
        flow = _flow_loss(config, plan, rollouts, student_model)
        loss, magnitude = loss + flow, magnitude + flow
    if plan.output:
        of_tokens = _token_values(token_loss, config, logits)
        if config.loss.output.importance:
            of_tokens = _weighed_by_position(of_tokens, config, logits)
        loss = loss + _output_loss(config, of_tokens)
        magnitude = magnitude + _output_loss(config, [[abs(value) for value in values] for values in of_tokens])
    loss.backward()
    gradients = _by_checkpoint_name(student_model)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return Update(loss.item(), norm.item(), {}, gradients, magnitude.item())


def reference_metrics(
    student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None
) -> dict[str, float]:
    """Return the metrics `output/*` of the same step: means over the selected tokens."""
    config = make_config(student, teacher, *overrides)
    with torch.no_grad():
        _, _, logits = _run_models(_open_model(student), config, rollouts)
    every = [values for sequence in _token_values(token_metrics, config, logits) for values in sequence]
    return {f"output/{name}": sum(values[name] for values in every) / len(every) for name in every[0]}


def reference_map_gradients(
    student: Path, teacher: Path, *overrides: str, rollouts: Sequence[Rollout] | None = None
) -> dict[tuple[int, str], torch.Tensor]:
    """Return the gradient of the loss on hidden states by each trained matrix: {(student layer, name): gradient}.

    The matrices are the bridge's student maps P_S, with the name `map`, or those of a map of full width.
    """
    config, bridge, state_maps = make_config(student, teacher, *overrides), None, None
    if config.loss.representation.has_map:
        state_maps = _state_maps(config)
        matrices = {(layer, name): one for layer, of_layer in state_maps.items() for name, one in of_layer.items()}
    else:
        bridge = read_bridge(config.loss.representation.bridge)
        maps = {
            pair: dataclasses.replace(one, student_map=one.student_map.double().requires_grad_())
            for pair, one in bridge.maps.items()
        }
        bridge = dataclasses.replace(bridge, maps=maps)
    plan, sequences, _ = _run_models(_open_model(student), config, rollouts, bridge, state_maps)
    if bridge is not None:  # a bridge can have maps of other pairs too
        matrices = {(pair.student, "map"): bridge.maps[pair].student_map for pair in plan.pairs}
    _representation_loss(config, plan.student_layers, sequences).backward()
    return {key: matrix.grad for key, matrix in matrices.items()}


StateMaps = dict[int, dict[str, torch.Tensor]]  # by student layer, the matrices of a map of full width by name


def _state_maps(config: Config) -> StateMaps:
    """Return the initial matrices of the maps of full width in float64, with gradients."""
    student, teacher = (read_model_spec(folder) for folder in (config.student.path, config.teacher.path))
    layers = make_plan(config.loss, student, teacher).student_layers
    widths = student.hidden_size, teacher.hidden_size
    maps = make_maps(config.loss.representation.map, layers, widths, config.train.seed, torch.device("cpu"))
    return {
        layer: {name: matrix.double().requires_grad_() for name, matrix in one.parameters.items()}
        for layer, one in maps.items()
    }


def _mapped(states: torch.Tensor, matrices: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return M(states): one matrix, or two with the exact GELU between them."""
    if "map" in matrices:
        return states @ matrices["map"].to(states.dtype).T
    first, second = (matrices[name].to(states.dtype) for name in ("first", "second"))
    return torch.nn.functional.gelu(states @ first.T) @ second.T


def _run_models(
    student: transformers.PreTrainedModel,
    config: Config,
    rollouts: Sequence[Rollout] | None,
    bridge: Bridge | None = None,
    state_maps: StateMaps | None = None,
) -> tuple[LayerPlan, list, list]:
    """Run student and teachers on each rollout.

    Returns the layer plan, the arguments of `oprd_loss` for each rollout, and for each rollout the logits of student
    and teacher at the response tokens, cut to the smallest vocabulary. `bridge` and `state_maps` replace those of the
    configuration.
    """
    if state_maps is None and config.loss.representation.has_map:
        state_maps = _state_maps(config)
    if bridge is None and config.loss.representation.bridge:
        bridge = read_bridge(config.loss.representation.bridge)
    named = config.named_teachers
    teachers = dict(zip(named, _teachers(config, student), strict=True))
    bases = {
        name: _open_model(of.base.path, student.dtype)
        for name, of in named.items()
        if of.base is not None and of.extrapolates
    }
    vocab_size = min(model.config.vocab_size for model in (student, *teachers.values()))
    spec = read_model_spec(config.student.path)
    plans = {name: make_plan(config.loss, spec, read_model_spec(of.path)) for name, of in named.items()}
    sequences, logits = [], []
    for rollout in some_rollouts(student.config.vocab_size) if rollouts is None else rollouts:
        name = rollout.data_source if len(teachers) > 1 else next(iter(teachers))
        token_ids = rollout.prompt_ids + rollout.response_ids
        states, of_student = _states(student, token_ids, len(rollout.prompt_ids), config)
        with torch.no_grad():
            prompt_ids = rollout.prompt_ids if rollout.teacher_prompt_ids is None else rollout.teacher_prompt_ids
            read = rollout.response_ids if rollout.alignment is None else rollout.alignment.teacher_ids
            targets, of_teacher = _states(teachers[name], prompt_ids + read, len(prompt_ids), config)
            if name in bases:
                of_base, base_logits = _states(bases[name], prompt_ids + read, len(prompt_ids), config)
                share = named[name].base.extrapolate
                if named[name].base.space != "output":
                    targets = {layer: share * state + (1 - share) * of_base[layer] for layer, state in targets.items()}
                if named[name].base.space != "representation":
                    of_teacher = share * of_teacher + (1 - share) * base_logits
        plan = plans[name]
        targets = {pair.student: targets[pair.teacher] for pair in plan.pairs}
        if bridge is not None:
            states, targets = _bridged(states, targets, plan, bridge)
        mask = rollout.response_mask
        if rollout.alignment is not None:
            states, targets, mask = _paired_states(rollout, states, targets, config)
        sequences.append((states, targets, 0, mask))
        logits.append((of_student[:, :vocab_size], of_teacher[:, :vocab_size], rollout))
    if config.loss.representation.map.init == "closed_form":
        state_maps = {layer: {"map": _ridge_regression(config, layer, sequences)} for layer in plan.student_layers}
    if state_maps is not None:
        sequences = [
            ({layer: _mapped(states[layer], state_maps[layer]) for layer in plan.student_layers}, *rest)
            for states, *rest in sequences
        ]
    return plan, sequences, logits


def _teachers(config: Config, student: transformers.PreTrainedModel) -> list[transformers.PreTrainedModel]:
    """Return the teachers. One that follows the student has followed the student's weights once."""
    teachers = []
    for of in config.named_teachers.values():
        teacher = _open_model(of.path, student.dtype)
        if of.ema is not None:
            with torch.no_grad():
                for own, followed in zip(teacher.parameters(), student.parameters(), strict=True):
                    own.mul_(of.ema).add_((1 - of.ema) * followed)
        teachers.append(teacher)
    return teachers


def _bridged(states: dict, targets: dict, plan: LayerPlan, bridge: Bridge) -> tuple[dict, dict]:
    """Map both models' states to the r dimensions of the bridge, equations (12) and (13) of OPRD, by student layer."""
    maps = {pair.student: bridge.maps[pair] for pair in plan.pairs}
    dtype = next(iter(states.values())).dtype
    of_student = {layer: states[layer] @ one.student_map.to(dtype).T for layer, one in maps.items()}
    of_teacher = {
        layer: (targets[layer] - one.teacher_mean.to(dtype)) @ one.teacher_map.to(dtype).T
        for layer, one in maps.items()
    }
    return of_student, of_teacher


def _paired_states(rollout, states, targets, config):
    """Return only the states that the alignment of two tokenizers pairs, in one order, with a response mask of ones."""
    term, alignment = config.loss.representation, rollout.alignment
    partner = {-1: -1} | dict(zip(alignment.student_positions, alignment.teacher_positions, strict=True))
    chosen = selected_indices(rollout.response_mask, term.positions, term.k)
    met = [(t, partner[t + term.shift] - term.shift) for t in chosen if t + term.shift in partner]
    of_student = {layer: state[[t for t, _ in met]] for layer, state in states.items()}
    of_teacher = {layer: state[[u for _, u in met]] for layer, state in targets.items()}
    return of_student, of_teacher, (1,) * len(met)


def _representation_loss(config: Config, layers: Sequence[int], sequences: list) -> torch.Tensor:
    term = config.loss.representation
    # The states of `sequences` are those at the shifted positions already.
    unshifted = term.model_copy(update={"shift": 0})
    if term.layer_weights == "equal":
        return term.weight * oprd_loss([(layer, layer) for layer in layers], sequences, unshifted)
    factors = term.layer_weights
    if factors == "inverse_square":
        factors = [1 / _mean_square(layer, sequences, unshifted) for layer in layers]
    losses = [f * oprd_loss([(layer, layer)], sequences, unshifted) for f, layer in zip(factors, layers, strict=True)]
    return term.weight * sum(losses) / len(layers)


def _flow_loss(
    config: Config, plan: LayerPlan, rollouts: Sequence[Rollout] | None, student: transformers.PreTrainedModel
) -> torch.Tensor:
    """Return the weighted loss on hidden flow. One teacher with the student's tokens."""
    (teacher,), sequences, pairs = _teachers(config, student), [], [(one.student, one.teacher) for one in plan.flow]
    term = config.loss.representation.model_copy(update={"shift": 0})
    at_token = config.model_copy(update={"loss": config.loss.model_copy(update={"representation": term})})
    for rollout in some_rollouts(student.config.vocab_size) if rollouts is None else rollouts:
        prompt_ids = rollout.prompt_ids if rollout.teacher_prompt_ids is None else rollout.teacher_prompt_ids
        of_student, _ = _states(student, rollout.prompt_ids + rollout.response_ids, len(rollout.prompt_ids), at_token)
        with torch.no_grad():
            of_teacher, _ = _states(teacher, prompt_ids + rollout.response_ids, len(prompt_ids), at_token)
        sequences.append((of_student, of_teacher, rollout.response_mask))
    flow = config.loss.flow
    direction, geometry, adjacent = flow_parts(pairs, sequences, flow.positions)
    return flow.weight * (flow.direction * direction + flow.geometry * geometry + flow.adjacent * adjacent)


def _ridge_regression(config: Config, layer: int, sequences: list) -> torch.Tensor:
    """Return the matrix [d_T, d_S] of `bridge/fitting/map_start.py`, by least squares with a row for each penalty."""
    term = config.loss.representation
    rows = [
        (states[layer][t].detach(), targets[layer][t])
        for states, targets, _, mask in sequences
        for t in selected_indices(mask, term.positions, term.k)
    ]
    x, y = (torch.stack(side).double() for side in zip(*rows, strict=True))
    if term.normalize == "l2":
        y = y / y.norm(dim=1, keepdim=True)
    width = x.shape[1]
    ridge = (1e-3 / width * x.square().sum()).sqrt() * torch.eye(width, dtype=torch.float64)
    none = torch.zeros(width, y.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([y, none])).solution.T


def _mean_square(layer: int, sequences: list, term: RepresentationConfig) -> float:
    """Return the mean square of the teacher's states at the selected tokens of all sequences."""
    squares = [
        teacher[layer][prompt_length + t].double().square().mean().item()
        for _, teacher, prompt_length, mask in sequences
        for t in selected_indices(mask, term.positions, term.k)
    ]
    return sum(squares) / len(squares)


def _output_loss(config: Config, of_tokens: list[list[torch.Tensor]]) -> torch.Tensor:
    term = config.loss.output
    return term.weight * aggregate([values for values in of_tokens if values], term.aggregation)


def _token_values(function: Callable[..., Any], config: Config, logits: list) -> list[list]:
    """Return `function(student_logits, teacher_logits, token_id, objective)` for each selected token, by rollout."""
    term = config.loss.output
    per_sequence = []
    for of_student, of_teacher, rollout in logits:
        student, teacher = of_student / config.rollout.temperature, of_teacher / term.teacher_temperature
        chosen = selected_indices(rollout.response_mask, term.positions, term.positions_k)
        per_sequence.append([function(student[t], teacher[t], rollout.response_ids[t], term) for t in chosen])
    return per_sequence


def _weighed_by_position(of_tokens: list[list[torch.Tensor]], config: Config, logits: list) -> list[list[torch.Tensor]]:
    """Return the losses of tokens times 1 + importance (1 - disagreement before the token / that of the response)."""
    weighed = []
    for values, gaps in zip(of_tokens, _token_values(_disagreement, config, logits), strict=True):
        shares = (sum(gaps[:t]) / (sum(gaps) + 1e-8) for t in range(len(gaps)))
        weighed.append([(1 + config.loss.output.importance * (1 - s)) * v for s, v in zip(shares, values, strict=True)])
    return weighed


def _disagreement(student: torch.Tensor, teacher: torch.Tensor, token_id: int, _: OutputConfig) -> float:
    """Return |log q - log p| of a sampled token."""
    log_p, log_q = (logits.detach().double().log_softmax(-1)[token_id].item() for logits in (student, teacher))
    return abs(log_q - log_p)


def _open_model(path: str | Path, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    # The grouped matrix products of experts do not support float64.
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")


def _states(model, ids, start, config):
    """Return the response tokens' states {layer: [response, hidden]} and their logits [response, vocabulary].

    With `final_norm=false` the last layer's states are the input of the final norm. With shift -1 the states have one
    more row, at the last token.
    """
    before_norm = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    with _StayInFloat64():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    handle.remove()
    term, last = config.loss.representation, len(output.hidden_states) - 1
    rows = slice(start + term.shift, None)
    states = {
        layer: (before_norm[0] if layer == last and not term.final_norm else output.hidden_states[layer])[0, rows]
        for layer in range(1, last + 1)
    }
    return states, output.logits[0, start - 1 : -1]


class _StayInFloat64(TorchFunctionMode):
    """Leave float64 tensors in float64 where the models of transformers ask for float32 (norms, Gated DeltaNet)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _by_checkpoint_name(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the gradients by the names of a checkpoint, in which every expert has its own tensors."""
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
