"""A teacher whose weights are an exponential moving average of the student's (`teacher.ema`).

The average is float32 and follows the optimizer's float32 weights. The teacher has the average in its own dtype. With a
distributed optimizer each rank averages its part of a parameter, and the ranks put the teacher's parameter together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from megatron_oprd.hf.load import named_parameters
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import Heads


@dataclass(frozen=True)
class Part:
    """The part of one student parameter that this rank averages: elements of the flattened parameter."""

    parameter: torch.nn.Parameter
    start: int
    end: int
    group: dist.ProcessGroup | None  # the ranks that have the other parts; None: this rank has all elements

    def weights(self) -> torch.Tensor:
        """Return the optimizer's weights [elements] of this part, or the student's if the optimizer has no copy."""
        copy: torch.Tensor | None = getattr(self.parameter, "main_param", None)
        if copy is not None:
            return copy.detach().view(-1)
        return self.parameter.detach().view(-1)[self.start : self.end]


@dataclass(frozen=True)
class AveragedParameter:
    """A parameter of the student, the average of its values, and the teacher's tensors that have this average."""

    part: Part
    values: torch.Tensor  # [elements] float32: the average of this rank's part
    tensors: tuple[torch.Tensor, ...]  # of the teacher: the parameter, or its first rows

    def fill(self, flat: torch.Tensor) -> None:
        """Fill the beginning of the flattened parameter, which has no more elements than `flat`, on this rank.

        Elements of other ranks become 0, so that a sum over `part.group` is the average.
        """
        end = min(self.part.end, len(flat))
        if self.part.group is not None:
            flat.zero_()
        if self.part.start < end:
            flat[self.part.start : end] = self.values[: end - self.part.start]


class TeacherAverage:
    """The exponential moving average of the student's weights that a teacher runs with.

    Args:
        student: the student's chunks.
        optimizer: the student's optimizer.
        teacher: the teacher's chunks, in the student's layout, with the weights from which the average starts.
        heads: the LM heads of an output-space objective on this rank, if any; the teacher's follows too.
        rate: `teacher.ema`, the share of the average that an update keeps.
    """

    def __init__(
        self, student: Stage, optimizer: MegatronOptimizer, teacher: Stage, heads: Heads | None, rate: float
    ) -> None:
        self.rate = rate
        self.parameters: dict[str, AveragedParameter] = {}  # by global name
        parts = dict(_parts(student, optimizer))
        for name, tensors in _teacher_tensors(student, teacher, heads).items():
            part, first = parts[name], tensors[0].detach().view(-1)
            # A head without the rows of the padding starts from the student's own in these rows.
            values = part.weights().float().clone()
            known = max(min(part.end, len(first)) - part.start, 0)
            values[:known] = first[part.start : part.start + known]
            self.parameters[name] = AveragedParameter(part, values, tuple(tensors))

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student after an update of its weights, and give the teacher the new average.

        Communicates over: with a distributed optimizer, the data- and context-parallel group, and for experts the
        ranks that have the same ones.
        """
        averages = list(self.parameters.values())
        if averages:
            values = [one.values for one in averages]
            torch._foreach_mul_(values, self.rate)
            torch._foreach_add_(values, [one.part.weights().float() for one in averages], alpha=1.0 - self.rate)
        self._fill_teacher()

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the float32 average of each parameter of this rank's stages, one at a time.

        Communicates over: the groups of `update`.
        """
        for name, one in self.parameters.items():
            average = torch.empty(one.part.parameter.shape, dtype=torch.float32, device=one.values.device)
            one.fill(average.view(-1))
            if one.part.group is not None:
                dist.all_reduce(average, group=one.part.group)
            yield name, average

    @torch.no_grad()
    def load(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Continue with averages that `gathered` yielded, by name. Communicates over the groups of `update`."""
        for name, one in self.parameters.items():
            one.values.copy_(averages[name].view(-1)[one.part.start : one.part.end])
        self._fill_teacher()

    def _fill_teacher(self) -> None:
        works = []
        for one in self.parameters.values():
            for tensor in one.tensors:
                flat = tensor.detach().view(-1)
                one.fill(flat)
                if one.part.group is not None:
                    works.append(dist.all_reduce(flat, group=one.part.group, async_op=True))
        for work in works:
            work.wait()


def _teacher_tensors(student: Stage, teacher: Stage, heads: Heads | None) -> dict[str, list[torch.Tensor]]:
    """Return the teacher's tensors that follow each parameter of the student, by the parameter's global name."""
    of_teacher = named_parameters(teacher)
    tensors: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named_parameters(student).items():
        found = [of_teacher[name]] if name in of_teacher else []
        if heads is not None and parameter is heads.student:
            found.append(heads.teachers[0])
        if found:
            tensors[name] = found
    return tensors


def _parts(student: Stage, optimizer: MegatronOptimizer) -> Iterator[tuple[str, Part]]:
    """Yield the name of each parameter of this rank, and the part that this rank averages."""
    owners = _distributed_optimizers(optimizer)
    for name, parameter in named_parameters(student).items():
        owner = owners.get(parameter)
        if owner is None:
            yield name, Part(parameter, 0, parameter.numel(), None)
            continue
        group = owner.data_parallel_group
        start = end = 0
        if parameter in owner.model_param_gbuf_map:
            own = owner._get_model_param_range_map(parameter)["param"]
            start, end = own.start, own.end
        yield name, Part(parameter, start, end, group if group.size() > 1 else None)


def _distributed_optimizers(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, DistributedOptimizer]:
    """Return the distributed optimizer that trains each parameter, if one does."""
    return {
        parameter: single
        for single in optimizer.chained_optimizers
        if isinstance(single, DistributedOptimizer)
        for buffer in single.buffers
        for parameter in buffer.params
    }
