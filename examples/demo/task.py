"""Three-digit addition: `123+456=` is answered by `  579` and the end-of-sequence token, `999+999=` by ` 1998`.

The answer begins with a space, because OPRD compares only the hidden states of response tokens. With the space, the
state that predicts the first digit belongs to a response token. The answer is right-aligned, because a digit at a fixed
position is learned several times faster. Decoding drops the spaces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.demo.tokenizer import EOS_ID, SYMBOLS

LOWEST, HIGHEST = 100, 999
NUM_OPERANDS = HIGHEST - LOWEST + 1
PROMPT_LENGTH = len("123+456=")
ANSWER_WIDTH = len(" 1998")
RESPONSE_LENGTH = ANSWER_WIDTH + 1  # and the end-of-sequence token
_TOKEN_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}


@dataclass(frozen=True)
class Addition:
    """An addition and its answer, as text."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        return str(self.left + self.right)

    def row(self) -> dict[str, object]:
        """Return the problem as a line of a prompt file (verl's columns)."""
        reward = {"ground_truth": self.answer, "style": "exact"}
        return {"prompt": self.prompt, "data_source": "addition", "reward_model": reward}


@dataclass(frozen=True)
class Splits:
    """Disjoint additions. The pair learns from `supervised`; distillation takes prompts neither model has seen."""

    heldout: list[Addition]
    validation: list[Addition]
    prompts: list[Addition]
    supervised: torch.Tensor  # [problems] int64: the remaining problem numbers, in random order


def split_additions(seed: int, num_heldout: int = 1000, num_validation: int = 1000, num_prompts: int = 8192) -> Splits:
    """Shuffle all additions of two 3-digit numbers by `seed` and divide them into disjoint parts."""
    order = torch.randperm(NUM_OPERANDS**2, generator=torch.Generator().manual_seed(seed))
    sizes = [num_heldout, num_validation, num_prompts, len(order) - num_heldout - num_validation - num_prompts]
    heldout, validation, prompts, supervised = order.split(sizes)
    return Splits(additions(heldout), additions(validation), additions(prompts), supervised)


def additions(numbers: torch.Tensor) -> list[Addition]:
    """Return the additions of problem numbers in 0 .. NUM_OPERANDS**2 - 1."""
    return [Addition(LOWEST + n // NUM_OPERANDS, LOWEST + n % NUM_OPERANDS) for n in numbers.tolist()]


def encode(problems: list[Addition]) -> torch.Tensor:
    """Return prompts with their answers as token ids [problems, PROMPT_LENGTH + RESPONSE_LENGTH] int64."""
    texts = [problem.prompt + problem.answer.rjust(ANSWER_WIDTH) for problem in problems]
    return torch.tensor([[*(_TOKEN_IDS[symbol] for symbol in text), EOS_ID] for text in texts])


def write_rows(path: Path, problems: list[Addition]) -> None:
    """Write a JSONL prompt file with one addition per line."""
    path.write_text("".join(json.dumps(problem.row()) + "\n" for problem in problems), encoding="utf-8")
