"""Count the bytes of live tensors, operation by operation and by purpose, without allocating them."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_oprd.planning.known_results import KnownResults

_aten = torch.ops.aten
_device = torch.ops.prim.device.default
_DICT_VALUES = type({}.values())
_COALESCED = (
    torch.ops.c10d.allreduce_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
)


@dataclass(frozen=True)
class _Call:
    """The memory of a call: its peak, and its results, which are all that it leaves in memory."""

    peak: dict[str, int]  # by purpose, beyond what was live before the call
    results: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


class LiveBytes(TorchDispatchMode):
    """Count every storage from the operation that creates it until it is freed, by purpose.

    Enter this mode above a FakeTensorMode, whose tensors have shapes and no memory. Where an operation needs a value,
    this mode answers for the tensor: a number is 1, a flag is False, `nonzero` finds every element, and
    `masked_select` finds as many elements as `finding` states.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()  # live bytes by purpose
        self.at_peak: Counter[str] = Counter()  # live bytes by purpose when their sum was largest
        self._purpose = ""  # of new storages
        self._found: int | None = None  # number of elements that masked_select finds
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}  # address: reference, purpose, bytes
        self._calls: dict[Hashable, _Call] = {}
        self._results = KnownResults()

    def reset_peak(self) -> None:
        """Start a new peak at the bytes that are live now."""
        self.at_peak = self.bytes.copy()

    @contextlib.contextmanager
    def making(self, purpose: str) -> Iterator[None]:
        """Count new storages for `purpose` inside the block."""
        before, self._purpose = self._purpose, purpose
        try:
            yield
        finally:
            self._purpose = before

    @contextlib.contextmanager
    def finding(self, count: int) -> Iterator[None]:
        """Let `masked_select` find `count` elements inside the block."""
        self._found = count
        try:
            yield
        finally:
            self._found = None

    def assign(self, purpose: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of `tensors` for `purpose` from now on."""
        for tensor in tensors:
            self._count(tensor)
            address = tensor.untyped_storage()._cdata
            reference, before, size = self._storages[address]
            self._storages[address] = reference, purpose, size
            self.bytes[before] -= size
            self.bytes[purpose] += size

    def resize(self, tensor: torch.Tensor, size: int) -> None:
        """Count `size` bytes for the storage of `tensor` from now on: its size in another format."""
        self._count(tensor)
        address = tensor.untyped_storage()._cdata
        reference, purpose, before = self._storages[address]
        self._storages[address] = reference, purpose, size
        self.bytes[purpose] += size - before

    def repeat(self, key: Hashable, call: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
        """Return the results of `call()`. A call with a known key is not made: its peak counts, its results are new.

        Args:
            key: All that the memory of the call depends on, beside the purpose of new storages.
            call: A function that needs no gradients. If something else than its results stays in memory, or something
                is freed that was live before, it is called again the next time.
        """
        known = self._calls.get((self._purpose, key))
        if known is not None:
            peak = self.bytes.copy()
            peak.update(known.peak)
            self.at_peak = max(self.at_peak, peak, key=Counter.total)
            return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in known.results]
        before, outer = self.bytes.copy(), self.at_peak
        self.reset_peak()
        results = call()
        peak, self.at_peak = self.at_peak.copy(), max(outer, self.at_peak, key=Counter.total)
        grown = Counter(self.bytes)
        grown.subtract(before)
        storages = {result.untyped_storage()._cdata: result.untyped_storage().nbytes() for result in results}
        sizes = [result.numel() * result.element_size() for result in results]
        alone = len(storages) == len(results) and all(result.is_contiguous() for result in results)
        if alone and [*storages.values()] == sizes and +grown == +Counter({self._purpose: sum(sizes)}) and not -grown:
            peak.subtract(before)
            described = tuple((result.shape, result.dtype, result.device) for result in results)
            self._calls[self._purpose, key] = _Call(dict(peak), described)
        return results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _device and isinstance(args[0], FakeTensor):  # most calls; autograd asks for each gradient
            return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        inputs = list(_tensors((args, kwargs.values() if kwargs else ())))
        if inputs and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            with unset_fake_temporarily():  # the states of random generators have values
                return func(*args, **(kwargs or {}))
        if func is _aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype == torch.bool else (1.0 if dtype.is_floating_point else 1)
        if func in _COALESCED:  # fake tensors support all collectives except these
            return FakeWork().boxed()
        if func is _aten.nonzero.default:
            result = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        elif func is _aten.masked_select.default and self._found is not None:
            result = args[0].new_empty(self._found)
        else:
            result = self._results.apply(func, args, kwargs, inputs)
        for tensor in _tensors((result,)):
            self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages:
            return
        self._storages[address] = weakref.ref(storage, self._forget(address)), self._purpose, size
        self.bytes[self._purpose] += size
        if self.bytes.total() > self.at_peak.total():
            self.at_peak = self.bytes.copy()

    def _forget(self, address: int) -> Callable[[weakref.ref], None]:
        """Return the callback that subtracts a storage when it is freed."""

        def forget(_: weakref.ref) -> None:
            _, purpose, size = self._storages.pop(address)
            self.bytes[purpose] -= size

        return forget


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among values and nested lists of values."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)) or type(value) is _DICT_VALUES:
            yield from _tensors(value)
