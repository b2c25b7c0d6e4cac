from . import attention, distributed, module, ops, optimizers
from .attention import DotProductAttention
from .distributed import CudaRNGStatesTracker, checkpoint
from .module import Fp8Padding, Fp8Unpadding, GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm
from .quantization import autocast, fp8_autocast, fp8_model_init, is_fp8_available, quantized_model_init
from .tensor import Float8Tensor, QuantizedTensor
from .utils import get_device_compute_capability

__all__ = [
    "CudaRNGStatesTracker",
    "DotProductAttention",
    "Float8Tensor",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "QuantizedTensor",
    "RMSNorm",
    "attention",
    "autocast",
    "checkpoint",
    "distributed",
    "fp8_autocast",
    "fp8_model_init",
    "get_device_compute_capability",
    "is_fp8_available",
    "module",
    "ops",
    "optimizers",
    "quantized_model_init",
]
