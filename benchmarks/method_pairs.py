"""The models that methods.py trains: five tasks for each seed, each with a student, its teachers and prompts.

| pair | student | teachers |
|---|---|---|
| same | the demo's: half of the 3-digit sums right | `teacher`: trained further, to 99.5 %; `weak`: the same, to 80 % |
| unlike | the same recipe | deeper and wider, from weights of its own; a bridge of rank 8 to it |
| two | half of the sums and differences right | a specialist for sums and one for differences |
| self | half of the sums right, and all after a prompt with the answer | none: the student with that prompt |
| chain | a third of the running sums of 28 digits right, modulo 10: answers of 30 tokens | trained further, to 97 % |

All weights are rounded to bf16, so that the folders are small.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from examples.demo import make_bridge_pair
from examples.demo.make_pair import (
    BATCH_SIZE,
    TargetMissed,
    build_model,
    exact_match,
    response_logits,
    train_pair,
    train_step,
    train_student,
    train_teacher,
)
from examples.demo.run import RECIPES
from examples.demo.task import ANSWER_WIDTH, RESPONSE_LENGTH, Addition, additions, encode, split_additions
from examples.demo.tokenizer import EOS_ID, SYMBOLS, build_tokenizer
from megatron_oprd.bridge import fit

CHAIN_LENGTH, CHAIN_WIDTH = 28, 64
HELDOUT, PROMPTS = 1000, 8192
STEPS = 1500  # at most, of each model; specialists may take twice as many
SUM, DIFFERENCE = "sum", "difference"
BRIDGE_RANK = 8
LEAST_COPIED = 0.98
KINDS = ("same", "unlike", "two", "self", "chain")
SOLVED_PROMPT = "solved_prompt"  # column of the prompt files
ANSWER_TOKENS = dict.fromkeys(KINDS, RESPONSE_LENGTH) | {"chain": CHAIN_LENGTH + 2}  # with the end token
_TOKEN_IDS = {symbol: number for number, symbol in enumerate(SYMBOLS)}


@dataclass(frozen=True)
class Problem:
    """A prompt and the text that answers it exactly."""

    source: str
    prompt: str
    answer: str

    @property
    def solved(self) -> Problem:
        """Return the problem with a prompt that begins with the answer."""
        return dataclasses.replace(self, prompt=f"={self.answer} {self.prompt}")

    def row(self) -> dict[str, object]:
        """Return the problem as a line of a prompt file (verl's columns), with the solved prompt as one more column."""
        reward = {"ground_truth": self.answer.strip(), "style": "exact"}
        row = {"prompt": self.prompt, "data_source": self.source, "reward_model": reward}
        return row | {SOLVED_PROMPT: self.solved.prompt}


def make(kind: str, seed: int, folder: Path) -> None:
    """Write the pair of a seed: Hugging Face folders, `train.jsonl` and `heldout.jsonl`. Raises TargetMissed.

    The folder appears when it is complete.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    {"same": make_same, "unlike": make_unlike, "two": make_two, "self": make_self, "chain": make_chain}[kind](
        fresh, seed
    )
    fresh.rename(folder)


def make_same(folder: Path, seed: int) -> None:
    """Write the demo's pair and a second teacher, which stops at 80 %."""
    splits = split_additions(seed)
    batches = (encode(additions(numbers)) for numbers in splits.supervised.split(BATCH_SIZE))
    validation = encode(splits.validation)
    student, teacher = train_pair(seed, batches, validation, STEPS)
    weak = train_until(copy.deepcopy(student), batches, validation, RESPONSE_LENGTH, target=0.78)
    save(folder, {"student": student, "teacher": teacher, "weak": weak})
    write_problems(folder, sums(splits.prompts), sums(splits.heldout))


def make_unlike(folder: Path, seed: int) -> None:
    """Write the demo's pair of another depth and width, and a bridge of rank BRIDGE_RANK."""
    make_bridge_pair.make_bridge_pair("cross_architecture", folder, seed, STEPS)
    save(folder, {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher")})
    paths = [f"student.path={folder}/student", f"teacher.path={folder}/teacher", f"data.prompts=[{folder}/train.jsonl]"]
    run = [f"train.run_dir={folder}", f"train.seed={seed}", "train.device=cpu", f"bridge.ranks=[{BRIDGE_RANK}]"]
    fit.main(["--config", str(RECIPES["cross_architecture"]), *paths, *run])
    shutil.rmtree(folder / "bridge" / "moments")  # of no use in training


def make_two(folder: Path, seed: int) -> None:
    """Write a student that adds and subtracts, and a specialist for each, trained from the student's weights."""
    numbers = random.Random(seed)
    problems = {kind: [arithmetic(numbers, kind) for _ in range(HELDOUT)] for kind in (SUM, DIFFERENCE)}

    def batches(*kinds: str) -> Iterator[torch.Tensor]:
        while True:
            yield tokens_of([arithmetic(numbers, numbers.choice(kinds)) for _ in range(BATCH_SIZE)])

    validation = {kind: tokens_of(some) for kind, some in problems.items()}
    student = train_student(build_model(seed), batches(*problems), torch.cat([*validation.values()]), STEPS)
    teachers = {
        kind: train_teacher(student, batches(kind), some, 2 * STEPS, target=0.97) for kind, some in validation.items()
    }
    save(folder, {"student": student, **teachers})
    prompts = [arithmetic(numbers, numbers.choice([*problems])) for _ in range(PROMPTS)]
    write_problems(folder, prompts, [arithmetic(numbers, kind) for kind in problems for _ in range(HELDOUT // 2)])


def make_self(folder: Path, seed: int) -> None:
    """Write a student that copies the answer if the prompt contains it. Raises TargetMissed if it does not."""
    splits = split_additions(seed)

    def batches() -> Iterator[torch.Tensor]:
        for number, supervised in enumerate(splits.supervised.split(BATCH_SIZE)):
            problems = sums(additions(supervised))
            yield tokens_of([one.solved for one in problems] if number % 2 else problems)

    validation = sums(splits.validation)
    student = train_student(build_model(seed), batches(), tokens_of(validation), STEPS)
    with_answer = exact_match(student, tokens_of([one.solved for one in validation]))
    if with_answer < LEAST_COPIED:
        raise TargetMissed(f"{with_answer:.1%} of the answers in a prompt are copied, fewer than {LEAST_COPIED:.0%}")
    save(folder, {"student": student})
    write_problems(folder, sums(splits.prompts), sums(splits.heldout))


def make_chain(folder: Path, seed: int) -> None:
    """Write models that write running sums: long answers in which each token depends on the one before."""
    numbers = random.Random(seed)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield tokens_of([running_sum(numbers) for _ in range(BATCH_SIZE)])

    validation = tokens_of([running_sum(numbers) for _ in range(HELDOUT // 2)])
    length = ANSWER_TOKENS["chain"]
    student = train_until(build_model(seed, hidden_size=CHAIN_WIDTH), batches(), validation, length, target=0.25)
    teacher = train_teacher(student, batches(), validation, STEPS, length, target=0.97)
    save(folder, {"student": student, "teacher": teacher})
    problems = [running_sum(numbers) for _ in range(PROMPTS + HELDOUT)]
    write_problems(folder, problems[HELDOUT:], problems[:HELDOUT])


def train_until(
    model: Qwen3ForCausalLM, batches: Iterator[torch.Tensor], validation: torch.Tensor, length: int, target: float
) -> Qwen3ForCausalLM:
    """Train with answers of `length` tokens until the model is right that often, slowly once it is right at times.

    Raises TargetMissed after STEPS steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    accuracy = exact_match(model, validation, length)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, next(batches), (3e-3 if accuracy < 0.01 else 1e-3) * min(1.0, step / 30), length)
        if step % 5 == 0:
            accuracy = exact_match(model, validation, length)
            if accuracy >= target:
                print(f"step {step}: accuracy {accuracy:.1%}", flush=True)
                return model
    raise TargetMissed(f"accuracy {accuracy:.1%} after {STEPS} steps is below {target:.0%}")


def arithmetic(numbers: random.Random, kind: str) -> Problem:
    """Draw two 3-digit numbers and ask for their sum, `123+456=`, or for the size of their difference, `123 456=`."""
    left, right = numbers.randint(100, 999), numbers.randint(100, 999)
    sign, answer = ("+", left + right) if kind == SUM else (" ", abs(left - right))
    return Problem(kind, f"{left}{sign}{right}=", str(answer).rjust(ANSWER_WIDTH))


def running_sum(numbers: random.Random) -> Problem:
    """Draw digits and ask for the last digit of each of their running sums."""
    digits = [numbers.randrange(10) for _ in range(CHAIN_LENGTH)]
    answer = [sum(digits[: number + 1]) % 10 for number in range(CHAIN_LENGTH)]
    return Problem("chain", "".join(map(str, digits)) + "=", " " + "".join(map(str, answer)))


def sums(problems: Sequence[Addition]) -> list[Problem]:
    return [Problem(SUM, one.prompt, one.answer.rjust(ANSWER_WIDTH)) for one in problems]


def tokens_of(problems: Sequence[Problem]) -> torch.Tensor:
    """Return prompts with their answers and the end token as token ids [problems, tokens]; all have one length."""
    texts = [problem.prompt + problem.answer for problem in problems]
    return torch.tensor([[*(_TOKEN_IDS[symbol] for symbol in text), EOS_ID] for text in texts])


def save(folder: Path, models: Mapping[str, PreTrainedModel]) -> None:
    """Write Hugging Face folders with weights in bf16 and the tokenizer."""
    tokenizer = build_tokenizer()
    for name, model in models.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_problems(folder: Path, prompts: Sequence[Problem], heldout: Sequence[Problem]) -> None:
    for name, problems in (("train", prompts), ("heldout", heldout)):
        lines = [json.dumps(problem.row()) + "\n" for problem in problems]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


@torch.no_grad()
def share_right_by_token(pair: Path, model: Path) -> list[float]:
    """Return how often each token of an answer is the most likely one after the right tokens before it."""
    rows = [json.loads(line) for line in (pair / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    problems = [Problem("", row["prompt"], " " + row["reward_model"]["ground_truth"]) for row in rows]
    tokens = tokens_of(problems)
    length = len(problems[0].answer) + 1
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    right = response_logits(loaded, tokens, length).argmax(-1) == tokens[:, -length:]
    return right.float().mean(0).tolist()
