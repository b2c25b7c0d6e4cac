"""On-policy representation distillation: from two checkpoints and prompts to a distilled student.

torchrun -m megatron_oprd.train --config F [a.b=1 ...]
"""

from __future__ import annotations

from megatron_oprd.config import load_config
from megatron_oprd.runtime.cli import STOPPED, add_plan_options, check_command_line, command_parser, run_command

PARSER = command_parser("train", "On-policy representation distillation (OPRD).", override="parallel.tensor=2")
PARSER.add_argument("--dry-run", action="store_true", help="do what `plan` does: print what would run and its needs")
PARSER.add_argument("--profile-start", action="store_true", help="print where the time to the first step goes")
add_plan_options(PARSER)
PARSER.epilog = (
    f"Exit code: 0, also when a signal (SIGTERM, SIGUSR1, Ctrl-C) ended it and the same command continues, 1 for a "
    f"failure, 2 for a mistake in the arguments or inputs, {STOPPED} if health.stop=true ended the training."
)
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.bridge.fitting.map_start import start_maps
from megatron_oprd.checkpoint.hf_export import export_best, export_student
from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.commands.plan import print_plan
from megatron_oprd.health.observers import start_observers
from megatron_oprd.launch.assemble import Run, build_run
from megatron_oprd.launch.earlier_run import check_run_folder
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.launch.run_folder import open_run_folder
from megatron_oprd.launch.step_data import align, make_global_batch
from megatron_oprd.launch.teacher_precision import choose_teacher_precision
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.planning.automatic import settle
from megatron_oprd.report.write import write_report
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.resilience.signals import handle_signals, received_by_any
from megatron_oprd.rollout.horizon import horizon_metrics
from megatron_oprd.runtime import progress, start_profile
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.training.layer_squares import weigh_layers
from megatron_oprd.training.state import BestEvaluation, Stop, TrainState, due
from megatron_oprd.training.step_metrics import StepMeter
from megatron_oprd.training.student_step import student_step
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import Rollout, UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the command: read and check the inputs, build the models, train, export and report."""
    options = PARSER.parse_args(arguments)
    if options.dry_run:
        print_plan(options)
        return 0
    if options.device or options.details:
        raise UserError("--device and --details belong to a plan; use them with --dry-run or `megatron-oprd plan`")
    start_profile.begin(options.profile_start)
    inputs = read_inputs(load_config(options.config, options.overrides), choose_later=True)
    check_run_folder(inputs)
    with handle_signals(), guarded(inputs.config.watchdog, inputs.run_dir, alone=True):
        progress.enter("loading")
        run = build_run(settle(inputs))
        state, stop = fit(run)
        if stop is None or stop.is_end:
            finish(run, state.best)
        if stop is not None:
            on_rank_zero(lambda: print(stop.message, flush=True))
    return stop.exit_code if stop is not None else 0


def fit(run: Run) -> tuple[TrainState, Stop | None]:
    """Train from the newest checkpoint of the run folder, or from step 0, up to `train.steps`.

    Returns: the state at the end; None, or why training ended earlier. Collective over the world.
    """
    config, settings = run.inputs.config, run.inputs.config.checkpoint
    state = open_run_folder(run)
    observers = start_observers(run, state)
    saver = Saver(run.inputs.run_dir / "checkpoints", run.checkpoint_content, settings)
    signal = None

    def last_step() -> int:
        return state.step if observers.stop(state) is not None else config.train.steps

    while state.step < last_step() and signal is None:
        state, metrics, rollouts = one_step(run, state)
        state = choose_teacher_precision(run, state, metrics, rollouts)
        saver.after_step()
        state = observers.after_step(state, metrics, rollouts)
        signal = received_by_any(run.topology, state.step)
        is_due = state.is_best or due(state.step, settings.every, last_step())
        if signal is not None or is_due or saver.is_overdue():
            saved = saver.save(state)
    saver.wait()
    observers.close()
    if signal is not None:
        on_rank_zero(lambda: write_report(run.inputs.run_dir))  # the page says that the run stopped
        resume = "the same command" if settings.resume == "auto" else "checkpoint.resume=auto"
        return state, Stop(f"{signal}: step {state.step} saved in {saved}; {resume} continues", 0, is_end=False)
    return state, observers.stop(state)


def one_step(run: Run, state: TrainState) -> tuple[TrainState, dict[str, float], list[Rollout]]:
    """Update the student once: it generates rollouts, the teachers run on them, and it trains on their states.

    With `rollout.ahead: 1` the rollouts were generated during the step before.

    Returns: the new state, the metrics, and the rollouts of the global batch. Collective over the world.
    """
    inputs, config, topology = run.inputs, run.inputs.config, run.topology
    progress.enter("batch", state.step + 1)
    meter = StepMeter(topology.device)
    with meter.stage("rollout"):
        local_rollouts, rollout_metrics, next_state = run.rollouts.next(state)
        local_rollouts = align(inputs, local_rollouts)
    global_batch = make_global_batch(inputs, share_rollouts(local_rollouts, topology), state.step)
    micro_batches = global_batch.micro_batches(topology)
    with progress.stage("teacher"):
        start_maps(run, global_batch, state.step)
        global_batch = weigh_layers(run.teachers, global_batch, micro_batches, topology, state.squares)
        targets, teacher_report = teacher_pass(run.teachers, global_batch, micro_batches, topology)
    with_metrics = due(state.step + 1, config.loss.output.metrics_every, config.train.steps, first=1)
    output = run.output_loss(state.step, with_metrics=with_metrics)
    with meter.stage("student"):
        report = student_step(run.student, global_batch, micro_batches, targets, output, with_metrics=with_metrics)
    metrics = meter.metrics(next_state.step, report, global_batch, targets, teacher_report) | rollout_metrics
    metrics |= horizon_metrics(config, state.step, global_batch.rollouts) | config.loss.metrics(state.step)
    return next_state.after_update(report), metrics, list(global_batch.rollouts)


def finish(run: Run, best: BestEvaluation | None = None) -> None:
    """Export the student and write the report, then export the student of the best evaluation.

    The best checkpoint may have been removed, so its export comes last. Collective over the world.
    """
    run_dir, settings = run.inputs.run_dir, run.inputs.config.checkpoint
    progress.enter("export")
    if settings.export_hf:
        export_student(run.checkpoint_content, run_dir / "hf", settings.export_dtype)
    progress.enter("report")
    on_rank_zero(lambda: print(f"report: {write_report(run_dir)}", flush=True))
    if settings.export_hf and best is not None:
        progress.enter("export")
        export_best(run.checkpoint_content, run_dir, best, settings.export_dtype)


if __name__ == "__main__":
    run_command(main)
