"""Cases of the matrix on Transformer Engine's modules: python -m tests.helpers.te_layouts OUTPUT NAME ...

To be started with the stand-in (tests/helpers/te_on_cpu) first on PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from megatron_oprd.models.precision import ModelPrecision, Precision
from megatron_oprd.models.te_spec import FusedAttention
from megatron_oprd.testing import replayed_run
from tests.helpers.layouts import OBJECTIVE_CASES, covering
from tests.helpers.run_layouts import References, run_cases


@contextlib.contextmanager
def on_transformer_engine(exchange: str = "p2p") -> Iterator[None]:
    """Student and teacher on Transformer Engine's modules; in float32, which a configuration does not combine."""
    modules = ModelPrecision(transformer_engine=True, arguments={"cp_comm_type": exchange})
    fused = mock.patch.object(FusedAttention, "forward", autospec=True, side_effect=FusedAttention.forward)
    with mock.patch.object(replayed_run, "PRECISION", Precision(modules, modules)), fused as forward:
        yield
    assert forward.called, "the models were built of other modules"


def main(output: str, *names: str) -> None:
    cases = [case for case in [*covering(), *OBJECTIVE_CASES] if case.name in names]
    with tempfile.TemporaryDirectory() as folder:
        references = References(Path(folder) / "models")
        outcomes = run_cases(cases, references, Path(folder) / "runs", on_transformer_engine)
        failures = {outcome.case.name: [outcome.failure, outcome.details] for outcome in outcomes}
    Path(output).write_text(json.dumps(failures))


if __name__ == "__main__":
    main(*sys.argv[1:])
