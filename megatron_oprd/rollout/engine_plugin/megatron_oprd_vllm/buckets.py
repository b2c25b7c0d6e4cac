"""The file format of weight buckets, and the checks of an update. Needs torch and safetensors only.

A bucket is a safetensors file with complete tensors under their Hugging Face names. Its checksums are sent apart from
the file, so that an old or half-written file is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open

WORD = 8  # bytes


class BadBucket(ValueError):
    """A bucket cannot be read, is damaged, or does not belong to the update. The message is one line."""


def checksum(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's bytes, read as signed 64-bit words, modulo 2^64. Missing bytes are zeros."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole_words = content.numel() // WORD * WORD
    words = content[:whole_words]
    if words.data_ptr() % WORD:  # a slice of a memory-mapped file may begin anywhere
        words = words.clone()
    total = int(words.view(torch.int64).sum()) if whole_words else 0
    total += int.from_bytes(bytes(content[whole_words:].tolist()), "little")
    return (total + 2**63) % 2**64 - 2**63


def read_bucket(path: str, checksums: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the tensors of a bucket, memory-mapped, after comparing names and checksums.

    Raises:
        BadBucket: the file is missing or truncated, has other tensors than `checksums`, or other content.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except FileNotFoundError:
        raise BadBucket(f"{path} does not exist on the server; trainer and server must share this folder") from None
    except (SafetensorError, OSError) as error:
        raise BadBucket(f"{path} is truncated or corrupt: {error}") from None
    if different := tensors.keys() ^ checksums.keys():
        raise BadBucket(
            f"{path} and its list of names differ in {len(different)} tensors, the first is {min(different)}"
        )
    compare_checksums(tensors, checksums, path)
    return tensors


def compare_checksums(tensors: Mapping[str, torch.Tensor], checksums: Mapping[str, int], source: str) -> None:
    """Raise BadBucket, which names the `source`, if the content of a tensor differs from the trainer's."""
    for name, tensor in tensors.items():
        if checksum(tensor) != checksums[name]:
            raise BadBucket(f"{source}: the content of {name} differs from what the trainer wrote")


@dataclass
class Update:
    """The names of the tensors that an open update has received."""

    version: str | None = None  # that of the first bucket
    total_tensors: int = 0  # of the complete update
    names: set[str] = field(default_factory=set)

    def add(self, names: set[str], version: str, total_tensors: int) -> None:
        """Add the names of a bucket. Raises BadBucket for another version and for a tensor that was received before."""
        if self.version is None:
            self.version, self.total_tensors = version, total_tensors
        if version != self.version:
            raise BadBucket(f"a bucket of version {version} arrived in the update to version {self.version}")
        if repeated := self.names & names:
            raise BadBucket(f"version {version}: {min(repeated)} arrived twice")
        self.names |= names

    def check_complete(self) -> None:
        """Raise BadBucket unless all tensors have arrived."""
        if self.version is None:
            raise BadBucket("the update ends without a single bucket")
        if len(self.names) != self.total_tensors:
            raise BadBucket(
                f"version {self.version} is incomplete: {len(self.names)} of {self.total_tensors} tensors arrived"
            )
