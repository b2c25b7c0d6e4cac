"""Transformer Engine has every name and keyword that Megatron-Core and this package ask of it, read from its wheel's
source; and the CPU stand-in of the tests has none that it lacks. Needs pip to fetch 0.7 MB a version, once."""

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from megatron.core.packed_seq_params import PackedSeqParams

import megatron_oprd
from tests.helpers.te_calls import lacks, uses
from tests.helpers.te_wheel import Source, download

# The oldest that has everything, the one that Megatron-Core 0.16.1 names (below 2.12), and the newest.
SUPPORTED = ("2.10.0", "2.11.0", "2.20.2")
STAND_IN_VERSION = "2.11.0"
STAND_IN = Path(__file__).resolve().parents[1] / "helpers" / "te_on_cpu"
CACHE = Path(sys.prefix, "cache", "transformer_engine")

# What every supported version lacks of what Megatron-Core 0.16.1 asks for, and what comes of it.
IGNORED = "pydantic drops it: fp8_wgrad=False has no effect with the delayed recipe"
FALLS_BACK = "in a try: Megatron-Core splits with torch"
NO_GEMM = "in a try: the router's product is torch's"
KNOWN_LACKS = {
    "transformer_engine.common.recipe.DelayedScaling(device=)": IGNORED,
    "transformer_engine.common.recipe.DelayedScaling(override_linear_precision=)": IGNORED,
    "transformer_engine.common.recipe.DelayedScaling(params_dtype=)": IGNORED,
    "transformer_engine.pytorch.attention._SplitAlongDim": FALLS_BACK,
    "transformer_engine.pytorch.attention._SplitAlongDim.apply": FALLS_BACK,
    "transformer_engine.pytorch.cpp_extensions.general_gemm(workspace=)": NO_GEMM,
    "transformer_engine.pytorch.module.base.get_workspace": NO_GEMM,
}
# Parts of Megatron-Core that no model of this package goes through.
UNUSED = ("distributed/fsdp", "post_training", "ssm", "inference", "export", "datasets", "models")
USED = ("models/gpt", "models/common")
# What this package may ask at a start and what tests on a GPU ask.
OURS = (
    "transformer_engine.pytorch.is_fp8_available",
    "transformer_engine.pytorch.fp8.FP8GlobalStateManager.is_fp8_available",
    "transformer_engine.pytorch.get_device_compute_capability",
    "transformer_engine.pytorch.module.base.initialize_ub",
    "transformer_engine.pytorch.Float8Tensor",
    "transformer_engine.pytorch.QuantizedTensor.dequantize",
    "transformer_engine.pytorch.autocast",
    "transformer_engine.pytorch.quantized_model_init",
)


needs_wheels = pytest.mark.nightly  # downloads three wheels of Transformer Engine

# The table is of one Megatron-Core; a newer one asks for more, mostly in a try.
of_this_megatron = pytest.mark.skipif(
    importlib.metadata.version("megatron-core") != "0.16.1", reason="the known gaps are those of Megatron-Core 0.16.1"
)


@functools.cache
def opened(version):
    """Return the wheel's source, or the reason why there is none."""
    try:
        return Source(download(version, CACHE))
    except (OSError, subprocess.SubprocessError) as error:
        return f"no wheel of Transformer Engine {version}: {error}"


def source(version):
    found = opened(version)
    return pytest.skip(found) if isinstance(found, str) else found


@functools.cache
def uses_of(version):
    """Return every use of a version of Transformer Engine in Megatron-Core and in this package."""
    core = Path(importlib.util.find_spec("megatron.core").origin).parent
    files = [(core, file) for file in sorted(core.rglob("*.py"))]
    files = [(r, f) for r, f in files if not _under(f.relative_to(r), UNUSED) or _under(f.relative_to(r), USED)]
    package = Path(megatron_oprd.__file__).parent
    files += [(package, file) for file in sorted(package.rglob("*.py"))]
    found = []
    for root, file in files:
        text = file.read_text()
        if "transformer_engine" in text:
            found += uses(ast.parse(text), f"{root.name}/{file.relative_to(root)}", version)
    return found


def _under(path, folders):
    return path.as_posix().startswith(folders)


@of_this_megatron
@needs_wheels
@pytest.mark.parametrize("version", SUPPORTED)
def test_transformer_engine_has_every_name_that_is_used(version):
    lacking = defaultdict(list)
    for use in uses_of(version):
        for lack in lacks(use, source(version)):
            lacking[lack].append(use.where)
    new = {lack: where for lack, where in lacking.items() if lack not in KNOWN_LACKS}
    assert not new, f"Transformer Engine {version} lacks names that are used at these lines: {new}"
    assert not KNOWN_LACKS.keys() - lacking.keys(), (
        "Transformer Engine has it, or nobody asks any more: delete the line"
    )


@of_this_megatron
@needs_wheels
@pytest.mark.parametrize("version", SUPPORTED)
def test_transformer_engine_has_names_that_are_looked_up_at_run_time(version):
    """Names without a call in Megatron-Core, and the packed sequence's fields, which it passes by name at run time."""
    wheel = source(version)
    assert [name for name in OURS if wheel.find(name) is None] == []
    attention = wheel.find("transformer_engine.pytorch.DotProductAttention.forward")
    fields = {field.name for field in dataclasses.fields(PackedSeqParams)} - {"cp_group", "local_cp_size"}
    assert [field for field in sorted(fields) if not wheel.accepts(attention, field)] == []


@of_this_megatron
@needs_wheels
@pytest.mark.parametrize("version", SUPPORTED)
def test_recipes_accept_the_keywords_of_megatron(version, tmp_path):
    file = source(version).extract("transformer_engine.common.recipe", tmp_path)
    spec = importlib.util.spec_from_file_location("te_recipe", file)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["te_recipe"] = recipe  # where pydantic looks for the types
    try:
        spec.loader.exec_module(recipe)
        calls = {u.name.rsplit(".", 1)[1]: u.keywords for u in uses_of(version) if u.is_call and ".recipe." in u.name}
        values = {"amax_compute_algo": "most_recent", "amax_history_len": 1, "margin": 0, "qfactory": print}
        for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
            for fp8_format in (recipe.Format.E4M3, recipe.Format.HYBRID):
                given = {keyword: values.get(keyword, False) for keyword in calls[name]} | {"fp8_format": fp8_format}
                made = getattr(recipe, name)(**given)
                assert made.fp8_format is fp8_format
                assert made.delayed() == (name == "DelayedScaling")
    finally:
        del sys.modules["te_recipe"]


@of_this_megatron
def test_uses_include_the_keywords_of_megatron():
    found = defaultdict(set)
    for use in uses_of("2.11.0"):
        found[use.name] |= set(use.keywords)
    te = "transformer_engine.pytorch."
    assert {"in_features", "tp_group", "params_dtype", "device", "rng_tracker_name", "ub_name"} <= found[te + "Linear"]
    assert found[te + "Linear.forward"] == found[te + "GroupedLinear.forward"] == {"is_first_microbatch"}
    assert {"normalization", "zero_centered_gamma", "device", "eps"} <= found[te + "LayerNormLinear"]
    assert {"hidden_size", "sequence_parallel", "params_dtype"} <= found[te + "RMSNorm"]
    parallel = {"cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type", "num_gqa_groups", "attention_type"}
    assert parallel <= found[te + "DotProductAttention"]
    assert {"fp8_recipe", "fp8_group", "enabled"} <= found[te + "fp8_autocast"]
    assert {"tp_group", "get_rng_state_tracker"} <= found[te + "distributed.checkpoint"]
    assert {te + "optimizers.FusedAdam", te + "tensor.QuantizedTensor", te + "LayerNormLinear.use_bias"} <= found.keys()
    old = {keyword for use in uses_of("1.4.0") for keyword in use.keywords}
    new = {keyword for use in uses_of("2.11.0") for keyword in use.keywords}
    assert "ub_split_ag" in old - new and "ub_overlap_ag" in new - old


PACKAGE = {
    "__init__.py": "from . import pytorch",
    "pytorch/__init__.py": "from .linear import Linear as Linear\nfrom .other import *",
    "pytorch/linear.py": """
class Base:
    def __init__(self, *, device=None): self.tp_size = 1
class Linear(Base):
    def __init__(self, size, bias=True, **kwargs): super().__init__(**kwargs)
    def forward(self, inp, is_first_microbatch=None): ...
""",
    "pytorch/other.py": "def checkpoint(function, *args, **kwargs): kwargs.pop('tp_group')",
}
CASES = {
    "import transformer_engine as te\nte.pytorch.Linear(4, bias=False, device='cpu')": [],
    "from transformer_engine.pytorch import checkpoint as c\nc(f, x, tp_group=1)": [],
    "from transformer_engine.pytorch import Gone": ["Gone"],
    "import transformer_engine.pytorch as te\nte.Linear(4, rank=0)": ["Linear(rank=)"],
    "import transformer_engine.pytorch as te\nte.Linear(bias=False)": ["Linear(size required)"],
    "import transformer_engine.pytorch as te\nte.Linear(1, 2, 3)": ["Linear(3 arguments)"],
    "import transformer_engine.pytorch as te\nte.checkpoint(f, gone=1)": ["checkpoint(gone=)"],
    "import transformer_engine.pytorch as te\ndef f():\n    k = {'a': 1}\n    k['b'] = 2\n    te.Linear(4, **k)": [
        "Linear(a=)",
        "Linear(b=)",
    ],
    "import transformer_engine.pytorch as te\nif is_te_min_version('3.0'):\n    te.Gone()\nelse:\n    te.Linear(4)": [],
    "import transformer_engine.pytorch as te\nclass A(te.Linear):\n    def forward(self, x):\n"
    "        return super().forward(x, other=self.tp_size + self.gone)": ["Linear.forward(other=)", "Linear.gone"],
}


@pytest.mark.parametrize("code", CASES)
def test_a_missing_name_is_found(tmp_path, code):
    for name, text in PACKAGE.items():
        file = tmp_path / "transformer_engine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    package = Source(tmp_path)
    lacking = {lack for use in uses(ast.parse(code), "x.py", "2.11.0") for lack in lacks(use, package)}
    assert sorted(lacking) == [f"transformer_engine.pytorch.{name}" for name in CASES[code]]


@needs_wheels
def test_the_stand_in_has_no_name_that_the_package_lacks():
    real, ours = source(STAND_IN_VERSION), Source(STAND_IN)
    wrong = []
    for module in ours.modules():
        if module == "transformer_engine.on_cpu":
            continue
        for node in ours.tree(module).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                wrong += _differences(f"{module}.{node.name}", ours, real)
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
                for method in methods:
                    wrong += _differences(f"{module}.{node.name}.{method}", ours, real)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = ast.literal_eval(node.value)
                wrong += [f"{module}.{name}" for name in names if real.find(f"{module}.{name}") is None]
    assert not wrong, wrong


def _differences(name, ours, real):
    """List what the stand-in's definition promises beyond the package's, or differently."""
    own, theirs = ours.find(name), real.find(name)
    if theirs is None:
        return [f"{name}: not in the package"]
    parameters = real.signature(theirs)
    if parameters is None:  # C++, or an object that is called
        return []
    by_name, positional = {p.name: p for p in parameters}, [p.name for p in parameters if p.kind == "positional"]
    is_called = real.fields(theirs) is None if theirs.kind == "class" else True  # fields are given by name
    wrong = []
    for place, parameter in enumerate(ours.signature(own) or []):
        if parameter.kind in ("*", "**"):
            continue
        if not real.accepts(theirs, parameter.name):
            wrong.append(f"{name}({parameter.name}=)")
        elif parameter.kind == "positional" and is_called and positional[place : place + 1] != [parameter.name]:
            wrong.append(f"{name}: place of {parameter.name}")
        default = by_name.get(parameter.name, parameter).default
        if None not in (default, parameter.default) and _value(default) != _value(parameter.default):
            wrong.append(f"{name}({parameter.name}={parameter.default}), not {default}")
    return wrong


def _value(text):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text
