"""Decide whether a run fits into the memory of a device: its updates, rollouts, checkpoints, and the process itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_oprd.config import Config
from megatron_oprd.planning.evaluation_plan import evaluation_run
from megatron_oprd.planning.memory_formulas import predict_memory
from megatron_oprd.planning.peak_memory import NotTraced, predict_peaks
from megatron_oprd.planning.plan_device import PlanDevice
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.rollout_memory import CachePlan, plan_cache
from megatron_oprd.planning.update_trace import Footprint

TRAINS, GENERATES, SAVES = "while the student trains", "during rollouts", "while a checkpoint is saved"
EVALUATES = "during evaluations"


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run on a device."""

    peaks: Mapping[range, Footprint]  # of an update, for each group of ranks with the same pipeline stages
    cache: CachePlan | None  # of the rollouts; None: the student generates nothing
    device: PlanDevice
    config: Config
    not_traced: str = ""  # the reason why `peaks` are formulas; "" if they are traced
    evaluation_cache: CachePlan | None = None  # None: the student answers no prompts in evaluations

    @property
    def world_size(self) -> int:
        return max(ranks.stop for ranks in self.peaks)

    @property
    def fits(self) -> bool:
        return self.needed <= self.device.memory

    @property
    def needed(self) -> int:
        """Return the bytes that the processes on the fullest device need together."""
        return self._on_device(self.fullest)

    @property
    def fullest(self) -> range:
        """Return the ranks on the fullest device. Consecutive ranks share a device."""
        size = self.device.sharers
        starts = range(0, self.world_size, size)
        return max((range(start, min(start + size, self.world_size)) for start in starts), key=self._on_device)

    @property
    def phase(self) -> str:
        """Return the phase of the run in which the fullest device needs the most memory."""
        phases = self.phases(next(peak for ranks, peak in self.peaks.items() if self.fullest[0] in ranks))
        return max(phases, key=phases.__getitem__)

    @property
    def lasting(self) -> int:
        """Return the bytes that the largest process needs without activations, targets and rollouts."""
        return max(map(lasting_bytes, self.peaks.values())) + self.device.process_bytes

    def phases(self, footprint: Footprint) -> dict[str, int]:
        """Return the bytes of one process in each phase of the run."""
        lasting = lasting_bytes(footprint) + self.device.process_bytes
        phases = {TRAINS: training_bytes(footprint, self.config, self.device)}
        if self.cache is not None:
            phases[GENERATES] = lasting + self.cache.num_bytes
        if self.evaluation_cache is not None:
            phases[EVALUATES] = lasting + self.evaluation_cache.num_bytes
        if _gathers_optimizer_state(self.config):
            phases[SAVES] = lasting + self._gathered_bytes(footprint)
        return phases

    def _gathered_bytes(self, footprint: Footprint) -> int:
        """Return the bytes on the device with which Megatron-Core gathers the optimizer's state for a checkpoint.

        The state is three fp32 numbers for each parameter, with the size of the gradients each. In CPU memory there are
        the gathered state, the rank's own shards of it, and three more buffers of one number. A GPU has one such
        buffer, and a rank's shard.
        """
        parallel, one = self.config.parallel, footprint.gradients
        copies = self.world_size // (parallel.tensor * parallel.pipeline)
        return one + one // copies if self.device.kind == "gpu" else 6 * one + 3 * one // copies

    def _on_device(self, block: range) -> int:
        """Return the bytes that the processes of these ranks need together."""
        sizes = ((max(self.phases(peak).values()), ranks) for ranks, peak in self.peaks.items())
        return sum(size * _common(ranks, block) for size, ranks in sizes)


def plan_memory(run: PlannedRun, device: PlanDevice) -> MemoryPlan:
    """Return the memory of a run. Traces an update of each group of ranks, which takes seconds."""
    reason = ""
    try:
        peaks = predict_peaks(run)
    except NotTraced as error:
        reason = str(error)
        peaks = {range(run.setup.world_size): Footprint(*predict_memory(run).values())}
    models = max(footprint.weights + footprint.teacher_weights for footprint in peaks.values())
    answers = evaluation_run(run)
    evaluation_cache = None if answers is None else plan_cache(answers, models, device.share)
    return MemoryPlan(peaks, plan_cache(run, models, device.share), device, run.config, reason, evaluation_cache)


def training_bytes(footprint: Footprint, config: Config, device: PlanDevice) -> int:
    """Return the bytes of one process at the peak of an update."""
    needed = footprint.peak + device.process_bytes
    if _gathers_optimizer_state(config) and config.checkpoint.asynchronous and device.kind == "cpu":
        needed += 3 * footprint.gradients + footprint.weights  # the copy of the state while training goes on
    return needed


def _gathers_optimizer_state(config: Config) -> bool:
    """Return True if Megatron-Core gathers the optimizer's state for checkpoints."""
    saves = bool(config.checkpoint.every or config.checkpoint.every_minutes)
    return saves and config.optimizer.name == "adamw" and config.parallel.distributed_optimizer


def lasting_bytes(footprint: Footprint) -> int:
    """Return the bytes of weights, gradients, optimizer state and teachers, which stay during all phases."""
    return footprint.peak - footprint.targets - footprint.activations


def _common(first: range, second: range) -> int:
    """Return the number of ranks that both ranges contain."""
    return max(0, min(first.stop, second.stop) - max(first.start, second.start))
