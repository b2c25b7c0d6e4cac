"""Targets are stored until the student's loss has used them, and no longer."""

import pytest
import torch

from megatron_oprd.models.targets import TeacherTargets

CPU = torch.device("cpu")


def states(*layers):
    return {layer: torch.full((3, 4), float(layer)) for layer in layers}


def test_a_taken_target_is_forgotten_and_a_shared_tensor_counts_once():
    targets = TeacherTargets((1, 2, 3), CPU)
    two, five = states(2, 5).values()
    targets.put(0, {1: two, 2: two, 3: five, 4: five})
    assert len(targets) == 3 and targets.num_bytes == 2 * 3 * 4 * 4
    first = targets.of(0)
    assert 3 in first and 4 not in first and sorted(first) == [1, 2, 3]
    assert first[3][0, 0] == 5 and first.take(3)[0, 0] == 5
    first.release(1)
    assert targets.num_bytes == 3 * 4 * 4, "student layer 2 still waits for the same states"
    first.take(2)
    assert len(targets) == 0 and targets.num_bytes == 0 and targets.most_bytes == 2 * 3 * 4 * 4
    with pytest.raises(KeyError):
        first.take(2)


def test_a_streamed_teacher_computes_a_micro_batch_when_it_starts():
    produced = []

    def produce(number):
        produced.append(number)
        return states(1)

    targets = TeacherTargets((1,), CPU, produce=produce)
    for number in range(3):
        assert produced == list(range(number))
        targets.of(number).take(1)
    assert targets.most_bytes == 3 * 4 * 4


def test_states_without_a_compared_layer_are_refused():
    with pytest.raises(KeyError):
        TeacherTargets((1, 2), CPU).put(0, states(1))
