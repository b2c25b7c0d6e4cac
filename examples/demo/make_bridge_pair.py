"""Make a pair of unlike models, with their prompts: `python -m examples.demo.make_bridge_pair --kind KIND --out DIR`.

The student is the demo's: a Qwen3 of 4 layers and width 96 that stops half-way. The teacher starts from weights of its
own: a deeper and wider Qwen3 with the student's tokenizer (`cross_architecture`), or a Phi-3 as deep and as wide
as that with a tokenizer and a chat template of its own (`cross_tokenizer`). Only a bridge can compare their states.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from examples.demo import byte_level
from examples.demo.make_pair import BATCH_SIZE, TargetMissed, build_model, exact_match, train_step, train_student
from examples.demo.task import ANSWER_WIDTH, Addition, Splits, additions, split_additions, write_rows
from examples.demo.tokenizer import build_tokenizer
from megatron_oprd.data.alignment import Alignment, make_aligner
from megatron_oprd.data.chat_template import encode as encode_texts
from megatron_oprd.data.chat_template import render_text
from megatron_oprd.data.end_tokens import end_of_turn_id

TEACHER_ACCURACY = 0.992  # on 1000 additions: on others it is hardly less than 99 %
ROPE_THETA = 10.0  # of the teachers: with wavelengths of 6 to 60 tokens they learn several times faster
KINDS = ("cross_architecture", "cross_tokenizer")


@dataclass(frozen=True)
class Part:
    """The recipe of one model of a pair."""

    build: Callable[[int], PreTrainedModel]  # takes the seed of the weights
    tokenizer: PreTrainedTokenizerFast
    train: Callable[[PreTrainedModel, Iterator[torch.Tensor], torch.Tensor, int, int], PreTrainedModel]
    batch_size: int
    answer_width: int

    @property
    def response_length(self) -> int:
        """Return the tokens of an answer with its end-of-turn token; all answers have the same number."""
        return len(self.tokenizer("1998".rjust(self.answer_width))["input_ids"]) + 1

    def encode(self, problems: Sequence[Addition]) -> torch.Tensor:
        """Return prompts with their answers as token ids [problems, prompt + response_length] int64.

        The tokenizer's chat template renders the prompts.
        """
        end = end_of_turn_id(self.tokenizer)
        prompts = [render_text(problem.prompt, self.tokenizer, {}) for problem in problems]
        answers = self.tokenizer([problem.answer.rjust(self.answer_width) for problem in problems])["input_ids"]
        rows = zip(encode_texts(prompts, self.tokenizer), answers, strict=True)
        return torch.tensor([[*prompt, *answer, end] for prompt, answer in rows])

    def exact_match(self, model: PreTrainedModel, problems: Sequence[Addition]) -> float:
        """Return the share of problems that greedy decoding answers exactly."""
        return exact_match(model, self.encode(problems), self.response_length)


def parts_of(kind: str) -> tuple[Part, Part]:
    """Return the recipes of the student and the teacher of one of KINDS."""
    if kind == "cross_architecture":
        tokenizer = build_tokenizer()
        build_teacher = partial(build_model, num_layers=6, hidden_size=128, rope_theta=ROPE_THETA)
        return (
            Part(build_model, tokenizer, train_student, BATCH_SIZE, ANSWER_WIDTH),
            Part(build_teacher, tokenizer, train_teacher, BATCH_SIZE // 2, ANSWER_WIDTH),
        )
    tokenizer, teacher_tokenizer = byte_level.build_student_tokenizer(), byte_level.build_teacher_tokenizer()
    return (
        Part(build_model, tokenizer, train_student, BATCH_SIZE, byte_level.ANSWER_WIDTH),
        Part(build_phi, teacher_tokenizer, train_teacher, BATCH_SIZE // 2, byte_level.ANSWER_WIDTH),
    )


def build_phi(seed: int) -> Phi3ForCausalLM:
    """Build a random Phi-3 of 0.9 million parameters in fp32, deeper and wider than the student."""
    torch.manual_seed(seed)
    tokenizer = byte_level.build_teacher_tokenizer()
    config = Phi3Config(
        vocab_size=len(tokenizer) + len(tokenizer) % 2,  # as models pad it
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA, "partial_rotary_factor": 1.0},
        tie_word_embeddings=False,
        initializer_range=0.1,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Phi3ForCausalLM(config)
    ends = [end_of_turn_id(tokenizer), tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=True)
    return model


def train_teacher(
    model: PreTrainedModel, batches: Iterator[torch.Tensor], validation: torch.Tensor, steps: int, response_length: int
) -> PreTrainedModel:
    """Train the teacher to TEACHER_ACCURACY; raises TargetMissed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    accuracy, decay_from = 0.0, steps
    for step in range(1, steps + 1):
        decay = max(0.1, 1 - max(0, step - decay_from) / 300)
        train_step(model, optimizer, next(batches), 3e-3 * min(1.0, step / 50) * decay, response_length)
        if step % 25 == 0:
            accuracy = exact_match(model, validation, response_length)
            print(f"teacher: step {step:4d}  accuracy {accuracy:6.1%}", flush=True)
            if accuracy >= 0.8:  # it has found how to carry: from here on, smaller steps do more
                decay_from = min(decay_from, step)
            if accuracy >= TEACHER_ACCURACY and decay <= 0.2:  # before, one good measurement may be luck
                return model
    raise TargetMissed(f"the teacher did not reach {TEACHER_ACCURACY:.1%} in {steps} steps (last {accuracy:.1%})")


def train_part(part: Part, splits: Splits, seed: int, steps: int) -> PreTrainedModel:
    """Train a model. Start over, up to twice, if the first weights learn slowly. Raises TargetMissed."""
    validation = part.encode(splits.validation)
    for weights_seed in (seed, seed + 1000, seed + 2000):
        batches = (part.encode(additions(numbers)) for numbers in splits.supervised.split(part.batch_size))
        try:
            return part.train(part.build(weights_seed), batches, validation, steps, part.response_length)
        except TargetMissed as error:
            print(f"make_bridge_pair: {error}", flush=True)
            missed = error
    raise missed


def align(student: Part, teacher: Part, answers: Sequence[str]) -> list[Alignment]:
    """Align each answer of the student, which ends with an EOS, with the teacher's tokens."""
    end, eos_id = end_of_turn_id(teacher.tokenizer), student.tokenizer.eos_token_id
    aligner = make_aligner(student.tokenizer, teacher.tokenizer, student_eos_ids=[eos_id], teacher_end_of_turn_id=end)
    return [aligner.align([*ids, eos_id]) for ids in student.tokenizer(list(answers))["input_ids"]]


def print_coverage(student: Part, teacher: Part, problems: Sequence[Addition]) -> None:
    """Print the sync points per student token, for right answers and for answers without their last digit but one."""
    right = [problem.answer.rjust(student.answer_width) for problem in problems]
    for title, answers in (("right", right), ("wrong", [answer[:-2] + answer[-1] for answer in right])):
        coverages = [alignment.coverage for alignment in align(student, teacher, answers)]
        mean = sum(coverages) / len(coverages)
        print(f"coverage of {title} answers: {mean:.3f} ({min(coverages):.3f} to {max(coverages):.3f})")


def make_bridge_pair(kind: str, out: Path, seed: int, steps: int) -> None:
    """Write `student/` and `teacher/` (Hugging Face folders with tokenizers), `train.jsonl`, `heldout.jsonl` and
    `validation.jsonl` into `out`, and print how many of the student's tokens align with the teacher's.

    `steps` bounds the training of each model. Deterministic for a seed on one machine. Raises TargetMissed.
    """
    splits, (student, teacher) = split_additions(seed), parts_of(kind)
    parts = {"student": student, "teacher": teacher}
    # The teacher's seed differs: the two models must have nothing in common.
    models = {name: train_part(part, splits, seed + 500 * (part is teacher), steps) for name, part in parts.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        model.save_pretrained(out / name)
        parts[name].tokenizer.save_pretrained(out / name)
        accuracy = parts[name].exact_match(model, splits.heldout)
        print(f"{name}: {accuracy:.1%} of {len(splits.heldout)} held-out additions -> {out / name}")
    for name, problems in (("train", splits.prompts), ("heldout", splits.heldout), ("validation", splits.validation)):
        write_rows(out / f"{name}.jsonl", problems)
    print_coverage(student, teacher, splits.heldout)


def main() -> int:
    """Run the command line. Return exit code 1 if a model misses its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True, help="what is unlike")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the problems")
    parser.add_argument("--steps", type=int, default=2000, help="most steps that each model may take")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads do not pay at this size, and change the rounding
    start, start_cpu = time.perf_counter(), time.process_time()
    try:
        make_bridge_pair(arguments.kind, arguments.out, arguments.seed, arguments.steps)
    except TargetMissed as error:
        print(f"make_bridge_pair: {error}; try another --seed or more --steps", file=sys.stderr)
        return 1
    print(f"made the pair in {time.perf_counter() - start:.0f} s, {time.process_time() - start_cpu:.0f} s of the CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
