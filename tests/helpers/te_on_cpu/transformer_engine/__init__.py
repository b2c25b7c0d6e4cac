"""A stand-in for Transformer Engine 2.11.0 in plain torch, for tests only: Megatron-Core's own TE modules run on a CPU.

Put the folder above this one first on PYTHONPATH. Names, keywords and defaults are those of the real package, which
tests/unit/test_te_contract.py holds it to; what is here and not there stands in `transformer_engine.on_cpu`. Every FP8
recipe computes as per-tensor current scaling: enough to see where FP8 is on, not how exact a recipe is.
"""

from importlib import metadata

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = metadata.version("transformer_engine")
