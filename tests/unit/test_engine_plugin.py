"""The plugin's reader accepts exactly what the trainer wrote, and an update is complete or refused."""

import pytest
import torch
from safetensors.torch import save_file

from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.buckets import BadBucket, Update, checksum, read_bucket

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bucket(path, tensors):
    save_file(tensors, path)
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def test_a_bucket_has_the_bits_that_were_written(tmp_path):
    # Odd numbers of bfloat16 values begin and end between words of eight bytes.
    tensors = {f"{n}-{dtype}": torch.randn(n, 3).to(dtype) for n in (1, 2, 5, 64) for dtype in DTYPES}
    tensors["empty"] = torch.empty(0)
    sums = bucket(tmp_path / "a", tensors)
    found = read_bucket(str(tmp_path / "a"), sums)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_every_byte_changes_the_checksum(count):
    tensor = torch.randn(count).to(torch.bfloat16)
    before = checksum(tensor)
    for place in range(2 * count):
        changed = tensor.clone()
        changed.view(torch.uint8)[place] ^= 0x80
        assert checksum(changed) != before


def test_damaged_buckets_are_refused(tmp_path):
    path = tmp_path / "a"
    sums = bucket(path, {"x": torch.ones(4), "y": torch.zeros(3)})
    with pytest.raises(BadBucket, match="the content of x differs"):
        read_bucket(str(path), {**sums, "x": sums["x"] + 1})
    with pytest.raises(BadBucket, match="differ in 1 tensors, the first is y"):
        read_bucket(str(path), {"x": sums["x"]})
    with pytest.raises(BadBucket, match="must share this folder"):
        read_bucket(str(tmp_path / "b"), sums)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadBucket, match="truncated or corrupt"):
        read_bucket(str(path), sums)


def test_an_update_has_every_tensor_once_and_one_version():
    update = Update()
    with pytest.raises(BadBucket, match="without a single bucket"):
        update.check_complete()
    update.add({"a", "b"}, "run:1", 3)
    with pytest.raises(BadBucket, match="run:1 is incomplete: 2 of 3 tensors"):
        update.check_complete()
    with pytest.raises(BadBucket, match="b arrived twice"):
        update.add({"b"}, "run:1", 3)
    with pytest.raises(BadBucket, match="a bucket of version run:2 arrived in the update to version run:1"):
        update.add({"c"}, "run:2", 3)
    update.add({"c"}, "run:1", 3)
    update.check_complete()
