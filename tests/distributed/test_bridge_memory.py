"""A fit never has the hidden states of all prompts in memory."""

import resource

import pytest

from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.fits import fit_quietly, write_replay

PER_STEP, LENGTH, LAYERS, WIDTHS, FLOAT = 4, 400, 2, (64, 96), 4
FEW, MANY = 4, 40  # steps
STATES_OF_A_STEP = PER_STEP * LENGTH * LAYERS * sum(WIDTHS) * FLOAT
ALLOWANCE = 16 * 2**20  # bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    for seed, (name, width) in enumerate(zip(("student", "teacher"), WIDTHS, strict=True)):
        sizes = {"num_hidden_layers": LAYERS, "hidden_size": width, "num_attention_heads": 2, "intermediate_size": 64}
        save(random_hf_model("Qwen3", seed, **sizes), folder / name)
    write_replay(folder / "replay.jsonl", [LENGTH] * PER_STEP * MANY, 131)
    return folder


def _peak(rank, arguments):
    """Return the peak resident memory of a fit, in bytes."""
    fit_quietly(arguments)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(folder, steps, *overrides):
    arguments = [
        f"student.path={folder / 'student'}",
        f"teacher.path={folder / 'teacher'}",
        f"train.run_dir={folder / str(steps)}",
        "precision.dtype=fp32",
        "rollout.engine=replay",
        f"rollout.path={folder / 'replay.jsonl'}",
        f"rollout.prompts_per_step={PER_STEP}",
        "rollout.samples_per_prompt=1",
        "batch.max_tokens_per_micro_batch=1024",
        "bridge.save_every=1000",
        f"bridge.prompts={PER_STEP * steps}",
    ]
    return run_distributed(1, _peak, arguments)[0]


def test_memory_does_not_grow_with_the_number_of_prompts(folder):
    few, many = peak(folder, FEW), peak(folder, MANY)
    assert (MANY - FEW) * STATES_OF_A_STEP > 4 * ALLOWANCE
    assert many < few + ALLOWANCE, f"{few / 2**20:.0f} MiB with {FEW} steps, {many / 2**20:.0f} MiB with {MANY}"
