from __future__ import annotations

import torch

from ...common.recipe import MXFP8BlockScaling
from ..quantization import FP8GlobalStateManager


def _padded(m_splits: list[int], align_size: int | None) -> list[int]:
    if align_size is None:
        align_size = 32 if isinstance(FP8GlobalStateManager.get_fp8_recipe(), MXFP8BlockScaling) else 16
    return [-(-rows // align_size) * align_size for rows in m_splits]


class Fp8Padding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None):
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Rows of zeros after each group of [tokens, hidden], up to whole FP8 tiles."""
        targets = _padded(m_splits, self.align_size)
        groups = zip(inp.split(m_splits), targets, strict=True)
        padded = [torch.nn.functional.pad(rows, (0, 0, 0, target - len(rows))) for rows, target in groups]
        return torch.cat(padded), targets
