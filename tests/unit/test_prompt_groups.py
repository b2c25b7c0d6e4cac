"""data.group_by_teacher: the prompts of a step have one data_source, and each prompt is used as often as before."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_oprd.checkpoint.pending_rollouts import write_pending
from megatron_oprd.checkpoint.state_file import read_state_file
from megatron_oprd.data.prompts import PromptState, take_of_one_source
from megatron_oprd.rollout.engine import FinishedRollouts
from megatron_oprd.testing.replayed_run import make_config
from megatron_oprd.training.state import PendingStep
from megatron_oprd.types import Prompt, UserError

TEACHERS = {"math": Path("a"), "code": Path("b")}


def prompts(**sizes):
    sources = itertools.chain.from_iterable([source] * size for source, size in sizes.items())
    return [Prompt(index, (1,), data_source=source) for index, source in enumerate(sources)]


def steps(of, count, number, state=None, shuffle=True):
    """Return the prompts of `number` steps of `count` prompts, and the state after them."""
    state, taken = state or PromptState(), []
    for _ in range(number):
        chosen, state = take_of_one_source(of, state, count, seed=3, shuffle=shuffle)
        taken.append(chosen)
    return taken, state


def test_a_step_has_one_source_and_a_cycle_uses_every_prompt_once():
    taken, state = steps(prompts(math=8, code=4), 2, 6)
    assert all(len({prompt.data_source for prompt in step}) == 1 and len(step) == 2 for step in taken)
    assert Counter(prompt.index for step in taken for prompt in step) == dict.fromkeys(range(12), 1)
    assert [step[0].data_source for step in taken] == ["math", "code", "math", "math", "code", "math"]
    assert (state.epoch, state.position, state.of_source) == (1, 0, {"math": 8, "code": 4})


def test_sources_of_equal_size_alternate_and_a_step_may_reach_into_the_next_epoch_of_its_source():
    taken, _ = steps(prompts(math=3, code=3), 2, 6, shuffle=False)
    assert [step[0].data_source for step in taken] == ["math", "code"] * 3
    assert [prompt.index for step in taken[::2] for prompt in step] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("done", [1, 4])
def test_a_stored_state_continues_with_the_same_prompts(done):
    of = prompts(math=5, code=9, chat=2)
    all_at_once, end = steps(of, 3, 8)
    _, state = steps(of, 3, done)
    restored = PromptState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert steps(of, 3, 8 - done, restored) == (all_at_once[done:], end)


def test_a_checkpoint_has_the_position_in_the_prompts_of_each_source(tmp_path):
    _, state = steps(prompts(math=5, code=9), 3, 4)
    checkpoint = tmp_path / "step_0000004"
    checkpoint.mkdir()
    pending = write_pending(checkpoint, PendingStep(3, state, FinishedRollouts([])), []).to_dict()
    values = {"step": 4, "prompts": state.to_dict(), "teachers": {}, "pending": pending}
    (checkpoint / "state.json").write_text(json.dumps(values))
    saved = read_state_file(checkpoint)
    assert state.of_source and saved.pending is not None
    assert saved.prompts.state() == saved.pending.prompts.state() == state


def test_a_state_without_groups_has_the_form_of_earlier_checkpoints():
    assert PromptState(1, 2).to_dict() == {"epoch": 1, "position": 2}


def test_prompts_of_a_source_that_is_gone_are_an_error():
    with pytest.raises(UserError, match="prompts of chat: the prompt files have changed"):
        steps(prompts(math=5), 1, 1, PromptState(of_source={"chat": 4}))


@pytest.mark.parametrize(
    ("teachers", "settings", "message"),
    [
        (Path("a"), (), "needs several teachers"),
        (TEACHERS, (), "no effect with rollout.engine=replay"),
    ],
)
def test_groups_without_a_choice_of_prompts_are_refused(teachers, settings, message):
    with pytest.raises(UserError, match=message):
        make_config(Path("student"), teachers, "data.group_by_teacher=true", *settings)
