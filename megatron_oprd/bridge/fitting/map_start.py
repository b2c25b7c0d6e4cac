"""The closed-form start of linear maps from the student's hidden states (`loss.representation.map.init`)."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from megatron_oprd.bridge.fitting.moments import float64_chunks
from megatron_oprd.bridge.fitting.paired_states import ModelPair
from megatron_oprd.launch.assemble import Run
from megatron_oprd.parallel.rank_zero import on_every_rank
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.types import LayerPair, UserError

RIDGE = 1e-3  # the penalty of W, in units of the mean square of an element of the student's states


def start_maps(run: Run, global_batch: GlobalBatch, step: int) -> None:
    """Replace the random matrices W of all maps by ridge regressions, before the first update that trains them.

    W minimises the sum over the selected tokens of ||W x - y||^2 plus lambda ||W||^2. x is the student's state, y the
    target, divided by its length with `normalize: l2`. lambda is RIDGE / d_S times the sum of ||x||^2.

    Does nothing at other steps, with `init: random`, and for a batch without a selected token.

    Memory: d_S (d_S + d_T) float64 numbers for each layer on this rank, and the targets of one global batch.
    Communicates over: the groups of both models.
    Raises: UserError if states are not finite.
    """
    loss = run.inputs.config.loss
    if loss.representation.map.init != "closed_form" or not loss.begins_layers(step):
        return
    if not global_batch.representation.counts.tokens:
        return
    global_batch = dataclasses.replace(global_batch, loss=global_batch.loss.only_layers)
    setup, student, (teacher,), topology = run.inputs.setup, run.student, run.teachers, run.topology
    (planned,) = setup.teachers.values()
    plan = student.plan.for_loss(global_batch.loss)
    models = ModelPair(setup.student, planned.spec, plan, topology, student.stage, teacher)
    widths = setup.student.hidden_size, planned.spec.hidden_size
    sums = {layer: _ProductSums(*widths, topology.device) for layer in student.maps}

    def add(pair: LayerPair, states: torch.Tensor, targets: torch.Tensor, held_out: torch.Tensor) -> None:
        if global_batch.loss.representation.normalize == "l2":
            targets = torch.nn.functional.normalize(targets.double(), dim=-1)
        sums[pair.student].add(states, targets)

    models.compute_states(global_batch, torch.zeros(len(global_batch.rollouts), dtype=torch.bool), add)
    for of_layer in sums.values():
        for group in topology.token_groups:
            of_layer.all_reduce(group)
    matrices = on_every_rank(lambda: {layer: one.solve(layer) for layer, one in sums.items()})
    for layer, matrix in matrices.items():
        student.maps[layer].parameters["map"].copy_(matrix)


class _ProductSums:
    """Sums over tokens of x x^T [d_S, d_S] and x y^T [d_S, d_T] in float64."""

    def __init__(self, student_width: int, teacher_width: int, device: torch.device) -> None:
        self.student = torch.zeros(student_width, student_width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(student_width, teacher_width, dtype=torch.float64, device=device)

    def add(self, states: torch.Tensor, targets: torch.Tensor) -> None:
        for x, y in float64_chunks(states, targets):
            self.student.addmm_(x.T, x)
            self.cross.addmm_(x.T, y)

    def all_reduce(self, group: dist.ProcessGroup) -> None:
        for products in (self.student, self.cross):
            dist.all_reduce(products, group=group)

    def solve(self, layer: int) -> torch.Tensor:
        """Return W [d_T, d_S] of `start_maps`."""
        diagonal = self.student.diagonal()
        diagonal += RIDGE * diagonal.mean()
        if not torch.isfinite(diagonal).all() or not torch.isfinite(self.cross).all():
            raise UserError(f"hidden states of layer {layer} are NaN or infinite; try another precision")
        return torch.linalg.solve(self.student, self.cross).T
