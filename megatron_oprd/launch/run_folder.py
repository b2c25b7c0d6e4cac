"""The run folder at the start of a run: the checkpoint to resume from, and the files that describe the run.

`train.fit` calls `open_run_folder`. The run log writes the other files of the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path

from megatron_oprd.bridge.origin import unrecorded_properties
from megatron_oprd.checkpoint.training_state import latest_checkpoint, load_checkpoint
from megatron_oprd.config import dump_config
from megatron_oprd.evaluation.records import read_json as read_record
from megatron_oprd.launch.assemble import Run
from megatron_oprd.launch.earlier_run import find_changes, in_words
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.run_summary import run_summary
from megatron_oprd.launch.teacher_precision import restore_teacher_precision
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import start_profile
from megatron_oprd.runtime.environment import describe_environment, one_line
from megatron_oprd.runtime.files import explain_os_errors, write_json, write_text
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import Prompt, UserError


def open_run_folder(run: Run) -> TrainState:
    """Load the newest checkpoint of the run folder, if any, and describe the run in the folder.

    Returns: the position to train from. Collective over the world. Raises UserError on every rank if the run may not
    resume; the folder then stays unchanged.
    """
    start_profile.enter("run folder and checkpoint")
    checkpoint = on_rank_zero(lambda: find_checkpoint(run.inputs))
    state = TrainState() if checkpoint is None else load_checkpoint(checkpoint, run.checkpoint_content)
    if state.best is not None and state.best.metric != run.inputs.config.evaluation.best:
        state = dataclasses.replace(state, best=None)  # the best by another metric
    restore_teacher_precision(run, state)
    on_rank_zero(lambda: record_configuration(run.inputs, state.step + 1))
    if run.inputs.prompts is not None:
        prompts = run.inputs.prompts.prompts
        on_rank_zero(lambda: record_prompts(run.inputs.run_dir, prompts, state.step + 1))
    on_rank_zero(lambda: describe(run))
    if checkpoint is not None and run.topology.rank == 0:
        print(f"continuing from {checkpoint}", flush=True)
        if state.step == run.inputs.config.train.steps:
            print(
                f"{run.inputs.run_dir} is complete: all {state.step} steps are done; only the export and the report "
                "are made again. Raise train.steps to train on, or name a new train.run_dir for another run",
                flush=True,
            )
    return state


def find_checkpoint(inputs: Inputs) -> Path | None:
    """Make the run folder and return the checkpoint to resume from, or None.

    One rank calls this. Raises UserError if a watched run cannot resume because the files of the health watch are
    missing.
    """
    config, run_dir = inputs.config, inputs.run_dir
    with explain_os_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    found = latest_checkpoint(run_dir / "checkpoints")
    for name in ("answers.jsonl", "checks.jsonl") if found and config.health.every else ():
        path = run_dir / "health" / name
        if not path.exists():
            raise UserError(
                f"health.every={config.health.every}: {path} is missing, which the start model left at step 0; put it "
                "back, set health.every=0, or begin anew in another train.run_dir"
            )
    return found


def record_configuration(inputs: Inputs, first_step: int) -> None:
    """Write `config.yaml`; keep each configuration of the run in `configs/` under the first step that it was used for.

    Print and record the keys that the configuration changes. One rank calls this.
    """
    run_dir, text = inputs.run_dir, dump_config(inputs.config)
    latest, folder = run_dir / "config.yaml", run_dir / "configs"
    changes = find_changes(latest, inputs.config) if first_step > 1 else {}
    with explain_os_errors(folder):
        if first_step > 1 and not folder.exists() and latest.exists():  # the run of an older version
            folder.mkdir()
            write_text(folder / "step_0000001.yaml", latest.read_text(encoding="utf-8"))
        folder.mkdir(exist_ok=True)
        if changes or first_step == 1:
            write_text(folder / f"step_{first_step:07d}.yaml", text)
        if changes:
            with (folder / "changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": first_step, "changes": changes}) + "\n")
    write_text(latest, text)
    for line in in_words(changes):
        print(f"{line} from step {first_step}", flush=True)


def record_prompts(run_dir: Path, prompts: Sequence[Prompt], first_step: int) -> None:
    """Keep the hash of the prompts in `configs/prompts.json`, and print a line if a resumed run has other prompts.

    Their position is kept, but not their order: some prompts come twice in an epoch and others never. One rank calls
    this.
    """
    path, digest = run_dir / "configs" / "prompts.json", hashlib.sha256()
    for prompt in prompts:
        digest.update(array("q", (len(prompt.prompt_ids), *prompt.prompt_ids)).tobytes())
    new = {"count": len(prompts), "sha256": digest.hexdigest()}
    earlier = read_record(path)
    if first_step > 1 and earlier and earlier != new:
        print(
            f"the prompts have changed ({earlier.get('count')} before, {len(prompts)} now): from step {first_step} "
            "on, some of this epoch may come twice and others not at all",
            flush=True,
        )
    if earlier != new:
        write_json(path, new)


def describe(run: Run) -> None:
    """Write the environment and the layer plan to the run folder, and print a summary."""
    inputs, topology = run.inputs, run.topology
    layout, attention = describe_layout(topology), inputs.setup.precision.attention
    environment = describe_environment(str(topology.device), topology.world_size, layout, attention)
    own = {
        name: describe_layout(teacher.topology)
        for name, teacher in zip(inputs.setup.teachers, run.teachers, strict=True)
        if teacher.topology is not topology
    }
    if own:
        environment["teacher_layout"] = own.get("", own)
    write_json(inputs.run_dir / "environment.json", environment)
    plans = {name: teacher.plan.as_json() for name, teacher in inputs.setup.teachers.items()}
    write_json(inputs.run_dir / "plan.json", plans.get("", {"teachers": plans}))
    print("\n".join(run_summary(inputs, one_line(environment))), flush=True)
    dtype = inputs.config.precision.dtype
    if dtype == "bf16" and topology.device.type == "cpu":
        print("warning: bf16 is about 7 times slower than fp32 on a CPU; use precision.dtype=fp32", flush=True)
    if inputs.config.rollout.ahead and inputs.config.rollout.engine == "megatron":
        print("rollout.ahead=1 saves no time: the student generates its rollouts itself, before it trains", flush=True)
    if inputs.bridge is not None and (unrecorded := unrecorded_properties(inputs.bridge)):
        path = inputs.config.loss.representation.bridge
        print(f"{path} does not say, and nothing checks, {', '.join(unrecorded)} that it was fitted on", flush=True)


def describe_layout(topology: Topology) -> dict[str, int]:
    """Return the sizes of a layout by name. Other than tensor, pipeline and data, only sizes above 1 are included."""
    sizes = {"tensor": topology.tensor_size, "pipeline": topology.pipeline_size, "data": topology.data_size}
    others = {
        "virtual pipeline": topology.virtual_size,
        "context": topology.context_size,
        "expert": topology.expert_size,
        "sequence": topology.tensor_size if topology.sequence_parallel else 1,
    }
    return sizes | {name: size for name, size in others.items() if size > 1}
