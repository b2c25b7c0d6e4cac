"""On-policy representation distillation (OPRD) on Megatron-Core."""

import sys

from megatron_oprd.runtime.loaded_libraries import LoadBeforeTransformerEngine

__version__ = "0.1.0"

sys.meta_path.insert(0, LoadBeforeTransformerEngine())  # Megatron-Core imports Transformer Engine, if it is installed
