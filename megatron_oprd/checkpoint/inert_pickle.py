"""Read plain values from a pickle of another program without running any of its code.

Megatron-LM stores the arguments of a run as an `argparse.Namespace` beside enums, dtypes and functions. Its own code
imports and calls whatever the file names. Here every class and function of a pickle becomes a placeholder that does
nothing. Numbers, texts, lists and dictionaries are read as they are.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any, BinaryIO


class Placeholder(dict):
    """Stands for an object of a pickled class, or for the result of a pickled function call. Runs no code.

    Attributes:
        origin: module and name of the class or function.
        arguments: the arguments of the call.
        state: the attributes of the object, if the pickle has them as a dictionary.
    """

    origin = ""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.state: dict[str, Any] = dict(named)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state = state

    def __hash__(self) -> int:  # a placeholder may be a key or a member of a set
        return id(self)

    def append(self, value: Any) -> None:
        """Ignore an element that the pickle appends to a list subclass."""

    def extend(self, values: Any) -> None:
        """Ignore elements that the pickle appends to a list subclass."""

    def add(self, value: Any) -> None:
        """Ignore an element that the pickle adds to a set subclass."""


class _InertUnpickler(pickle.Unpickler):
    """Replaces every class and function by a class of placeholders, and every tensor by None."""

    def find_class(self, module: str, name: str) -> Any:
        return type(name.rpartition(".")[2], (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> None:
        return None


def read_saved(file: BinaryIO) -> Any:
    """Return the value that `torch.save` wrote into `file`, with placeholders for everything that is not plain data.

    Raises any exception for a damaged file, and ValueError for the format of torch 1.5 and earlier.
    """
    with zipfile.ZipFile(file) as archive:
        entries = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(entries) != 1:
            raise ValueError("the file has no data.pkl")
        return _InertUnpickler(io.BytesIO(archive.read(entries[0]))).load()
