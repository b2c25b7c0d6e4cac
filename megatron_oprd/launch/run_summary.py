"""The lines that a run prints before its first step: what it trains on what, how, and where its files go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_oprd.config import Config, OutputConfig, RepresentationConfig, ScheduleConfig, teacher_title
from megatron_oprd.hf.names import count_parameters
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.runtime.readable import count

OBJECTIVES = {
    "sampled": "reverse KL on the sampled tokens",
    "topk_surrogate": "surrogate of reverse KL on the top {k} tokens",
    "topk_kl": "KL on the top {k} tokens",
    "full_kl": "KL over the vocabulary",
}
EXTRAPOLATED = {"representation": "targets", "output": "the teacher's logits", "both": "targets and logits"}


def run_summary(inputs: Inputs, machine: str) -> list[str]:
    """Return the lines, each with a heading. `machine`: versions, device and layout in words."""
    return [f"{heading:<10} {text}" for heading, text in _facts(inputs, machine)]


def plan_facts(inputs: Inputs) -> list[tuple[str, str]]:
    """Return what a run would train on what: headings and texts. Inputs that do not exist yet are left out."""
    left_out = ("tokenizer", "precision", "machine", "files", *(("prompts",) if inputs.missing.prompts else ()))
    facts = [fact for fact in _facts(inputs, "") if fact[0] not in left_out]
    for name, teacher in inputs.setup.teachers.items():
        plan = teacher.plan
        place = "on the ranks that compare them" if plan.aligned else "in its own layout, then sent to the student's"
        head = ", and the LM head on the student's last stage" if plan.output else ""
        layers = f"{teacher_title(name)} up to layer {sum(plan.teacher_stages)} of {plan.teacher_depth}{head}"
        facts.append(("built", f"{layers}; its hidden states are computed {place}"))
    return facts


def _facts(inputs: Inputs, machine: str) -> Iterator[tuple[str, str]]:
    config, setup = inputs.config, inputs.setup
    yield "student", f"{config.student.path} ({_model(setup.student)})"
    for name, teacher in setup.teachers.items():
        yield teacher_title(name), f"{teacher.config.path} ({_model(teacher.spec)}{_own_layout(teacher)})"
        if teacher.config.follows_student:
            yield "average", f"after each update the teacher is {teacher.config.ema:g} x teacher + the rest x student"
        if teacher.config.base is not None and teacher.config.extrapolates:
            base = teacher.config.base
            what = EXTRAPOLATED[base.space]
            yield "base", f"{base.path}; {what} are base + {base.extrapolate:g} x (teacher - base)"
    if inputs.tokenizer is not None:
        other = "the teacher's is another one" if inputs.aligner else "all models read its token ids"
        yield "tokenizer", f"{len(inputs.tokenizer):,} tokens, of the student; {other}"
    for name, teacher in setup.teachers.items() if config.loss.reads_layers else ():
        yield f"layers{f' {name}' if name else ''}", pairs_in_words(teacher.plan)
    if config.loss.reads_layers:
        yield "loss", _representation(config.loss.representation)
    if config.loss.reads_flow:
        flow = config.loss.flow
        yield "loss", f"{flow.weight:g} x hidden flow at up to {flow.positions} positions of a response"
    if config.loss.reads_output:
        yield "loss", _output(config.loss.output)
    if config.loss.schedule is not None:
        yield "schedule", _schedule(config.loss.schedule)
    if inputs.prompts is not None:
        yield "prompts", inputs.prompts.summary()
    if inputs.evaluation_prompts is not None:
        summary = inputs.evaluation_prompts.evaluation_summary(inputs.prompts)
        yield "evaluation", f"every {config.evaluation.every} steps{_measured(inputs)}; {summary}"
    if inputs.end_tokens is not None:
        yield "answers", f"end with {inputs.end_tokens.summary()}"
    yield "step", _step(config)
    yield "optimizer", _optimizer(config)
    yield "precision", f"{config.precision.dtype} weights and activations"
    yield "machine", machine
    yield "files", _files(config)


def pairs_in_words(plan: LayerPlan) -> str:
    """Return the compared layers like `student 4, 8, 12 of 12 from teacher 8, 16, 24 of 24`."""
    students, teachers = ([getattr(pair, of) for pair in plan.pairs] for of in ("student", "teacher"))
    text = f"student {_numbers(students)} of {plan.student_depth} from teacher {_numbers(teachers)} of "
    text += str(plan.teacher_depth)
    return f"{text}; layer {plan.student_depth} after the final norm" if plan.student_normed_layer else text


def _numbers(layers: Sequence[int]) -> str:
    """Return layer numbers as text: consecutive ones as a range, more than twelve with the middle left out."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    shown = [*map(str, layers)] if len(layers) <= 12 else [*map(str, layers[:5]), "...", *map(str, layers[-2:])]
    return ", ".join(shown)


def _model(spec: ModelSpec) -> str:
    experts = f", {spec.num_experts} experts" if spec.num_experts else ""
    size = f"{count(count_parameters(spec))} parameters, {spec.num_layers} layers of width {spec.hidden_size:,}"
    return f"{spec.architecture.removesuffix('ForCausalLM')}, {size}{experts}"


def _own_layout(teacher: PlannedTeacher) -> str:
    layout = teacher.layout
    return f"; tensor {layout.tensor} x pipeline {layout.pipeline} of its own" if layout is not None else ""


def _representation(loss: RepresentationConfig) -> str:
    error = "squared error of hidden states" + (" scaled to length 1" if loss.normalize == "l2" else "")
    maps = f", mapped by {loss.bridge}" if loss.bridge else ""
    if loss.has_map:
        maps = f", mapped to the teacher's width by a trained {loss.map.kind} map"
        maps += " that starts as a ridge regression" if loss.map.init == "closed_form" else ""
    if loss.layer_weights == "inverse_square":
        maps += ", each layer divided by the teacher's mean square"
    elif loss.layer_weights != "equal":
        maps += f", layers times {', '.join(f'{factor:g}' for factor in loss.layer_weights)}"
    return f"{error}{maps}, at {_positions(loss.positions, loss.k)}, weight {loss.weight:g}"


def _output(loss: OutputConfig) -> str:
    direction = "" if loss.direction == "reverse" or loss.objective == "sampled" else f", {loss.direction}"
    objective = OBJECTIVES[loss.objective].format(k=loss.k)
    if loss.importance:
        objective += f", weighed by position with importance {loss.importance:g}"
    where = _positions(loss.positions, loss.positions_k)
    return f"{objective} (loss.output.objective={loss.objective}{direction}), at {where}, weight {loss.weight:g}"


def _schedule(schedule: ScheduleConfig) -> str:
    """Return the multipliers at the points like `hidden states 1 after 0 updates, 0 after 10; distributions 1`."""
    terms = {"hidden states": schedule.representation, "distributions": schedule.output}
    points = {
        name: ", ".join(f"{value:g} after {step} updates" for step, value in term) for name, term in terms.items()
    }
    return "weights are multiplied: " + "; ".join(f"{name} by {text}" for name, text in points.items())


def _positions(positions: str, k: int) -> str:
    return {
        "all": "all response tokens",
        "last": "the last response token",
        "last_k": f"the last {k:,} response tokens",
        "first_k": f"the first {k:,} response tokens",
    }[positions]


def _measured(inputs: Inputs) -> str:
    evaluation = inputs.config.evaluation
    count = evaluation.samples
    answers = [f"{count} answer{'s' * (count != 1)} of the student to each prompt"] if count else []
    answers += ["the teacher's answers"] if inputs.teacher_answers else []
    text = f": {' and '.join(answers)}, up to {inputs.config.evaluation_tokens:,} new tokens"
    text += f", best checkpoint by {evaluation.best}" if evaluation.best else ""
    return text + (f", end after {evaluation.patience} without a better one" if evaluation.patience else "")


def _step(config: Config) -> str:
    rollout = config.rollout
    rollouts = rollout.prompts_per_step * rollout.samples_per_prompt
    size = f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples"
    kinds = {"replay": "stored rollouts", "vllm": "rollouts from vLLM"}
    what = kinds.get(rollout.engine, "rollouts of the student")
    longest = f", up to {rollout.max_new_tokens:,} new tokens" if rollout.generates else ""
    batches = f"micro-batches of up to {config.batch.max_tokens_per_micro_batch:,} tokens"
    return f"{size} = {rollouts} {what}{longest}; {batches}"


def _optimizer(config: Config) -> str:
    optimizer = config.optimizer
    warmup = f" after {optimizer.warmup_fraction:.0%} warm-up" if optimizer.warmup_fraction else ""
    rate = f"learning rate {optimizer.lr:g}, {optimizer.schedule}{warmup}"
    return f"{optimizer.name}, {rate}; {config.train.steps:,} steps"


def _files(config: Config) -> str:
    every = f" every {config.checkpoint.every} steps" if config.checkpoint.every else " on a signal"
    export = ", the student in hf/ at the end" if config.checkpoint.export_hf else ""
    return f"{config.train.run_dir}: metrics.jsonl, report.html, checkpoints/{every}{export}"
