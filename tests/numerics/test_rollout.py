"""The embedded engine generates the tokens of Hugging Face, and rollouts do not influence each other."""

import dataclasses

import pytest
import torch

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.load import load_hf
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.models.build import build_model
from megatron_oprd.models.kv_cache import rollout_cache_bytes
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.rollout.batch_rows import rows_at_a_time
from megatron_oprd.rollout.decoder import Decoder
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.sampling import sample, uniforms
from megatron_oprd.testing.models import longrope, random_hf_model, save
from megatron_oprd.types import Prompt, UserError

EOS = (3, 17, 40, 90, 111)
NEW_TOKENS = 24
GREEDY = Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS)


def load(hf, folder, topology):
    """Return (stage, spec) of a Hugging Face model, with the EOS ids of these tests."""
    save(hf, folder)
    spec = dataclasses.replace(read_model_spec(folder), eos_token_ids=EOS)
    stage = build_model(spec, topology, torch.float32)
    load_hf(stage, HFReader(folder), spec)
    return stage, spec


@pytest.fixture(scope="module")
def qwen3(topology, tmp_path_factory):
    hf = random_hf_model("Qwen3", num_hidden_layers=2)
    return hf, *load(hf, tmp_path_factory.mktemp("qwen3"), topology)


def random_prompts(count, vocabulary=131, longest=21):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        Prompt(index, tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist()))
        for index, length in enumerate(lengths)
    ]


def hf_greedy(hf, prompt):
    """Return the response of Hugging Face's `generate` to a prompt, up to and including the EOS token."""
    ids = torch.tensor([prompt.prompt_ids])
    arguments = dict(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=list(EOS), pad_token_id=0)
    output = hf.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    return tuple(output[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    ("family", "row_counts"),
    [
        *((family, (64, 7, 1)) for family in ("Mistral", "Qwen3", "Qwen2Moe", "Llama")),
        ("Qwen3_5", (7,)),
        *(pytest.param(family, (64, 7, 1), marks=pytest.mark.nightly) for family in ("Qwen3_5Moe", "Qwen3Next")),
    ],
    ids=str,
)
def test_greedy_tokens_equal_hugging_face(family, row_counts, topology, tmp_path):
    hf = random_hf_model(family, num_hidden_layers=3)
    stage, spec = load(hf, tmp_path, topology)
    prompts = random_prompts(64)
    expected = [hf_greedy(hf, prompt) for prompt in prompts]
    reasons = ["eos" if response[-1] in EOS else "length" for response in expected]
    assert 0 < reasons.count("eos") < 64, "the case must contain both ways to end"
    stage.train()
    for slots in row_counts:
        rollouts = EmbeddedEngine(stage, spec, topology, GREEDY, seed=0, max_batch=slots).generate(prompts, step=0)
        assert [r.response_ids for r in rollouts] == expected, f"{slots} slots"
        assert [r.finish_reason for r in rollouts] == reasons
        assert [r.prompt_ids for r in rollouts] == [p.prompt_ids for p in prompts]
        assert all(r.response_mask == (1,) * len(r.response_ids) for r in rollouts)
    assert stage.training


@pytest.mark.parametrize("tokens_per_pass", [8192, 30])
def test_a_row_that_outgrows_the_short_factors_equals_hugging_face(tokens_per_pass, topology, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_oprd.rollout.embedded.PROMPT_TOKENS_PER_STEP", tokens_per_pass)
    hf = random_hf_model("Phi3", num_hidden_layers=3, num_attention_heads=4, **longrope(12, original=15))
    stage, spec = load(hf, tmp_path, topology)
    prompts = [*random_prompts(24), *(Prompt(24 + i, tuple(range(20, 20 + n))) for i, n in enumerate((14, 15, 16)))]
    expected = [hf_greedy(hf, prompt) for prompt in prompts]
    sides = [(len(p.prompt_ids) <= 15, len(p.prompt_ids) + len(r) > 16) for p, r in zip(prompts, expected, strict=True)]
    assert sides.count((True, True)) > 12, "the case must have rows that cross"
    for slots in (27, 5):
        rollouts = EmbeddedEngine(stage, spec, topology, GREEDY, seed=0, max_batch=slots).generate(prompts, step=0)
        assert [r.response_ids for r in rollouts] == expected, f"{slots} slots"


def test_cached_logits_and_samples_equal_those_of_the_full_forward(qwen3, topology, monkeypatch):
    _, stage, spec = qwen3
    seen = []

    class Recording(Decoder):
        def choose(self, logits, rows):
            for slot, row_logits in zip(rows.tolist(), logits, strict=True):
                seen.append((self.slots.requests[slot].order, int(self.slots.generated[slot]), row_logits.clone()))
            return super().choose(logits, rows)

    monkeypatch.setattr("megatron_oprd.rollout.embedded.Decoder", Recording)
    sampling = Sampling(max_new_tokens=150, samples_per_prompt=2)
    rollouts = EmbeddedEngine(stage, spec, topology, sampling, seed=1, max_batch=5).generate(random_prompts(6), step=3)
    full = []
    for rollout in rollouts:
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        rows = torch.arange(len(rollout.prompt_ids) - 1, len(ids) - 1)
        positions = torch.arange(len(ids))
        lengths = torch.full_like(positions, len(ids))
        batch = MicroBatch(position_ids=positions, lengths=lengths, bounds=(0, len(ids)), logit_rows=rows)
        with torch.no_grad():
            full.append(stage[0].run(ids, batch)[:, : spec.vocab_size])
    assert len(seen) == sum(len(r.response_ids) for r in rollouts)
    assert max(len(r.response_ids) for r in rollouts) > 128
    for order, generated, logits in seen:
        torch.testing.assert_close(logits, full[order][generated], rtol=1e-4, atol=1e-4)
    for rollout, logits in zip(rollouts, full, strict=True):
        numbers = uniforms(1, 3, rollout.prompt_index, rollout.sample_index, len(logits))
        assert rollout.response_ids == tuple(sample(logits, sampling, torch.from_numpy(numbers)).tolist())


def by_sample(rollouts):
    return {(r.prompt_index, r.sample_index): r.response_ids for r in rollouts}


@pytest.mark.parametrize("sampling", [Sampling(0.8, 1.0, 0, 16, 3), Sampling(1.2, 0.9, 20, 16, 3)])
def test_a_rollout_depends_only_on_its_prompt_and_sample(sampling, qwen3, topology):
    _, stage, spec = qwen3
    prompts = random_prompts(10)

    def engine(slots, seed=7):
        return EmbeddedEngine(stage, spec, topology, sampling, seed=seed, max_batch=slots)

    rollouts = engine(64).generate(prompts, step=2)
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [(p, s) for p in range(10) for s in range(3)]
    expected = by_sample(rollouts)
    assert by_sample(engine(64).generate(prompts[::-1], step=2)) == expected
    assert by_sample(engine(4).generate(prompts, step=2)) == expected
    assert by_sample(engine(5).generate(prompts[:3], 2) + engine(8).generate(prompts[3:], 2)) == expected
    # and it does depend on these:
    assert len(set(expected.values())) > 25
    assert by_sample(engine(64).generate(prompts, step=3)) != expected
    assert by_sample(engine(64, seed=8).generate(prompts, step=2)) != expected


def test_vocabulary_padding_is_never_sampled(qwen3, topology):
    _, stage, spec = qwen3
    narrow = dataclasses.replace(spec, vocab_size=40, eos_token_ids=())
    sampling = Sampling(temperature=5.0, max_new_tokens=30)
    rollouts = EmbeddedEngine(stage, narrow, topology, sampling, seed=0).generate(random_prompts(8, 40), step=0)
    assert max(max(r.response_ids) for r in rollouts) == 39
    assert {r.finish_reason for r in rollouts} == {"length"}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0.9, 20, NEW_TOKENS)])
def test_ids_outside_the_teachers_vocabulary_are_never_sampled(sampling, qwen3, topology, monkeypatch):
    _, stage, spec = qwen3
    student = dataclasses.replace(spec, vocab_size=100, eos_token_ids=())  # the logits of 100 and up are padding

    def sampled(boosted_from, **arguments):
        class Boosted(Decoder):
            def _sample(self, logits, rows):
                logits = logits.clone()
                logits[:, boosted_from:] += 1000.0
                super()._sample(logits, rows)

        monkeypatch.setattr("megatron_oprd.rollout.embedded.Decoder", Boosted)
        engine = EmbeddedEngine(stage, student, topology, sampling, seed=0, **arguments)
        rollouts = engine.generate(random_prompts(8, 40), 0)
        return {token for rollout in rollouts for token in rollout.response_ids}

    assert min(sampled(40)) >= 40, "the case must be one that tempts"
    assert len(sampled(40, vocab_size=40)) > 1 and max(sampled(40, vocab_size=40)) < 40
    assert sampled(39, vocab_size=40) == {39}, "the last id of the teacher stays"
    assert max(sampled(100, vocab_size=131)) < 100, "a teacher that knows more does not open the padding"


def test_a_rollout_keeps_data_source_and_teacher_prompt(qwen3, topology):
    _, stage, spec = qwen3
    prompts = [
        dataclasses.replace(prompt, data_source=f"s{prompt.index}", teacher_prompt_ids=(9, prompt.index))
        for prompt in random_prompts(9)
    ]
    prompts[4] = dataclasses.replace(prompts[4], teacher_prompt_ids=None)
    sampling = Sampling(max_new_tokens=12, samples_per_prompt=2)
    rollouts = EmbeddedEngine(stage, spec, topology, sampling, seed=0, max_batch=3).generate(prompts, step=0)
    expected = [prompt for prompt in prompts for _ in range(2)]
    assert [r.data_source for r in rollouts] == [p.data_source for p in expected]
    assert [r.teacher_prompt_ids for r in rollouts] == [p.teacher_prompt_ids for p in expected]
    assert [r.prompt_ids for r in rollouts] == [p.prompt_ids for p in expected]


def test_the_number_of_positions_limits_the_answer_and_errors_name_the_prompt(qwen3, topology):
    _, stage, spec = qwen3
    short = dataclasses.replace(spec, max_position_embeddings=12, eos_token_ids=())
    engine = EmbeddedEngine(stage, short, topology, GREEDY, seed=0)
    rollouts = engine.generate([Prompt(0, (5,) * 9), Prompt(1, (5,))], step=0)
    assert [len(r.response_ids) for r in rollouts] == [3, 11]
    assert [len(r.response_ids) for r in engine.generate([Prompt(0, (5,)), Prompt(1, (6,))], 0, limits=[1, 4])] == [
        1,
        4,
    ]
    assert engine.generate([], step=0) == []
    with pytest.raises(UserError, match="prompt 4 is empty"):
        engine.generate([Prompt(0, (5,)), Prompt(4, ())], step=0)
    with pytest.raises(UserError, match="prompt 9 has 12 tokens"):
        engine.generate([Prompt(9, (5,) * 12)], step=0)


def test_the_rows_generated_at_once_fit_a_third_of_the_free_memory(qwen3, topology, monkeypatch):
    _, stage, spec = qwen3
    row_bytes = rollout_cache_bytes(spec, 1, 100, range(2), 1, torch.float32)
    for rows, free in ((1, 0), (1, 3 * row_bytes), (5, 3 * 5 * row_bytes + row_bytes), (256, 10**12)):
        monkeypatch.setattr("megatron_oprd.runtime.platform.free_memory_bytes", lambda device, free=free: free)
        assert rows_at_a_time(spec, topology, stage, longest_row=100) == rows
