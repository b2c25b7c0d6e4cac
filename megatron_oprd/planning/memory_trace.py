"""How many bytes of tensors are alive, followed operation by operation, and what they are for."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_VALUES = type({}.values())
_COALESCED = (
    torch.ops.c10d.allreduce_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among values and lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)) or type(value) is _VALUES:
            yield from _tensors(value)


class LiveBytes(TorchDispatchMode):
    """Counts every storage made inside the block, from the operation that makes it until it is freed, by purpose.

    Entered above a FakeTensorMode, whose tensors have sizes and no memory. As there are no values either, a number that
    is read is 1, a flag false, `nonzero` finds everything and `masked_select` as much as `finding` says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()  # alive now, by purpose
        self.at_peak: Counter[str] = Counter()  # when the most was alive, since `reset_peak`
        self._purpose = ""  # of new storages
        self._found: int | None = None  # by masked_select
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}  # by address: itself, its purpose and size

    def reset_peak(self) -> None:
        self.at_peak = self.bytes.copy()

    @contextlib.contextmanager
    def making(self, purpose: str) -> Iterator[None]:
        """New storages are for `purpose` inside the block."""
        before, self._purpose = self._purpose, purpose
        try:
            yield
        finally:
            self._purpose = before

    @contextlib.contextmanager
    def finding(self, count: int) -> Iterator[None]:
        """`masked_select` finds `count` elements inside the block."""
        self._found = count
        try:
            yield
        finally:
            self._found = None

    def resize(self, tensor: torch.Tensor, size: int) -> None:
        """Count `size` bytes for the storage of `tensor` from now on: what another format would take."""
        self._count(tensor)
        address = tensor.untyped_storage()._cdata
        reference, purpose, before = self._storages[address]
        self._storages[address] = reference, purpose, size
        self.bytes[purpose] += size - before

    def assign(self, purpose: str, tensors: Iterable[torch.Tensor]) -> None:
        """The storages of `tensors` are for `purpose`."""
        for tensor in tensors:
            self._count(tensor)
            address = tensor.untyped_storage()._cdata
            reference, before, size = self._storages[address]
            self._storages[address] = reference, purpose, size
            self.bytes[before] -= size
            self.bytes[purpose] += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = list(_tensors((args, kwargs.values() if kwargs else ())))
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():  # the states of random generators have values
                return func(*args, **(kwargs or {}))
        if func is _aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else (1.0 if dtype.is_floating_point else 1)
        if func in _COALESCED:  # the only collectives that fake tensors do not know
            return FakeWork().boxed()
        if func is _aten.nonzero.default:
            result = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        elif func is _aten.masked_select.default and self._found is not None:
            result = args[0].new_empty(self._found)
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages:
            return
        self._storages[address] = weakref.ref(storage, self._forgetting(address)), self._purpose, size
        self.bytes[self._purpose] += size
        if self.bytes.total() > self.at_peak.total():
            self.at_peak = self.bytes.copy()

    def _forgetting(self, address: int) -> Callable[[weakref.ref], None]:
        def forget(_: weakref.ref) -> None:
            _, purpose, size = self._storages.pop(address)
            self.bytes[purpose] -= size

        return forget
