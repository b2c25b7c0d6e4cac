"""Hugging Face folders whose config.json was edited."""

import json

import pytest

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError


def edited(family, change, tmp_path, **overrides):
    folder = save(random_hf_model(family, **overrides), tmp_path / "hf")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


def assert_refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        read_model_spec(folder)
    assert "config.json" in str(caught.value)
