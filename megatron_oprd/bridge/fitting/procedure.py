"""What a fit of a bridge does, in its order: answers, moments, maps, cosines. Collective over the world throughout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import track

from megatron_oprd.bridge.fitting.accumulate import StreamedMoments
from megatron_oprd.bridge.fitting.adamw import AdamWFit
from megatron_oprd.bridge.fitting.cosines import SubspaceCosines
from megatron_oprd.bridge.fitting.paired_states import Readers
from megatron_oprd.bridge.fitting.results import Cosines, Fits
from megatron_oprd.bridge.fitting.rollouts import StoredRollouts
from megatron_oprd.bridge.fitting.solve import PairFit, TeacherDirections, check_tokens, fit_pair, teacher_directions
from megatron_oprd.bridge.record import Counts
from megatron_oprd.config import Config
from megatron_oprd.data.packing import chosen_positions
from megatron_oprd.data.prompts import PromptState
from megatron_oprd.data.sharding import split
from megatron_oprd.launch.assemble import Models
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.rank_zero import on_every_rank, on_rank_zero
from megatron_oprd.runtime import progress
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.types import LayerPair, PairBridge, Rollout


@dataclass(frozen=True)
class Fitting:
    """A fit under way."""

    inputs: Inputs
    models: Models

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def folder(self) -> Path:
        return self.inputs.run_dir / "bridge"

    @property
    def readers(self) -> Readers:
        (planned,), (teacher,) = self.inputs.teachers.values(), self.models.teachers
        return Readers(
            self.config,
            self.inputs.student,
            planned.spec,
            planned.plan,
            self.models.topology,
            self.models.stage,
            teacher,
        )

    def steps(self, doing: str, start: int = 0) -> Iterator[int]:
        """The steps from `start`, with a progress bar on the first rank."""
        total, silent = self.config.train.steps, self.models.topology.rank != 0
        for step in track(range(start, total), doing, total=total, completed=start, disable=silent):
            progress.enter(doing, step + 1)
            yield step
        progress.enter(f"after {doing}")


def is_held_out(prompt: int, fraction: float) -> bool:
    """Whether the prompt with this number, in the order in which they are taken, only judges: one in 1 / `fraction`,
    evenly spaced. All answers to a prompt are on one side."""
    return math.floor((prompt + 1) * fraction) > math.floor(prompt * fraction)


def per_step(config: Config) -> int:
    """Rollouts of a step."""
    return config.rollout.prompts_per_step * config.rollout.samples_per_prompt


def generate(fitting: Fitting, stored: StoredRollouts) -> None:
    """The student's answers to all prompts, on the disk. Collective over the world."""
    topology, count = fitting.models.topology, fitting.config.rollout.prompts_per_step
    for step in fitting.steps("answers of the student", on_rank_zero(stored.open)):
        prompts, _ = fitting.inputs.take_prompts(PromptState(0, step * count))
        mine = split(prompts, topology.replica_rank, topology.num_replicas)
        rollouts = share_rollouts(fitting.models.engine.generate(mine, step), topology)
        on_rank_zero(lambda rollouts=rollouts: stored.append(rollouts))


def read_step(fitting: Fitting, stored: StoredRollouts, step: int) -> tuple[list[Rollout], list[bool]]:
    """The rollouts of a step on every rank, as both models read them, and which are held out. Collective."""
    inputs, topology, config = fitting.inputs, fitting.models.topology, fitting.config
    if config.rollout.engine == "replay":
        mine = fitting.models.engine.generate([], step)
    else:
        mine = split(on_rank_zero(lambda: stored.read(step)), topology.replica_rank, topology.num_replicas)
    rollouts = share_rollouts(inputs.aligned(mine), topology)
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    numbers = (step * prompts + place // samples for place in range(len(rollouts)))
    return rollouts, [is_held_out(number, config.bridge.held_out_fraction) for number in numbers]


def gather_moments(fitting: Fitting, stored: StoredRollouts, readers: Readers) -> StreamedMoments:
    """The moments of all pairs on this rank, over all ranks. Collective over the world."""
    every, steps = fitting.config.bridge.save_every, fitting.config.train.steps
    moments = StreamedMoments(readers, fitting.folder / "moments")
    for step in fitting.steps("moments of the states", moments.resume()):
        rollouts, held_out = read_step(fitting, stored, step)
        readers.read(fitting.inputs.global_batch(rollouts), torch.tensor(held_out), moments.visit)
        if (step + 1) % every == 0 or step + 1 == steps:
            moments.fold()
            moments.save(step + 1)
    return moments


def directions_of(
    moments: StreamedMoments, pairs: Sequence[LayerPair], ranks: Sequence[int]
) -> dict[LayerPair, TeacherDirections]:
    """The teacher's directions of each pair, found once for pairs that share its layer. Raises UserError for too few
    tokens. No communication."""
    of_layers: dict[int, TeacherDirections] = {}
    for pair in pairs:
        parts = moments.total[pair]
        check_tokens(parts["train"], parts["held_out"], ranks)
        if pair.teacher not in of_layers:
            of_layers[pair.teacher] = teacher_directions(parts["train"], max(ranks))
    return {pair: of_layers[pair.teacher] for pair in pairs}


def fit_closed_form(fitting: Fitting, readers: Readers, moments: StreamedMoments) -> Fits:
    """This rank's share of the pairs of its stage. Collective over the world."""
    config, topology = fitting.config.bridge, readers.topology
    place = topology.replica_rank * topology.tensor_size + topology.tensor_rank
    share = readers.pairs[place :: topology.num_replicas * topology.tensor_size]

    def solve() -> Fits:
        return {
            pair: fit_pair(
                moments.total[pair]["train"], moments.total[pair]["held_out"], config.ranks, config.ridges, directions
            )
            for pair, directions in directions_of(moments, share, config.ranks).items()
        }

    return on_every_rank(solve)


def fit_adamw(fitting: Fitting, stored: StoredRollouts, readers: Readers, moments: StreamedMoments) -> Fits:
    """The pairs of this rank's stage by the paper's fit: every epoch, both models read all rollouts once more.
    Collective over the world."""
    config = fitting.config.bridge

    def begin() -> AdamWFit | None:
        directions = directions_of(moments, readers.pairs, config.ranks)
        width, seed, pairs = fitting.inputs.student.hidden_size, fitting.config.train.seed, len(readers.plan.pairs)
        if not directions:
            return None  # a stage may own no compared layer
        return AdamWFit(directions, width, config.ranks, lr=config.lr, seed=seed, num_pairs=pairs)

    found = on_every_rank(begin)

    def visit(pair: LayerPair, student: torch.Tensor, teacher: torch.Tensor, held_out: torch.Tensor) -> None:
        if found is not None:
            found.add(pair, student[~held_out], teacher[~held_out])

    for epoch in range(config.epochs):
        for step in fitting.steps(f"AdamW, epoch {epoch + 1} of {config.epochs}"):
            rollouts, held_out = read_step(fitting, stored, step)
            readers.read(fitting.inputs.global_batch(rollouts), torch.tensor(held_out), visit)
            if found is not None:
                found.step(readers.topology.token_groups)
        if found is not None:
            found.snapshot({pair: parts["held_out"] for pair, parts in moments.total.items()})
    return found.best if found is not None else {}


def measure(
    fitting: Fitting, stored: StoredRollouts, readers: Readers, fits: Fits
) -> tuple[Cosines, Counts, float | None]:
    """Compute the cosines (before, after) of every pair and rank on held-out tokens. Collective over the world.

    Returns:
        The cosines, the counts of the whole fit, and the share of the selected tokens that are sync points (None if
        both models use one tokenizer).
    """
    config = fitting.config
    counts = Counts(config.train.steps * config.rollout.prompts_per_step, sequences=0, tokens=0, held_out_tokens=0)
    selected, aligned = 0, False  # tokens before those that are no sync points are dropped
    mine = {pair: fits[pair] for pair in readers.pairs}
    cosines = SubspaceCosines(mine, config.train.seed, readers.topology.device)
    for step in fitting.steps("cosines on held-out answers"):
        rollouts, held_out = read_step(fitting, stored, step)
        judges = [rollout for rollout, held in zip(rollouts, held_out, strict=True) if held]
        global_batch, held_out_batch = fitting.inputs.global_batch(rollouts), fitting.inputs.global_batch(judges)
        all_tokens, held_out_tokens = global_batch.representation.counts, held_out_batch.representation.counts
        counts = Counts(
            counts.prompts,
            counts.sequences + all_tokens.sequences,
            counts.tokens + all_tokens.tokens,
            counts.held_out_tokens + held_out_tokens.tokens,
        )
        selected += sum(map(len, chosen_positions(config.loss.representation, rollouts)))
        aligned = aligned or any(rollout.alignment is not None for rollout in rollouts)
        if judges:
            readers.read(held_out_batch, torch.ones(len(judges), dtype=torch.bool), cosines.visit)
    coverage = counts.tokens / max(selected, 1) if aligned else None
    return merged(cosines.means(readers.topology.token_groups)), counts, coverage


def merged(mine: Mapping[LayerPair, dict]) -> dict:
    """What all ranks have, by pair, in the order of the layers. Collective over the world."""
    found: dict[LayerPair, dict] = {}
    for part in gather_objects(dict(mine), dist.group.WORLD):
        found |= part
    return dict(sorted(found.items(), key=lambda item: item[0].student))


def with_one_teacher_map(fits: Fits) -> Fits:
    """Pairs that share a teacher layer have the same directions, but for rounding where they were found on two
    machines: all take those of the first."""
    first: dict[tuple[int, int], PairBridge] = {}

    def agreed(pair: LayerPair, rank: int, one: PairFit) -> PairFit:
        of_layer = first.setdefault((pair.teacher, rank), one.bridge)
        maps = PairBridge(one.bridge.student_map, of_layer.teacher_map, of_layer.teacher_mean)
        return dataclasses.replace(one, bridge=maps)

    return {pair: {rank: agreed(pair, rank, one) for rank, one in by_rank.items()} for pair, by_rank in fits.items()}
