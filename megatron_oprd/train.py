"""On-policy representation distillation: from two checkpoints and prompts to a distilled one.

torchrun -m megatron_oprd.train --config F [a.b=1 ...]
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial

from megatron_oprd.config import Config, load_config
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command

STOPPED = 3  # the exit code of a run that the health watch ended
PARSER = command_parser("train", "On-policy representation distillation (OPRD).", override="parallel.tensor=2")
PARSER.add_argument("--dry-run", action="store_true", help="print what would run and what it needs, then stop")
PARSER.epilog = (
    f"Exit code: 0, also when a signal (SIGTERM, SIGUSR1) ended it and the same command goes on, 1 for a "
    f"failure, 2 for a mistake in what was given, {STOPPED} where health.stop=true ended the training."
)
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.checkpoint.training_state import load_checkpoint
from megatron_oprd.data.sharding import split
from megatron_oprd.evaluation.report import write_report
from megatron_oprd.evaluation.sampling import evaluate_over_ranks, write_samples
from megatron_oprd.evaluation.scores import score_by_source
from megatron_oprd.health import watch as health_watch
from megatron_oprd.health.watch import HealthWatch
from megatron_oprd.hf.export import export_hf
from megatron_oprd.launch.assemble import Run, build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.launch.run_folder import describe, find_checkpoint
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.planning.dry_run import describe_run
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.resilience.signals import handle_signals, received_by_any
from megatron_oprd.resilience.straggler import measure_straggler
from megatron_oprd.runtime import platform, progress
from megatron_oprd.runtime.files import explain_os_errors
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.training.overlap import wait_for_gather
from megatron_oprd.training.run_log import RunLog
from megatron_oprd.training.state import TrainState, due
from megatron_oprd.training.student_step import student_step
from megatron_oprd.training.teacher_pass import PassReport, teacher_pass
from megatron_oprd.types import Rollout


@dataclass(frozen=True)
class Stop:
    """Why training ended before its last step."""

    message: str
    exit_code: int
    is_end: bool  # of the run, which is exported and reported on; else the same command goes on


def main(arguments: list[str] | None = None) -> int:
    """The command: configuration, checks, models, training, export, report."""
    options = PARSER.parse_args(arguments)
    inputs = read_inputs(load_config(options.config, options.overrides), dry_run=options.dry_run)
    if options.dry_run:
        planned = PlannedRun(
            inputs.config, inputs.student, inputs.teachers, inputs.lengths, inputs.world, inputs.bridge_rank
        )
        describe_run(planned, inputs.missing)
        return 0
    with handle_signals(), guarded(inputs.config.watchdog, inputs.run_dir):
        progress.enter("loading")
        run = build_run(inputs)
        stop = fit(run)
        if stop is None or stop.is_end:
            finish(run)
        if stop is not None:
            on_rank_zero(lambda: print(stop.message, flush=True))
    return stop.exit_code if stop is not None else 0


def fit(run: Run) -> Stop | None:
    """Train to `train.steps`, going on from the newest checkpoint; why it ended earlier, or None. Collective over the
    world."""
    config = run.inputs.config
    state, log, health = start(run)
    saver = Saver(
        run.inputs.run_dir / "checkpoints",
        run.checkpoint_content,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
    )
    signal: str | None = None

    def last_step() -> int:
        return state.step if health_watch.reason_to_stop(config, health) else config.train.steps

    while state.step < last_step() and signal is None:
        state, metrics, rollouts = one_step(run, state)
        saver.after_step()
        progress.enter("health", state.step)
        health, measured = health_watch.after_step(run, log, health, state.step, metrics)
        progress.enter("log", state.step)
        measured |= measure_straggler(config.watchdog, run.topology, state.step)
        on_rank_zero(partial(write_step, run, log, metrics | measured, rollouts))
        if due(state.step, config.evaluation.every, last_step()):
            health = evaluate_student(run, log, state, health)
        signal = received_by_any(run.topology)
        if signal is not None or due(state.step, config.checkpoint.every, last_step()):
            saved = saver.save(state)
    saver.wait()
    on_rank_zero(log.close)
    if signal is not None:
        return Stop(f"{signal}: step {state.step} saved in {saved}; {how_to_go_on(config)}", 0, is_end=False)
    reason = health_watch.reason_to_stop(config, health)
    return None if reason is None else Stop(reason, STOPPED, is_end=True)


def how_to_go_on(config: Config) -> str:
    """What to do after a signal."""
    return "the same command goes on" if config.checkpoint.resume == "auto" else "checkpoint.resume=auto goes on"


def one_step(run: Run, state: TrainState) -> tuple[TrainState, dict[str, float], list[Rollout]]:
    """Prompts, rollouts, the teachers' states, one update of the student. Collective over the world."""
    inputs, topology = run.inputs, run.topology
    config, plan = inputs.config, inputs.plan
    watch = progress.Stopwatch()
    progress.enter("batch", state.step + 1)
    platform.reset_peak_memory(topology.device)
    prompts, position = inputs.take_prompts(state.prompts)
    with watch("rollout"):
        mine = run.engine.generate(split(prompts, topology.replica_rank, topology.num_replicas), state.step)
        mine = inputs.aligned(mine)
    global_batch = inputs.global_batch(share_rollouts(mine, topology))
    micro_batches = global_batch.micro_batches(topology)
    with progress.stage("teacher"):
        targets, teacher_report = teacher_pass(run.teachers, global_batch, micro_batches, topology)
    with_metrics = due(state.step + 1, config.loss.output.metrics_every, config.train.steps)
    output = output_loss(run, with_metrics=with_metrics)
    with watch("student"):
        report = student_step(
            run.student,
            topology,
            plan,
            config.loss,
            global_batch,
            micro_batches,
            targets,
            output,
            with_metrics=with_metrics,
        )
    state = TrainState(state.step + 1, position)
    metrics = {"step": state.step, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate}
    metrics |= report.metrics | global_batch.metrics()
    metrics |= {"teacher/moved_bytes": teacher_report.moved_bytes, "teacher/target_bytes": targets.most_bytes}
    metrics |= step_seconds(watch, teacher_report)
    return (
        state,
        metrics | {"memory/peak_bytes": platform.peak_memory_bytes(topology.device)},
        list(global_batch.rollouts),
    )


def output_loss(run: Run, *, with_metrics: bool) -> OutputLoss | None:
    """The output-space objective of a step, on the student's last stage."""
    if run.heads is None:
        return None
    config = run.inputs.config
    return OutputLoss(
        config.loss.output,
        run.heads,
        run.topology,
        temperature=config.rollout.temperature,
        with_metrics=with_metrics,
    )


def step_seconds(watch: progress.Stopwatch, teacher: PassReport) -> dict[str, float]:
    """`time/rollout`, `time/teacher`, `time/student`, `time/step`; a streamed teacher ran while the student did."""
    seconds = watch.seconds()
    if teacher.streamed:
        seconds["time/student"] -= teacher.seconds
    return seconds | {"time/teacher": teacher.seconds}


def start(run: Run) -> tuple[TrainState, RunLog, HealthWatch]:
    """The run folder, the state to go on from, the watch, and the first evaluation of a run that begins."""
    topology, run_dir = run.topology, run.inputs.run_dir
    found = on_rank_zero(lambda: find_checkpoint(run))
    if found is not None:
        on_rank_zero(lambda: health_watch.check_can_go_on(run.inputs))
    state = TrainState()
    if found is not None:
        state = load_checkpoint(found, run.checkpoint_content)
    on_rank_zero(lambda: describe(run))  # only now: a run that may not go on leaves the folder as it was
    if found is not None and topology.rank == 0:
        print(f"going on from {found}", flush=True)
    log = RunLog(run_dir)
    on_rank_zero(lambda: log.open(state.step))
    if state.step > 0:
        return state, log, health_watch.go_on(run)
    progress.enter("health", state.step)
    health = evaluate_student(run, log, state, health_watch.begin(run, log))
    return state, log, health


def finish(run: Run) -> None:
    """Export the student to Hugging Face format and write the report; its path is the last line of the run."""
    run_dir = run.inputs.run_dir
    progress.enter("export")
    if run.inputs.config.checkpoint.export_hf:
        fresh, target = run_dir / "hf.new", run_dir / "hf"
        on_rank_zero(lambda: shutil.rmtree(fresh, ignore_errors=True))
        wait_for_gather(run.student.ddp)
        export_hf(run.student.stage, run.inputs.student, run.topology, run.inputs.config.student.path, fresh)

        def replace_export() -> None:
            with explain_os_errors(target):
                shutil.rmtree(target, ignore_errors=True)
                fresh.rename(target)

        on_rank_zero(replace_export)
    progress.enter("report")
    report = on_rank_zero(lambda: write_report(run_dir))
    if run.topology.rank == 0:
        print(f"report: {report}", flush=True)


def write_step(run: Run, log: RunLog, metrics: dict[str, float], rollouts: list[Rollout]) -> None:
    """The line and the rollouts of a step. One rank calls it."""
    log.step(metrics)
    log.rollouts(int(metrics["step"]), rollouts, run.inputs.tokenizer)


def evaluate_student(run: Run, log: RunLog, state: TrainState, health: HealthWatch) -> HealthWatch:
    """Evaluate on `evaluation.data`, if asked for, and write the scores and samples; the watch that has seen them.
    Collective over the world."""
    inputs = run.inputs
    if run.evaluator is None or inputs.evaluation_prompts is None or inputs.tokenizer is None:
        return health
    progress.enter("evaluation", state.step)
    samples = evaluate_over_ranks(run.evaluator, inputs.evaluation_prompts.prompts, inputs.tokenizer, run.topology)
    steps = inputs.config.train.steps
    name = {0: "before", steps: "after"}.get(state.step, f"step {state.step}")

    def write() -> dict[str, dict[str, float]]:
        scores = score_by_source(samples, inputs.config.evaluation.samples)
        log.evaluation(state.step, name, scores)
        write_samples(inputs.run_dir / "evaluations" / f"step_{state.step:07d}.jsonl", state.step, samples)
        return scores

    return health_watch.after_evaluation(run, log, health, state.step, on_rank_zero(write))


if __name__ == "__main__":
    run_command(main)
