from __future__ import annotations

import torch

from .fp8_padding import _padded


class Fp8Unpadding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None):
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        groups = zip(inp.split(_padded(m_splits, self.align_size)), m_splits, strict=True)
        return torch.cat([rows[:count] for rows, count in groups])
