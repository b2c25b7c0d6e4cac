"""Hugging Face checkpoints one tensor at a time: checked before reading, and written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_oprd.hf.config import read_json
from megatron_oprd.hf.names import hf_shapes
from megatron_oprd.types import ModelSpec, UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFReader:
    """The tensors of a folder with `model.safetensors` or an index and its shards.

    Raises UserError for a missing, truncated or corrupt file, by name. No communication.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shard_of = self._locate()
        for file in sorted(set(self._shard_of.values())):
            held = self._names_in(file)
            for name in (name for name, shard in self._shard_of.items() if shard == file):
                if name not in held:
                    raise UserError(f"{self.folder / file} does not hold {name}, which {INDEX} says it does")

    def _locate(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{self.folder / INDEX} has no weight_map")
            return weight_map
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._names_in(SINGLE), SINGLE)
        if any(self.folder.glob("model-*-of-*.safetensors")):
            raise UserError(f"{self.folder} holds shards but not their index {INDEX}")
        if any(self.folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{self.folder} holds pytorch_model.bin; save it as safetensors first (save_pretrained does)"
            )
        raise UserError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")

    def _names_in(self, file: str) -> set[str]:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as opened:
                return set(opened.keys())
        except FileNotFoundError:
            raise UserError(f"{path} is missing, but {INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or corrupt: {error}") from None

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._shard_of)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype of the file."""
        with safe_open(self.folder / self._shard_of[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError when a tensor is missing, unknown or of another shape than the model's config says."""
        expected = hf_shapes(spec)
        # A tied model may be saved with its LM head all the same; the embedding is what counts.
        found = set(self._shard_of) - ({"lm_head.weight"} if spec.tied_embeddings else set())
        for problem, names in (("misses", expected.keys() - found), ("holds unknown", found - expected.keys())):
            if names:
                raise UserError(f"{self.folder} {problem} {len(names)} tensors, the first is {min(names)}")
        for name, shape in expected.items():
            with safe_open(self.folder / self._shard_of[name], framework="pt") as opened:
                actual = tuple(opened.get_slice(name).get_shape())
            if actual != shape:
                raise UserError(f"{self.folder}: {name} has shape {list(actual)}, config.json asks for {list(shape)}")


class HFWriter:
    """Writes tensors in shards to `<folder>.partial` and renames it to `folder` when the block ends without an error.

    Memory: one shard, at most `max_shard_bytes` (or one tensor, when that is larger).
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
        self.folder = Path(folder)
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> HFWriter:
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} exists and is not empty; name a new folder")
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write {self.partial}: {error.strerror}") from None
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor; it is written out with its shard."""
        pending = sum(t.nbytes for t in self._pending.values())
        if self._pending and pending + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()

    def _flush(self) -> None:
        save_file(self._pending, self.partial / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._total_bytes += sum(t.nbytes for t in self._pending.values())
        self._shards.append(list(self._pending))
        self._pending = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        if self._pending:
            self._flush()
        count = len(self._shards)
        files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, file in enumerate(files):
            (self.partial / f"shard-{number}").rename(self.partial / file)
        if count > 1:
            weight_map = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if self.folder.exists():
            self.folder.rmdir()
        self.partial.rename(self.folder)


def copy_companions(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files beside the weights (tokenizer, generation config, chat template) that exist."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
