"""Model weights in `torch_dist` folders of Megatron-LM and Megatron-Bridge: find, check and load them.

Such a folder differs from a checkpoint of this package (`megatron_format.py`):

- it has no config.json and no tokenizer: the user names a Hugging Face folder with them;
- the layers are stacked along a first axis (`decoder.layers.mlp.linear_fc2.weight` [layers, ...]), or separate tensors;
- norms have the names of Transformer Engine's fused modules, also with Megatron-Core's local layer spec;
- it may contain the optimizer, `_extra_state` and unsharded objects. All three are ignored.

No pickled object of the folder is loaded with its code: mcore's own `dist_checkpointing.load` would run the code in
`common.pt`, so only its reader of sharded tensors is used here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_oprd.checkpoint.megatron_lm_arguments import COMMON, RUN_CONFIG, ModelArguments, read_arguments
from megatron_oprd.checkpoint.stored_index import COPY_AGAIN, INDEX, read_index
from megatron_oprd.hf.names import FUSED_NORMS
from megatron_oprd.hf.weight_files import MANIFEST
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.runtime.files import read_json
from megatron_oprd.types import UserError

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = "iter_[0-9]*"
_OLD_FORMAT = "mp_rank_*"
_MTP = "mtp."
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# State beside the weights of the model. Keys of the optimizer begin with one of these words.
_OTHER_STATE = re.compile(
    r"^(optimizer|opt_param_scheduler|rng_state|rerun_state|chained_\d+|common_state)|_extra_state"
)


def is_megatron_lm(path: str | Path) -> bool:
    """Return True for a checkpoint of Megatron-LM or Megatron-Bridge: its root, or the folder of one iteration."""
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return False
    if (folder / TRACKER).exists() or (folder / RUN_CONFIG).exists() or any(folder.glob(_ITERATION)):
        return True
    own = (folder / "config.json").exists()  # a checkpoint of this package without its manifest
    found = (folder / INDEX).exists() or (folder / COMMON).exists() or any(folder.glob("*.distcp"))
    return any(folder.glob(_OLD_FORMAT)) or (found and not own)


def iteration_folder(path: str | Path) -> Path:
    """Return the folder with the weights: `path` itself, or the iteration that its tracker file names.

    Raises UserError for a root without a tracker file, and for an iteration that is not there.
    """
    folder = Path(path)
    tracker = folder / TRACKER
    if not tracker.exists():
        iterations = sorted(folder.glob(_ITERATION))
        if iterations:
            raise UserError(f"{tracker} is missing; name the iteration itself, the last is {iterations[-1]}")
        return folder
    name = tracker.read_text(errors="replace").strip()
    if name != "release" and not name.isdecimal():
        raise UserError(f"{tracker} has {name[:40]!r} in place of an iteration; name the folder of the iteration")
    iteration = folder / (name if name == "release" else f"iter_{int(name):07d}")
    if not iteration.is_dir():
        raise UserError(f"{tracker} names {iteration.name}, which is missing; {COPY_AGAIN}")
    return iteration


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The weights in a checkpoint of Megatron-LM or Megatron-Bridge."""

    folder: Path  # folder of the iteration
    tensors: Mapping[str, TensorStorageMetadata]  # of the model alone, by their names in the checkpoint
    arguments: ModelArguments | None

    @property
    def padded_vocabulary(self) -> int:
        """Return the rows of the embedding. Raises UserError if the checkpoint has no embedding."""
        return self._tensor("embedding.word_embeddings.weight").size[0]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the embedding. Raises UserError if the checkpoint has no embedding."""
        dtype: torch.dtype = self._tensor("embedding.word_embeddings.weight").properties.dtype
        return dtype

    def place(self, name: str) -> tuple[str, int | None]:
        """Return the stored name of a tensor, and its layer if the layers are stacked.

        `name` is the name in a checkpoint of this package. Raises UserError if the tensor is not there.
        """
        layer = LAYER.match(name)
        for candidate in stored_names(name):
            if candidate in self.tensors:
                return candidate, None
            stacked = LAYER.sub("decoder.layers.", candidate)
            if layer is not None and stacked in self.tensors:
                return stacked, int(layer[1])
        raise UserError(f"{self.folder} misses {name}, which config.json asks for; name the folder of this model")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without the axis of stacked layers."""
        stored, layer = self.place(name)
        size = tuple(self.tensors[stored].size)
        return size if layer is None else size[1:]

    def check(self, shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> None:
        """Raise UserError if arguments, tensors or shapes are not those of a model.

        Args:
            shapes: by the names in a checkpoint of this package, without padding of the vocabulary.
            spec: the model of the config.json that the user named.
        """
        if self.arguments is not None:
            self.arguments.check(spec)
        used = set()
        for name, shape in shapes.items():
            stored, layer = self.place(name)
            used.update(stored_names(stored))
            found, padded = self.shape(name), "word_embeddings" in name or name.startswith("output_layer")
            layers = self.tensors[stored].size[0] if layer is not None else spec.num_layers
            fits = found[1:] == shape[1:] and found[0] >= shape[0] if padded else found == shape
            if not fits or layers != spec.num_layers:
                raise UserError(
                    f"{self.folder}: {stored} has shape {list(self.tensors[stored].size)}, config.json asks for "
                    f"{[spec.num_layers, *shape] if layer is not None else list(shape)}; name the Hugging Face folder "
                    "of this model"
                )
        unknown = self.tensors.keys() - used
        if unknown:
            raise UserError(
                f"{self.folder} holds {len(unknown)} tensors that config.json does not ask for, the first is "
                f"{min(unknown)}; name the Hugging Face folder of this model"
            )

    def load(self, state: dict[str, Any]) -> dict[str, Any]:
        """Load mcore's sharded state dict, whose names are those of a checkpoint of this package.

        Collective over the world. Raises what mcore and torch raise for damaged files.
        """
        state, _, factories = load_preprocess(state)

        def relocate(value: Any) -> Any:
            if not isinstance(value, ShardedTensor):
                return value
            name, layer = self.place(value.key)
            return renamed(value, name) if layer is None else stacked(value, name, layer, self.tensors[name].size[0])

        dict_list_map_inplace(relocate, state)
        loaded = TorchDistLoadShardedStrategy().load(state, self.folder)
        merged: dict[str, Any] = apply_factory_merges(loaded, factories)
        return merged

    def _tensor(self, name: str) -> TensorStorageMetadata:
        if name not in self.tensors:
            raise UserError(f"{self.folder} holds no {name}; name a checkpoint of a language model")
        return self.tensors[name]


def open_model(path: str | Path) -> StoredModel:
    """Read index and arguments of a checkpoint. No weights are read. No communication.

    Raises UserError, with the file and what to do, for damaged files and for another format of Megatron-LM.
    """
    folder = iteration_folder(path)
    if any(folder.glob(_OLD_FORMAT)):
        raise UserError(
            f"{folder} is in Megatron-LM's old format ({next(folder.glob(_OLD_FORMAT)).name}); load it there and save "
            "it with --ckpt-format torch_dist"
        )
    described = folder / "metadata.json"
    backend = read_json(described).get("sharded_backend") if described.exists() else "torch_dist"
    if backend != "torch_dist":
        raise UserError(f"{described}: sharded_backend={backend!r} is not supported; save it as torch_dist")
    index = read_index(folder)
    tensors = {
        name: stored
        for name, stored in index.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not _OTHER_STATE.search(name)
    }
    if not any(LAYER.match(name) or name.startswith("decoder.layers.") for name in tensors):
        found = ", ".join(sorted(tensors)[:2]) or "no tensors"
        raise UserError(
            f"{folder} holds no decoder layers in Megatron-Core's names ({found}); save it with --ckpt-format "
            "torch_dist"
        )
    predicting = min((name for name in tensors if name.startswith(_MTP)), default=None)
    if predicting is not None:
        raise UserError(
            f"{folder} holds layers of multi-token prediction ({predicting}), which this package would lose; load it "
            "in Megatron-LM without --mtp-num-layers and save it again"
        )
    return StoredModel(folder, tensors, read_arguments(folder, index))


def stored_names(name: str) -> Iterable[str]:
    """Yield the names that a tensor may have in a checkpoint: this package's, and that of a norm in a fused module."""
    yield name
    for fused, own in FUSED_NORMS.items():
        if f".{own}" in name:
            yield name.replace(own, fused)


def renamed(tensor: ShardedTensor, name: str) -> ShardedTensor:
    """Return a sharded tensor under another name in the checkpoint."""
    return dataclasses.replace(tensor, key=name)


def stacked(tensor: ShardedTensor, name: str, layer: int, num_layers: int) -> ShardedTensor:
    """Return a sharded tensor of one layer as layer `layer` of a tensor that stacks all layers."""
    return dataclasses.replace(
        tensor,
        key=name,
        global_shape=(num_layers, *tensor.global_shape),
        global_offset=(layer, *tensor.global_offset),
        axis_fragmentations=(num_layers, *(tensor.axis_fragmentations or ())),
        prepend_axis_num=tensor.prepend_axis_num + 1,
    )
