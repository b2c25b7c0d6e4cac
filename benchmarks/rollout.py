"""Compare the embedded rollout engine with Hugging Face's `generate`: tokens per second with the same weights.

Greedy decoding of a random, tied Qwen3 in float32, both sides in turn in one process with the same number of threads;
each figure is the median over the repeats. Two workloads, each with `batch` rows at a time:

- equal: `batch` prompts of one length, all responses of 256 tokens: no row waits for another.
- mixed: 4 * `batch` prompts of different lengths, responses of 16 to 256 tokens. Hugging Face pads prompts on the left
  and runs each batch until its longest response is complete (a stopping criterion ends single rows, as EOS does); the
  engine gives the slot of a finished row to the next prompt.

    python benchmarks/rollout.py [--batch 16 64] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.load import load_hf
from megatron_oprd.hf.stream import HFReader
from megatron_oprd.models.build import build_model
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.runtime.platform import choose_device
from megatron_oprd.types import Prompt


class StopAt(transformers.StoppingCriteria):
    """Stop row i after `limits[i]` new tokens."""

    def __init__(self, prompt_tokens: int, limits: torch.Tensor) -> None:
        self.prompt_tokens, self.limits = prompt_tokens, limits

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt_tokens >= self.limits


def hf_generate(model: torch.nn.Module, prompts: Sequence[Prompt], limits: Sequence[int], batch: int) -> list[tuple]:
    """Generate responses in consecutive batches of left-padded prompts."""
    responses = []
    for start in range(0, len(prompts), batch):
        rows, stops = prompts[start : start + batch], limits[start : start + batch]
        width = max(len(row.prompt_ids) for row in rows)
        ids = torch.tensor([[0] * (width - len(row.prompt_ids)) + list(row.prompt_ids) for row in rows])
        mask = torch.tensor([[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in rows])
        criteria = [StopAt(width, torch.tensor(stops))] if len(set(stops)) > 1 else []
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(stops),
            stopping_criteria=transformers.StoppingCriteriaList(criteria),
            pad_token_id=0,
        )
        responses += [tuple(row[width : width + stop].tolist()) for row, stop in zip(output, stops, strict=True)]
    return responses


def workload(name: str, batch: int, vocabulary: int) -> tuple[list[Prompt], list[int]]:
    """Prompts and the number of new tokens for each."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high + 1, (count,), generator=generator).tolist()

    count = batch if name == "equal" else 4 * batch
    lengths = [32] * count if name == "equal" else draw(8, 48, count)
    limits = [256] * count if name == "equal" else draw(16, 256, count)
    return [Prompt(i, tuple(draw(0, vocabulary - 1, length))) for i, length in enumerate(lengths)], limits


def measure(
    sides: dict[str, Callable[[], list[tuple]]], repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, float], float]:
    """Median tokens per second of each side, run in turn, and the share of answers on which the two agree."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    responses: dict[str, list[tuple]] = {}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = clock()
            responses[name] = run()
            if repeat:  # the first round warms up
                speeds[name].append(sum(map(len, responses[name])) / (clock() - start))
    first, second = responses.values()
    same = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    return {name: statistics.median(values) for name, values in speeds.items()}, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64], help="rows at a time")
    parser.add_argument("--workload", nargs="+", default=["equal", "mixed"], choices=["equal", "mixed"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine shared with others"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    hf = random_qwen3(arguments.layers, arguments.hidden, arguments.vocabulary)
    device = choose_device("auto")
    start_process(device)
    topology = build_topology(ParallelConfig(), device, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        spec = read_model_spec(folder)
        model = build_model(spec, topology, torch.float32)
        load_hf(model, HFReader(folder), spec)
    results = []
    print(f"{'workload':10}{'batch':>6}{'Hugging Face':>15}{'engine':>10}{'ratio':>8}{'same answers':>14}   (tokens/s)")
    for name in arguments.workload:
        for batch in arguments.batch:
            prompts, limits = workload(name, batch, arguments.vocabulary)
            sampling = Sampling(temperature=0.0, max_new_tokens=max(limits))
            engine = EmbeddedEngine(model, spec, topology, sampling, seed=0, max_batch=batch)
            sides = {
                "hf": lambda p=prompts, n=limits, b=batch: hf_generate(hf, p, n, b),
                "engine": lambda e=engine, p=prompts, n=limits: [r.response_ids for r in e.generate(p, 0, limits=n)],
            }
            speed, same = measure(sides, arguments.repeats, clock)
            ratio = speed["engine"] / speed["hf"]
            print(f"{name:10}{batch:6}{speed['hf']:15.0f}{speed['engine']:10.0f}{ratio:7.2f}x{same:13.0%}", flush=True)
            results.append({"workload": name, "batch": batch, **speed, "ratio": ratio, "same_answers": same})
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")


def random_qwen3(layers: int, hidden: int, vocabulary: int) -> torch.nn.Module:
    """Return a random Qwen3 with tied embeddings, 8 heads in 4 groups and no EOS token."""
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(config).eval()


if __name__ == "__main__":
    main()
