"""Write a Hugging Face checkpoint one tensor at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_oprd.hf.companions import add_end_tokens, copy_companions
from megatron_oprd.hf.weight_files import INDEX, SINGLE
from megatron_oprd.runtime.files import explain_os_errors, write_folder, write_json

MAX_SHARD_BYTES = 5_000_000_000


class HFWriter:
    """Writes tensors in shards to `<folder>.partial` and renames it to `folder` if the block ends without an error.

    Memory: one shard of at most `max_shard_bytes`, or one tensor if that is larger. No communication.

    Args:
        companions: folder whose tokenizer, generation config and chat template are copied.
        config: content of config.json.
        eos_token_ids: added to the generation config, so that answers end where they ended in training.

    Raises:
        UserError: the folder is not empty, or the disk cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        companions: str | Path | None = None,
        config: dict[str, Any] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._companions = companions
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> HFWriter:
        self._stack = contextlib.ExitStack()
        self.partial = self._stack.enter_context(write_folder(self.folder))
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor. It is written to the disk with its shard."""
        pending = sum(t.nbytes for t in self._pending.values())
        if self._pending and pending + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()

    def _flush(self) -> None:
        path = self.partial / f"shard-{len(self._shards)}"
        with explain_os_errors(path):
            save_file(self._pending, path, metadata={"format": "pt"})
        self._total_bytes += sum(t.nbytes for t in self._pending.values())
        self._shards.append(list(self._pending))
        self._pending = {}

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        count = len(self._shards)
        files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, file in enumerate(files):
            (self.partial / f"shard-{number}").rename(self.partial / file)
        if count > 1:
            weight_map = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.partial / INDEX, index)
        if self._companions is not None:
            copy_companions(self._companions, self.partial)
            add_end_tokens(self.partial, self._config or {}, self._eos_token_ids)
        if self._config is not None:
            write_json(self.partial / "config.json", self._config)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is not None:
                raise error
            self._finish()
