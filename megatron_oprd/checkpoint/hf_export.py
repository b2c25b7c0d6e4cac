"""The export of the trained student in Hugging Face format. `train` calls it at the end of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_oprd.checkpoint.training_state import CheckpointContent
from megatron_oprd.hf.export import export_hf
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.runtime.files import explain_os_errors


def export_student(content: CheckpointContent, target: Path) -> None:
    """Write the student to the Hugging Face folder `target` and replace the export of an earlier run.

    The old folder is removed when the new one is complete, beside it under the name `<target>.new`. Collective over the
    world. Raises UserError on every rank for a disk error.
    """
    fresh = target.with_name(f"{target.name}.new")
    on_rank_zero(lambda: shutil.rmtree(fresh, ignore_errors=True))
    content.student.stage.wait_for_parameters()
    export_hf(content.student.stage, content.spec, content.topology, content.source, fresh)

    def replace() -> None:
        with explain_os_errors(target):
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)

    on_rank_zero(replace)
