"""Run the cases of tests/numerics/test_te_stand_in.py in processes of their own.

Megatron-Core looks for Transformer Engine at import, so a test process that has imported it cannot run them.

usage: python -m tests.helpers.te_cases WORLD_SIZE FOLDER, with tests/helpers/te_on_cpu first on PYTHONPATH.
The ranks are forked with their imports done. Rank 0 writes {case: figures} to FOLDER/figures.json.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from transformer_engine import on_cpu

from megatron_oprd.config import ParallelConfig
from megatron_oprd.parallel.topology import build_topology
from megatron_oprd.runtime import cpu_stand_ins
from tests.helpers.megatron_lm import round_trip
from tests.helpers.te_models import EXPERTS, build, compare, gradients, load, relative, run

FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}


def set_layout(tensor: int) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    with cpu_stand_ins.cpu_devices():
        tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)


def dense(local: Any, weights: dict, logits: torch.Tensor, **settings: Any) -> dict[str, float]:
    model = load(build("te", **settings), weights)
    return {"logits": relative(run(model), logits), "gradients": compare(model, local)}


def fp8(weights: dict, logits: torch.Tensor) -> dict[str, Any]:
    """Return the FP8 contexts of one pass, and by how much FP8 changes logits and gradients."""
    plain = load(build("te"), weights)
    run(plain)
    model = load(build("te", **FP8, first_last_layers_bf16=True), weights)
    on_cpu.entered.clear()
    moved = relative(run(model), logits)
    return {"contexts": contexts(), "logits": moved, "gradients": relative_gradients(model, plain)}


def contexts() -> list[list]:
    return [[e.kind, e.enabled, type(e.recipe).__name__, e.recipe.fp8_format.name] for e in on_cpu.entered]


def recomputed(weights: dict) -> dict[str, Any]:
    """Recompute every layer in backward, after the context around all layers (of the delayed recipe) has ended."""
    settings = {"fp8": "e4m3", "fp8_recipe": "delayed"}
    kept = load(build("te", **settings), weights)
    again = load(
        build("te", **settings, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        weights,
    )
    on_cpu.entered.clear()
    moved = relative(run(again), run(kept))
    return {"contexts": contexts(), "logits": moved, "gradients": relative_gradients(again, kept)}


def relative_gradients(model: torch.nn.Module, other: torch.nn.Module) -> float:
    ours, theirs = gradients(model), gradients(other)
    return max(relative(ours[name], theirs[name]) for name in theirs)


def stale(weights: dict) -> dict[str, float]:
    """Compare an optimizer step with and without `set_is_first_microbatch`."""
    model = load(build("te", **FP8), weights)
    with torch.no_grad():
        before = run(model)
        for layer in model.decoder.layers:
            layer.mlp.linear_fc2.weight.mul_(2)
        cached = run(model)
        model.set_is_first_microbatch()
        fresh = run(model)
    return {"cached": relative(cached, before), "fresh": relative(fresh, before)}


@torch.no_grad()
def fp8_weights(weights: dict, logits: torch.Tensor) -> dict[str, Any]:
    """Run a frozen model with FP8 weights, as a teacher."""
    on_cpu.entered.clear()
    model = load(build("te", **FP8, fp8_param=True), weights)
    weight = model.decoder.layers[0].mlp.linear_fc2.weight
    moved = relative(run(model), logits)
    return {
        "contexts": [[e.kind, e.grad_enabled, e.preserve_high_precision_init_val] for e in on_cpu.entered],
        "held": sorted({name.split(".")[-2] for name, p in model.named_parameters() if isinstance(p, te.Float8Tensor)}),
        "bytes": weight._data.element_size(),
        "rounding": relative(weight.dequantize(), weights["decoder.layers.0.mlp.linear_fc2.weight"]),
        "logits": moved,
    }


def experts() -> dict[str, float]:
    """TEGroupedMLP beside SequentialMLP, and in FP8, where groups are padded to whole tiles."""
    one_by_one = build("te", **EXPERTS)
    parameters = dict(one_by_one.named_parameters())
    logits, expected = run(one_by_one), gradients(one_by_one)
    figures = {}
    for name, settings in {"grouped": {}, "fp8": FP8}.items():
        grouped = build("te", **EXPERTS, moe_grouped_gemm=True, **settings)
        with torch.no_grad():
            for target, parameter in grouped.named_parameters():
                parameter.copy_(parameters[_one_by_one(target)])
        figures[name] = relative(run(grouped), logits)
        actual = gradients(grouped)
        figures[f"{name}_gradients"] = max(relative(actual[n], expected[_one_by_one(n)]) for n in actual)
    return figures


def _one_by_one(name: str) -> str:
    """mlp.experts.linear_fc1.weight2 -> mlp.experts.local_experts.2.linear_fc1.weight"""
    if ".experts." not in name:
        return name
    head, number = name.split(".weight")
    return head.replace(".experts.", f".experts.local_experts.{number}.") + ".weight"


def context_parallel(rank: int, size: int) -> dict[str, float]:
    """Attention over packed sequences with gaps between them, on all ranks and on one; grouped queries."""
    torch.manual_seed(0)
    used, padded = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 7, 11, 22], [0, 8, 12, 24]))
    query, key, value, probe = (torch.randn(24, heads, 16) for heads in (4, 2, 2, 4))
    chunks = [torch.arange(24)[start:end].chunk(2 * size) for start, end in ((0, 8), (8, 12), (12, 24))]
    own = torch.cat([torch.cat((parts[rank], parts[-1 - rank])) for parts in chunks])
    found = {}
    for name, group, rows in (("one", None, torch.arange(24)), ("all", dist.group.WORLD, own)):
        attention = te.DotProductAttention(4, 16, num_gqa_groups=2, attn_mask_type="padding_causal", cp_group=group)
        inputs = [tensor[rows].requires_grad_() for tensor in (query, key, value)]
        kwargs = {"cu_seqlens_q": used, "cu_seqlens_kv": used, "cu_seqlens_q_padded": padded}
        out = attention(*inputs, qkv_format="thd", **kwargs)
        (out * probe[rows].flatten(-2)).sum().backward()
        found[name] = [out.detach(), *[tensor.grad for tensor in inputs]]
    errors = [relative(part, full[own]) for part, full in zip(found["all"], found["one"], strict=True)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *[x[12:23].transpose(0, 1) for x in (query, key, value)], is_causal=True, enable_gqa=True
    )
    single = relative(found["one"][0][12:23], expected.transpose(0, 1).flatten(-2))
    return {"all_ranks": max(errors), "one_rank": single, "gap": found["one"][0][[7, 23]].abs().max().item()}


def optimizer() -> dict[str, float]:
    """Five steps of FusedAdam and of torch's Adam, with either way to decay."""
    figures = {}
    for decoupled, reference in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
        torch.manual_seed(0)
        ours = torch.nn.Parameter(torch.randn(8, 8))
        theirs = torch.nn.Parameter(ours.detach().clone())
        settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
        fused = te.optimizers.FusedAdam([ours], adam_w_mode=decoupled, **settings)
        plain = reference([theirs], **settings)
        for _ in range(5):
            ours.grad = torch.randn(8, 8)
            theirs.grad = ours.grad.clone()
            fused.step()
            plain.step()
        figures[reference.__name__] = relative(ours.detach(), theirs.detach())
    return figures


def training(weights: dict, folder: Path) -> dict[str, float]:
    """Train two FP8 steps on two data-parallel ranks with the distributed optimizer, and resume after the first.

    Return how far the parameters move in each step, and the distance of the resumed run at the end.
    """
    (folder / "saved").mkdir(exist_ok=True)
    dist.barrier()
    model, trainer = trained(weights)
    start = weights_of(model)
    step(model, trainer)
    first = weights_of(model)
    dist_checkpointing.save(sharded_state(model, trainer), str(folder / "saved"))
    step(model, trainer)
    resumed, resumed_trainer = trained({name: torch.zeros_like(weight) for name, weight in weights.items()})
    state = dist_checkpointing.load(sharded_state(resumed, resumed_trainer, is_loading=True), str(folder / "saved"))
    resumed.module.load_state_dict(state["model"])
    with torch.no_grad():  # parameters in float32 are their own main parameters
        resumed_trainer.load_state_dict(state["optimizer"])
    step(resumed, resumed_trainer)
    last = weights_of(model)
    moved = {"first": relative(first, start), "second": relative(last, first)}
    return {**moved, "resumed": relative(weights_of(resumed), last)}


def trained(weights: dict) -> tuple[Any, Any]:
    model = load(build("te", **FP8), weights)
    with cpu_stand_ins.cpu_devices():
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        ddp = DistributedDataParallel(model.config, settings, model)
        config = OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, use_distributed_optimizer=True)
        return ddp, get_megatron_optimizer(config, [ddp])


def step(model: Any, trainer: Any) -> None:
    model.zero_grad_buffer()
    model.module.set_is_first_microbatch()
    run(model)
    finalize_model_grads([model])
    with cpu_stand_ins.cpu_devices():
        trainer.step()


def weights_of(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def sharded_state(model: Any, trainer: Any, is_loading: bool = False) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "dp_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(),
    }
    weights = model.module.sharded_state_dict(metadata=metadata)
    state = trainer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": state}


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    cpu_stand_ins.install()
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size)
    set_layout(1)
    local = build("local")
    weights = {name: parameter.detach().clone() for name, parameter in local.named_parameters()}
    logits = run(local, packed=False)
    figures: dict[str, Any] = {
        "one_rank": dense(local, weights, logits),
        "fp8": fp8(weights, logits),
        "recomputed": recomputed(weights),
        "stale": stale(weights),
        "fp8_weights": fp8_weights(weights, logits),
        "experts": experts(),
        "context_parallel": context_parallel(rank, size),
        "optimizer": optimizer(),
        "training": training(weights, folder),
    }
    set_layout(size)
    figures["tensor_parallel"] = dense(local, weights, logits)
    figures["sequence_parallel"] = dense(local, weights, logits, sequence_parallel=True)
    for name, parallel in {"dense": {"tensor": size}, "dense_and_sparse": {}}.items():
        topology = build_topology(ParallelConfig(**parallel), torch.device("cpu"), seed=0)
        figures[f"megatron_lm_{name}"] = round_trip("te", name, folder / name, topology)
    if rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    size, context = int(sys.argv[1]), multiprocessing.get_context("fork")
    ranks = [context.Process(target=main, args=(rank, size, Path(sys.argv[2]))) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
