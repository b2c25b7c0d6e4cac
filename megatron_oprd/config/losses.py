"""Sections about the loss: on hidden states and on next-token distributions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from megatron_oprd.config.loss_schedule import ScheduleConfig
from megatron_oprd.config.section import NATS, STEPS, TOKENS, PathText, Section
from megatron_oprd.config.yaml_core import load_yaml


class StateMapConfig(Section):
    """A trained map M from the student's hidden states to the teacher's width; the export does not contain it."""

    kind: Literal["none", "linear", "mlp"] = Field(
        "none", description="no map, a matrix, or two matrices with GELU between them; needs one teacher and no bridge"
    )
    hidden_multiple: int = Field(4, ge=1, description="mlp: its inner width, as a multiple of the student's width")
    init: Literal["random", "closed_form"] = Field(
        "random",
        description="first matrices: random, or for kind linear a ridge regression of the teacher's states on the "
        "student's at the tokens of the first step (closed_form)",
    )
    lr: float | None = Field(None, gt=0.0, description="peak learning rate of the map; null: optimizer.lr")

    @model_validator(mode="after")
    def _closed_form_is_linear(self) -> StateMapConfig:
        if self.init == "closed_form" and self.kind != "linear":
            raise ValueError(
                "loss.representation.map.init=closed_form fits a matrix, and loss.representation.map.kind="
                f"{self.kind}; use kind linear, or init random"
            )
        return self


class RepresentationConfig(Section):
    """The loss on hidden states."""

    weight: float = Field(1.0, ge=0.0, description="weight of this loss; 0 leaves it out. Default 10 with a bridge")
    layers: Literal["all", "last", "even", "odd"] | list[int] = Field(
        "all", description="student layers to compare, numbered from 1; even is 1, 3, 5, ... and odd 2, 4, 6, ..."
    )
    pairs: list[tuple[int, int]] | None = Field(
        None,
        description="explicit pairs (student layer, teacher layer) in place of layers, or the path of a YAML file with "
        "`pairs`, as `megatron-oprd prune` writes it",
    )
    positions: Literal["all", "last", "last_k", "first_k"] = Field("last_k", description="response tokens to compare")
    k: int = Field(2000, ge=1, description="number of tokens for last_k and first_k", json_schema_extra=TOKENS)
    normalize: Literal["none", "l2"] = Field(
        "none", description="scale each hidden state to length 1 first (l2). Default l2 with a bridge or a map"
    )
    layer_weights: Literal["equal", "inverse_square"] | list[Annotated[float, Field(gt=0.0)]] = Field(
        "equal",
        description="factors of the layers' losses: 1 (equal), one over the teacher's mean square at the layer "
        "(inverse_square), or a list in the order of the compared layers",
    )
    aggregation: Literal["sequence_mean", "token_mean"] = Field(
        "sequence_mean", description="mean over the tokens of each response first, or over all tokens at once"
    )
    final_norm: bool = Field(True, description="compare the last layer after the model's final norm")
    shift: Literal[0, -1] = Field(0, description="0: the hidden state at a token; -1: at the token before")
    bridge: PathText | None = Field(
        None, description="folder that bridge.fit wrote (OPRD-Bridge); null: compare as they are (OPRD-Vanilla)"
    )
    train_bridge: bool = Field(False, description="also train the student's side of the bridge")
    map: StateMapConfig = StateMapConfig()

    @field_validator("pairs", mode="before")
    @classmethod
    def _read_pairs_file(cls, value: Any) -> Any:
        """Replace the path of a file by its pairs, so that the resolved configuration does not depend on the file."""
        if not isinstance(value, str):
            return value
        pairs = _pairs_of(Path(os.path.expanduser(value)))
        if not isinstance(pairs, list) or not all(isinstance(pair, list) for pair in pairs):
            raise ValueError("the file must have `pairs`, a list of [student layer, teacher layer]")
        return [tuple(pair) for pair in pairs]

    @model_validator(mode="before")
    @classmethod
    def _use_defaults_of_a_map(cls, values: Any) -> Any:
        """Use other defaults with a bridge or a map; the resolved configuration contains them."""
        if isinstance(values, dict) and values.get("bridge") is not None:
            return {"weight": 10.0, "normalize": "l2", **values}
        match values:
            case {"map": {"kind": "linear" | "mlp"}}:
                return {"normalize": "l2", **values}
        return values

    @model_validator(mode="after")
    def _train_bridge_needs_a_bridge(self) -> RepresentationConfig:
        if self.train_bridge and self.bridge is None:
            raise ValueError(
                "loss.representation.train_bridge=true needs loss.representation.bridge; name one or use false"
            )
        return self

    @model_validator(mode="after")
    def _maps_or_a_bridge(self) -> RepresentationConfig:
        if self.map.kind != "none" and self.bridge is not None:
            raise ValueError(
                f"loss.representation.map.kind={self.map.kind} and loss.representation.bridge both map the student's "
                "hidden states; use kind none, or bridge null"
            )
        return self

    @model_validator(mode="after")
    def _inverse_square_needs_lengths(self) -> RepresentationConfig:
        if self.layer_weights == "inverse_square" and self.normalize == "l2":
            raise ValueError(
                "loss.representation.layer_weights=inverse_square has no effect on states of length 1; use equal, or "
                "loss.representation.normalize=none"
            )
        return self

    @property
    def has_map(self) -> bool:
        """Return True if a trained map leads to the teacher's width."""
        return self.map.kind != "none"

    @property
    def trains_maps(self) -> bool:
        """Return True if the optimizer updates maps beside the student."""
        return self.train_bridge or self.has_map


def _pairs_of(path: Path) -> Any:
    """Return the value of `pairs` in a YAML file, or None. Raises ValueError for a file that cannot be read."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise ValueError("the file is not YAML") from None
    return values.get("pairs") if isinstance(values, dict) else None


class OutputConfig(Section):
    """The loss on next-token distributions; docs/losses.md describes the objectives."""

    objective: Literal["none", "sampled", "topk_surrogate", "topk_kl", "full_kl"] = Field(
        "none", description="the objective; none leaves this loss out"
    )
    weight: float = Field(1.0, gt=0.0, description="weight of this loss")
    k: int = Field(16, ge=1, description="number of tokens of the top-k objectives", json_schema_extra=TOKENS)
    support: Literal["student", "teacher", "union"] = Field("student", description="whose top-k tokens are compared")
    tail_bucket: bool = Field(False, description="topk_kl: treat all other tokens as one more outcome")
    direction: Literal["reverse", "forward", "jsd", "skew_reverse", "skew_forward", "adaptive"] = Field(
        "reverse",
        description="KL of student to teacher, of teacher to student, Jensen-Shannon divergence, KL to a mixture of "
        "both, or both KL with weights that depend on where they differ (adaptive)",
    )
    beta: float = Field(0.5, ge=0.0, le=1.0, description="mixture of jsd: forward at 0, reverse at 1")
    skew: float = Field(
        0.1, ge=0.0, lt=1.0, description="share of the first distribution in the mixture of skew_reverse, skew_forward"
    )
    forward_above_entropy: float | None = Field(
        None,
        ge=0.0,
        description="sampled: add the forward KL on the teacher's top k where its entropy is above this; null: nowhere",
        json_schema_extra=NATS,
    )
    importance: float = Field(
        0.0,
        ge=0.0,
        description="sampled: weigh each token by 1 + importance times the share of the response's disagreement that "
        "lies at this token or after it; 0: all tokens count alike",
    )
    teacher_temperature: float = Field(1.0, gt=0.0, description="temperature of the teacher's distribution")
    positions: Literal["all", "last", "last_k", "first_k"] = Field("all", description="response tokens to compare")
    positions_k: int = Field(
        2000, ge=1, description="number of tokens for last_k and first_k", json_schema_extra=TOKENS
    )
    aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="mean over all tokens at once, or over the tokens of each response first"
    )
    chunk_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] | None = Field(
        "auto",
        description="tokens whose logits are in memory at one time; auto: 2048, fewer if they need more than 1 GiB, "
        "or if `recompute: auto` finds nothing else that fits; null: those of a whole micro-batch",
        json_schema_extra=TOKENS,
    )
    metrics_every: int = Field(
        10, ge=0, description="log the metrics output/... at step 1, every so many steps and at the end; 0: never",
        json_schema_extra=STEPS,
    )  # fmt: skip

    @property
    def mixture(self) -> float:
        """Return the share that the mixture of `direction` depends on: `beta`, or `skew` of a skew divergence."""
        return self.skew if self.direction.startswith("skew") else self.beta

    @model_validator(mode="after")
    def _entropy_belongs_to_sampled(self) -> OutputConfig:
        if self.forward_above_entropy is not None and self.objective != "sampled":
            raise ValueError(
                f"loss.output.forward_above_entropy={self.forward_above_entropy:g} adds to the objective sampled, and "
                f"loss.output.objective={self.objective}; use sampled or null"
            )
        return self

    @model_validator(mode="after")
    def _importance_needs_complete_responses(self) -> OutputConfig:
        if not self.importance:
            return self
        for key, needed in (("objective", "sampled"), ("positions", "all"), ("forward_above_entropy", None)):
            if getattr(self, key) != needed:
                raise ValueError(
                    f"loss.output.importance={self.importance:g} weighs the sampled tokens of complete responses, and "
                    f"loss.output.{key}={getattr(self, key)}; use {'null' if needed is None else needed}, or "
                    "importance 0"
                )
        return self


class FlowConfig(Section):
    """The loss on hidden flow: how states turn from position to position of a response (PHF); docs/methods.md."""

    weight: float = Field(0.0, ge=0.0, description="weight of this loss; 0 leaves it out")
    layers: Literal["all", "last", "even", "odd"] | list[int] = Field(
        "all", description="student layers to compare, as in loss.representation.layers"
    )
    positions: int = Field(
        128, ge=2, description="most positions of a response, spread evenly", json_schema_extra=TOKENS
    )
    direction: float = Field(0.25, ge=0.0, description="share of the directions between neighbouring positions")
    geometry: float = Field(0.25, ge=0.0, description="share of the angles between the directions of one layer")
    adjacent: float = Field(
        0.5, ge=0.0, description="share of the angles between the directions of neighbouring layers"
    )

    @model_validator(mode="after")
    def _one_share_at_least(self) -> FlowConfig:
        if self.weight and not (self.direction or self.geometry or self.adjacent):
            raise ValueError(
                "loss.flow.direction, geometry and adjacent are all 0; set one above 0, or loss.flow.weight=0"
            )
        return self


class LossConfig(Section):
    """The loss: a weighted sum of its parts."""

    representation: RepresentationConfig = RepresentationConfig()
    output: OutputConfig = OutputConfig()
    flow: FlowConfig = FlowConfig()
    schedule: ScheduleConfig | None = Field(
        None, description="change the weights of both parts from step to step; null: they are constant"
    )

    def at(self, step: int) -> LossConfig:
        """Return the loss of the update after `step` updates: weights times multipliers, and no schedule.

        A part whose multiplier is 0 is turned off.
        """
        if self.schedule is None:
            return self
        of_layers, of_output = self.schedule.multipliers(step)
        representation, output = self.representation, self.output
        output_changes = {"weight": output.weight * of_output} if of_output else {"objective": "none"}
        return self.model_copy(
            update={
                "representation": representation.model_copy(update={"weight": representation.weight * of_layers}),
                "output": output.model_copy(update=output_changes),
                "schedule": None,
            }
        )

    def begins_layers(self, step: int) -> bool:
        """Return True if the update after `step` updates is the first one that compares hidden states."""
        return self.at(step).reads_layers and not any(self.at(earlier).reads_layers for earlier in range(step))

    @property
    def only_layers(self) -> LossConfig:
        """Return the loss without distributions and without hidden flow."""
        no_output, no_flow = {"objective": "none"}, {"weight": 0.0}
        return self.model_copy(
            update={"output": self.output.model_copy(update=no_output), "flow": self.flow.model_copy(update=no_flow)}
        )

    def metrics(self, step: int) -> dict[str, float]:
        """Return the multipliers of the update after `step` updates under their names in metrics.jsonl, if any."""
        if self.schedule is None:
            return {}
        return dict(zip(("rep/multiplier", "output/multiplier"), self.schedule.multipliers(step), strict=True))

    @property
    def reads_layers(self) -> bool:
        """Return True if the loss compares hidden states."""
        return self.representation.weight > 0

    @property
    def reads_output(self) -> bool:
        """Return True if the loss compares next-token distributions."""
        return self.output.objective != "none"

    @property
    def reads_flow(self) -> bool:
        """Return True if the loss compares the flow of hidden states."""
        return self.flow.weight > 0

    @property
    def first_tokens(self) -> int | None:
        """Return after how many sampled tokens of a response no loss compares one; None if the last one is compared."""
        if self.reads_flow:  # its positions reach from the first sampled token to the last one
            return None
        representation, output = self.representation, self.output
        terms = [(representation.positions, representation.k)] if self.reads_layers else []
        terms += [(output.positions, output.positions_k)] if self.reads_output else []
        return max(k for _, k in terms) if all(positions == "first_k" for positions, _ in terms) else None

    @model_validator(mode="after")
    def _one_part_at_least(self) -> LossConfig:
        if not (self.reads_layers or self.reads_output or self.reads_flow):
            raise ValueError(
                "loss.representation.weight=0 and loss.output.objective=none leave nothing to learn; set one of them"
            )
        return self

    @model_validator(mode="after")
    def _schedule_leaves_one_part_at_every_step(self) -> LossConfig:
        # Between two points a multiplier is 0 only if it is 0 at both, so that the points speak for all steps.
        for step in self.schedule.steps if self.schedule else ():
            now = self.at(step)
            if not (now.reads_layers or now.reads_output or now.reads_flow):
                raise ValueError(
                    f"loss.schedule leaves nothing to learn at step {step}, where the multiplier of every part that is "
                    "in use is 0; let one of them be above 0"
                )
        return self
