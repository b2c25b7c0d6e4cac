"""Models and workloads of `benchmarks/rollout.py`: random weights, random prompts, and the length of each response."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import transformers

from megatron_oprd.models.build import DTYPES
from megatron_oprd.types import Prompt


@dataclass(frozen=True)
class Shape:
    """A model shape. The weights are random and there is no EOS token."""

    family: Literal["Qwen2", "Qwen3"]
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool
    dtype: str = "fp32"
    deviation: float = 0.02  # standard deviation of the weights

    def build(self, device: torch.device, seed: int = 0) -> transformers.PreTrainedModel:
        """Return Hugging Face's model with random weights on a device."""
        config = getattr(transformers, f"{self.family}Config")(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
            initializer_range=self.deviation,
            eos_token_id=None,
            bos_token_id=None,
            **({"head_dim": self.hidden // self.heads} if self.family == "Qwen3" else {}),
        )
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.dtype])
        try:
            with torch.device(device):
                return getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Workload:
    """Prompts and responses of random lengths between two bounds (included), at most `rows` at a time."""

    name: str
    rows: int
    prompts: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    temperature: float = 0.0

    @property
    def equal(self) -> bool:
        """Return True if all responses have one length and start at the same time."""
        return self.prompts <= self.rows and self.new_tokens[0] == self.new_tokens[1]

    def draw(self, vocabulary: int) -> tuple[list[Prompt], list[int]]:
        """Return the prompts and the number of new tokens for each."""
        generator = torch.Generator().manual_seed(0)

        def draw(low: int, high: int, count: int) -> list[int]:
            return torch.randint(low, high + 1, (count,), generator=generator).tolist()

        lengths, limits = draw(*self.prompt_tokens, self.prompts), draw(*self.new_tokens, self.prompts)
        return [Prompt(i, tuple(draw(0, vocabulary - 1, length))) for i, length in enumerate(lengths)], limits


def small_workloads(names: Sequence[str], batches: Sequence[int]) -> list[Workload]:
    """Return the workloads of a small model on a CPU, greedy."""
    made = {
        "equal": lambda rows: Workload("equal", rows, rows, (32, 32), (256, 256)),
        "mixed": lambda rows: Workload("mixed", rows, 4 * rows, (8, 48), (16, 256)),
    }
    return [made[name](rows) for name in names for rows in batches]


# DeepSeek-R1-Distill-Qwen-1.5B.
H100_SHAPE = Shape("Qwen2", 28, 1536, 8960, 12, 2, 151936, tied=False, dtype="bf16")
H100_WORKLOADS = [
    Workload("equal", 64, 64, (256, 256), (128, 128)),
    Workload("mixed", 64, 96, (32, 512), (16, 128), temperature=1.0),
    Workload("equal", 1, 1, (256, 256), (128, 128)),
    Workload("equal, sampled", 64, 64, (256, 256), (128, 128), temperature=1.0),
]
# A rehearsal of the same in seconds on a CPU.
# vLLM needs heads of 32 at least.
REHEARSAL_SHAPE = dataclasses.replace(H100_SHAPE, layers=2, hidden=128, ffn=256, heads=4, vocabulary=512)
REHEARSAL_WORKLOADS = [
    Workload("equal", 4, 4, (16, 16), (8, 8)),
    Workload("mixed", 4, 6, (2, 32), (4, 8), temperature=1.0),
    Workload("equal", 1, 1, (16, 16), (8, 8)),
    Workload("equal, sampled", 4, 4, (16, 16), (8, 8), temperature=1.0),
]
