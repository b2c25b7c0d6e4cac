"""A decode step starts few operators, reads nothing back, and works on memory that neither grows nor moves."""

import dataclasses
from collections import Counter

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_oprd.models.kv_cache import rollout_cache_bytes
from megatron_oprd.rollout import embedded
from megatron_oprd.rollout.decoder import Decoder
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.graphs import Graphs
from megatron_oprd.testing.models import longrope, random_hf_model
from megatron_oprd.types import Prompt
from tests.numerics.test_rollout import EOS, GREEDY, hf_greedy, load, random_prompts

SAMPLED = Sampling(temperature=1.0, max_new_tokens=12)
# Most outermost operators, views included, of a decode step of 4 layers with rows of different lengths, by temperature.
# With attention alone they are half of those of Megatron-Core's modules.
MOST_OPERATORS = {
    "Qwen2": {0.0: 156, 1.0: 175},
    "Qwen3": {0.0: 192, 1.0: 211},
    "Qwen3_5": {1.0: 325},
}
READ_BACKS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


class Replayed(Graphs):
    """Graphs on a CPU: each key calls the function of its first call, as a CUDA graph repeats what was captured."""

    def __init__(self, *, enabled):
        super().__init__(enabled=False)
        self.enabled, self.functions, self.calls = True, {}, Counter()

    def run(self, key, function):
        self.calls[key] += 1
        self.functions.setdefault(key, function)()


@pytest.mark.parametrize("family", list(MOST_OPERATORS))
def test_a_decode_step_has_few_operators_whatever_its_rows(family, topology, tmp_path, monkeypatch):
    class Marked(Decoder):
        def decode(self):
            shapes.add((self.slots.end, self.slots.longest))
            with record_function("decode step"):
                super().decode()

    monkeypatch.setattr(embedded, "Decoder", Marked)
    stage, spec = load(random_hf_model(family, num_hidden_layers=4), tmp_path, topology)
    spec = dataclasses.replace(spec, eos_token_ids=())
    for temperature, most in MOST_OPERATORS[family].items():
        shapes = set()
        sampling = dataclasses.replace(SAMPLED, temperature=temperature)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            engine = EmbeddedEngine(stage, spec, topology, sampling, seed=0, max_batch=3)
            engine.generate(random_prompts(7), 0, limits=[12, 5, 9, 3, 4, 5, 12])
        assert len({rows for rows, _ in shapes}) == 3 and len({length for _, length in shapes}) > 10
        counts, called = Counter(), set()
        for event in profiler.events():
            ancestor, inside = event.cpu_parent, False
            while ancestor is not None and ancestor.name != "decode step":
                inside = inside or ancestor.name.startswith("aten::")
                ancestor = ancestor.cpu_parent
            if ancestor is not None and event.name.startswith("aten::"):
                called.add(event.name)
                counts[ancestor.id] += not inside
        assert len(counts) > 12, "the case must have many steps"
        assert len(set(counts.values())) == 1, "all steps must have the same operators"
        assert max(counts.values()) <= most
        assert "aten::addmm" in called and not called & READ_BACKS


@pytest.mark.parametrize(
    ("family", "settings", "looks"),
    [("Phi3", {"num_attention_heads": 4, **longrope(12, original=15)}, looks) for looks in (1, 8)]
    + [("Qwen3_5", {"seed": 4}, 8)],
    ids=["Phi3-1", "Phi3-8", "Qwen3_5-8"],
)
def test_replayed_steps_generate_the_tokens_of_hugging_face(family, settings, looks, topology, tmp_path, monkeypatch):
    made = []

    class Recorded(Replayed):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            made.append(self)

    monkeypatch.setattr("megatron_oprd.rollout.decoder.Graphs", Recorded)
    monkeypatch.setitem(embedded.PASSES_BETWEEN_LOOKS, "cpu", looks)
    hf = random_hf_model(family, num_hidden_layers=2, **settings)
    stage, spec = load(hf, tmp_path, topology)
    prompts = random_prompts(30)
    expected = [hf_greedy(hf, prompt) for prompt in prompts]
    assert any(len(response) == 1 for response in expected), "a row must end with its first token"
    for slots in (30, 6):
        rollouts = EmbeddedEngine(stage, spec, topology, GREEDY, seed=0, max_batch=slots).generate(prompts, step=0)
        assert [rollout.response_ids for rollout in rollouts] == expected, f"{slots} slots"
    assert {len(group) for _, group, _ in made[0].calls} <= {1, 2, 4, 8, 16, 30}
    assert {len(group) for _, group, _ in made[1].calls} <= {1, 2, 4, 6}
    assert max(made[0].calls.values()) > 5, "steps must be replayed"


def reference_attention(inputs, bounds, longest, scale, lengths=None):
    """Return what flash attention computes for packed sequences, one sequence after the other."""
    queries, keys, values = inputs
    query_bounds, key_bounds = (each.tolist() for each in bounds)
    pieces = []
    for number in range(len(query_bounds) - 1):
        query = queries[query_bounds[number] : query_bounds[number + 1]]
        first = key_bounds[number]
        last = key_bounds[number + 1] if lengths is None else first + int(lengths[number])
        assert len(query) <= longest[0] and last - first <= longest[1]
        key, value = (x[first:last] for x in (keys, values))
        pieces.append(
            torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (query, key, value)),
                is_causal=lengths is None,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
        )
    return torch.cat(pieces)


def test_the_arguments_of_flash_attention_describe_the_rows(topology, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_oprd.models.cached_attention.flash_attention", reference_attention)
    monkeypatch.setattr("megatron_oprd.rollout.decoder.flash_attention_works", lambda *arguments: True)
    hf = random_hf_model("Qwen3", num_hidden_layers=2)
    stage, spec = load(hf, tmp_path, topology)
    prompts = random_prompts(12)
    rollouts = EmbeddedEngine(stage, spec, topology, GREEDY, seed=0, max_batch=5).generate(prompts, step=0)
    assert [rollout.response_ids for rollout in rollouts] == [hf_greedy(hf, prompt) for prompt in prompts]


def test_the_cache_is_allocated_once_with_the_planned_bytes(topology, tmp_path, monkeypatch):
    seen = []

    class Watched(Decoder):
        def decode(self):
            super().decode()
            seen.append((self.cache.num_bytes, self.cache.data.data_ptr(), self.slots.longest))

    monkeypatch.setattr(embedded, "Decoder", Watched)
    stage, spec = load(random_hf_model("Qwen3", num_hidden_layers=2), tmp_path, topology)
    spec = dataclasses.replace(spec, eos_token_ids=())
    sampling = Sampling(max_new_tokens=200, samples_per_prompt=2)
    EmbeddedEngine(stage, spec, topology, sampling, seed=0, max_batch=3).generate([Prompt(0, (5,) * 9)] * 2, step=0)
    assert {(size, address) for size, address, _ in seen} == {
        (rollout_cache_bytes(spec, 3, 209, range(2), 1, torch.float32), seen[0][1])
    }
    assert max(length for *_, length in seen) == 209
    wide = dataclasses.replace(spec, max_position_embeddings=100)
    assert rollout_cache_bytes(wide, 3, 209, range(2), 1, torch.float32) == rollout_cache_bytes(
        spec, 3, 100, range(2), 1, torch.float32
    )


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(0.7, 0.8, 20, 12), Sampling(1.3, 1.0, 0, 12)])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(sampling, topology, tmp_path):
    hf = random_hf_model("Qwen3", num_hidden_layers=2)
    stage, spec = load(hf, tmp_path, topology)
    sampling = dataclasses.replace(sampling, logprobs=True, samples_per_prompt=2)
    engine = EmbeddedEngine(stage, spec, topology, sampling, seed=0, max_batch=3)
    rollouts = engine.generate(random_prompts(5), step=0)
    warpers = transformers.LogitsProcessorList()
    if sampling.temperature:
        warpers.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logits = hf(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].double()
        expected = warpers(None, logits).log_softmax(dim=-1)
        expected = expected[torch.arange(len(expected)), ids[0, len(rollout.prompt_ids) :]]
        torch.testing.assert_close(torch.tensor(rollout.logprobs, dtype=torch.float64), expected, rtol=0, atol=1e-4)
    plain = EmbeddedEngine(stage, spec, topology, dataclasses.replace(sampling, logprobs=False), seed=0, max_batch=3)
    without = plain.generate(random_prompts(5), step=0)
    assert without == [dataclasses.replace(rollout, logprobs=None) for rollout in rollouts]
    assert set(EOS) & {rollout.response_ids[-1] for rollout in rollouts}, "a row must end before its limit"
