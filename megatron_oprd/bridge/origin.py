"""What a configuration says of a bridge's origin: a fit writes it down, a run holds its bridge against it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_oprd import __version__
from megatron_oprd.bridge.record import Bridge, Counts, ModelOrigin, Origin, Positions
from megatron_oprd.bridge.store import check_bridge, read_bridge
from megatron_oprd.checkpoint.weights import content_hash
from megatron_oprd.config import Config
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.types import ModelSpec, UserError


@dataclass(frozen=True)
class BridgeModels:
    """The two models that a bridge joins, as a run has them. `tokenizers`: hashes of those whose ids student and
    teacher read, None where no folder has one."""

    config: Config
    student: ModelSpec
    teacher: PlannedTeacher
    tokenizers: tuple[str | None, str | None]

    def read(self) -> Bridge:
        """The bridge of the configuration, restricted to the pairs of the run. What needs the weights themselves is not
        checked: see `check_hashes`. Raises UserError; no communication."""
        path = self.config.loss.representation.bridge
        assert path is not None  # whoever reads one names it
        bridge = self._check(read_bridge(path), path, *self._models(with_hashes=False))
        if bridge.rank == 1 and self.config.loss.representation.normalize == "l2":
            raise UserError(
                f"{path} has rank 1, and loss.representation.normalize=l2 leaves of one number its sign alone, without "
                "a gradient; use a bridge of a higher rank, or normalize=none"
            )
        return bridge

    def check_hashes(self, bridge: Bridge) -> None:
        """Raise UserError for a bridge of other weights. Reads all weights: let one rank call it."""
        self._check(bridge, str(self.config.loss.representation.bridge), *self._models(with_hashes=True))

    def origin(self) -> Origin:
        """What a fit on `bridge.prompts` prompts writes down before it has read any. Reads all weights."""
        config = self.config
        prompts = config.train.steps * config.rollout.prompts_per_step
        return Origin(
            *self._models(with_hashes=True),
            self._positions(),
            Counts(prompts, sequences=0, tokens=0, held_out_tokens=0),
            method=config.bridge.method,
            coverage=None,
            seed=config.train.seed,
            version=__version__,
        )

    def _check(self, bridge: Bridge, path: str, student: ModelOrigin, teacher: ModelOrigin) -> Bridge:
        pairs, positions = self.teacher.plan.pairs, self._positions()
        return check_bridge(bridge, path, pairs=pairs, student=student, teacher=teacher, positions=positions)

    def _models(self, *, with_hashes: bool) -> tuple[ModelOrigin, ModelOrigin]:
        models = (
            (self.config.student.path, self.student, self.tokenizers[0]),
            (self.teacher.config.path, self.teacher.spec, self.tokenizers[1]),
        )
        student, teacher = (
            ModelOrigin(path, content_hash(path) if with_hashes else None, spec.num_layers, spec.hidden_size, tokenizer)
            for path, spec, tokenizer in models
        )
        return student, teacher

    def _positions(self) -> Positions:
        term = self.config.loss.representation
        return Positions(term.positions, term.k, term.shift, term.final_norm)
