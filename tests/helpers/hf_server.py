"""A rollout server inside the process of the test: it loads real buckets into a model of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.bucket_group import (
    BucketGroup,
    GroupFailed,
    GroupInfo,
    join_group,
    receive_bucket,
)
from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.buckets import BadBucket, Update, read_bucket
from megatron_oprd.rollout.server_client import Answer, GenerateRequest, ServerClient, ServerError, VersionSpan


class HFServer(ServerClient):
    """Answers like a vLLM server, with transformers. Its state lies in a folder, so that all ranks reach it.

    Args:
        folder: for its state; every rank passes the same one.
        model: a Hugging Face folder; only its configuration is used.
        fault: what it does wrong: `old head`, `skipped bucket`, `old cache`, or nothing.
    """

    workers = 2  # that receive buckets through process groups, as those of a tensor-parallel server

    def __init__(self, folder: Path, model: Path, fault: str = "") -> None:
        super().__init__("localhost:1")
        self.groups: dict[str, list[BucketGroup]] = {}
        self.folder, self.fault = folder, fault
        self.model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
        self.model.float().eval()
        self.tensors: dict[str, torch.Tensor] = {}
        self.cache: dict[tuple[int, ...], torch.Tensor] = {}  # log-probabilities of the next token after a prompt
        self.calls: list[str] = []
        self.label = "default"
        folder.mkdir(exist_ok=True)

    def max_model_len(self) -> int:
        return 64

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def start_weight_update(self) -> None:
        self.calls.append("start")
        for path in self.folder.glob("*.json"):
            path.unlink()

    def init_weight_transfer(self, info: Mapping[str, Any]) -> None:
        self.groups[info["group"]] = self._on_workers(
            lambda worker: join_group(GroupInfo(**info), worker, self.workers, torch.device("cpu"))
        )

    def update_weights(self, info: Mapping[str, Any]) -> None:
        info = dict(info)
        if group := info.get("group"):
            received = self._on_workers(lambda worker: receive_bucket(self.groups[group][worker], info["layout"]))
            assert all(equal_tensors(received[0], other) for other in received)
            info["path"] = str(self.folder / f"{group}-{len(list(self.folder.glob(f'{group}*.json')))}.safetensors")
            save_file(received[0], info["path"])
        (self.folder / f"{Path(info['path']).stem}.json").write_text(json.dumps(info))

    def _on_workers(self, function: Callable[[int], Any]) -> list[Any]:
        """Call a function for each worker at the same time."""
        with ThreadPoolExecutor(self.workers) as threads:
            try:
                return list(threads.map(function, range(self.workers)))
            except GroupFailed as error:
                raise ServerError(f"{self.address}: {error}") from None

    def finish_weight_update(self, version: str) -> None:
        self.calls.append("finish")
        update, tensors = Update(), {}
        try:
            for path in sorted(self.folder.glob("*.json")):
                info = json.loads(path.read_text())
                tensors |= read_bucket(info["path"], info["checksums"])
                update.add(set(info["checksums"]), info["version"], info["total_tensors"])
            update.check_complete()
        except BadBucket as error:
            raise ServerError(f"{self.address}: {error}") from None
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self._load(self.tensors)
        self.label = version

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.fault == "skipped bucket":  # a server that drops weights after it has counted them
            tensors = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
        head = self.model.lm_head.weight.detach().clone()
        state, names = self.model.state_dict(), self.model.config
        tensors = stack_experts(tensors, getattr(names, "num_experts", 0), getattr(names, "num_hidden_layers", 0))
        assert tensors.keys() <= state.keys(), tensors.keys() - state.keys()
        self.model.load_state_dict(tensors, strict=False)
        if self.fault == "old head":
            self.model.lm_head.weight = torch.nn.Parameter(head)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")
        if self.fault != "old cache":
            self.cache.clear()

    def weight_info(self) -> str:
        return self.label

    @torch.no_grad()
    def _logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.model(torch.tensor([list(tokens)])).logits[0].log_softmax(-1)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        values = self._logprobs(token_ids)[:-1]
        return values.gather(1, torch.tensor(list(token_ids[1:]))[:, None])[:, 0].tolist()

    def generate(self, request: GenerateRequest, on_tokens=None, *, timeout_seconds=None) -> Answer:
        tokens, logprobs = list(request.prompt_ids), []
        for _ in range(request.max_new_tokens):
            key = tuple(tokens)
            if key not in self.cache:
                self.cache[key] = self._logprobs(tokens)[-1]
            tokens.append(int(self.cache[key].argmax()))
            logprobs.append(float(self.cache[key].max()))
        answer = tuple(tokens[len(request.prompt_ids) :])
        return Answer(answer, "length", (VersionSpan(self.label, 0, len(answer)),), tuple(logprobs))


def equal_tensors(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Return True if both have the same names and values."""
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def stack_experts(tensors: dict[str, torch.Tensor], experts: int, layers: int) -> dict[str, torch.Tensor]:
    """Return the tensors with the experts of each layer in one tensor, as transformers 5 has them in memory."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.down_proj.weight" in tensors:
            down, gate, up = (
                [tensors[f"{prefix}.{expert}.{part}_proj.weight"] for expert in range(experts)]
                for part in ("down", "gate", "up")
            )
            rest[f"{prefix}.down_proj"] = torch.stack(down)
            rest[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
    return rest
