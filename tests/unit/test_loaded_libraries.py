"""A CUDA library with two installations is found by the files that the process has loaded."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_oprd.launch import setup
from megatron_oprd.launch.setup import check_libraries
from megatron_oprd.models.precision import PLAIN, Precision
from megatron_oprd.runtime.loaded_libraries import DoubledLibrary, find_doubled_library
from megatron_oprd.types import UserError

ROOT = Path(__file__).parents[2]
PIP = "lib/python3.12/site-packages/nvidia/cudnn/lib"
REPORT = """
import ctypes, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path)
from megatron_oprd.runtime.loaded_libraries import find_doubled_library
print(find_doubled_library())
"""


@pytest.fixture(scope="module")
def shared_object():
    """Return the path of a real shared object."""
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if "/libm." in line)


@pytest.fixture
def install(tmp_path, shared_object):
    def place(*files):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared_object, tmp_path / file)
        return [str(tmp_path / file) for file in files]

    return place


def report(*loaded, search=""):
    """Load the files in a new process and return what it finds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": search}
    command = [sys.executable, "-c", REPORT, *loaded]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_two_loaded_files_of_one_library_are_named_with_the_cure(install, tmp_path):
    one, other = install("lib/libcudnn.so.9", f"{PIP}/libcudnn.so.9")
    line = report(one, other)
    assert line == (
        f"two installations of cuDNN, {one} and {other}, are both loaded; "
        f"import megatron_oprd before Transformer Engine, or name {tmp_path / PIP}/libcudnn*.so.9 in LD_PRELOAD"
    )
    assert "unset LD_LIBRARY_PATH, or import megatron_oprd before" in report(one, other, search=str(tmp_path / PIP))


def test_parts_of_cudnn_that_the_loader_would_find_elsewhere_are_named(install, tmp_path):
    one, *_, other = install("lib/libcudnn.so.9", f"{PIP}/libcudnn_ops.so.9", f"{PIP}/libcudnn_graph.so.9")
    line = report(one, search=f"/nowhere:{tmp_path / PIP}")
    assert line.startswith(f"two installations of cuDNN, {one} and {other}, would be mixed: LD_LIBRARY_PATH")
    assert report(one, search=f"{tmp_path / 'lib'}:{tmp_path / PIP}") == "None", "the loaded one is found first"


@pytest.mark.parametrize(
    ("mapped", "library"),
    [
        (("/a/libnccl.so.2", "/b/libnccl.so.2.27.5"), "NCCL"),
        (("/a/libcudart.so.13", "/b/libcudart.so.13"), "CUDA runtime"),
        (("/a/libcublas.so.13", "/b/libcublasLt.so.13"), "cuBLAS"),
        (("/a/libcudnn.so.9.14.0", "/a/libcudnn.so.9.19.0"), "cuDNN"),
        (("/a/libcudnn.so.9", "/b/libcudnn_engines_precompiled.so.9.14.0"), "cuDNN"),
        (("/a/libcudart.so.12", "/b/libcudart.so.13"), None),
        (("/a/libcudnn.so.9", "/a/libcudnn_graph.so.9", "/b/libnccl.so.2", "/b/libcuda.so.1"), None),
        (("/a/libcudnn_frontend.so", "/b/libm.so.6", "/c/libm.so.6"), None),
    ],
)
def test_files_of_one_major_version_in_two_folders_count(mapped, library, monkeypatch):
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    found = find_doubled_library(mapped)
    assert (found.library if found else None) == library


def test_a_mixed_cudnn_is_refused_with_transformer_engine_and_a_warning_without(monkeypatch, capsys):
    doubled = DoubledLibrary("cuDNN", Path("/a/libcudnn.so.9"), Path("/b/libcudnn.so.9"), is_loaded=True)
    monkeypatch.setattr(setup, "find_doubled_library", lambda: doubled)
    plain = Precision(PLAIN, PLAIN)
    check_libraries(plain)
    assert capsys.readouterr().out == f"warning: {doubled}\n"
    te = dataclasses.replace(PLAIN, transformer_engine=True)
    for precision in (Precision(te, PLAIN), Precision(PLAIN, te)):
        with pytest.raises(UserError, match=r"two installations of cuDNN, /a/libcudnn\.so\.9 and /b/"):
            check_libraries(precision)
    monkeypatch.setattr(setup, "find_doubled_library", lambda: dataclasses.replace(doubled, library="NCCL"))
    check_libraries(Precision(te, te))
    assert "warning: two installations of NCCL" in capsys.readouterr().out


def test_all_files_of_the_cudnn_of_torch_are_loaded_before_transformer_engine_is(install, tmp_path):
    """Torch has loaded the first. Transformer Engine would take the others from the system's installation."""
    names = ("libcudnn.so.9", "libcudnn_adv.so.9", "libcudnn_engines_precompiled.so.9")
    (tmp_path / "transformer_engine.py").touch()
    first, *others = install(*(f"{PIP}/{name}" for name in names))
    code = f"""
import ctypes, os, sys
import megatron_oprd
sys.path.insert(0, {str(tmp_path)!r})
ctypes.CDLL({first!r})
print(os.environ.get("CUDNN_HOME"))
import transformer_engine
print(os.environ["CUDNN_HOME"])
print([path in open("/proc/self/maps").read() for path in {others!r}])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("CUDNN_HOME", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "None",
        f"{tmp_path}/lib/python3.12/site-packages/nvidia/cudnn",
        "[True, True]",
    ]
