"""Answers that benchmarks/real_model.py samples by transformers: the teacher's for training, the student's to compare.

Threads may call these functions at the same time: transformers opens one model after the other.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
import transformers

from megatron_oprd.config import DataConfig
from megatron_oprd.data.prompts import PromptState, load_prompts, take
from megatron_oprd.data.tokenizer import load_tokenizer

ROWS = 128  # answers that are generated at the same time
SCORED_ROWS = 8
SEED = 1_000_003
LOCK = threading.Lock()


def teacher_rollouts(path: Path, teacher: Path, prompts: Path, *, number: int, seed: int, max_new_tokens: int) -> Path:
    """Write a replay file with one answer of the teacher to each of `number` prompts, in the order of a run.

    The answers are sampled at temperature 1. A file with too few answers is continued.
    """
    present = len(path.read_text().splitlines()) if path.exists() else 0
    if present < number:
        all_prompts = load_prompts([str(prompts)], load_tokenizer(teacher), DataConfig()).prompts
        chosen, _ = take(all_prompts, PromptState(), number, seed=seed, shuffle=True)
        missing = [prompt.prompt_ids for prompt in chosen[present:]]
        with LOCK:
            torch.manual_seed(seed + present)
            answers = sample(open_model(teacher), missing, max_new_tokens)
        with path.open("a") as file:
            for ids, answer in zip(missing, answers, strict=True):
                file.write(json.dumps({"prompt_ids": list(ids), "response_ids": answer}) + "\n")
    return path


class OwnAnswers:
    """Lets students answer prompts at temperature 1 and compares them with the teacher on these answers.

    One model after the other, in a thread, so that the next trials need not wait.

    Args:
        folder: for a file with the figures of each student.
        teacher: the folder of the teacher.
        prompts: the prompt file.
    """

    def __init__(self, folder: Path, teacher: Path, prompts: Path, max_new_tokens: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.max_new_tokens = folder, max_new_tokens
        self.samples = 4 if torch.cuda.is_available() else 1  # answers to each prompt
        self.teacher_folder, self.prompt_file = teacher, prompts
        self.thread = ThreadPoolExecutor(1)
        self.begun: list[Future[None]] = []

    def begin(self, name: str, student: Path, *, delete: bool = True) -> None:
        """Compare the student in a folder later, unless its figures exist; then delete the folder."""
        self.begun.append(self.thread.submit(self._compare, name, student, delete))

    def finish(self) -> None:
        """Wait for all figures. Raises the first exception, after the others are done."""
        self.thread.shutdown()
        for future in self.begun:
            future.result()

    def cancel(self) -> None:
        """Begin no further comparison."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def figures(self, name: str) -> dict[str, float] | None:
        """Return the figures of a student, or None before they exist."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _compare(self, name: str, student: Path, delete: bool) -> None:
        try:
            if self.figures(name) is None:
                figures = self._measure(student)
                (self.folder / "new").write_text(json.dumps(figures) + "\n")
                (self.folder / "new").rename(self.folder / f"{name}.json")
        finally:
            if delete:
                shutil.rmtree(student)

    def _measure(self, folder: Path) -> dict[str, float]:
        """Return the figures of a student: means over the tokens of all answers."""
        with LOCK:
            student = open_model(folder)
            torch.manual_seed(SEED)
            rows = [ids for ids in self._prompts for _ in range(self.samples)]
            answers = sample(student, rows, self.max_new_tokens)
        sums, tokens = torch.zeros(5, dtype=torch.float64), 0
        for start in range(0, len(rows), SCORED_ROWS):
            part = list(zip(rows[start : start + SCORED_ROWS], answers[start : start + SCORED_ROWS], strict=True))
            longest = max(len(ids) + len(answer) for ids, answer in part)
            # Padding behind a row: no token attends to later ones.
            padded = [[*ids, *answer, *[0] * (longest - len(ids) - len(answer))] for ids, answer in part]
            token_ids = torch.tensor(padded, device=student.device)
            with torch.no_grad():
                logits = [model(token_ids).logits for model in (student, self._teacher)]
            for row, (ids, answer) in enumerate(part):
                span = slice(len(ids) - 1, len(ids) + len(answer) - 1)
                p, q = (one[row, span].double().log_softmax(-1) for one in logits)
                sampled = torch.tensor(answer, device=p.device)[:, None]
                values = [
                    (p.exp() * (p - q)).sum(),
                    (q.exp() * (q - p)).sum(),
                    -p.gather(1, sampled).sum(),
                    -q.gather(1, sampled).sum(),
                    (p.argmax(-1) == q.argmax(-1)).sum().double(),
                ]
                sums += torch.stack(values).cpu()
                tokens += len(answer)
        reverse, forward, own, teacher, agreement = (sums / tokens).tolist()
        return {
            "tokens": tokens,
            "reverse_kl": reverse,
            "forward_kl": forward,
            "perplexity": math.exp(own),
            "teacher_perplexity": math.exp(teacher),
            "argmax_agreement": agreement,
        }

    @cached_property
    def _teacher(self) -> transformers.PreTrainedModel:
        with LOCK:
            return open_model(self.teacher_folder)

    @cached_property
    def _prompts(self) -> list[tuple[int, ...]]:
        tokenizer = load_tokenizer(self.teacher_folder)
        return [prompt.prompt_ids for prompt in load_prompts([str(self.prompt_file)], tokenizer, DataConfig()).prompts]


def open_model(folder: Path) -> transformers.PreTrainedModel:
    """Return a model in float32, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def sample(
    model: transformers.PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return an answer to each prompt, sampled at temperature 1, with its end token."""
    end = model.generation_config.eos_token_id
    answers = []
    for start in range(0, len(prompts), ROWS):
        part = prompts[start : start + ROWS]
        longest = max(map(len, part))
        padding = [longest - len(ids) for ids in part]
        made = model.generate(
            torch.tensor([[end] * pad + list(ids) for pad, ids in zip(padding, part, strict=True)]).to(model.device),
            attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]).to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=end,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
        for answer in made[:, longest:].tolist():
            answers.append(answer[: answer.index(end) + 1] if end in answer else answer)
    return answers
