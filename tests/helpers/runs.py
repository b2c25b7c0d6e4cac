"""Small complete runs for tests: the arguments of `train`, and comparisons of run folders."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

VOCAB_SIZE = 259  # of the byte tokenizer
SOURCES = ("sums/0", "sums/1")
HINTED = "hinted_prompt"


def models(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    family: str = "Qwen3",
    sources: Sequence[str] = (),
    **sizes: Any,
) -> list[str]:
    """Save a random student and teacher below `folder`; return the arguments that name them.

    With `sources` there is one teacher per source.
    """
    names = ("student", *(sources or ("teacher",)))
    for seed, name in enumerate(names):
        save(random_hf_model(family, seed=seed, **{"vocab_size": VOCAB_SIZE, **sizes}), folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)
    return [f"{'teachers.' * (name in sources)}{name}.path={folder / name}" for name in names]


def replay_run(folder: Path, steps: int, *settings: str, **options: Any) -> list[str]:
    """Three stored rollouts a step, of uneven lengths, some empty, from SOURCES in turn. `options`: of `models`."""
    draw = random.Random(7)
    path = folder / "replay.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number in range(3 * steps):
            prompt, response = (draw.choices(range(VOCAB_SIZE), k=draw.randint(low, 8)) for low in (1, 0))
            row = {"prompt_ids": prompt, "response_ids": response, "data_source": SOURCES[number % 2]}
            file.write(json.dumps(row) + "\n")
    return [
        *models(folder, **options),
        "rollout.engine=replay",
        f"rollout.path={path}",
        "rollout.prompts_per_step=3",
        "rollout.samples_per_prompt=1",
        "batch.max_tokens_per_micro_batch=32",
        *_common(folder, steps),
        *settings,
    ]


def prompt_run(folder: Path, steps: int, *settings: str, **options: Any) -> list[str]:
    """Five arithmetic prompts with answers, also after a hint (the column HINTED), from SOURCES in turn; two prompts a
    step with two samples each: an epoch ends within a step. `options`: of `models`."""
    path = folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number in range(5):
            row = {"prompt": f"{number}+2=", "data_source": SOURCES[number % 2]}
            row[HINTED] = f"It is {number + 2}. {row['prompt']}"
            file.write(json.dumps(row | {"reward_model": {"ground_truth": str(number + 2), "style": "exact"}}) + "\n")
    return [
        *models(folder, byte_tokenizer(chat=CHAT_TEMPLATE), **options),
        f"data.prompts=[{path}]",
        f"evaluation.data=[{path}]",
        "evaluation.samples=2",
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        "rollout.max_new_tokens=6",
        "batch.max_tokens_per_micro_batch=96",
        *_common(folder, steps),
        *settings,
    ]


def _common(folder: Path, steps: int) -> list[str]:
    return [
        f"train.run_dir={folder / 'run'}",
        f"train.steps={steps}",
        "checkpoint.every=2",
        "precision.dtype=fp32",
        "optimizer.lr=1.0e-3",
    ]


def in_folder(arguments: list[str], run_dir: Path) -> list[str]:
    """Return the arguments of the same run in another run folder."""
    return [*arguments, f"train.run_dir={run_dir}"]


def read_lines(path: Path) -> list[Any]:
    """Return the values of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without times and memory, which differ between any two runs."""
    rows = read_lines(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]


def last_step(run_dir: Path) -> int:
    """Return the step of the last complete line of metrics.jsonl, or 0; a process may be writing the file."""
    try:
        text = (run_dir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    lines = text[: text.rfind("\n") + 1].splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0


def complete_steps(run_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints."""
    marked = (run_dir / "checkpoints").glob("step_???????/complete")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in marked)


def assert_same_export(actual: Path, expected: Path) -> None:
    """Assert that two run folders have the same Hugging Face weights, bit for bit."""
    ours, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (actual, expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
