"""The steps of a fit: generate answers, sum moments, fit maps, measure cosines, write the bridges.

Every function with a FitRun is collective over the world.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_oprd.bridge.fitting.adamw import AdamWFit
from megatron_oprd.bridge.fitting.cosines import SubspaceCosines
from megatron_oprd.bridge.fitting.results import Cosines, Fits, print_results, write_results
from megatron_oprd.bridge.fitting.rollout_file import RolloutFile
from megatron_oprd.bridge.fitting.setup import FitRun, is_held_out, open_folder
from megatron_oprd.bridge.fitting.solve import PairFit, TeacherDirections, check_tokens, fit_pair, teacher_directions
from megatron_oprd.bridge.fitting.streamed_moments import StreamedMoments
from megatron_oprd.bridge.record import Counts
from megatron_oprd.data.packing import chosen_positions
from megatron_oprd.data.prompts import PromptState
from megatron_oprd.data.sharding import split
from megatron_oprd.launch.step_data import align, make_global_batch, next_prompts
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.rank_zero import on_every_rank, on_rank_zero
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.types import LayerPair, PairBridge, Rollout


def fit_bridge(run: FitRun) -> None:
    """Fit and write a bridge for each rank. Continues from the files of an interrupted fit in the same folder.

    Raises:
        UserError: there are too few tokens, states are not finite, or the folder contains another fit.
    """
    origin = on_rank_zero(lambda: open_folder(run))
    file = RolloutFile(run.folder / "rollouts.jsonl", run.rollouts_per_step)
    if run.config.rollout.generates:
        generate_answers(run, file)
    moments = compute_moments(run, file)
    local_fits = fit_adamw(run, file, moments) if run.config.bridge.method == "adamw" else fit_closed_form(run, moments)
    fits = share_teacher_maps(gather_pairs(local_fits))
    cosines, counts, coverage = measure_cosines(run, file, fits)
    origin = dataclasses.replace(origin, counts=counts, coverage=coverage)

    def write() -> None:
        write_results(run.folder, fits, cosines, origin)
        print_results(run.folder, fits, cosines)

    on_rank_zero(write)


def generate_answers(run: FitRun, file: RolloutFile) -> None:
    """Append the student's answers to all prompts to the file, from the first step that the file lacks."""
    topology, count = run.models.topology, run.config.rollout.prompts_per_step
    run.models.engine.sync_weights(0)
    for step in run.steps("answers of the student", on_rank_zero(file.open)):
        prompts, _ = next_prompts(run.inputs, PromptState(0, step * count))
        local_prompts = split(prompts, topology.replica_rank, topology.num_replicas)
        rollouts = share_rollouts(run.models.engine.generate(local_prompts, step), topology)
        on_rank_zero(lambda rollouts=rollouts: file.append(rollouts))


def load_rollouts(run: FitRun, file: RolloutFile, step: int) -> tuple[list[Rollout], list[bool]]:
    """Return the rollouts of a step, the same on every rank, and for each whether it is held out."""
    inputs, topology, config = run.inputs, run.models.topology, run.config
    if config.rollout.engine == "replay":
        local_rollouts = run.models.engine.generate([], step)
    else:
        local_rollouts = split(on_rank_zero(lambda: file.read(step)), topology.replica_rank, topology.num_replicas)
    rollouts = share_rollouts(align(inputs, local_rollouts), topology)
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    numbers = (step * prompts + index // samples for index in range(len(rollouts)))
    return rollouts, [is_held_out(number, config.bridge.held_out_fraction) for number in numbers]


def compute_moments(run: FitRun, file: RolloutFile) -> StreamedMoments:
    """Return the moments of the pairs of this stage, summed over all steps and ranks."""
    pair, every, steps = run.pair, run.config.bridge.save_every, run.config.train.steps
    moments = StreamedMoments(pair, run.folder / "moments")
    for step in run.steps("moments of the states", moments.resume()):
        rollouts, held_out = load_rollouts(run, file, step)
        pair.compute_states(make_global_batch(run.inputs, rollouts), torch.tensor(held_out), moments.add)
        if (step + 1) % every == 0 or step + 1 == steps:
            moments.all_reduce()
            moments.save(step + 1)
    return moments


def directions_by_pair(
    moments: StreamedMoments, pairs: Sequence[LayerPair], ranks: Sequence[int]
) -> dict[LayerPair, TeacherDirections]:
    """Return the teacher's principal directions of each pair, computed once per teacher layer. No communication.

    Raises:
        UserError: there are too few tokens for the largest rank, or states are not finite.
    """
    by_layer: dict[int, TeacherDirections] = {}
    for pair in pairs:
        parts = moments.total[pair]
        check_tokens(parts["train"], parts["held_out"], ranks)
        if pair.teacher not in by_layer:
            by_layer[pair.teacher] = teacher_directions(parts["train"], max(ranks))
    return {pair: by_layer[pair.teacher] for pair in pairs}


def fit_closed_form(run: FitRun, moments: StreamedMoments) -> Fits:
    """Return the fits of this rank's share of the pairs: the ranks of a stage divide its pairs between them."""
    config, topology = run.config.bridge, run.models.topology
    index = topology.replica_rank * topology.tensor_size + topology.tensor_rank
    share = run.pair.layer_pairs[index :: topology.num_replicas * topology.tensor_size]

    def solve() -> Fits:
        return {
            pair: fit_pair(
                moments.total[pair]["train"], moments.total[pair]["held_out"], config.ranks, config.ridges, directions
            )
            for pair, directions in directions_by_pair(moments, share, config.ranks).items()
        }

    return on_every_rank(solve)


def fit_adamw(run: FitRun, file: RolloutFile, moments: StreamedMoments) -> Fits:
    """Return the fits of the pairs of this stage by AdamW. Each epoch runs both models on all rollouts again."""
    model_pair, config = run.pair, run.config.bridge

    def start() -> AdamWFit | None:
        directions = directions_by_pair(moments, model_pair.layer_pairs, config.ranks)
        if not directions:
            return None  # no compared layer is on this stage
        width, seed, num_pairs = run.inputs.setup.student.hidden_size, run.config.train.seed, len(model_pair.plan.pairs)
        return AdamWFit(directions, width, config.ranks, lr=config.lr, seed=seed, num_pairs=num_pairs)

    fit = on_every_rank(start)

    def add(pair: LayerPair, student: torch.Tensor, teacher: torch.Tensor, held_out: torch.Tensor) -> None:
        if fit is not None:
            fit.add(pair, student[~held_out], teacher[~held_out])

    for epoch in range(config.epochs):
        for step in run.steps(f"AdamW, epoch {epoch + 1} of {config.epochs}"):
            rollouts, held_out = load_rollouts(run, file, step)
            model_pair.compute_states(make_global_batch(run.inputs, rollouts), torch.tensor(held_out), add)
            if fit is not None:
                fit.step(model_pair.topology.token_groups)
        if fit is not None:
            fit.snapshot({pair: parts["held_out"] for pair, parts in moments.total.items()})
    return fit.best if fit is not None else {}


def measure_cosines(run: FitRun, file: RolloutFile, fits: Fits) -> tuple[Cosines, Counts, float | None]:
    """Compute the cosines (before, after) of every pair and rank on held-out tokens.

    Returns:
        The cosines, the counts of the whole fit, and the share of the selected tokens that are sync points (None if
        both models use one tokenizer).
    """
    config, model_pair = run.config, run.pair
    counts = Counts(config.train.steps * config.rollout.prompts_per_step, sequences=0, tokens=0, held_out_tokens=0)
    selected, aligned = 0, False  # selected: tokens before those that are no sync points are dropped
    local_fits = {pair: fits[pair] for pair in model_pair.layer_pairs}
    cosines = SubspaceCosines(local_fits, config.train.seed, model_pair.topology.device)
    for step in run.steps("cosines on held-out answers"):
        rollouts, held_out = load_rollouts(run, file, step)
        held_out_rollouts = [rollout for rollout, chosen in zip(rollouts, held_out, strict=True) if chosen]
        held_out_batch = make_global_batch(run.inputs, held_out_rollouts)
        all_counts = make_global_batch(run.inputs, rollouts).representation.counts
        counts = Counts(
            counts.prompts,
            counts.sequences + all_counts.sequences,
            counts.tokens + all_counts.tokens,
            counts.held_out_tokens + held_out_batch.representation.counts.tokens,
        )
        selected += sum(map(len, chosen_positions(config.loss.representation, rollouts)))
        aligned = aligned or any(rollout.alignment is not None for rollout in rollouts)
        if held_out_rollouts:
            every_rollout = torch.ones(len(held_out_rollouts), dtype=torch.bool)
            model_pair.compute_states(held_out_batch, every_rollout, cosines.add)
    coverage = counts.tokens / max(selected, 1) if aligned else None
    return gather_pairs(cosines.means(model_pair.topology.token_groups)), counts, coverage


def gather_pairs(local: Mapping[LayerPair, dict]) -> dict:
    """Return the entries of all ranks, in the order of the student's layers. Collective over the world."""
    gathered: dict[LayerPair, dict] = {}
    for part in gather_objects(dict(local), dist.group.WORLD):
        gathered |= part
    return dict(sorted(gathered.items(), key=lambda item: item[0].student))


def share_teacher_maps(fits: Fits) -> Fits:
    """Return the fits with one teacher map for all pairs of a teacher layer: the map of the first pair.

    Maps that were computed on two machines differ by rounding; a bridge file must have them equal.
    """
    first: dict[tuple[int, int], PairBridge] = {}  # by teacher layer and rank

    def with_first_map(pair: LayerPair, rank: int, fit: PairFit) -> PairFit:
        shared = first.setdefault((pair.teacher, rank), fit.bridge)
        maps = PairBridge(fit.bridge.student_map, shared.teacher_map, shared.teacher_mean)
        return dataclasses.replace(fit, bridge=maps)

    return {
        pair: {rank: with_first_map(pair, rank, fit) for rank, fit in by_rank.items()} for pair, by_rank in fits.items()
    }
