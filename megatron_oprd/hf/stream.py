"""Read and write Hugging Face checkpoints one tensor at a time."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_oprd.hf.config import read_json
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD, hf_shapes
from megatron_oprd.runtime.files import explain_os_errors, write_folder, write_json
from megatron_oprd.types import ModelSpec, UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "sentencepiece*",
    "spiece.model",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates",
    "LICENSE*",
)
# Buffers that earlier versions of transformers saved. It ignores them when it loads a model.
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids|(self_)?attn\.bias)$")
(_EMBEDDING,), (_HEAD,) = EMBEDDING.hf, LM_HEAD.hf
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class HFReader:
    """Reads the tensors of a folder with `model.safetensors`, or with an index and its shards. No communication.

    Raises:
        UserError: a file is missing, truncated or corrupt. Names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shard_of = {name: file for name, file in self._locate().items() if not _BUFFER.search(name)}
        self._opened: dict[str, Any] = {}

    def _locate(self) -> dict[str, str]:
        """Return the file of each tensor, from the files that transformers reads: the single file before an index."""
        if (self.folder / SINGLE).exists():
            self._check_index_agrees()
            return dict.fromkeys(self._names_in(SINGLE), SINGLE)
        if (self.folder / INDEX).exists():
            return self._read_index()
        if any(self.folder.glob("model-*-of-*.safetensors")):
            raise UserError(f"{self.folder} holds shards but not their index {INDEX}")
        if any(self.folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{self.folder} holds pytorch_model.bin; save it as safetensors first (save_pretrained does)"
            )
        raise UserError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path} has no weight_map")
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{path}: weight_map must give each tensor the name of a file")
        outside = next((file for file in weight_map.values() if Path(file).name != file), None)
        if outside is not None:
            raise UserError(f"{path} names {outside!r}; name files in the folder itself, without a path")
        for file in sorted(set(weight_map.values())):
            # transformers loads every tensor of a shard, also one that the index puts elsewhere or does not name.
            present = self._names_in(file)
            wrong = sorted(name for name in present if weight_map.get(name) != file)
            if wrong:
                elsewhere = f"puts it into {weight_map[wrong[0]]}" if wrong[0] in weight_map else "does not name it"
                raise UserError(f"{self.folder / file} holds {wrong[0]}, but {INDEX} {elsewhere}; save the model anew")
            named = {name for name, place in weight_map.items() if place == file and not _BUFFER.search(name)}
            missing = sorted(named - present)
            if missing:
                raise UserError(f"{self.folder / file} does not hold {missing[0]}, which {INDEX} says it does")
        return weight_map

    def _check_index_agrees(self) -> None:
        """Raise UserError if the folder has a second complete set of weights that differs from the single file."""
        if not (self.folder / INDEX).exists():
            return
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not files or files == {SINGLE} or not all((self.folder / str(file)).exists() for file in files):
            return  # a left-over of an earlier save, which transformers ignores
        with safe_open(self.folder / SINGLE, framework="pt") as single:
            differ = set(single.keys()) ^ weight_map.keys()
            for name in sorted(weight_map.keys() - differ):
                with safe_open(self.folder / weight_map[name], framework="pt") as shard:
                    if name not in shard.keys() or not torch.equal(shard.get_tensor(name), single.get_tensor(name)):  # noqa: SIM118
                        differ.add(name)
                        break
        if differ:
            raise UserError(
                f"{self.folder} holds two sets of weights, {SINGLE} and those of {INDEX}, which differ in "
                f"{min(differ)}; remove one of them"
            )

    def _names_by_file(self) -> dict[str, list[str]]:
        """Return the tensor names of each file, so that each file is opened once and not once per tensor."""
        names: dict[str, list[str]] = {}
        for name, file in sorted(self._shard_of.items()):
            names.setdefault(file, []).append(name)
        return names

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
        """Return the names of all tensors, sorted."""
        return sorted(self._shard_of)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the dtype of the file. The file stays open (memory-mapped)."""
        tensor: torch.Tensor = self._open(name).get_tensor(name)
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Return the rows from `start` to `end` (exclusive) of a tensor without reading the others."""
        rows: torch.Tensor = self._open(name).get_slice(name)[start:end]
        return rows

    def _open(self, name: str) -> Any:
        file = self._shard_of[name]
        if file not in self._opened:  # opening it for every tensor would take longer than reading the tensor
            self._opened[file] = safe_open(self.folder / file, framework="pt")
        return self._opened[file]

    def dtype(self) -> torch.dtype:
        """Return the dtype that represents every tensor exactly: the common dtype, or the widest if they differ.

        Raises:
            UserError: a tensor is not bfloat16, float16 or float32.
        """
        found: set[torch.dtype] = set()
        for file, names in self._names_by_file().items():
            with safe_open(self.folder / file, framework="pt") as opened:
                found |= {self._torch_dtype(name, opened.get_slice(name).get_dtype()) for name in names}
        return functools.reduce(torch.promote_types, sorted(found, key=str))

    def _torch_dtype(self, name: str, stored: str) -> torch.dtype:
        if stored not in _DTYPES:
            raise UserError(f"{self.folder}: {name} is stored as {stored}, use one of {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def _check_tied_head(self) -> None:
        """Raise UserError if a model with tied embeddings contains another LM head, which transformers would use."""
        if _HEAD not in self._shard_of or _EMBEDDING not in self._shard_of:
            return
        if not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
            raise UserError(
                f"{self.folder}: config.json says tie_word_embeddings=true, but {_HEAD} differs from {_EMBEDDING}; "
                "transformers uses that LM head: set tie_word_embeddings to false to train it as a model of its own"
            )

    def check(self, spec: ModelSpec) -> None:
        """Check the names, shapes and dtypes of all tensors.

        Raises:
            UserError: a tensor is missing, unknown, of a shape that differs from config.json, or not stored as
                bfloat16, float16 or float32.
        """
        expected = hf_shapes(spec)
        found = set(self._shard_of)
        if spec.tied_embeddings:
            self._check_tied_head()
            found.discard(_HEAD)
        missing = expected.keys() - found
        if missing == {_HEAD}:
            raise UserError(
                f"{self.folder} holds no {_HEAD}; if it is the embedding, set tie_word_embeddings to true in "
                "config.json"
            )
        for problem, names in (("misses", missing), ("holds unknown", found - expected.keys())):
            if names:
                raise UserError(f"{self.folder} {problem} {len(names)} tensors, the first is {min(names)}")
        for file, names_in_file in self._names_by_file().items():
            with safe_open(self.folder / file, framework="pt") as opened:
                for name in (name for name in names_in_file if name in expected):
                    stored, shape = opened.get_slice(name), list(expected[name])
                    self._torch_dtype(name, stored.get_dtype())
                    if stored.get_shape() != shape:
                        actual = stored.get_shape()
                        raise UserError(f"{self.folder}: {name} has shape {actual}, config.json asks for {shape}")


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


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy tokenizer, generation config, chat templates and licence. Raises OSError.

    config.json is not copied, because it contains the dtype of the weights.
    """
    source, target = Path(source), Path(target)
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def add_end_tokens(folder: Path, config: dict[str, Any], eos_token_ids: Sequence[int]) -> None:
    """Add token ids to `eos_token_id` in the generation_config.json of a folder. Raises OSError and UserError.

    Without that file, transformers takes the id of `config`, the content of config.json.
    """
    if not eos_token_ids:
        return
    path = folder / "generation_config.json"
    values = read_json(path) if path.exists() else {}
    written = (values or config).get("eos_token_id")
    before = written if isinstance(written, list) else [] if written is None else [written]
    ids = list(dict.fromkeys([*before, *eos_token_ids]))
    if ids != before:
        write_json(path, {**values, "eos_token_id": ids[0] if len(ids) == 1 else ids})


def config_with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of config.json with the dtype of the weights.

    The key is `torch_dtype` if only that one is present, as in transformers 4, else `dtype`.
    """
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}
