"""A server that does not suit the student is refused in one line before any work starts."""

import dataclasses

import pytest

from megatron_oprd.model_spec import LongRope, ModelSpec, YarnScaling
from megatron_oprd.rollout.server_answers import excluded_ids
from megatron_oprd.rollout.server_checks import check_server, check_student
from megatron_oprd.rollout.server_client import ServerClient
from megatron_oprd.types import UserError
from tests.helpers.fake_vllm import FakeServer, HashModel

SPEC = ModelSpec(
    "Qwen3ForCausalLM", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1,
    head_dim=4, vocab_size=131, norm_epsilon=1e-6, rope_theta=1e4, rotary_dim=4, max_position_embeddings=4096,
    tied_embeddings=False, qkv_bias=False, qk_norm=True, eos_token_ids=(7,),
)  # fmt: skip
LONG_ROPE = dataclasses.replace(SPEC, rope_scaling=LongRope((1.0,), (2.0,), 1000, 1.0))


def test_hybrid_models_that_have_not_been_tried_are_refused_by_name():
    hybrid = dataclasses.replace(SPEC, architecture="Qwen3_5MoeForCausalLM", linear_layers=(0,))
    with pytest.raises(UserError, match=r"does not support Qwen3_5MoeForCausalLM: .* use rollout.engine=megatron"):
        check_student(hybrid, 131, 100)
    check_student(dataclasses.replace(hybrid, architecture="Qwen3NextForCausalLM"), 131, 100)


def refusal(server, spec=SPEC, longest_row=4096):
    with pytest.raises(UserError) as caught:
        check_server(ServerClient(server.address), spec, longest_row)
    message = str(caught.value)
    assert message.startswith(f"rollout.server.addresses: {server.address}: ") and "\n" not in message
    return message


def test_a_server_of_the_students_model_is_accepted():
    with FakeServer() as server:
        check_server(ServerClient(server.address), SPEC, 4096)


def test_a_server_that_a_killed_run_left_paused_gets_no_request():
    with FakeServer() as server:
        client = ServerClient(server.address)
        client.pause()
        client.start_weight_update()
        check_server(client, SPEC, 4096)
        assert server.requests == [] and "dead engine" not in server.faults


@pytest.mark.parametrize("version", ["0.31.2", "0.9", "dev"])
def test_an_old_version_is_refused(version):
    with FakeServer() as server:
        server.version = version
        assert f"runs vLLM {version}; 0.32 or later is needed" in refusal(server)


def test_a_context_limit_below_the_longest_row_is_refused():
    with FakeServer() as server:
        assert "--max-model-len 4097" in refusal(server, longest_row=4097)


@pytest.mark.parametrize(("size", "difference"), [(130, "fewer"), (132, "more")])
def test_a_server_with_another_vocabulary_is_refused(size, difference):
    with FakeServer(HashModel(size)) as server:
        assert f"another model: its vocabulary has {difference} than the student's 131 ids" in refusal(server)


def test_a_server_without_the_needed_options_is_refused():
    with FakeServer() as server:
        server.development_mode = False
        assert "start it with VLLM_SERVER_DEV_MODE=1" in refusal(server)
        server.development_mode, server.token_in_token_out = True, False
        assert "start the server with --enable-scale-out" in refusal(server)
        server.token_in_token_out, server.raw_logprobs = True, True
        assert "start the server with --logprobs-mode processed_logprobs" in refusal(server)


def test_a_dead_server_is_refused():
    with FakeServer() as server:
        server.faults.add("dead engine")
        assert "status 500: EngineCore encountered an issue" in refusal(server)
    assert "Connection refused" in refusal(server)


def test_long_rows_with_longrope_are_refused():
    check_student(LONG_ROPE, 131, 1000)
    with pytest.raises(UserError, match=r"long LongRoPE factors .* exceed 1000 tokens, and the longest has 1001"):
        check_student(LONG_ROPE, 131, 1001)
    with FakeServer() as server:
        assert "start it with --max-model-len 1000" in refusal(server, LONG_ROPE, 900)
        server.max_model_len = 1000
        check_server(ServerClient(server.address), LONG_ROPE, 1000)


def test_rows_beyond_the_angles_that_vllm_has_under_yarn_are_refused():
    yarn = dataclasses.replace(SPEC, rope_scaling=YarnScaling(4.0, 250, 1.1, 32.0, 1.0, True))
    check_student(yarn, 131, 1000)
    with pytest.raises(UserError, match=r"= 1000 tokens under YaRN, .* the longest row has 1001; lower rollout"):
        check_student(yarn, 131, 1001)


def test_a_teachers_smaller_vocabulary_is_excluded_up_to_the_limit_of_vllm():
    large = dataclasses.replace(SPEC, vocab_size=151936)
    assert excluded_ids(large, None) == excluded_ids(large, 151936) == excluded_ids(large, 152064) == ()
    assert excluded_ids(large, 151933) == (151933, 151934, 151935)
    with pytest.raises(UserError, match=r"cannot exclude the 1025 token ids .* only 1024; use rollout.engine=megatron"):
        check_student(large, 151936 - 1025, 100)
