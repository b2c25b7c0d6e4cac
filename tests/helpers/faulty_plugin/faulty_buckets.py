"""A weight transfer backend for vLLM that makes the mistake named in the file $FAULT_FILE, for tests of the canary.

`stale head`: the LM head multiplies with a packed copy of its old weight, as vLLM does on some CPUs after an update of
tied embeddings. `skipped bucket`: a bucket is counted but not loaded.
"""

import os
from pathlib import Path


def register() -> None:
    """Register the backend `faulty_buckets`."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "faulty_buckets" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("faulty_buckets", _engine_class())


def _engine_class() -> type:
    import torch
    from megatron_oprd_vllm.bucket_engine import BucketEngine

    class FaultyEngine(BucketEngine):
        def _load(self, tensors):
            if _fault() == "skipped bucket" and any("layers.1.mlp" in name for name in tensors):
                self._missing = {name for name in self._missing if "layers.1" not in name}
            else:
                super()._load(tensors)

        def start_weight_update(self):
            self._old_head = self.model.lm_head.weight.detach().clone()
            super().start_weight_update()

        def _repack_heads(self):
            super()._repack_heads()
            if _fault() == "stale head":
                old = self._old_head
                self.model.lm_head.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, old, bias)

    return FaultyEngine


def _fault() -> str:
    path = Path(os.environ["FAULT_FILE"])
    return path.read_text() if path.exists() else ""
