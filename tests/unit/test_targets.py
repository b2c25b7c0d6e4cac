"""Targets are there until the student has read them, and no longer."""

import pytest
import torch

from megatron_oprd.models.targets import TeacherTargets

CPU = torch.device("cpu")


def states(*layers):
    return {layer: torch.full((3, 4), float(layer)) for layer in layers}


def test_what_is_taken_is_gone_and_shared_states_are_counted_once():
    targets = TeacherTargets((1, 2, 3), CPU)
    two, five = states(2, 5).values()
    targets.put(0, {1: two, 2: two, 3: five, 4: five})
    assert len(targets) == 3 and targets.num_bytes == 2 * 3 * 4 * 4
    of = targets.of(0)
    assert 3 in of and 4 not in of
    assert of.read(3)[0, 0] == 5 and of.take(3)[0, 0] == 5
    of.take(1)
    assert targets.num_bytes == 3 * 4 * 4, "student layer 2 still waits for the same states"
    of.take(2)
    assert len(targets) == 0 and targets.num_bytes == 0 and targets.most_bytes == 2 * 3 * 4 * 4
    with pytest.raises(KeyError):
        of.take(2)


def test_a_streamed_teacher_makes_a_micro_batch_when_it_starts():
    made = []

    def produce(number):
        made.append(number)
        return states(1)

    targets = TeacherTargets((1,), CPU, produce=produce)
    for number in range(3):
        assert made == list(range(number))
        targets.of(number).take(1)
    assert targets.most_bytes == 3 * 4 * 4


def test_a_missing_layer_is_refused():
    with pytest.raises(KeyError):
        TeacherTargets((1, 2), CPU).put(0, states(1))
