"""A teacher with another tokenizer has micro-batches of its own tokens. Every compared token has the same number and
weight as in the student's micro-batches."""

import bisect
import dataclasses
import functools
import itertools
import random

import pytest
import torch

from megatron_oprd.config import BatchConfig, LossConfig, RepresentationConfig
from megatron_oprd.data.alignment import align_rollouts, make_aligner
from megatron_oprd.data.end_tokens import end_of_turn_id
from megatron_oprd.testing.reference import selected_indices
from megatron_oprd.training.global_batch import GlobalBatch, max_num_tokens, teacher_view
from megatron_oprd.types import Rollout
from tests.helpers.responses import Speller, brute_force, random_response, tokenizer_named
from tests.helpers.specs import ranks, tiny_spec

PAIRS = [("bytes", name) for name in ("qwen", "llama_3", "llama_2", "gemma")]
PAIRS += [("phi_4_mini", "bytes"), ("llama_2", "phi_4_mini")]
ROOM = 40  # tokens of a micro-batch, and so the most that the teacher reads of a rollout
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 2)]  # data, context and sequence ranks
SETTINGS = list(itertools.product(["all", "last", "last_k", "first_k"], [0, -1], ["sequence_mean", "token_mean"]))


class Pair:
    """Two tokenizers, and random rollouts of the first after random prompts."""

    def __init__(self, names, make_folder):
        self.tokenizers = [tokenizer_named(name, make_folder(name)) for name in names]
        self.spellers = [
            Speller.of(name, one, make_folder(f"model-of-{name}"))
            for name, one in zip(names, self.tokenizers, strict=True)
        ]
        self.eos = self.tokenizers[0].eos_token_id
        student, teacher = self.tokenizers
        self.aligner = make_aligner(
            student, teacher, student_eos_ids=[self.eos], teacher_end_of_turn_id=end_of_turn_id(teacher)
        )

    def rollouts(self, seed, count, room=ROOM):
        """Return random rollouts. One is empty, and the teacher's tokens of some are cut."""
        generator, rollouts = random.Random(seed), [Rollout((1,), (), (), "replay", teacher_prompt_ids=(2,))]
        while len(rollouts) < count:
            response = tuple(random_response(generator, self.tokenizers[0]))
            prompts = [tuple(generator.choices(range(200), k=generator.randint(1, 9))) for _ in range(2)]
            if len(prompts[0] + response) <= room:
                mask = tuple(generator.choices([0, 1], [1, 4], k=len(response)))
                rollouts.append(Rollout(prompts[0], response, mask, "replay", teacher_prompt_ids=prompts[1]))
        return align_rollouts(self.aligner, rollouts, room)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    folders = functools.cache(tmp_path_factory.mktemp)
    return functools.cache(lambda names: Pair(names, folders))


def batches_of(global_batch, topology, teacher=None):
    return global_batch.micro_batches(topology, teacher=teacher)


def host_batches(global_batch, topology, teacher=None):
    return [batch.host for batch in batches_of(global_batch, topology, teacher)]


def make_batch(rollouts, **representation):
    loss = LossConfig(representation=RepresentationConfig(**representation))
    batch = BatchConfig(max_tokens_per_micro_batch=ROOM)
    return GlobalBatch(tuple(rollouts), (0,) * len(rollouts), loss, batch, tiny_spec())


def compared(pair, rollout, mode, k, shift):
    """Return the (student token, teacher token) pairs whose states come after the same bytes, by brute force."""
    ended = rollout.response_ids[-1:] == (pair.eos,)
    global_batch = pair.aligner.align(rollout.response_ids).teacher_ids
    said, read = (
        speller.prefixes(list(ids[: len(ids) - ended]))
        for speller, ids in zip(pair.spellers, (rollout.response_ids, global_batch), strict=True)
    )
    states = {*brute_force(said, read), (-1, -1)} | ({(len(said), len(read))} if ended else set())
    room = ROOM - len(rollout.teacher_prompt_ids)
    chosen = selected_indices(rollout.response_mask, mode, k)
    return [(t - shift, u - shift) for t, u in sorted(states) if t - shift in chosen and u < room]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_every_compared_token_has_one_number_and_one_weight_in_both_models(names, pair_of):
    pair = pair_of(names)
    for seed, (mode, shift, aggregation) in enumerate(SETTINGS):
        rollouts = pair.rollouts(seed, 30)
        global_batch = make_batch(rollouts, positions=mode, k=4, shift=shift, aggregation=aggregation)
        per_rollout = [compared(pair, rollout, mode, 4, shift) for rollout in rollouts]
        sequences, total = sum(map(bool, per_rollout)), sum(map(len, per_rollout))
        assert 0 < sequences < len(rollouts) and total >= 10
        expected = []  # by number: the rollout, the place of the state in both readings, the weight, the token
        for number, tokens in enumerate(per_rollout):
            weight = 1 / total if aggregation == "token_mean" else 1 / (sequences * max(len(tokens), 1))
            for t, u in tokens:
                student = len(rollouts[number].prompt_ids) + t + shift
                teacher = len(rollouts[number].teacher_prompt_ids) + u + shift
                expected.append((number, (student, teacher), weight, rollouts[number].response_ids[t]))
        for layout in LAYOUTS if names == PAIRS[0] else (LAYOUTS[0], LAYOUTS[-1]):
            assert_as_expected(global_batch, layout, expected)


def assert_as_expected(global_batch, layout, expected):
    for side, teacher in enumerate((None, 0)):
        readings = [teacher_view(rollout) if side else rollout for rollout in global_batch.rollouts]
        found = []
        for topology in ranks(*layout):
            for batch in batches_of(global_batch, topology, teacher):
                hidden_rows = [
                    values.chunk(layout[2])[topology.tensor_rank] if layout[2] > 1 else values
                    for values in (batch.tokens, batch.position_ids, batch.lengths)
                ]
                selection = batch.host.representation
                for row, number, weight, token in zip(
                    *(
                        x.tolist()
                        for x in (selection.selected, selection.token_numbers, selection.weights, selection.token_ids)
                    ),
                    strict=True,
                ):
                    rollout, places, expected_weight, sampled = expected[number]
                    ids = readings[rollout].prompt_ids + readings[rollout].response_ids
                    where = (ids[places[side]], places[side], len(ids))
                    assert tuple(int(values[row]) for values in hidden_rows) == where
                    assert weight == pytest.approx(expected_weight, rel=1e-12) and token == sampled
                    found.append(number)
        assert sorted(found) == list(range(len(expected)))


@pytest.mark.parametrize("shift", [0, -1])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_states_with_the_same_number_come_after_the_same_bytes(names, shift, pair_of):
    """The texts are decoded from the tokens of the micro-batches alone."""
    pair = pair_of(names)
    rollouts = pair.rollouts(f"{shift}", 300)
    global_batch, (topology,) = make_batch(rollouts, positions="all", shift=shift), ranks(1, 1, 1)
    prompts = {rollout.prompt_ids + rollout.response_ids: rollout for rollout in rollouts}
    number = 0
    for of_student, of_teacher in zip(
        *(host_batches(global_batch, topology, teacher) for teacher in (None, 0)), strict=True
    ):
        assert max(of_student.num_tokens, of_teacher.num_tokens) <= ROOM
        assert of_student.representation.token_numbers.tolist() == of_teacher.representation.token_numbers.tolist()
        assert of_student.representation.weights.tolist() == of_teacher.representation.weights.tolist()
        bounds = [batch.bounds for batch in (of_student, of_teacher)]
        for rows in zip(
            of_student.representation.selected.tolist(), of_teacher.representation.selected.tolist(), strict=True
        ):
            places = [bisect.bisect(ends, row) - 1 for ends, row in zip(bounds, rows, strict=True)]
            assert places[0] == places[1]
            start, end = bounds[0][places[0] : places[0] + 2]
            rollout = prompts[tuple(of_student.tokens[start:end].tolist())]
            said, read = (
                batch.tokens[starts[places[0]] : row + 1].tolist()[len(prompt) :]
                for batch, starts, row, prompt in zip(
                    (of_student, of_teacher),
                    bounds,
                    rows,
                    (rollout.prompt_ids, rollout.teacher_prompt_ids),
                    strict=True,
                )
            )
            assert (len(said) == len(rollout.response_ids) and said[-1:] == [pair.eos]) == (
                read[-1:] == [pair.aligner.end_of_turn_id]
            )
            spelled = [speller.prefixes(ids) for speller, ids in zip(pair.spellers, (said, read), strict=True)]
            assert (spelled[0] or [b""])[-1] == (spelled[1] or [b""])[-1]
            number += 1
    assert number == global_batch.representation.counts.tokens > 300


@pytest.mark.parametrize("shift", [0, -1])
def test_with_the_same_tokenizer_every_tensor_equals_that_without_alignment(shift, pair_of):
    tokenizer = pair_of(("bytes", "qwen")).tokenizers[0]
    rollouts = [
        dataclasses.replace(one, alignment=None) for one in pair_of(("bytes", "qwen")).rollouts(0, 40, ROOM - 9)
    ]
    aligner = make_aligner(tokenizer, tokenizer, student_eos_ids=[258], teacher_end_of_turn_id=258)
    aligned = align_rollouts(aligner, rollouts, ROOM)
    assert [max_num_tokens(one) for one in aligned] == [max_num_tokens(one) for one in rollouts]
    settings = {"positions": "last_k", "k": 4, "shift": shift}
    plain, global_batch = make_batch(rollouts, **settings), make_batch(aligned, **settings)
    for layout in LAYOUTS:
        for topology, teacher in itertools.product(ranks(*layout), (None, 0)):
            pairs = zip(batches_of(plain, topology, teacher), batches_of(global_batch, topology, teacher), strict=True)
            for expected, actual in pairs:
                assert_equal(expected, actual)
    extra = {key: value for key, value in global_batch.metrics().items() if key not in plain.metrics()}
    assert extra["align/coverage"] == 1 and extra["align/no_sync"] == extra["align/teacher_tokens_cut"] == 0
    assert plain.metrics().items() <= global_batch.metrics().items()


def assert_equal(expected, actual):
    for field in dataclasses.fields(expected):
        first, second = getattr(expected, field.name), getattr(actual, field.name)
        if dataclasses.is_dataclass(first):
            assert_equal(first, second)
        elif isinstance(first, dict):
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        elif isinstance(first, torch.Tensor):
            assert first.dtype == second.dtype and torch.equal(first, second), field.name
        else:
            assert first == second


def test_the_metrics_count_comparable_tokens(pair_of):
    """Every teacher token ends at a sync point of the first response. The second response has no sync point."""
    pair = pair_of(("bytes", "llama_3"))
    student = pair.tokenizers[0]
    said = [student("the 2024", add_special_tokens=False)["input_ids"], [256, 257], []]
    rollouts = [Rollout((1,), tuple(ids), (1,) * len(ids), "replay", teacher_prompt_ids=(2, 3)) for ids in said]
    reading = pair.tokenizers[1]("the 2024", add_special_tokens=False)["input_ids"]
    assert len(reading) < len(said[0])
    points = len(reading)  # bytes are read one by one: every token of the teacher ends with one
    found = make_batch(align_rollouts(pair.aligner, rollouts, ROOM), positions="all").metrics()
    assert found["align/coverage"] == points / (len(said[0]) + 2)
    assert found["align/teacher_tokens"] == len(reading) / 3
    assert found["align/teacher_tokens_cut"] == 0
    assert found["align/no_sync"] == 1
    assert found["rep/num_tokens"] == points
    cut = make_batch(align_rollouts(pair.aligner, rollouts, 2 + 1), positions="all").metrics()
    assert cut["align/teacher_tokens_cut"] == len(reading) - 1
    assert cut["align/coverage"] == 1 / (len(said[0]) + 2)
    last = make_batch(align_rollouts(pair.aligner, rollouts, 2 + 1), positions="last").metrics()
    assert (last["align/coverage"], last["align/no_sync"]) == (0, 2)
    assert make_batch(align_rollouts(pair.aligner, rollouts[2:], ROOM)).metrics()["align/coverage"] == 1


def test_a_step_without_sync_points_has_only_padding(pair_of):
    pair, (topology,) = pair_of(("bytes", "llama_3")), ranks(1, 1, 1)
    rollouts = [Rollout((1,), (256,), (1,), "replay", teacher_prompt_ids=(2,))] * 3
    global_batch = make_batch(align_rollouts(pair.aligner, rollouts, ROOM))
    for teacher in (None, 0):
        (batch,) = batches_of(global_batch, topology, teacher)
        assert len(batch.representation) == 0
