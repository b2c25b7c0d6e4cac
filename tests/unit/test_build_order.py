"""The order in which a run checks its inputs and makes what takes time."""

import contextlib
from types import SimpleNamespace

import pytest

from megatron_oprd.launch import assemble
from megatron_oprd.types import UserError


class Stopped(Exception):
    """Ends `build_models` where a test has seen enough."""


def stop(*_):
    raise Stopped


@pytest.fixture
def inputs(monkeypatch):
    """Replace everything that `build_models` does before it checks the servers."""
    topologies = SimpleNamespace(student=SimpleNamespace(rank=0), teachers=())
    monkeypatch.setattr(assemble, "start_topologies", lambda *_: topologies)
    monkeypatch.setattr(assemble, "on_rank_zero", lambda function: function())
    config = SimpleNamespace(
        parallel=SimpleNamespace(tp_comm_overlap=False), student=SimpleNamespace(path="a"), rollout=SimpleNamespace()
    )
    setup = SimpleNamespace(teachers={}, teacher_folders=())
    return SimpleNamespace(config=config, setup=setup, bridge=None, bridge_origin=None, teacher_answers=True)


def test_servers_are_checked_before_the_teacher_answers(inputs, monkeypatch):
    def refuse(_):
        raise UserError("the server has another model")

    monkeypatch.setattr(assemble, "WeightHashes", lambda _: None)
    monkeypatch.setattr(assemble, "check_servers", refuse)
    monkeypatch.setattr(assemble, "_teacher_answers", stop)
    with pytest.raises(UserError, match="another model"):
        assemble.build_models(inputs, evaluates=True)


@pytest.mark.parametrize(("identifies", "bridge", "hashed"), [(True, None, 1), (False, None, 0), (False, "maps", 1)])
def test_weights_are_hashed_only_for_an_identity_or_a_bridge(inputs, monkeypatch, identifies, bridge, hashed):
    folders = []
    monkeypatch.setattr(assemble, "WeightHashes", folders.extend)
    monkeypatch.setattr(assemble, "check_servers", stop)
    inputs.bridge = bridge
    with contextlib.suppress(Stopped):
        assemble.build_models(inputs, identifies=identifies)
    assert len(folders) == hashed
