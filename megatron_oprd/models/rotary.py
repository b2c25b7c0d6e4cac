"""Rotary position embedding of a micro-batch."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_oprd.model_spec import LinearScaling, Llama3Scaling, LongRope, ModelSpec, YarnScaling
from megatron_oprd.models.pointwise import kernels_for


class Rotary:
    """Computes cosine and sine of each token's angles, in float32 for every dtype of the model.

    The values equal those of transformers bit for bit. No communication.
    """

    def __init__(self, spec: ModelSpec) -> None:
        exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
        frequencies, scaling = 1.0 / (spec.rope_theta**exponents), spec.rope_scaling
        self.long_above: int | None = None  # tokens; longer sequences use the last row of the frequencies
        self.factor = 1.0
        if isinstance(scaling, LongRope):
            divisors = torch.tensor((scaling.short_factor, scaling.long_factor), dtype=torch.float32)
            frequencies = 1.0 / (divisors * spec.rope_theta**exponents)
            self.long_above, self.factor = scaling.original_positions, scaling.attention_factor
        elif isinstance(scaling, Llama3Scaling):
            frequencies = _stretched(frequencies, scaling)
        elif isinstance(scaling, LinearScaling):
            frequencies = frequencies / scaling.factor
        elif isinstance(scaling, YarnScaling):
            frequencies, self.factor = _yarn_frequencies(spec, scaling), scaling.attention_factor
        # [1 or 2, rotary_dim / 2]. Not a buffer, which a bf16 model would round.
        self.inverse_frequencies = frequencies.view(-1, len(exponents))

    def __call__(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine [tokens, 1, rotary_dim].

        Args:
            positions: [tokens], position in the sequence.
            lengths: [tokens], length of the sequence.
        """
        frequencies = self.inverse_frequencies.to(positions.device)
        token_frequencies = frequencies[:1]
        if self.long_above is not None:
            token_frequencies = torch.where((lengths > self.long_above)[:, None], frequencies[1], frequencies[0])
        angles = positions.float()[:, None] * token_frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos() * self.factor, angles.sin() * self.factor


class RotaryTable:
    """Cosines and sines of all positions in generation, so that a forward pass looks them up with one kernel.

    `data` [positions, 2, rotary_dim]: the cosines, then the sines, negated in the first half of the dimensions. With
    LongRoPE the positions under the short factors come first, then those under the long factors. No communication.
    """

    def __init__(self, rotary: Rotary, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.positions, self.long_above = positions, rotary.long_above
        every = torch.arange(positions, device=device)
        lengths = (0,) if rotary.long_above is None else (0, rotary.long_above + 1)
        parts = []
        for length in lengths:
            cos, sin = rotary(every, torch.full_like(every, length))
            parts.append(torch.cat((cos, signed(sin)), dim=1))
        self.data = torch.cat(parts).to(dtype)

    def __call__(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and signed sines [tokens, 1, 1, rotary_dim].

        Args:
            positions: [tokens] int64, position in the sequence.
            lengths: [tokens] int64, length of the sequence.
        """
        if self.long_above is not None:
            positions = positions + (lengths > self.long_above) * self.positions
        cos, sin = self.data.index_select(0, positions)[:, :, None, None].unbind(1)
        return cos, sin


def _stretched(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Return the inverse frequencies under `Llama3Scaling`."""
    low, high, positions = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_positions
    waves = 2 * math.pi / frequencies
    kept = (positions / waves - low) / (high - low)  # the part of the frequency that is not stretched
    between = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    result = torch.where(waves > positions / low, frequencies / scaling.factor, between)
    return torch.where(waves < positions / high, frequencies, result)


def _yarn_frequencies(spec: ModelSpec, scaling: YarnScaling) -> torch.Tensor:
    """Return the inverse frequencies under `YarnScaling`, [rotary_dim / 2], by the operations of transformers."""
    width = spec.rotary_dim
    wavelengths = spec.rope_theta ** (torch.arange(0, width, 2).float() / width)

    def dimension(rotations: float) -> float:
        """Return the dimension whose frequency makes this many rotations in the original positions."""
        turns = math.log(scaling.original_positions / (rotations * 2 * math.pi))
        return (width * turns) / (2 * math.log(spec.rope_theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    ramp = torch.clamp((torch.arange(width // 2, dtype=torch.float32) - first) / (last - first), 0, 1)
    kept = 1 - ramp
    stretched: torch.Tensor = 1.0 / (scaling.factor * wavelengths) * (1 - kept)
    return stretched + 1.0 / wavelengths * kept


def signed(sin: torch.Tensor) -> torch.Tensor:
    """Return sin [..., rotary_dim] negated in the first half of the dimensions, as `rotate` takes it."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def rotate(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first rotary_dim dimensions of states [tokens, heads, d] by cos and sin [tokens, 1, rotary_dim].

    The two halves of these dimensions are paired, as in Hugging Face's models. On a GPU with Triton, forward and
    backward run one kernel each, which rounds once. Elsewhere they run four, about half of what autograd would run,
    with the same bits.
    """
    rotated: torch.Tensor = _Rotate.apply(states, cos, signed_sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """x cos + swap(x) sin, where swap exchanges the two halves and is its own inverse; sin is signed."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, signed_sin)
        if (kernels := kernels_for(states)) is not None:
            return kernels.rotate(states, cos, signed_sin, backward=False)
        other_half = _swap(states[..., : cos.shape[-1]]).mul_(signed_sin)
        return _add_to_product(states, cos, other_half)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        if (kernels := kernels_for(gradients[0])) is not None:
            return kernels.rotate(gradients[0], cos, signed_sin, backward=True), None, None
        other_half = _swap(gradients[0][..., : cos.shape[-1]] * signed_sin)
        return _add_to_product(gradients[0], cos, other_half), None, None


def _swap(states: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def _add_to_product(states: torch.Tensor, cos: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
    """Return states * cos + summand in the first dimensions, and the other dimensions of states unchanged."""
    width = cos.shape[-1]
    if states.shape[-1] == width:
        return (states * cos).add_(summand)
    result = states.clone()
    result[..., :width].mul_(cos).add_(summand)
    return result
