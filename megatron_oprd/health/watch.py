"""The health watch of a run: the start model's own answers, read again and again by the student that learns.

Their perplexity, and what else `health/rule.py` goes by, tell a collapse that the objective does not see.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_oprd.config import Config
from megatron_oprd.data.prompts import PromptState, take
from megatron_oprd.data.sharding import split
from megatron_oprd.evaluation.grading import grade
from megatron_oprd.health.measure import can_be_asked, read_answers
from megatron_oprd.health.rule import Check, Health, HealthWarning, judge
from megatron_oprd.launch.assemble import Run, load_heads, rows_at_a_time
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.replay import load_replay, replay_record
from megatron_oprd.runtime.files import explain_os_errors, write_text
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.training.run_log import RunLog
from megatron_oprd.training.state import due
from megatron_oprd.types import Prompt, Rollout, UserError

ENOUGH_RIGHT = 8  # right answers, or a quarter of all: then only they are read


@dataclasses.dataclass(frozen=True)
class HealthWatch:
    """What a run reads and what it remembers; nothing where `health.every` is 0."""

    answers: tuple[Rollout, ...] = ()
    health: Health = dataclasses.field(default_factory=Health)


def begin(run: Run, log: RunLog) -> HealthWatch:
    """The watch of a run at step 0: the start model answers, and reads its answers. Collective over the world."""
    config = run.inputs.config
    if not config.health.every:
        return HealthWatch()
    prompts, limits = choose_prompts(run.inputs)
    given = answer(run, prompts, limits)
    answers, facts = on_rank_zero(lambda: keep_answers(run.inputs, prompts, given))
    watch = HealthWatch(tuple(answers))
    check = _measure(run, watch, 0)

    def write() -> None:
        log.check(dataclasses.asdict(check) | facts, check.metrics())
        right = "" if facts["right"] is None else f", {facts['right']} of {facts['graded']} right"
        read = f"; the {len(answers)} right ones are read" if facts["filtered"] else ""
        print(f"health: {facts['answers']} answers of the start model{right}{read}: {_told(check)}", flush=True)

    on_rank_zero(write)
    return dataclasses.replace(watch, health=Health().with_check(check, generates=_generates(config)))


def go_on(run: Run) -> HealthWatch:
    """The watch of a run that goes on, from the files of its folder. Collective over the world."""
    if not run.inputs.config.health.every:
        return HealthWatch()
    return on_rank_zero(lambda: read_watch(run.inputs))


def check_can_go_on(inputs: Inputs) -> None:
    """Raise UserError when a run that goes on is to be watched and lacks what the start model left. No
    communication."""
    every = inputs.config.health.every
    for path in (answers_file(inputs.run_dir), inputs.run_dir / "health" / "checks.jsonl") if every else ():
        if not path.exists():
            raise UserError(
                f"health.every={every}: {path} is missing, which the start model left at step 0; put it back, set "
                "health.every=0, or begin anew in another train.run_dir"
            )


def after_step(
    run: Run, log: RunLog, watch: HealthWatch, step: int, metrics: Mapping[str, float]
) -> tuple[HealthWatch, dict[str, float]]:
    """The watch after a training step with these `metrics`, and where a check is due what it measured. Collective over
    the world."""
    config = run.inputs.config
    if not config.health.every:
        return watch, {}
    watch = dataclasses.replace(watch, health=watch.health.with_step(metrics))
    if not due(step, config.health.every, config.train.steps):
        return watch, {}
    started = time.perf_counter()
    health = watch.health.with_check(_measure(run, watch, step), generates=_generates(config))
    check = health.checks[-1]
    on_rank_zero(lambda: log.check(dataclasses.asdict(check), {}))  # its curves are drawn with the step's
    watch = _judge(run, log, dataclasses.replace(watch, health=health), step)
    measured = {**check.metrics(), "health/warnings": float(len(watch.health.warnings))}
    return watch, measured | {"time/health": time.perf_counter() - started}


def after_evaluation(
    run: Run, log: RunLog, watch: HealthWatch, step: int, data: Mapping[str, Mapping[str, float]]
) -> HealthWatch:
    """The watch after an evaluation. Collective over the world."""
    if not run.inputs.config.health.every:
        return watch
    return _judge(run, log, dataclasses.replace(watch, health=watch.health.with_evaluation(data)), step)


def reason_to_stop(config: Config, watch: HealthWatch) -> str | None:
    """Why training ends before its last step; None: it does not."""
    if not (config.health.stop and watch.health.warnings):
        return None
    return f"stopped by health.stop=true: {watch.health.warnings[0].message}"


def answers_file(run_dir: Path) -> Path:
    """The answers that are read, as a replay file."""
    return run_dir / "health" / "answers.jsonl"


def choose_prompts(inputs: Inputs) -> tuple[list[Prompt], list[int]]:
    """What the start model is asked, and how long each answer may be to fit wherever it is read.

    Of `evaluation.data` where it is loaded, of `data.prompts` those that training takes last, or of a replay file the
    last prompts. Raises UserError when none leaves room for an answer. No communication.
    """
    config = inputs.config
    if inputs.prompts is None and inputs.evaluation_prompts is None:
        prompts = _replayed_prompts(inputs.replayed)
    else:
        chosen = inputs.evaluation_prompts or inputs.prompts
        assert chosen is not None
        shuffle = chosen is inputs.evaluation_prompts or config.data.shuffle
        prompts = chosen.prompts
        prompts, _ = take(prompts, PromptState(), len(prompts), seed=config.train.seed, shuffle=shuffle)
    most = min(
        inputs.student.max_position_embeddings,
        config.batch.max_tokens_per_micro_batch,
        *(teacher.spec.max_position_embeddings for teacher in inputs.teachers.values()),
    )
    room = [most - max(len(prompt.prompt_ids), len(prompt.teacher_prompt_ids or ())) for prompt in prompts]
    asked = [pair for pair in zip(prompts, room, strict=True) if pair[1] > 0][-config.health.prompts :]
    if not asked:
        raise UserError(
            f"health.every={config.health.every}: no prompt leaves room for an answer in {most} tokens (batch."
            "max_tokens_per_micro_batch and the positions of the models); raise it or set health.every=0"
        )
    return [prompt for prompt, _ in asked], [min(config.health.max_new_tokens, tokens) for _, tokens in asked]


def answer(run: Run, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[Rollout]:
    """The student's most likely answers, in the order of the prompts, on every rank. Collective over the world."""
    inputs, topology, stage = run.inputs, run.topology, run.student.stage
    longest = max(len(prompt.prompt_ids) + limit for prompt, limit in zip(prompts, limits, strict=True))
    engine = EmbeddedEngine(
        stage,
        inputs.student,
        topology,
        Sampling(temperature=0.0, max_new_tokens=inputs.config.health.max_new_tokens),
        seed=inputs.config.train.seed,
        max_batch=rows_at_a_time(inputs.student, topology, stage, longest),
        vocab_size=inputs.vocab_size,
    )
    my_prompts, my_limits = (split(all_, topology.replica_rank, topology.num_replicas) for all_ in (prompts, limits))
    answers = share_rollouts(engine.generate(my_prompts, 0, my_limits), topology)
    if inputs.aligner is None:
        return answers
    return [dataclasses.replace(one, teacher_prompt_ids=None) for one in answers]  # its prompts are no ids of ours


def keep_answers(
    inputs: Inputs, prompts: Sequence[Prompt], answers: Sequence[Rollout]
) -> tuple[list[Rollout], dict[str, Any]]:
    """The answers that are read from now on, and how many there were, `graded` and `right`; writes them to the run
    folder.

    Where enough are right only those are kept: a student that learns makes its wrong ones improbable, which is no harm.
    One rank calls it.
    """
    tokenizer, right = inputs.tokenizer, []
    known = [place for place, prompt in enumerate(prompts) if tokenizer and prompt.ground_truth is not None]
    if tokenizer:
        right = [place for place in known if grade(prompts[place], answers[place], tokenizer).correct]
    filtered = len(right) >= min(ENOUGH_RIGHT, len(answers) / 4)
    kept = right if filtered else range(len(answers))
    path = answers_file(inputs.run_dir)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(_replay_line(answers[place], prompts[place]) + "\n" for place in kept))
    facts = {"answers": len(answers), "graded": len(known), "right": len(right) if known else None}
    return [answers[place] for place in kept], facts | {"filtered": filtered}


def read_watch(inputs: Inputs) -> HealthWatch:
    """What the files of a run folder say up to where they end. No communication."""
    run_dir = inputs.run_dir
    checks, warnings, steps, evaluations = (
        _lines(run_dir / name)
        for name in ("health/checks.jsonl", "health/warnings.jsonl", "metrics.jsonl", "evaluations.jsonl")
    )
    names = [field.name for field in dataclasses.fields(Check)]
    health = Health(
        checks=tuple(Check(**{name: line[name] for name in names}) for line in checks),
        warnings=tuple(HealthWarning(**line) for line in warnings),
    )
    for line in steps:
        if line["step"] > checks[-1]["step"]:
            health = health.with_step(line)
    for line in evaluations:
        if line["name"] != "teacher":
            health = health.with_evaluation(line["data"])
    return HealthWatch(tuple(load_replay(answers_file(run_dir), inputs.student.vocab_size)), health)


def _measure(run: Run, watch: HealthWatch, step: int) -> Check:
    """Collective over the world."""
    inputs, teacher, heads = run.inputs, None, None
    if can_be_asked(run.teachers) and inputs.aligner is None:  # distributions over one vocabulary
        (teacher,) = run.teachers
        heads = run.heads if inputs.plan.output else load_heads(inputs, run.student.stage, run.topology)
    reading = read_answers(
        run.student.stage,
        inputs.student,
        run.topology,
        watch.answers,
        inputs.config.batch,
        teacher=teacher,
        heads=heads,
        pad_tokens=inputs.precision.pad_tokens,
    )
    return Check(step, **dataclasses.asdict(reading))


def _judge(run: Run, log: RunLog, watch: HealthWatch, step: int) -> HealthWatch:
    """Says what is new to warn of. Rank 0 judges for all, so that all end together. Collective over the world."""

    def warn() -> list[HealthWarning]:
        new = judge(watch.health, step, run.inputs.config)
        for warning in new:
            log.warning(dataclasses.asdict(warning))
        return new

    new = on_rank_zero(warn)
    return dataclasses.replace(watch, health=watch.health.with_warnings(new))


def _lines(path: Path) -> list[dict[str, Any]]:
    """None of a file that is not there: a run without a warning has no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _generates(config: Config) -> bool:
    return config.rollout.engine != "replay"


def _replayed_prompts(rollouts: Sequence[Rollout]) -> list[Prompt]:
    """What the rollouts answer, each once."""
    asked = {(r.prompt_ids, r.teacher_prompt_ids): r for r in rollouts}
    return [
        Prompt(number, r.prompt_ids, data_source=r.data_source, teacher_prompt_ids=r.teacher_prompt_ids)
        for number, r in enumerate(asked.values())
    ]


def _replay_line(answer: Rollout, prompt: Prompt) -> str:
    truth = {} if prompt.ground_truth is None else {"ground_truth": prompt.ground_truth}
    return json.dumps(replay_record(answer) | truth)


def _told(check: Check) -> str:
    kl = "" if check.reverse_kl is None else f", KL(student || teacher) {check.reverse_kl:.4g}"
    return f"perplexity {check.perplexity:.4g}, entropy {check.entropy:.4g}{kl}"
