"""A stock GPTModel of Megatron-Core, saved and loaded by Megatron-Core as Megatron-LM does, beside our own model."""

from __future__ import annotations

import enum
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.models.gpt import GPTModel

from megatron_oprd.checkpoint.megatron_format import save_model
from megatron_oprd.checkpoint.megatron_lm import iteration_folder, open_model
from megatron_oprd.checkpoint.megatron_lm_write import save_megatron_lm
from megatron_oprd.checkpoint.weights import check_weights, load_weights
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import build_model
from megatron_oprd.models.compare import all_states
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.runtime.files import write_json
from tests.helpers.te_models import EXPERTS, VOCAB, build, relative

TOKENS = torch.randint(VOCAB - 9, (13,), generator=torch.Generator().manual_seed(4))
# Settings of stock models: their layers stacked or apart, dense, sparse and both, with the families' norms and biases.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "layers_apart": {"apart": True},
    "tied_with_bias": {"qk_layernorm": False, "add_qkv_bias": True, "tied": True},
    "padded_vocabulary": {"real_vocabulary": VOCAB - 9},
    "experts": EXPERTS,
    "shared_expert": {
        **{**EXPERTS, "qk_layernorm": False, "add_qkv_bias": True},
        **{"moe_shared_expert_intermediate_size": 48, "moe_shared_expert_gate": True},
    },
    "dense_and_sparse": {**EXPERTS, "moe_layer_freq": [0, 1, 1]},
}


class Backend(enum.Enum):
    """Stands for the enums among Megatron-LM's arguments, whose pickles refer to their class."""

    FLASH = 1


def stock_model(spec: str, **settings: Any) -> GPTModel:
    """Build a stock model with three layers of the "local" or the "te" spec."""
    return build(spec, **{"num_layers": 3, **settings})


def arguments_of(model: GPTModel, **changes: Any) -> Namespace:
    """Return what Megatron-LM stores as the arguments of a stock model, besides hundreds that it does not depend on."""
    config = model.config
    copied = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    copied += ("normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "moe_layer_freq", "moe_router_topk")
    values = {
        **{name: getattr(config, name) for name in (*copied, "moe_ffn_hidden_size", "moe_router_pre_softmax")},
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": config.moe_shared_expert_gate,
        "group_query_attention": True,
        "norm_epsilon": config.layernorm_epsilon,
        "num_experts": config.num_moe_experts,
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        "max_position_embeddings": 64,
        "seq_length": 64,
        "padded_vocab_size": model.vocab_size,
        "attention_backend": Backend.FLASH,
        "params_dtype": torch.bfloat16,
        "mtp_num_layers": None,
    }
    return Namespace(**{**values, **changes})


def save_as_megatron_lm(
    model: GPTModel, root: Path, topology: Topology, *, apart: bool = False, **changes: Any
) -> Path:
    """Save a stock model as Megatron-LM does after iteration 100, with state beside the model. Return the root."""
    folder = root / "iter_0000100"
    on_rank_zero(lambda: folder.mkdir(parents=True))
    state = {
        "args": arguments_of(model, **changes),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "opt_param_scheduler": {"max_lr": 1e-5},
        "rng_state": [{"random_rng_state": torch.get_rng_state()}],
        "model": model.sharded_state_dict(metadata=_metadata(topology, apart)),
    }
    dist_checkpointing.save(state, str(folder))
    on_rank_zero(lambda: (root / "latest_checkpointed_iteration.txt").write_text("100"))
    return root


def load_stock(model: GPTModel, root: Path, topology: Topology, *, apart: bool = False) -> GPTModel:
    """Fill a stock model as Megatron-LM does; a tensor or an extra state that is missing raises an error."""
    return _fill(model, iteration_folder(root), _metadata(topology, apart))


def load_stock_from_own(model: GPTModel, folder: Path, topology: Topology) -> GPTModel:
    """Fill a stock model from a checkpoint of this package, with nothing but functions of Megatron-Core."""
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    return _fill(model, folder, {**metadata, "dp_cp_group": topology.groups.dp_cp})


def _fill(model: GPTModel, folder: Path, metadata: dict[str, Any]) -> GPTModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(state, str(folder))["model"])
    return model


def _metadata(topology: Topology, apart: bool) -> dict[str, Any]:
    """Return the metadata that Megatron-LM gives to the model's `sharded_state_dict`."""
    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": topology.groups.dp_cp,
    }
    return {**metadata, **({"non_homogeneous_layers": True} if apart else {})}


@torch.no_grad()
def stock_logits(model: GPTModel) -> torch.Tensor:
    """Return the logits [tokens, vocabulary] of a stock model. Communicates over the tensor-parallel group."""
    length = len(TOKENS)
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    with cpu_stand_ins.cpu_devices():
        logits = model(TOKENS[None], torch.arange(length)[None], mask)[0].clone()
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits)


def read_with_arguments(
    root: Path, folder: Path, topology: Topology, vocabulary: int | None = None
) -> tuple[Stage, ModelSpec]:
    """Make a config.json in the new `folder` from a checkpoint's arguments, build that model and load the checkpoint.

    `vocabulary` replaces the padded vocabulary in config.json.
    """

    def describe() -> None:
        stored = open_model(root)
        assert stored.arguments is not None
        folder.mkdir()
        write_json(folder / "config.json", stored.arguments.hf_config(vocabulary or stored.padded_vocabulary))

    on_rank_zero(describe)
    spec = read_model_spec(folder)
    check_weights(root, spec)
    stage = build_model(spec, topology, torch.float32)
    load_weights(stage, root, spec, topology)
    return stage, spec


def train_one_step(stage: Stage) -> None:
    """Change all weights of a stage by one step of gradient descent on the next-token loss. No pipeline stages."""
    rows = torch.arange(len(TOKENS))
    lengths = torch.full_like(rows, len(TOKENS))
    batch = MicroBatch(position_ids=rows, lengths=lengths, bounds=(0, len(TOKENS)), logit_rows=rows)
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(stage[0].run(TOKENS, batch))
    torch.nn.functional.cross_entropy(logits[:-1], TOKENS[1:]).backward()
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.grad is None:  # an expert without tokens
                continue
            if not getattr(parameter, "tensor_model_parallel", False):  # ranks have gradients of their own heads
                dist.all_reduce(parameter.grad)
            parameter -= 0.03 * parameter.grad


def round_trip(spec: str, name: str, folder: Path, topology: Topology) -> dict[str, float]:
    """Save a stock model as Megatron-LM does, read and train it here, write it, and read it with a new stock model.

    Returns: relative distances. "read": from the stock model's logits to ours. "trained": how far a step moves ours.
        "returned": from ours to those of the new stock model. "returned_from_own": the same if the stock model reads a
        checkpoint of this package.
    """
    settings = dict(MODELS[name])
    if spec == "te" and "num_moe_experts" in settings:
        settings["moe_grouped_gemm"] = True
    apart, vocabulary = settings.pop("apart", False), settings.pop("real_vocabulary", VOCAB)
    stock = stock_model(spec, **settings)
    saved = save_as_megatron_lm(stock, folder / "saved", topology, apart=apart)
    stage, model = read_with_arguments(saved, folder / "hf", topology, vocabulary)
    before = all_states(stage, model, topology, TOKENS)["logits"]
    train_one_step(stage)
    after = all_states(stage, model, topology, TOKENS)["logits"]
    save_megatron_lm(stage, folder / "written", model, topology, source=folder / "hf")
    save_model(stage, folder / "own", model, topology, source=folder / "hf")
    fresh = stock_model(spec, **settings)
    returned = stock_logits(load_stock(fresh, folder / "written", topology))
    from_own = stock_logits(load_stock_from_own(fresh, folder / "own", topology))
    return {
        "read": relative(before, stock_logits(stock)[:, :vocabulary]),
        "trained": relative(after, before),
        "returned": relative(returned[:, :vocabulary], after),
        "returned_from_own": relative(from_own[:, :vocabulary], after),
    }
