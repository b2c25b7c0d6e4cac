"""Functions that are compiled for a GPU alone, and run as they are written elsewhere."""

import pytest
import torch

from megatron_oprd.runtime.fused import fused


class OnCuda:
    """Stands for a CUDA tensor: has no data."""

    is_cuda = True


def test_a_function_runs_as_it_is_written_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    assert fused(torch.add)(torch.ones(2), 1).tolist() == [2.0, 2.0]


def test_a_function_is_compiled_once_and_only_at_its_first_call(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or (lambda x: "compiled"))

    def written(x):
        return "written"

    function = fused(written)
    assert compiled == []
    assert [function(OnCuda()), function(OnCuda())] == ["compiled", "compiled"]
    assert compiled == [written]


def test_without_a_compiler_it_runs_as_written_after_one_warning(monkeypatch):
    def fail(x):
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no C compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    function = fused(lambda x: "written")
    with pytest.warns(UserWarning, match="no C compiler") as warnings:
        assert [function(OnCuda()), function(OnCuda())] == ["written", "written"]
    assert len(warnings) == 1
