"""The observers of a training run: the run log, the health watch and the search for slow ranks.

`train.fit` calls them after each step and evaluates through them. They do not change the training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_oprd.evaluation.best import judge, reason_to_stop, write_best
from megatron_oprd.evaluation.measure import MeasuredModels, measure_by_source
from megatron_oprd.evaluation.sampling import evaluate_over_ranks, write_samples
from megatron_oprd.evaluation.scores import Scores, merge_scores, over_all_sources, score_by_source
from megatron_oprd.health.cut_answers import cut_answers_warning
from megatron_oprd.health.watch import HealthWatch, begin_watch, resume_watch
from megatron_oprd.launch.assemble import Run
from megatron_oprd.launch.measured import measured_models
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.report.live_report import LiveReport
from megatron_oprd.resilience.straggler import measure_straggler
from megatron_oprd.runtime import progress, start_profile
from megatron_oprd.runtime.cli import STOPPED
from megatron_oprd.training.run_log import RunLog, make_run_log
from megatron_oprd.training.state import Stop, TrainState, due
from megatron_oprd.types import Rollout


@dataclass(frozen=True)
class Observers:
    """Everything that observes a run. All methods are collective over the world."""

    run: Run
    log: RunLog
    report: LiveReport
    watch: HealthWatch | None  # None: health.every is 0
    on_answers: MeasuredModels | None  # the models, to be measured on the teacher's answers; None: it did not answer

    def after_step(self, state: TrainState, metrics: Mapping[str, float], rollouts: Sequence[Rollout]) -> TrainState:
        """Check the health and the speed of the ranks where due, log the step with all its metrics, and evaluate.

        Returns: the state, with the best evaluation so far.
        """
        inputs, step = self.run.inputs, int(metrics["step"])
        measured = dict(metrics)
        progress.enter("health", step)
        if self.watch is not None:
            measured |= self.watch.after_step(step, metrics)
        last_step = step if self.stop(state) is not None else inputs.config.train.steps
        is_evaluated = due(step, inputs.config.evaluation.every, last_step)
        on_answers = self._measure_teacher_answers(step) if is_evaluated else {}
        measured |= {f"evaluation/{name}": value for name, value in over_all_sources(on_answers).items()}
        progress.enter("log", step)
        measured |= measure_straggler(inputs.config.watchdog, self.run.topology, step)

        def write() -> None:
            self.log.step(measured)
            self.log.rollouts(step, rollouts, inputs.tokenizer)
            config = inputs.config
            limit, end_tokens = config.rollout.max_new_tokens, inputs.end_tokens
            warning = cut_answers_warning(self.log.run_dir, step, config.train.steps, limit, end_tokens)
            if warning:
                print(f"warning: {warning}", flush=True)
            self.report.update()
            start_profile.finish(self.log.run_dir)

        on_rank_zero(write)
        if not is_evaluated:
            return state
        scores = self._evaluate(step, on_answers)
        state = dataclasses.replace(state, best=judge(state.best, step, scores, inputs.config.evaluation))
        self.write_best(state)
        return state

    def evaluate_start(self) -> None:
        """Evaluate the start model, if training evaluates."""
        self._evaluate(0, self._measure_teacher_answers(0))

    def write_best(self, state: TrainState) -> None:
        """Write the best evaluation so far to the run folder."""
        stopped_at = state.step if reason_to_stop(state.best, self.run.inputs.config.evaluation) else None
        on_rank_zero(lambda: write_best(self.log.run_dir, state.best, stopped_at))

    def _measure_teacher_answers(self, step: int) -> Scores:
        """Return the student's metrics on the teacher's answers by data source, if the teacher has answered."""
        if self.on_answers is None:
            return {}
        progress.enter("evaluation", step)
        return measure_by_source(self.on_answers, self.run.models.teacher_answers)

    def _evaluate(self, step: int, on_answers: Scores) -> Scores:
        """Sample answers of the student and grade them; log the scores, check the accuracy and return all scores."""
        run, config = self.run, self.run.inputs.config
        prompts, tokenizer = run.inputs.evaluation_prompts, run.inputs.tokenizer
        if prompts is None or tokenizer is None:
            return {}
        progress.enter("evaluation", step)
        samples = []
        if run.evaluator is not None:
            samples = evaluate_over_ranks(run.evaluator, prompts.prompts, tokenizer, run.topology)
        name = {0: "before", config.train.steps: "after"}.get(step, f"step {step}")

        def write() -> Scores:
            scores = merge_scores(on_answers, score_by_source(samples, config.evaluation.samples))
            self.log.evaluation(step, name, scores)
            if samples:
                write_samples(self.log.run_dir / "evaluations" / f"step_{step:07d}.jsonl", step, samples)
            self.report.update(now=True)
            return scores

        scores = on_rank_zero(write)
        if self.watch is not None:
            self.watch.after_evaluation(step, scores)
        return scores

    def stop(self, state: TrainState) -> Stop | None:
        """Return why the run ends before its last step, by the health watch or by `evaluation.patience`, or None."""
        unhealthy = None if self.watch is None else self.watch.reason_to_stop()
        if unhealthy is not None:
            return Stop(unhealthy, STOPPED, is_end=True)
        no_better = reason_to_stop(state.best, self.run.inputs.config.evaluation)
        return None if no_better is None else Stop(no_better, 0, is_end=True)

    def close(self) -> None:
        """Close the run log."""
        on_rank_zero(self.log.close)


def start_observers(run: Run, state: TrainState) -> Observers:
    """Open the run log, and begin or resume the health watch. At step 0, evaluate the start model.

    Collective over the world.
    """
    step, log = state.step, make_run_log(run.inputs.config)
    report = LiveReport(run.inputs.run_dir)
    on_rank_zero(partial(log.open, step))
    on_answers = measured_models(run, layers=True) if run.models.teacher_answers else None
    if step > 0:
        observers = Observers(run, log, report, resume_watch(run, log), on_answers)
        observers.write_best(state)
        return observers
    progress.enter("health", step)
    observers = Observers(run, log, report, begin_watch(run, log), on_answers)
    observers.evaluate_start()
    return observers
