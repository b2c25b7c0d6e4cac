"""Everything that a run needs, on disk, for tests that break one thing in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.commands import Outcome, run, run_until_start
from tests.helpers.tokenizer import byte_tokenizer

# Environment variables by which torchrun describes the processes of a run.
GROUP = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(frozen=True)
class Scene:
    """Everything a run needs, whole; each test breaks one thing in a copy of its own."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name

    def options(self, *overrides: str) -> list[str]:
        """Return the arguments of a run of one step on stored rollouts."""
        return [
            f"student.path={self.student}",
            f"teacher.path={self.teacher}",
            f"train.run_dir={self.run}",
            "train.steps=1",
            "train.device=auto",
            "precision.dtype=fp32",
            "rollout.engine=replay",
            f"rollout.path={self.folder / 'replay.jsonl'}",
            "rollout.prompts_per_step=2",
            "rollout.samples_per_prompt=2",
            *overrides,
        ]

    def generating(self, *overrides: str) -> list[str]:
        """Return the arguments of a run that generates its rollouts."""
        prompts = f"data.prompts=[{self.folder / 'prompts.jsonl'}]"
        return self.options("rollout.engine=megatron", "rollout.max_new_tokens=4", prompts, *overrides)

    def edit(self, path: str, **changes: object) -> None:
        """Change values of a JSON file; a value of ... removes the key."""
        values = json.loads((self.folder / path).read_text())
        values = {key: value for key, value in {**values, **changes}.items() if value is not ...}
        (self.folder / path).write_text(json.dumps(values))

    def write(self, name: str, rows: Iterable[object]) -> None:
        """Write a JSONL file and return its path."""
        (self.folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def contents(self) -> dict[str, str]:
        """Return every file and folder with its content."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in self.folder.rglob("*")
            if not path.name.startswith("rank-")
        }


def make_scene(folder: Path) -> Scene:
    """Make two models with their tokenizers (`student`, `teacher`), prompts with answers, and rollouts."""
    scene = Scene(folder)
    for seed, name in enumerate(["student", "teacher"]):
        save_model(scene.folder / name, seed)
    prompts = [{"prompt": f"{n}+1", "reward_model": {"ground_truth": str(n + 1)}} for n in range(4)]
    rollouts = [{"prompt_ids": [n, 2], "response_ids": [3, 4, n]} for n in range(12)]
    for name, rows in (("prompts", prompts), ("replay", rollouts)):
        scene.write(f"{name}.jsonl", rows)
    return scene


def save_model(folder: Path, seed: int, family: str = "Qwen3", **overrides: object) -> None:
    """Save a tiny model with the tokenizer that all models of the scene share."""
    sizes = {"vocab_size": 259, "num_hidden_layers": 2, "hidden_size": 32, **overrides}
    save(random_hf_model(family, seed, **sizes), folder)
    byte_tokenizer().save_pretrained(folder)


def assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.stdout + outcome.stderr
    assert outcome.stderr.startswith("error: ") and outcome.stderr.endswith("\n"), outcome.stderr
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    for word in words:
        assert word in outcome.stderr, f"{word!r} is not in: {outcome.stderr}"


def refuse(
    scene: Scene,
    words: tuple[str, ...],
    command: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    largest_file: int | None = None,
) -> None:
    """Assert that a command is refused with these words and leaves every file and folder as it was.

    The command runs in this process. If it gets as far as the process group, or if a limit or the environment must be
    set before the imports, it runs in a process of its own.
    """
    before = scene.contents()
    outcome = None
    if largest_file is None and set(environment or {}) <= GROUP:
        outcome = run_until_start(command, *arguments, environment=environment)
    if outcome is None:
        outcome = run(scene.folder, command, *arguments, environment=environment, largest_file=largest_file)
    assert_refused(outcome, *words)
    assert scene.contents() == before


def accept(command: str, *arguments: str) -> None:
    """Assert that the configuration and the inputs of a command are not refused. No model is built."""
    assert (outcome := run_until_start(command, *arguments)) is None, outcome


def waiting_for(world_size: int) -> dict[str, str]:
    """Return the environment of rank 0 in a group whose other ranks never start, so that joining it hangs."""
    values = {"WORLD_SIZE": world_size, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    return {name: str(value) for name, value in values.items()}
