"""`recompute: auto` chooses what repeats the fewest operations, and an update with it stays within the given memory."""

import gc
import json
import os
import random
import subprocess
import sys

import psutil
import pytest
import torch

from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.models.recompute import Recomputation
from megatron_oprd.parallel.topology import start_process
from megatron_oprd.planning.plan_device import PlanDevice
from megatron_oprd.planning.recompute_options import NOTHING, Option
from megatron_oprd.planning.recompute_search import (
    SearchJob,
    StageMemory,
    search,
    search_recomputation,
    traced_memory,
)
from megatron_oprd.runtime import platform
from megatron_oprd.testing.distributed import result_of
from megatron_oprd.testing.random_update import build_random_update
from tests.helpers.memory import HONEST
from tests.helpers.planning import dense_spec, expert_spec, filling_rollouts, planned_run, replay_config

CPU = PlanDevice("cpu", "a CPU", 0, 1, 0, 0, None)
NORMS, MLP = frozenset({"layernorm"}), frozenset({"layernorm", "mlp"})
SPECS = {"dense": dense_spec, "experts": expert_spec}
LAYOUTS = {  # processes, layout, rank, blocks
    "two blocks": (1, (), 0, 2),
    "four blocks": (1, (), 0, 4),
    "first rank of a pipeline": (2, ("parallel.pipeline=2",), 0, 6),
    "virtual pipeline": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2"), 1, 8),
    "one block on a rank": (2, ("parallel.pipeline=2",), 1, 2),
}


def job_of(kind, layout, tokens=512):
    world_size, overrides, rank, layers = LAYOUTS[layout]
    settings = ("precision.dtype=fp32", "checkpoint.every=0", "rollout.prompts_per_step=8", *overrides)
    spec = SPECS[kind](layers=layers, hidden=128, vocabulary=512)
    lengths = Lengths(sequence=tokens // 2, response=tokens // 2 - 8)
    return SearchJob(planned_run(replay_config(tokens, *settings), spec, world_size, lengths=lengths), CPU, rank)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("dense", "two blocks"),
        pytest.param("experts", "two blocks", marks=pytest.mark.nightly),
        pytest.param("experts", "first rank of a pipeline", marks=pytest.mark.nightly),
        *(pytest.param("dense", layout, marks=pytest.mark.nightly) for layout in list(LAYOUTS)[1:]),
    ],
)
def test_the_choice_is_the_cheapest_of_all_options_that_fit(kind, layout):
    options, needed, memory = result_of(traced_memory, job_of(kind, layout))
    known = dict(zip([option.recomputation for option in options], needed, strict=True))
    # With a single block on the rank, some options need more than no recomputation does.
    low, high, traces = min(needed), needed[0], 0
    for limit in (low + share * (high - low) / 40 for share in range(40)):
        tried = []
        choice = search(options, lambda one, tried=tried: tried.append(one) or known[one], memory, limit)
        fitting = [option for option, size in zip(options, needed, strict=True) if size <= limit]
        assert choice.fits and choice.chosen.option.operations == fitting[0].operations
        assert choice.chosen.needed <= limit < (choice.cheaper.needed if choice.cheaper else limit + 1)
        traces += len(tried)
    assert traces / 40 < 4.5


def test_without_a_choice_that_fits_the_strongest_is_taken():
    options = [Option(Recomputation(), 0.0), Option(Recomputation(NORMS), 0.0), Option(Recomputation(blocks=2), 5.0)]
    memory = StageMemory(100, {NOTHING: 40.0, NORMS: 30.0, None: 5.0}, (2,), 1.0)
    choice = search(options, lambda one: {NORMS: 80}.get(one.parts, 30), memory, 10)
    assert not choice.fits and choice.chosen.option == options[2]


CASES = 30  # random configurations


def random_case(number):
    """Return the sizes of a random run and the share of its memory for activations that is given to it."""
    draw = random.Random(number)
    dtype, kind = draw.choice(["fp32", "fp32", "bf16"]), draw.choice(["dense", "dense", "experts"])
    sizes = {"layers": draw.randint(2, 5), "hidden": draw.choice([256, 384]), "vocabulary": draw.choice([512, 4096])}
    loss = draw.choice(["layers=all", "layers=last", "positions=all"])
    return {
        "kind": kind,
        "sizes": sizes,
        "tokens": draw.choice([1024, 1536, 2048]),
        "overrides": [f"precision.dtype={dtype}", f"loss.representation.{loss}"],
        "share": draw.uniform(0.05, 0.95),
    }


def chosen_for(case):
    """Return the memory that is given to a run beside the process, and the recomputation that is chosen for it."""
    lengths = Lengths(sequence=case["tokens"] // 2, response=case["tokens"] // 2 - 8)
    config = replay_config(case["tokens"], "checkpoint.every=0", "rollout.prompts_per_step=2", *case["overrides"])
    run = planned_run(config, SPECS[case["kind"]](**case["sizes"]), lengths=lengths)
    least, most = (search_recomputation(SearchJob(run, CPU, 0, limit)).chosen.needed for limit in (0.0, 1e18))
    given = (least + case["share"] * (most - least)) / 0.9
    choice = search_recomputation(SearchJob(run, CPU, 0, 0.9 * given))
    return given, choice.fits, choice.chosen.option.recomputation


def measure(cases):
    """Return the bytes by which an update of each case raises the resident memory of this process."""
    device = torch.device("cpu")
    start_process(device)
    for dtype in ("fp32", "bf16"):  # loads the libraries and kernels of both, which stay in memory
        run_update(64, "dense", {"layers": 1, "hidden": 128, "vocabulary": 256}, (f"precision.dtype={dtype}",))
    found = []
    for case in cases:
        gc.collect()
        before = psutil.Process().memory_info().rss
        run_update(case["tokens"], case["kind"], case["sizes"], case["overrides"])
        found.append(platform.peak_memory_bytes(device) - before)
    return found


def run_update(tokens, kind, sizes, overrides):
    """Run two updates and reset the peak before each."""
    device = torch.device("cpu")
    config, spec = replay_config(tokens, *overrides), SPECS[kind](**sizes)
    update = build_random_update(config, spec, filling_rollouts(tokens), device)
    for _ in range(2):
        platform.reset_peak_memory(device)
        update.run()


@pytest.mark.parametrize(
    "numbers",
    [range(1), *(pytest.param(range(n, min(n + 6, CASES)), marks=pytest.mark.nightly) for n in range(1, CASES, 6))],
)
def test_updates_stay_within_the_memory_that_is_given(numbers):
    cases = [random_case(number) for number in numbers]
    given = []
    for case in cases:
        size, fits, chosen = result_of(chosen_for, case)
        assert fits
        given.append(size)
        stage = json.dumps([{"parts": sorted(chosen.parts), "blocks": chosen.blocks}])
        case["overrides"].append(f"recompute.stages={stage}")
    command = [sys.executable, "-m", "tests.unit.test_recompute_search", json.dumps(cases)]
    environment = {**os.environ, **HONEST, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    assert all(size <= limit for size, limit in zip(measured, given, strict=True)), (measured, given, cases)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
