"""A plugin of vLLM: the weight transfer backend `megatron_oprd_buckets`.

It is installed into the server's environment and imports nothing of megatron_oprd.
"""

BACKEND = "megatron_oprd_buckets"


def register() -> None:
    """Register the backend. vLLM calls this in each of its processes, perhaps more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "megatron_oprd_vllm.bucket_engine", "BucketEngine")
