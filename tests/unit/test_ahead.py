"""Rollouts that are generated ahead: the weights that sample them, the overlap with training, and storing them."""

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from megatron_oprd.checkpoint.pending_rollouts import FILE, read_pending, write_pending
from megatron_oprd.config import load_config
from megatron_oprd.data.prompts import PromptState
from megatron_oprd.rollout.engine import FinishedRollouts
from megatron_oprd.rollout.replay import load_replay
from megatron_oprd.rollout.stored import rollouts_as_text, rollouts_from_text
from megatron_oprd.training.ahead import RolloutSource
from megatron_oprd.training.state import PendingStep, TrainState
from megatron_oprd.types import Prompt, Rollout, UserError

ONE_REPLICA = SimpleNamespace(replica_rank=0, num_replicas=1)


@dataclass
class SlowServer:
    """An engine whose thread generates while the caller goes on. A rollout's response is the version of its weights."""

    calls: list = field(default_factory=list)
    may_generate: threading.Event = field(default_factory=threading.Event)
    version: int | None = None
    fails_at_step: int | None = None
    pending: int = 0

    def sync_weights(self, version):
        assert self.pending == 0, "weights are replaced while rollouts are generated"
        self.version = version
        self.calls.append(f"sync {version}")
        return {"rollout/sync_seconds": 1.0}

    def submit(self, prompts, step):
        self.pending += 1
        self.calls.append(f"submit {step}")
        return SlowGeneration(self, prompts, step)


class SlowGeneration:
    def __init__(self, server, prompts, step):
        self.server, self.step, self.rollouts, self.error = server, step, [], None
        self.thread = threading.Thread(target=self.generate, args=(prompts, server.version))
        self.thread.start()

    def generate(self, prompts, version):
        assert self.server.may_generate.wait(60)
        if self.step == self.server.fails_at_step:
            self.error = UserError("the server ended")
        self.rollouts = [Rollout(prompt.prompt_ids, (version,), (1,), "eos") for prompt in prompts]

    def result(self):
        self.thread.join()
        self.server.pending -= 1
        self.server.calls.append(f"result {self.step}")
        if self.error is not None:
            raise self.error
        return self.rollouts


def take_two(state):
    first = state.position
    return [Prompt(first, (first,)), Prompt(first + 1, (first + 1,))], PromptState(0, first + 2)


def train(source, state, steps, server):
    """Return the prompts, the version of the sampling weights and the staleness of each step, and the last state."""
    found = []
    for _ in range(steps):
        rollouts, metrics, state = source.next(state)
        server.calls.append("train")
        (version,) = {rollout.response_ids[0] for rollout in rollouts}
        found.append(([rollout.prompt_ids[0] for rollout in rollouts], version, metrics["rollout/staleness"]))
    return found, state


def started_server(**options):
    server = SlowServer(**options)
    server.may_generate.set()
    return server


def test_without_ahead_the_present_weights_sample_each_step():
    server = started_server()
    found, state = train(RolloutSource(server, take_two, ONE_REPLICA, 0, 3), TrainState(), 3, server)
    assert found == [([0, 1], 0, 0), ([2, 3], 1, 0), ([4, 5], 2, 0)]
    assert server.calls == [
        *("sync 0", "submit 0", "result 0", "train"),
        *("sync 1", "submit 1", "result 1", "train"),
        *("sync 2", "submit 2", "result 2", "train"),
    ]
    assert state == TrainState(3, PromptState(0, 6))


def test_ahead_submits_the_next_step_before_training_and_nothing_beyond_the_last():
    server = started_server()
    found, state = train(RolloutSource(server, take_two, ONE_REPLICA, 1, 3), TrainState(), 3, server)
    assert found == [([0, 1], 0, 0), ([2, 3], 0, 1), ([4, 5], 1, 1)]
    assert server.calls == [
        *("sync 0", "submit 0", "result 0", "submit 1", "train"),
        *("result 1", "sync 1", "submit 2", "train"),
        *("result 2", "train"),
    ]
    assert state == TrainState(3, PromptState(0, 6))


def test_training_runs_while_the_next_rollouts_are_generated():
    server = started_server()
    source = RolloutSource(server, take_two, ONE_REPLICA, 1, 3)
    _, _, state = source.next(TrainState())
    state.pending.generation.thread.join()
    server.may_generate.clear()
    rollouts, _, state = source.next(state)  # step 1 is returned although step 2 cannot be generated yet
    assert [rollout.prompt_ids[0] for rollout in rollouts] == [2, 3]
    assert state.pending.generation.thread.is_alive()
    server.may_generate.set()
    assert [rollout.prompt_ids[0] for rollout in state.pending.rollouts] == [4, 5]


def test_pending_rollouts_are_used_up_first_when_ahead_is_turned_off():
    server = started_server()
    _, state = train(RolloutSource(server, take_two, ONE_REPLICA, 1, 4), TrainState(), 2, server)
    found, _ = train(RolloutSource(server, take_two, ONE_REPLICA, 0, 4), state, 2, server)
    assert found == [([4, 5], 1, 1), ([6, 7], 3, 0)]


def test_a_run_can_turn_ahead_on():
    server = started_server()
    _, state = train(RolloutSource(server, take_two, ONE_REPLICA, 0, 4), TrainState(), 2, server)
    found, _ = train(RolloutSource(server, take_two, ONE_REPLICA, 1, 4), state, 2, server)
    assert found == [([4, 5], 2, 0), ([6, 7], 2, 1)]


def test_metrics_of_the_weight_transfer_are_those_of_the_step():
    server = started_server()
    source = RolloutSource(server, take_two, ONE_REPLICA, 1, 2)
    _, metrics, state = source.next(TrainState())
    assert metrics == {"rollout/sync_seconds": 1.0, "rollout/staleness": 0}
    assert source.next(state)[1] == {"rollout/staleness": 1}  # the last step starts nothing, so nothing is transferred


def test_a_failure_of_pending_generation_is_raised_where_its_rollouts_are_needed():
    server = started_server(fails_at_step=1)
    source = RolloutSource(server, take_two, ONE_REPLICA, 1, 3)
    _, _, state = source.next(TrainState())
    with pytest.raises(UserError, match="the server ended"):
        source.next(state)
    assert server.calls[-1] == "result 1"  # no weights were replaced and nothing was submitted after it


def test_the_rollouts_of_a_step_are_awaited_once():
    server = started_server()
    _, _, state = RolloutSource(server, take_two, ONE_REPLICA, 1, 3).next(TrainState())
    assert state.pending.rollouts is state.pending.rollouts  # a checkpoint waits for them, and so does the next step
    assert server.calls.count("result 1") == 1


ROLLOUTS = [
    Rollout((1, 2), (3, 4, 5), (1, 0, 1), "eos", 7, 1, "maths/\u2028é", (9,), None, (-0.1, -1e-300, -1 / 3)),
    Rollout((1,), (), (), "length", 8, 0),
    Rollout((1,), (2,), (1,), "replay", 9, 0, "", None, None, ()),
]


def test_stored_rollouts_are_read_back_without_loss(tmp_path):
    assert rollouts_from_text(rollouts_as_text(ROLLOUTS)) == ROLLOUTS
    (tmp_path / "file").write_text(rollouts_as_text(ROLLOUTS))
    replayed = load_replay(tmp_path / "file")
    assert [rollout.response_ids for rollout in replayed] == [(3, 4, 5), (), (2,)]


def stored(folder):
    return write_pending(folder, PendingStep(4, PromptState(1, 2), FinishedRollouts([])), ROLLOUTS)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_divide_stored_rollouts_in_their_order(tmp_path, replicas):
    entry, found = stored(tmp_path), []
    for rank in range(replicas):
        pending = read_pending(tmp_path, entry, SimpleNamespace(replica_rank=rank, num_replicas=replicas))
        assert (pending.version, pending.prompts) == (4, PromptState(1, 2))
        found += pending.rollouts
    assert found == ROLLOUTS


DAMAGE = {
    "cut": (lambda file: file.write_text(file.read_text()[:-9]), "is truncated or corrupt"),
    "a token changed": (lambda file: file.write_text(file.read_text().replace("[3, 4, 5]", "[3, 4, 6]")), "corrupt"),
    "missing": (lambda file: file.unlink(), "No such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_stored_rollouts_are_refused(tmp_path, name):
    damage, message = DAMAGE[name]
    entry = stored(tmp_path)
    damage(tmp_path / FILE)
    with pytest.raises(UserError, match=message) as caught:
        read_pending(tmp_path, entry, ONE_REPLICA)
    assert FILE in str(caught.value) and "\n" not in str(caught.value)


def test_replayed_rollouts_cannot_be_generated_ahead():
    arguments = ["student.path=a", "teacher.path=b", "train.run_dir=c", "train.steps=1"]
    replay = ["rollout.engine=replay", "rollout.path=d", "rollout.ahead=1"]
    with pytest.raises(UserError, match=r"rollout\.ahead=1 is not possible with rollout\.engine=replay"):
        load_config(None, [*arguments, *replay])
