"""The rollouts of each training step: generated before the step, or beside the training of the step before.

`train.one_step` calls `RolloutSource.next`. With `rollout.ahead: 0` the student's present weights sample the rollouts
of a step. With `rollout.ahead: 1` the rollouts of the next step are submitted before the update, so that an engine on
other devices generates them while the student trains. The weights that sample them are then one update older than the
weights that train on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron_oprd.data.prompts import PromptState
from megatron_oprd.data.sharding import split
from megatron_oprd.parallel.collectives import min_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import RolloutEngine
from megatron_oprd.training.state import PendingStep, TrainState
from megatron_oprd.types import Prompt, Rollout

# (position in the prompts) -> (prompts of a step, position after them)
TakePrompts = Callable[[PromptState], tuple[list[Prompt], PromptState]]


@dataclass(frozen=True)
class RolloutSource:
    """Makes the rollouts of this replica, step by step. It has no state: `TrainState` has the rollouts in progress."""

    engine: RolloutEngine
    take_prompts: TakePrompts
    topology: Topology
    ahead: int  # rollout.ahead
    steps: int  # train.steps: no later step is generated

    def next(self, state: TrainState) -> tuple[list[Rollout], dict[str, float], TrainState]:
        """Return this replica's rollouts of the next step, and start those of the step after it where configured.

        Rollouts that `state` has pending are used, whatever `rollout.ahead` is now. Collective over the world. Raises
        what the engine raises.

        Returns:
            The rollouts; their metrics; and the position of the run once the student has trained on them. The metrics
            are those of the engine's weight transfer, and `rollout/staleness`: the number of updates between the
            weights that sampled the rollouts and the weights that train on them.
        """
        pending, metrics = state.pending, {}
        if pending is None:
            metrics = self.engine.sync_weights(state.step)
            pending = self._submit(state.step, state.prompts, version=state.step)
        rollouts = pending.rollouts
        following = None
        if self.ahead and state.step + 1 < self.steps:
            if pending.version != state.step:
                self._wait_for_all_replicas()
                metrics = self.engine.sync_weights(state.step)
            following = self._submit(state.step + 1, pending.prompts, version=state.step)
        metrics = {**metrics, "rollout/staleness": state.step - pending.version}
        return rollouts, metrics, replace(state, step=state.step + 1, prompts=pending.prompts, pending=following)

    def _wait_for_all_replicas(self) -> None:
        """Return when every replica has its rollouts: replicas share servers, whose weights are replaced next."""
        if self.topology.num_replicas > 1:
            min_over([1.0], dist.group.WORLD, self.topology.device)

    def _submit(self, step: int, position: PromptState, *, version: int) -> PendingStep:
        prompts, position = self.take_prompts(position)
        local_prompts = split(prompts, self.topology.replica_rank, self.topology.num_replicas)
        return PendingStep(version, position, self.engine.submit(local_prompts, step))
