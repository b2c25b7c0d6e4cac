"""A run whose rollouts are generated ahead continues from its checkpoint exactly, with each engine that generates."""

import dataclasses

import pytest
import torch

from megatron_oprd.checkpoint.pending_rollouts import FILE
from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.checkpoint.training_state import load_checkpoint
from megatron_oprd.config import CheckpointConfig, load_config
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.rollout.engine import rollout_sampling
from megatron_oprd.rollout.server_client import ServerClient
from megatron_oprd.rollout.server_pool import ServerPool
from megatron_oprd.rollout.vllm_engine import VllmEngine, is_first_of_replica
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from tests.helpers.fake_vllm import FakeServer, HashModel
from tests.helpers.runs import VOCAB_SIZE, prompt_run


class VersionTransfer:
    """Sends the version in place of the weights. The fake server computes its tokens from it."""

    def __init__(self, client):
        self.client, self.label = client, ""

    def push(self, version):
        self.label = f"run:{version}"
        on_rank_zero(self._update)
        return {}

    def _update(self):
        client = self.client
        client.pause()
        client.start_weight_update()
        client.update_weights({"version": self.label})
        client.finish_weight_update(self.label)
        client.reset_prefix_cache()
        client.resume()


def with_server(run, address):
    """Return the run with an engine that generates on the server at `address`, one request of a rank at a time."""
    client = ServerClient(address)
    pool = ServerPool([client], max_running=1, stall_seconds=60) if is_first_of_replica(run.topology) else None
    config, spec = run.inputs.config, run.inputs.setup.student
    transfer, sampling = VersionTransfer(client), rollout_sampling(config.rollout)
    engine = VllmEngine(spec, run.topology, sampling, transfer, pool, seed=config.train.seed)
    return dataclasses.replace(run, models=dataclasses.replace(run.models, engine=engine))


def with_ahead(run, ahead):
    """Return the run with another `rollout.ahead`."""
    rollout = run.inputs.config.rollout.model_copy(update={"ahead": ahead})
    config = run.inputs.config.model_copy(update={"rollout": rollout})
    return dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=config))


def go_on(run, state, steps):
    """Return the tokens of each step, the staleness of each step, the weights after the last step, and the state."""
    tokens, staleness = [], []
    for _ in range(steps):
        state, metrics, rollouts = one_step(run, state)
        tokens.append([(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts])
        staleness.append(metrics["rollout/staleness"])
    weights = torch.cat([parameter.detach().flatten() for parameter in run.student.stage.parameters()])
    return tokens, staleness, weights, state


def stop_and_go_on(rank, arguments, folder, address):
    """Train two steps ahead, save, and train the rest: without a break, resumed, and resumed without `rollout.ahead`.

    Returns the staleness of the three ways, and True if the resumed run equals the unbroken run.
    """
    run = build_run(read_inputs(load_config(None, arguments)))
    run = run if address is None else with_server(run, address)
    state = go_on(run, TrainState(), 2)[-1]
    saver = Saver(folder, run.checkpoint_content, CheckpointConfig(keep=1, asynchronous=True))
    checkpoint = saver.save(state)
    tokens, staleness, weights, last = go_on(run, state, 2)
    saver.wait()
    assert (checkpoint / FILE).exists() and last.pending is None
    loaded = load_checkpoint(checkpoint, run.checkpoint_content)
    assert (loaded.step, loaded.prompts, loaded.pending.version) == (2, state.prompts, 1)
    again = go_on(run, loaded, 2)
    is_equal = again[0] == tokens and torch.equal(again[2], weights) and again[3] == last
    loaded = load_checkpoint(checkpoint, run.checkpoint_content)
    without = go_on(with_ahead(run, 0), loaded, 2)
    assert without[0][0] == tokens[0] and without[0][1] != tokens[1]  # the second step is sampled by newer weights
    return staleness, again[1], without[1], is_equal


def check_resumption(world_size, arguments, folder, address=None):
    for staleness, resumed, without, is_equal in run_distributed(
        world_size, stop_and_go_on, arguments, folder, address
    ):
        assert is_equal
        assert (staleness, resumed, without) == ([1, 1], [1, 1], [1, 0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_trains_on_the_rollouts_that_were_pending(tmp_path, world_size):
    arguments = prompt_run(tmp_path, 4, "rollout.ahead=1", "optimizer.lr=0.05", num_hidden_layers=2)
    check_resumption(world_size, arguments, tmp_path / "checkpoints")


def test_a_resumed_run_trains_on_the_rollouts_that_a_server_was_generating(tmp_path):
    # The second replica has twice the prompts of the first, which must not replace the weights before both have ended.
    uneven = ("rollout.prompts_per_step=3", "rollout.samples_per_prompt=1")
    arguments = prompt_run(tmp_path, 4, "rollout.ahead=1", *uneven, num_hidden_layers=2)
    with FakeServer(HashModel(VOCAB_SIZE), faults=["slow"]) as server:
        check_resumption(2, arguments, tmp_path / "checkpoints", server.address)
