"""Find the safetensors file of each tensor in a Hugging Face folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megatron_oprd.runtime.files import GET_LFS_FILE, is_lfs_pointer, read_json
from megatron_oprd.types import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "megatron_oprd.json"  # describes the weights of a Megatron checkpoint
# Buffers that earlier versions of transformers saved. It ignores them when it loads a model.
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids|(self_)?attn\.bias)$")
_TWICE = re.compile(r"model\.(model|lm_head)\.")
_TEXT_TOWER = re.compile(r"model\.language_model\.")
_WITHOUT_PREFIX = re.compile(r"(embed_tokens|layers|norm)\.")


class StoredTensor(NamedTuple):
    """The place of a tensor on the disk."""

    file: str  # name of the file in its folder
    name: str  # name of the tensor in the file


def locate_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the place of each tensor by its name in the model, without buffers that transformers ignores.

    Raises:
        UserError: a file is missing, truncated or corrupt, the index does not describe the folder, or two tensors have
            one name. Names the file.
    """
    places: dict[str, StoredTensor] = {}
    for stored, file in sorted(_files_by_tensor(folder).items()):
        if _BUFFER.search(stored):
            continue
        name = model_name(stored)
        if name in places:
            raise UserError(f"{folder} holds {name} twice, as {places[name].name} and as {stored}; remove one of them")
        places[name] = StoredTensor(file, stored)
    return places


def model_name(stored: str) -> str:
    """Return the name in the model of a tensor in a file.

    The text tower of a model for text and images gets the names of a model for text. As in transformers, a folder may
    have been saved from the model without LM head (`layers.0...`), or the names may have the prefix `model.` once too
    often.
    """
    if _TWICE.match(stored):
        return stored.removeprefix("model.")
    if _TEXT_TOWER.match(stored):
        return _TEXT_TOWER.sub("model.", stored)
    return f"model.{stored}" if _WITHOUT_PREFIX.match(stored) else stored


def stored_name(name: str, *, text_tower: bool) -> str:
    """Return the name in the files of a tensor of a model, or of the text tower of a model for text and images."""
    return re.sub(r"^model\.", "model.language_model.", name) if text_tower else name


def model_names(folder: Path) -> set[str]:
    """Return the names of the tensors of a folder without further checks; an empty set without readable weights."""
    try:
        if (folder / SINGLE).exists():
            stored = _names_in(folder, SINGLE)
        else:
            weight_map = read_json(folder / INDEX).get("weight_map")
            stored = set(weight_map) if isinstance(weight_map, dict) else set()
    except UserError:
        return set()
    return {model_name(name) for name in stored}


def _files_by_tensor(folder: Path) -> dict[str, str]:
    """Return the file of each tensor, from the files that transformers reads: the single file before an index."""
    if (folder / SINGLE).exists():
        _check_index_agrees(folder)
        return dict.fromkeys(_names_in(folder, SINGLE), SINGLE)
    if (folder / INDEX).exists():
        return _read_index(folder)
    if any(folder.glob("model-*-of-*.safetensors")):
        raise UserError(f"{folder} holds shards but not their index {INDEX}; copy it, or save the model anew")
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} holds pytorch_model.bin; save it as safetensors first (save_pretrained does)")
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; copy the weights there, or name another folder")


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(index.get("metadata"), dict):  # transformers needs it, even if it is empty
        raise UserError(f'{path} has no metadata; save the model anew, or add "metadata": {{}}')
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; copy the file again")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path}: weight_map must give each tensor the name of a file; copy the index again")
    outside = next((file for file in weight_map.values() if Path(file).name != file), None)
    if outside is not None:
        raise UserError(f"{path} names {outside!r}; name files in the folder itself, without a path")
    for file in sorted(set(weight_map.values())):
        # transformers loads every tensor of a shard, also one that the index puts elsewhere or does not name.
        present = _names_in(folder, file)
        wrong = sorted(name for name in present if weight_map.get(name) != file)
        if wrong:
            elsewhere = f"puts it into {weight_map[wrong[0]]}" if wrong[0] in weight_map else "does not name it"
            raise UserError(f"{folder / file} holds {wrong[0]}, but {INDEX} {elsewhere}; save the model anew")
        named = {name for name, place in weight_map.items() if place == file and not _BUFFER.search(name)}
        missing = sorted(named - present)
        if missing:
            raise UserError(
                f"{folder / file} does not hold {missing[0]}, which {INDEX} says it does; copy the folder again"
            )
    return weight_map


def _check_index_agrees(folder: Path) -> None:
    """Raise UserError if the folder has a second complete set of weights that differs from the single file."""
    if not (folder / INDEX).exists():
        return
    weight_map = read_json(folder / INDEX).get("weight_map")
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not files or files == {SINGLE} or not all((folder / str(file)).exists() for file in files):
        return  # a left-over of an earlier save, which transformers ignores
    with safe_open(folder / SINGLE, framework="pt") as single:
        differ = set(single.keys()) ^ weight_map.keys()
        for name in sorted(weight_map.keys() - differ):
            with safe_open(folder / weight_map[name], framework="pt") as shard:
                if name not in shard.keys() or not torch.equal(shard.get_tensor(name), single.get_tensor(name)):  # noqa: SIM118
                    differ.add(name)
                    break
    if differ:
        raise UserError(
            f"{folder} holds two sets of weights, {SINGLE} and those of {INDEX}, which differ in "
            f"{min(differ)}; remove one of them"
        )


def _names_in(folder: Path, file: str) -> set[str]:
    path = folder / file
    try:
        with safe_open(path, framework="pt") as opened:
            return set(opened.keys())
    except FileNotFoundError:
        raise UserError(f"{path} is missing, but {INDEX} names it; copy the file there") from None
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(path):
            raise UserError(f"{path} is a pointer of Git LFS", GET_LFS_FILE) from None
        raise UserError(f"{path} is truncated or corrupt: {error}; copy it again") from None
