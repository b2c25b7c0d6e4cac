"""OPRD-Bridge, stage 1: what makes the layers of two unlike models comparable, fitted on the student's own answers.

torchrun -m megatron_oprd.bridge.fit --config F [a.b=1 ...]
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import track

from megatron_oprd.assemble import Models, build_models
from megatron_oprd.bridge.accumulate import StreamedMoments
from megatron_oprd.bridge.adamw import AdamWFit
from megatron_oprd.bridge.cosines import SubspaceCosines
from megatron_oprd.bridge.reading import Readers
from megatron_oprd.bridge.record import Origin
from megatron_oprd.bridge.results import Fits, Tally, print_results, write_results
from megatron_oprd.bridge.rollouts import StoredRollouts
from megatron_oprd.bridge.solve import PairFit, check_ranks, check_tokens, fit_pair, teacher_directions
from megatron_oprd.cli import ArgumentParser, run_command
from megatron_oprd.config import Config, HealthConfig, OutputConfig, load_config
from megatron_oprd.data.prompts import PromptState, take
from megatron_oprd.data.sharding import split
from megatron_oprd.files import explain_os_errors, write_json
from megatron_oprd.hf.config import read_json
from megatron_oprd.inputs import Inputs, read_inputs
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.together import on_every_rank, on_rank_zero
from megatron_oprd.training.global_batch import GlobalBatch, share_rollouts
from megatron_oprd.types import LayerPair, PairBridge, Rollout, UserError

BEING_FITTED = "(being fitted)"  # in the place of the bridge: whatever needs one may run
WHICH_STATES = {"layers", "pairs", "positions", "k", "shift", "final_norm"}  # keys of loss.representation


def main(arguments: list[str] | None = None) -> int:
    """The command: rollouts of the student, moments of both models' states on them, maps, their cosines, files."""
    parser = ArgumentParser(
        prog="megatron_oprd.bridge.fit", description="Fit the bridge between a student and an unlike teacher."
    )
    parser.add_argument("--config", help="YAML file; `bridge`, `rollout`, `data` and `loss.representation` are read")
    parser.add_argument("overrides", nargs="*", help="dotted keys that win over the file, like bridge.ranks=[4,8]")
    options = parser.parse_args(arguments)
    inputs = read_inputs(fitting_config(load_config(options.config, options.overrides)), fitting=True)
    check(inputs)
    fit(Fitting(inputs, build_models(inputs)))
    return 0


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
        yield from track(range(start, total), doing, total=total, completed=start, disable=silent)


def fitting_config(config: Config) -> Config:
    """The configuration of a training run as the fit needs it: as many steps as give `bridge.prompts` prompts, and
    nothing of what comes after a fit. Raises UserError for several teachers and for a loss that reads no states."""
    if config.teachers:
        raise UserError("a bridge joins the student with one teacher; name it as teacher.path")
    if not config.loss.reads_layers:
        raise UserError("loss.representation.weight=0 compares no hidden states; a bridge needs some to be compared")
    representation = config.loss.representation.model_copy(update={"bridge": BEING_FITTED, "train_bridge": False})
    changes = {
        "loss": config.loss.model_copy(update={"representation": representation, "output": OutputConfig()}),
        "train": config.train.model_copy(
            update={"steps": math.ceil(config.bridge.prompts / config.rollout.prompts_per_step)}
        ),
        "evaluation": config.evaluation.model_copy(update={"every": 0}),
        "health": HealthConfig(),
        "teachers_in_memory": "all",
    }
    return config.model_copy(update=changes)


def check(inputs: Inputs) -> None:
    """Raise UserError for ranks that the models cannot have and for fewer prompts than are asked for."""
    config, (teacher,) = inputs.config, inputs.teachers.values()
    check_ranks(config.bridge.ranks, inputs.student.hidden_size, teacher.spec.hidden_size)
    needed = config.train.steps * config.rollout.prompts_per_step
    if inputs.prompts is not None and len(inputs.prompts.prompts) < needed:
        raise UserError(
            f"bridge.prompts={config.bridge.prompts} in steps of rollout.prompts_per_step="
            f"{config.rollout.prompts_per_step} needs {needed} prompts, data.prompts has {len(inputs.prompts.prompts)}"
        )
    held_out = sum(is_held_out(number, config.bridge.held_out_fraction) for number in range(needed))
    if not 0 < held_out < needed:
        raise UserError(
            f"bridge.held_out_fraction={config.bridge.held_out_fraction} of {needed} prompts leaves {held_out} held "
            "out; raise bridge.prompts or change the fraction"
        )


def is_held_out(prompt: int, fraction: float) -> bool:
    """Whether the prompt with this number, in the order in which they are taken, only judges: one in 1 / `fraction`,
    evenly spaced. All answers to a prompt are on one side."""
    return math.floor((prompt + 1) * fraction) > math.floor(prompt * fraction)


def fit(fitting: Fitting) -> None:
    """All of stage 1, going on where a process that died left it. Collective over the world."""
    folder, readers = fitting.folder, fitting.readers
    origin = on_rank_zero(lambda: open_folder(fitting))
    stored = StoredRollouts(folder / "rollouts.jsonl", per_step(fitting.config))
    if fitting.config.rollout.engine == "megatron":
        generate(fitting, stored)
    moments = gather_moments(fitting, stored, readers)
    by_adamw = fitting.config.bridge.method == "adamw"
    mine = fit_adamw(fitting, stored, readers, moments) if by_adamw else fit_closed_form(fitting, readers, moments)
    fits = with_one_teacher_map(merged(mine))
    cosines, tally = measure(fitting, stored, readers, fits)

    def write() -> None:
        write_results(folder, fits, cosines, tally, origin)
        print_results(folder, fits, cosines)

    on_rank_zero(write)


def per_step(config: Config) -> int:
    """Rollouts of a step."""
    return config.rollout.prompts_per_step * config.rollout.samples_per_prompt


def open_folder(fitting: Fitting) -> Origin:
    """Make the folder of the fit, or find in it what was asked for before. Raises UserError when that was something
    else. One rank calls it."""
    folder, config = fitting.folder, fitting.config
    assert fitting.inputs.ends is not None  # a fit has a bridge in mind
    origin = fitting.inputs.ends.origin()
    asked = {
        "student": [origin.student.hash, origin.student.tokenizer],
        "teacher": [origin.teacher.hash, origin.teacher.tokenizer],
        "data": config.data.model_dump(mode="json"),
        "rollout": config.rollout.model_dump(mode="json"),
        "content of rollout.path": _digest(config.rollout.path) if config.rollout.engine == "replay" else None,
        "loss.representation": config.loss.representation.model_dump(mode="json", include=WHICH_STATES),
        "precision": config.precision.model_dump(mode="json"),
        "bridge": config.bridge.model_dump(mode="json", include={"prompts", "held_out_fraction", "save_every"}),
        "train.seed": config.train.seed,
    }
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "asked.json").exists():
        write_json(folder / "asked.json", asked)
    before = read_json(folder / "asked.json")
    for key, value in asked.items():
        if before.get(key) != value:
            raise UserError(f"{folder} holds a fit with another {key}; go on with that one or name a new train.run_dir")
    return origin


def _digest(path: str | None) -> str:
    assert path is not None  # the configuration requires it
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def generate(fitting: Fitting, stored: StoredRollouts) -> None:
    """The student's answers to all prompts, on the disk. Collective over the world."""
    inputs, topology, config = fitting.inputs, fitting.models.topology, fitting.config
    assert inputs.prompts is not None  # the embedded engine has prompts
    start, count = on_rank_zero(stored.open), config.rollout.prompts_per_step
    for step in fitting.steps("answers of the student", start):
        position = PromptState(0, step * count)
        prompts, _ = take(inputs.prompts.prompts, position, count, seed=config.train.seed, shuffle=config.data.shuffle)
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


def global_batch(fitting: Fitting, rollouts: Sequence[Rollout]) -> GlobalBatch:
    return GlobalBatch(tuple(rollouts), (0,) * len(rollouts), fitting.config.loss)


def gather_moments(fitting: Fitting, stored: StoredRollouts, readers: Readers) -> StreamedMoments:
    """The moments of all pairs on this rank, over all ranks. Collective over the world."""
    every, steps = fitting.config.bridge.save_every, fitting.config.train.steps
    moments = StreamedMoments(readers, fitting.folder / "moments")
    for step in fitting.steps("moments of the states", moments.resume()):
        rollouts, held_out = read_step(fitting, stored, step)
        readers.read(global_batch(fitting, rollouts), torch.tensor(held_out), moments.visit)
        if (step + 1) % every == 0 or step + 1 == steps:
            moments.fold()
            moments.save(step + 1)
    return moments


def fit_closed_form(fitting: Fitting, readers: Readers, moments: StreamedMoments) -> Fits:
    """This rank's share of the pairs of its stage. Collective over the world."""
    config, topology = fitting.config.bridge, readers.topology
    place = topology.replica_rank * topology.tensor_size + topology.tensor_rank
    share = readers.pairs[place :: topology.num_replicas * topology.tensor_size]

    def solve() -> Fits:
        return {
            pair: fit_pair(moments.total[pair]["train"], moments.total[pair]["held_out"], config.ranks, config.ridges)
            for pair in share
        }

    return on_every_rank(solve)


def fit_adamw(fitting: Fitting, stored: StoredRollouts, readers: Readers, moments: StreamedMoments) -> Fits:
    """The pairs of this rank's stage by the paper's fit: every epoch, both models read all rollouts once more.
    Collective over the world."""
    config = fitting.config.bridge

    def begin() -> AdamWFit | None:
        for parts in moments.total.values():
            check_tokens(parts["train"], parts["held_out"], config.ranks)
        directions = {pair: teacher_directions(p["train"], max(config.ranks)) for pair, p in moments.total.items()}
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
            readers.read(global_batch(fitting, rollouts), torch.tensor(held_out), visit)
            if found is not None:
                found.step(readers.groups)
        if found is not None:
            found.snapshot({pair: parts["held_out"] for pair, parts in moments.total.items()})
    return found.best if found is not None else {}


def measure(
    fitting: Fitting, stored: StoredRollouts, readers: Readers, fits: Fits
) -> tuple[dict[LayerPair, dict[int, tuple[float, float]]], Tally]:
    """The cosines (before, after) of every pair and rank on held-out tokens, and what was read in all. Collective over
    the world."""
    seed, tally = fitting.config.train.seed, Tally()
    mine = {pair: fits[pair] for pair in readers.pairs}
    cosines = SubspaceCosines(mine, seed, readers.topology.device)
    for step in fitting.steps("cosines on held-out answers"):
        rollouts, held_out = read_step(fitting, stored, step)
        judges = [rollout for rollout, held in zip(rollouts, held_out, strict=True) if held]
        tally = tally.with_step(global_batch(fitting, rollouts), global_batch(fitting, judges))
        if judges:
            readers.read(global_batch(fitting, judges), torch.ones(len(judges), dtype=torch.bool), cosines.visit)
    return merged(cosines.means(readers.groups)), tally


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


if __name__ == "__main__":
    run_command(main)
