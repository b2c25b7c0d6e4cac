"""Load weight buckets from files or process groups into vLLM's model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from megatron_oprd_vllm.bucket_group import BucketGroup, GroupInfo, join_group, receive_bucket
from megatron_oprd_vllm.buckets import BadBucket, Update, compare_checksums, read_bucket


@dataclass
class BucketInitInfo(GroupInfo, WeightTransferInitInfo):
    """The place where a process group meets. Files need none."""


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """The source and the content of a bucket: a safetensors file, or the next buffer of a process group."""

    version: str  # of the weights; equal in all buckets of an update
    total_tensors: int  # of the complete update
    checksums: dict[str, int]  # of each tensor of the bucket, by name
    path: str = ""  # the safetensors file
    group: str = ""  # name of the process group, if there is no file
    layout: list[tuple[str, str, list[int]]] = field(default_factory=list)  # of the buffer


class BucketEngine(WeightTransferEngine[BucketInitInfo, BucketInfo]):
    """Loads buckets with vLLM's layerwise reload, which restores and processes the weights of one layer at a time."""

    init_info_cls = BucketInitInfo
    update_info_cls = BucketInfo
    supports_draft_weight_update = False

    _groups: dict[str, BucketGroup]  # of the open update, by name; each rank of the trainer that sends has one

    def init_transfer_engine(self, init_info: BucketInitInfo) -> None:
        """Enter a process group for the open update. Raises GroupFailed if the trainer does not answer."""
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._groups[init_info.group] = join_group(init_info, worker, parallel.world_size_across_dp, self.device)

    def start_weight_update(self) -> None:
        """Begin an update. Nothing may be generated until it is finished."""
        self._groups = {}
        self._forget_expert_kernels()
        initialize_layerwise_reload(self.model)
        self._update = Update()
        self._missing = {name for name, _ in self.model.named_parameters()} - self._tied_parameters()

    def receive_weights(self, update_info: BucketInfo) -> None:
        """Load one bucket.

        Raises:
            BadBucket: the bucket is damaged, or the model has no tensor of this name and shape.
            GroupFailed: the bucket did not arrive.
        """
        checksums = update_info.checksums
        self._update.add(set(checksums), update_info.version, update_info.total_tensors)
        if update_info.group:
            tensors = receive_bucket(self._groups[update_info.group], update_info.layout)
            compare_checksums(tensors, checksums, "a bucket")
        else:
            tensors = read_bucket(update_info.path, checksums)
        self._load(tensors)

    def finish_weight_update(self) -> None:
        """Complete the update. Raises BadBucket if a tensor is missing or a parameter of the model got no weights."""
        self._update.check_complete()
        if self._missing:
            raise BadBucket(
                f"version {self._update.version}: {len(self._missing)} parameters of the server's model got no "
                f"weights, the first is {min(self._missing)}"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_heads()
        for group in self._groups.values():
            group.close()
        self._groups = {}

    def shutdown(self) -> None:
        """Do nothing: groups end with their update."""

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        current = ""

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal current
            for current, tensor in tensors.items():  # noqa: UP028  # errors name `current`
                yield current, tensor

        try:
            loaded = self.model.load_weights(weights())
        except Exception as error:
            shape = list(tensors[current].shape) if current else []
            problem = str(error) or type(error).__name__
            raise BadBucket(f"the server's model does not accept {current} of shape {shape}: {problem}") from error
        self._missing -= set(loaded)

    def _tied_parameters(self) -> set[str]:
        """Return the names of the LM head's parameters if the head is tied to the embedding and gets no weights."""
        if not getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            return set()
        return {
            f"{prefix}.{name}"
            for prefix, module in self.model.named_modules()
            if isinstance(module, ParallelLMHead)
            for name, _ in module.named_parameters()
        }

    def _forget_expert_kernels(self) -> None:
        """Let experts be packed as at the first loading: an update on a CPU would leave out the packing."""
        if current_platform.is_cpu():
            for module in self.model.modules():
                method = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None

    def _repack_heads(self) -> None:
        """Pack the LM heads again on a CPU.

        A head multiplies with a packed copy of its weight. The reload renews that copy only if the head gets weights.
        """
        if current_platform.is_cpu():
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
