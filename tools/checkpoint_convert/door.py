"""Make `megatron_oprd` importable, also in processes that a tool starts, from a clone that is not installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

try:
    import megatron_oprd  # noqa: F401  # an installed package takes precedence
except ModuleNotFoundError:
    root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
