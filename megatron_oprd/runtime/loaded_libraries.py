"""Find CUDA libraries of which this process has two installations. No communication.

cuDNN consists of several files, which it loads at their first use from wherever the loader finds them. Parts of two
installations fail in the middle of a step: `CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED`, undefined symbols.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Library -> the names of its files without `.so.<version>`. All files of a library must lie in one folder.
LIBRARIES = {
    "cuDNN": r"libcudnn(_\w+)?",
    "NCCL": r"libnccl",
    "CUDA runtime": r"libcudart",
    "cuBLAS": r"libcublas(Lt)?",
    "NVRTC": r"libnvrtc",
}
_FILE = re.compile(r"(?P<name>[\w-]+)\.so\.(?P<major>\d+)[\d.]*")
SEARCHED = "LD_LIBRARY_PATH"
# Loaded first: the loader would look for them itself when it loads the other files.
_NEEDED_BY_OTHERS = ("libcudnn_graph", "libcudnn_ops")  # in this order, which is also that of their names


@dataclass(frozen=True)
class DoubledLibrary:
    """A library with files of the same major version in two folders."""

    library: str
    loaded: Path
    other: Path  # loaded too, or found first when the library loads its next part
    is_loaded: bool  # True if both files are loaded already

    def __str__(self) -> str:
        both = "are both loaded" if self.is_loaded else f"would be mixed: {SEARCHED} names the folder of the second"
        return f"two installations of {self.library}, {self.loaded} and {self.other}, {both}; {self._cure()}"

    def _cure(self) -> str:
        searched = {folder.resolve() for folder in _search_path()}
        cures = []
        if {self.loaded.parent, self.other.parent} & searched:
            cures.append(f"unset {SEARCHED}")
        home = _pip_cudnn([str(self.loaded), str(self.other)])
        if home is not None:
            cures.append(
                f"import megatron_oprd before Transformer Engine, or name {home}/lib/libcudnn*.so.9 in LD_PRELOAD"
            )
        return ", or ".join(cures) or "keep one of them in the environment"


def find_doubled_library(mapped: Iterable[str] | None = None) -> DoubledLibrary | None:
    """Return the first library of which this process has loaded, or is about to load, two installations.

    Call it when torch and Transformer Engine are imported. Returns None where the system does not list loaded files.

    Args:
        mapped: the paths of the loaded files; None: those of this process.
    """
    loaded = sorted({Path(path).resolve() for path in (_mapped_files() if mapped is None else mapped)})
    for library in LIBRARIES:
        by_major: dict[str, list[Path]] = {}
        for path in loaded:
            if (major := _major(library, path.name)) is not None:
                by_major.setdefault(major, []).append(path)
        for major, paths in by_major.items():
            for path in paths[1:]:
                if path.parent != paths[0].parent or _name(path) in {_name(one) for one in paths if one != path}:
                    return DoubledLibrary(library, paths[0], path, is_loaded=True)
            if library == "cuDNN" and (other := _found_first(paths, major)) is not None:
                return DoubledLibrary(library, paths[0], other, is_loaded=False)
    return None


class LoadBeforeTransformerEngine(importlib.abc.MetaPathFinder):
    """Calls `load_cudnn_of_torch` as soon as anything looks for the package `transformer_engine`; finds no module."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "transformer_engine":
            load_cudnn_of_torch()


def load_cudnn_of_torch() -> None:
    """Load every file of the cuDNN that pip installed for torch; torch itself loads most of them at their first use.

    Transformer Engine needs all files. It would take those that are not loaded from the cuDNN of the system, and two
    versions would be mixed. Does nothing in a container whose torch uses the cuDNN of the system. A file that cannot
    be loaded ends this quietly: `find_doubled_library` then finds the files of two installations.
    """
    mapped = _mapped_files()
    home = _pip_cudnn(mapped)
    if home is None:
        return
    os.environ.setdefault("CUDNN_HOME", str(home))
    if (nvrtc := _file_of_pip("NVRTC", mapped)) is not None:
        os.environ.setdefault("NVRTC_HOME", str(nvrtc.parent))  # Transformer Engine loads NVRTC from there
    files = (home / "lib").glob("libcudnn*.so.*")
    with contextlib.suppress(OSError):
        for path in sorted(files, key=lambda path: (_name(path) not in _NEEDED_BY_OTHERS, path.name)):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _pip_cudnn(mapped: Iterable[str]) -> Path | None:
    """Return the folder nvidia/cudnn of site-packages if one of the loaded files is there, else None."""
    path = _file_of_pip("cuDNN", mapped)
    return None if path is None else path.parent.parent  # of nvidia/cudnn/lib/libcudnn.so.9


def _file_of_pip(library: str, mapped: Iterable[str]) -> Path | None:
    """Return the first loaded file of a library that lies in site-packages, or None."""
    files = (path for path in map(Path, mapped) if _major(library, path.name) is not None)
    return next((path for path in files if "site-packages" in path.parts), None)


def _found_first(loaded: Sequence[Path], major: str) -> Path | None:
    """Return the file of another cuDNN that the loader finds before the parts of the loaded one, or None."""
    for folder in _search_path():
        parts = sorted(path.resolve() for path in folder.glob(f"libcudnn*.so.{major}"))
        if parts:
            return parts[0] if parts[0].parent != loaded[0].parent else None
    return None


def _search_path() -> list[Path]:
    return [Path(folder) for folder in os.environ.get(SEARCHED, "").split(":") if folder]


def _mapped_files() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return [fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6 and ".so" in fields[5]]


def _name(path: Path) -> str:
    return path.name.partition(".so")[0]


def _major(library: str, file: str) -> str | None:
    """Return the major version of a file of the library, or None for another file."""
    found = _FILE.fullmatch(file)
    return found["major"] if found and re.fullmatch(LIBRARIES[library], found["name"]) else None
