"""Make the demo's teacher and student, with their prompts: `python -m examples.demo.make_pair --out DIR`.

The student stops its training half-way; the teacher continues from the student's weights with a frozen embedding and
LM head. Both models share family, width and LM head and differ in their hidden states, which is the setting of OPRD.
The weights of seed 0 are stored in `pair/`; `--train` trains them anew.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # lets the file also run as a script, from anywhere

from examples.demo.task import RESPONSE_LENGTH, additions, encode, split_additions, write_rows
from examples.demo.tokenizer import EOS_ID, PAD_ID, SYMBOLS, build_tokenizer

STORED = Path(__file__).parent / "pair"  # the weights of seed 0, from `make_pair --train`
BATCH_SIZE = 64
WIDTH = 96
STUDENT_RANGE = (0.45, 0.55)
TEACHER_ACCURACY = 0.995


class TargetMissed(Exception):
    """A phase used up its steps before it reached its accuracy."""


def build_model(
    seed: int, *, num_layers: int = 4, hidden_size: int = WIDTH, rope_theta: float = 100.0
) -> Qwen3ForCausalLM:
    """Build a random Qwen3 in fp32, by default with 0.5 million parameters. Heads, layers and vocabulary are even."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(SYMBOLS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": rope_theta,
        },  # sequences of 14 tokens need short wavelengths
        tie_word_embeddings=False,
        initializer_range=0.1,  # about 1/sqrt(hidden_size): the default of 0.02 is meant for far wider models
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True)
    return model


def response_logits(model: PreTrainedModel, tokens: torch.Tensor, response_length: int) -> torch.Tensor:
    """Return the logits [problems, response_length, vocabulary] that predict the response tokens."""
    states = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    return model.lm_head(states[:, -response_length:])


@torch.no_grad()
def exact_match(model: PreTrainedModel, tokens: torch.Tensor, response_length: int = RESPONSE_LENGTH) -> float:
    """Return the share of problems that greedy decoding answers exactly.

    Greedy decoding gives the reference answer if and only if every reference token is the most likely one after the
    reference prefix, so one forward pass measures it without generating.
    """
    right = response_logits(model, tokens, response_length).argmax(-1) == tokens[:, -response_length:]
    return right.all(dim=1).float().mean().item()


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    lr: float,
    response_length: int = RESPONSE_LENGTH,
) -> None:
    """Run one step of supervised training on the answers."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    logits, targets = response_logits(model, tokens, response_length), tokens[:, -response_length:]
    optimizer.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train_student(
    model: Qwen3ForCausalLM,
    batches: Iterator[torch.Tensor],
    validation: torch.Tensor,
    steps: int,
    response_length: int = RESPONSE_LENGTH,
) -> Qwen3ForCausalLM:
    """Train from scratch until accuracy enters STUDENT_RANGE; raises TargetMissed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    peak, accuracy = 3e-3, 0.0
    for step in range(1, steps + 1):
        train_step(model, optimizer, next(batches), peak * min(1.0, step / 30), response_length)
        if step % (25 if accuracy < 0.1 else 5) == 0:
            accuracy = exact_match(model, validation, response_length)
            print(f"student: step {step:4d}  accuracy {accuracy:6.1%}", flush=True)
            if STUDENT_RANGE[0] <= accuracy <= STUDENT_RANGE[1]:
                return model
            peak = 3e-3 if accuracy < 0.2 else 1e-3  # accuracy rises fast here: small steps land inside the range
    raise TargetMissed(f"the student did not reach {STUDENT_RANGE} in {steps} steps (last accuracy {accuracy:.1%})")


def train_teacher(
    student: Qwen3ForCausalLM,
    batches: Iterator[torch.Tensor],
    validation: torch.Tensor,
    steps: int,
    response_length: int = RESPONSE_LENGTH,
    target: float = TEACHER_ACCURACY,
) -> Qwen3ForCausalLM:
    """Continue from a copy of the student, embedding and LM head frozen, to accuracy `target`; raises TargetMissed."""
    model = copy.deepcopy(student)
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    accuracy, decay_from = 0.0, steps
    for step in range(1, steps + 1):
        decay = max(0.05, 1 - max(0, step - decay_from) / 150)
        train_step(model, optimizer, next(batches), 3e-3 * min(1.0, step / 20) * decay, response_length)
        if step % 25 == 0:
            accuracy = exact_match(model, validation, response_length)
            print(f"teacher: step {step:4d}  accuracy {accuracy:6.1%}", flush=True)
            if accuracy >= 0.95:  # a fixed schedule would not do: how soon a seed gets here varies by a factor of two
                decay_from = min(decay_from, step)
            if accuracy >= target and decay <= 0.1:  # before, one good measurement may be luck
                return model
    raise TargetMissed(f"the teacher did not reach {target:.1%} in {steps} steps (last {accuracy:.1%})")


def train_pair(
    seed: int, batches: Iterator[torch.Tensor], validation: torch.Tensor, steps: int, hidden_size: int = WIDTH
) -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """Train the student and the teacher. Start over, up to twice, if the first weights learn slowly.

    Rounding differs between machines, so a seed that is quick on one may be slow on another. Raises TargetMissed.
    """
    for weights_seed in (seed, seed + 1000, seed + 2000):
        try:
            student = train_student(build_model(weights_seed, hidden_size=hidden_size), batches, validation, steps)
            return student, train_teacher(student, batches, validation, steps)
        except TargetMissed as error:
            print(f"make_pair: {error}", flush=True)
            missed = error
    raise missed


def stored_pair() -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """Return the student and the teacher of seed 0, which were trained once: training takes a minute."""
    models = build_model(seed=0), build_model(seed=0)
    for name, model in zip(("student", "teacher"), models, strict=True):
        model.load_state_dict(load_file(STORED / f"{name}.safetensors"))
    return models


def make_pair(out: Path, seed: int, steps: int, hidden_size: int = WIDTH, *, train: bool = False) -> None:
    """Write `student/` and `teacher/` (Hugging Face folders), `train.jsonl` and `heldout.jsonl` into `out`.

    The models of seed 0 are stored in this folder, unless `train` is True. Others are trained, which is deterministic
    on one machine; `steps` bounds each phase. Raises TargetMissed.
    """
    splits = split_additions(seed)
    if seed == 0 and hidden_size == WIDTH and not train:
        student, teacher = stored_pair()
    else:
        batches = (encode(additions(numbers)) for numbers in splits.supervised.split(BATCH_SIZE))
        student, teacher = train_pair(seed, batches, encode(splits.validation), steps, hidden_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, heldout = build_tokenizer(), encode(splits.heldout)
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        print(f"{name}: {exact_match(model, heldout):.1%} of {len(splits.heldout)} held-out additions -> {out / name}")
    write_rows(out / "train.jsonl", splits.prompts)
    write_rows(out / "heldout.jsonl", splits.heldout)


def main() -> int:
    """Run the command line. Return exit code 1 if a model misses its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the problems")
    parser.add_argument("--steps", type=int, default=1000, help="most steps each of the two phases may take")
    parser.add_argument(
        "--hidden-size", type=int, default=WIDTH, help="a quarter of it is a head; vLLM on a CPU needs heads of 32"
    )
    parser.add_argument("--train", action="store_true", help="train the pair of seed 0 too; it is stored otherwise")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads do not pay at this size, and change the rounding
    start = time.perf_counter()
    try:
        make_pair(arguments.out, arguments.seed, arguments.steps, arguments.hidden_size, train=arguments.train)
    except TargetMissed as error:
        print(f"make_pair: {error}; try another --seed or more --steps", file=sys.stderr)
        return 1
    print(f"made the pair in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
