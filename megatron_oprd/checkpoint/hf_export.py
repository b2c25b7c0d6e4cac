"""The export of the trained student in Hugging Face format. `train` calls it at the end of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megatron_oprd.checkpoint.megatron_format import load_model
from megatron_oprd.checkpoint.training_state import MARK, CheckpointContent
from megatron_oprd.hf.export import WrittenWeights, export_hf
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.runtime.files import explain_os_errors
from megatron_oprd.training.state import BestEvaluation
from megatron_oprd.types import UserError

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_student(content: CheckpointContent, target: Path, dtype_name: str | None = None) -> None:
    """Write the student to the Hugging Face folder `target` and replace the export of an earlier run.

    `dtype_name` is the dtype of the weights, a key of EXPORT_DTYPES; None is the dtype in the student's config.json.
    The old folder is removed when the new one is complete, beside it under the name `<target>.new`. Collective over the
    world. Raises UserError on every rank for a disk error.
    """
    fresh = target.with_name(f"{target.name}.new")
    on_rank_zero(lambda: shutil.rmtree(fresh, ignore_errors=True))
    dtype = EXPORT_DTYPES[dtype_name] if dtype_name is not None else written_dtype(content.spec)
    content.student.stage.wait_for_parameters()
    export_hf(content.student.stage, content.spec, content.topology, content.source, fresh, WrittenWeights(dtype))

    def replace() -> None:
        with explain_os_errors(target):
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        print(f"student: {target}", flush=True)

    on_rank_zero(replace)


def export_best(content: CheckpointContent, run_dir: Path, best: BestEvaluation, dtype_name: str | None = None) -> None:
    """Load the checkpoint of the best evaluation into the student, and export it to `hf_best` in the run folder.

    Training cannot continue afterwards. Collective over the world. Raises UserError on every rank if the checkpoint is
    gone or damaged, and for a disk error.
    """
    checkpoint = run_dir / "checkpoints" / best.name
    if not on_rank_zero(lambda: (checkpoint / MARK).exists()):
        raise UserError(
            f"{checkpoint}, the best checkpoint by {best.metric}, is gone; {run_dir / 'hf'} has the last student"
        )
    load_model(content.student.stage, checkpoint / "model", content.spec, content.topology)
    export_student(content, run_dir / "hf_best", dtype_name)


def written_dtype(spec: ModelSpec) -> torch.dtype | None:
    """Return the dtype that a model's config.json names, or None if the file names none of EXPORT_DTYPES."""
    name = spec.hf_config.get("dtype") or spec.hf_config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if dtype in EXPORT_DTYPES.values() else None
