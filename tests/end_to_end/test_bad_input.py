"""Bad input to any command: one clear line on stderr, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.commands import Outcome, run, run_ranks
from tests.helpers.scene import Scene, assert_refused, make_scene, refuse, save_model, waiting_for
from tests.helpers.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def complete_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Make the scene with a model of experts (`experts`), the student as a Megatron checkpoint (`megatron`) and a
    finished run (`finished`).
    """
    scene = make_scene(tmp_path_factory.mktemp("whole"))
    save_model(scene.experts, 2, "Qwen3Moe")
    done = run(scene.folder, "hf_to_megatron.py", f"--hf={scene.student}", f"--megatron={scene.megatron}")
    assert done.code == 0, done.stderr
    done = run(scene.folder, "train", *scene.options(f"train.run_dir={scene.finished}"))
    assert (done.code, done.stderr) == (0, "")
    return scene


@pytest.fixture
def scene(complete_scene: Scene, tmp_path: Path) -> Scene:
    shutil.copytree(complete_scene.folder, tmp_path / "scene")
    return Scene(tmp_path / "scene")


DATA = "evaluation.data={folder}/prompts.jsonl"
OVERRIDES = {
    "no equals sign": (["train.steps"], ("'train.steps'", "key=value")),
    "unknown option": (["--stepz=3"], ("unknown option --stepz", "train.steps=3")),
    "unknown section": (["trian.steps=1"], ("unknown key trian", "train")),
    "unknown key": (
        ["optimizer.learning_rate=1"],
        ("unknown key optimizer.learning_rate", "did you mean"),
    ),
    "near miss": (["parallel.tensors=2"], ("did you mean parallel.tensor?",)),
    "word for a number": (["train.steps=many"], ("train.steps='many'", "integer")),
    "float for a whole number": (["train.steps=1.5"], ("train.steps=1.5", "integer")),
    "number for a list of text": (["data.prompts=5"], ("data.prompts=5", "list")),
    "number for a section": (["optimizer=3"], ("optimizer=3",)),
    "negative": (["optimizer.lr=-1"], ("optimizer.lr=-1", "greater than 0")),
    "beyond one": (["rollout.top_p=1.5"], ("rollout.top_p=1.5", "less than or equal to 1")),
    "no such choice": (["optimizer.name=lion"], ("optimizer.name='lion'", "'adamw' or 'sgd'")),
    "one beta": (["optimizer.betas=[0.9]"], ("optimizer.betas",)),
    "pairs of one": (["loss.representation.pairs=[[1]]"], ("loss.representation.pairs",)),
    "null run folder": (["train.run_dir=null"], ("train.run_dir=null", "string")),
    "zero byte": (["train.run_dir=a\0b"], ("train.run_dir",)),
    "missing interpolation": (["train.run_dir=${oc.env:NO_SUCH_VARIABLE}"], ("NO_SUCH_VARIABLE",)),
    "index into a mapping": (["train[0]=1"], ("unknown key train.0", "did you mean")),
    "broken value": (["data.prompts=[a"], ("data.prompts=[a",)),
    "fp8 beside fp32": (
        ["precision.fp8=hybrid", "precision.dtype=fp32"],
        ("precision.fp8=hybrid", "precision.dtype=bf16"),
    ),
    "fp8 without its library": (
        ["precision.fp8=hybrid", "precision.dtype=bf16"],
        ("precision.fp8=hybrid needs Transformer Engine", "precision.fp8=null"),
    ),
    "attention": (["precision.attention=te"], ("Transformer Engine is not installed", "precision.attention=auto")),
    "no prompts": (["rollout.engine=megatron"], ("data.prompts", "name at least one prompt file")),
    "no replay file": (["rollout.path=null"], ("rollout.path", "JSONL file")),
    "output objective": (["loss.output.objective=kl"], ("loss.output.objective='kl'", "'none'")),
    "one virtual stage": (["parallel.virtual_pipeline=1"], ("parallel.virtual_pipeline=1", "equal to 2")),
    "no virtual stage": (["parallel.virtual_pipeline=0"], ("parallel.virtual_pipeline=0", "equal to 2")),
    "no ranks": (["parallel.context=0"], ("parallel.context=0", "equal to 1")),
    "negative ranks": (["parallel.expert=-2"], ("parallel.expert=-2", "equal to 1")),
    "ranks for a switch": (["parallel.sequence=2"], ("parallel.sequence=2", "valid boolean")),
    "no ranks of the teacher": (["teacher.parallel.tensor=0"], ("teacher.parallel.tensor=0", "equal to 1")),
    "negative ranks of the teacher": (
        ["teacher.parallel={pipeline: -1}"],
        ("teacher.parallel.pipeline=-1", "equal to 1"),
    ),
    "number for the teacher's layout": (["teacher.parallel=2"], ("teacher.parallel=2",)),
    "near miss in the teacher's layout": (
        ["teacher.parallel={tensors: 2}"],
        ("unknown key teacher.parallel.tensors", "did you mean teacher.parallel.tensor?"),
    ),
    "what the teacher's layout has not": (
        ["teacher.parallel.sequence=true"],
        ("unknown key teacher.parallel.sequence",),
    ),
    "too few processes": (["parallel.tensor=2"], ("parallel.tensor=2", "multiple of 2", "--nproc-per-node 2")),
    "an optimizer for GPUs": (
        ["optimizer.precision_aware=true", "precision.dtype=bf16"],
        ("optimizer.precision_aware=true", "needs a CUDA device", "use optimizer.precision_aware=false"),
    ),
    "layer out of range": (["loss.representation.layers=[3]"], ("layer 3 does not exist", "from 1 to 2")),
    "layer zero": (["loss.representation.layers=[0]"], ("layer 0 does not exist",)),
    "layer twice": (["loss.representation.layers=[1,1]"], ("named twice", "[1, 1]")),
    "no layers": (["loss.representation.layers=[]"], ("loss.representation.layers=[]", "selects no layer")),
    "no pairs": (["loss.representation.pairs=[]"], ("pairs is empty",)),
    "teacher layer out of range": (["loss.representation.pairs=[[1,9]]"], ("teacher layer 9 does not exist",)),
    "recompute": (
        [
            "recompute.granularity=full",
            "recompute.num_layers=2",
            "loss.representation.layers=[1]",
            "parallel.pipeline=2",
        ],
        ("multiple of 2",),
    ),
    "too few rollouts": (["train.steps=4"], ("has 12 rollouts", "4 lines are missing")),
    "micro-batch too small": (["batch.max_tokens_per_micro_batch=4"], ("max_tokens_per_micro_batch=4", "(5 tokens)")),
    "student is no folder": (["student.path=/nowhere"], ("/nowhere is not a folder",)),
    "teacher is no folder": (["teacher.path=/nowhere"], ("/nowhere is not a folder",)),
    "replay file is not there": (["rollout.path=/nowhere.jsonl"], ("/nowhere.jsonl", "No such file")),
    "replay file is a folder": (["rollout.path=/"], ("cannot read /:", "Is a directory")),
    "evaluation without data": (["evaluation.every=1"], ("evaluation.data", "name at least one prompt file")),
    "nothing to evaluate": (
        [
            "evaluation.every=1",
            "evaluation.samples=0",
            "evaluation.teacher_answers=false",
            "evaluation.data={folder}/prompts.jsonl",
        ],
        ("evaluation.samples=0 without the teacher's answers", "evaluation.teacher_answers=true"),
    ),
    "the best of nothing": (["evaluation.best=perplexity"], ("evaluation.best=perplexity", "evaluation.every above 0")),
    "no such metric": (["evaluation.best=loss"], ("evaluation.best='loss'", "'perplexity', 'forward_kl'")),
    "patience without a metric": (["evaluation.patience=2"], ("evaluation.patience=2 needs evaluation.best",)),
    "negative patience": (["evaluation.patience=-1"], ("evaluation.patience=-1", "greater than or equal to 0")),
    "the best without checkpoints": (
        ["evaluation.best=cosine", "evaluation.every=1", "checkpoint.every=0"],
        ("evaluation.best=cosine keeps a checkpoint", "checkpoint.every above 0"),
    ),
    "the best of right answers": (
        ["evaluation.best=avg@n", "evaluation.every=1", "evaluation.data={folder}/ungraded.jsonl"],
        ("evaluation.best=avg@n needs right answers in evaluation.data", "perplexity"),
    ),
    "the best on the teacher's answers": (
        [
            "evaluation.best=cosine",
            "evaluation.every=1",
            "evaluation.teacher_answers=false",
            "evaluation.data={folder}/prompts.jsonl",
        ],
        ("evaluation.best=cosine needs the teacher's answers; set evaluation.teacher_answers=true",),
    ),
    "the best of a part of the teacher": (
        [
            "evaluation.best=forward_kl",
            "evaluation.every=1",
            "evaluation.data={folder}/ungraded.jsonl",
            "loss.representation.layers=[1]",
        ],
        ("evaluation.best=forward_kl needs the teacher's last layer", "use perplexity or cosine"),
    ),
    "answers of nobody": (
        ["evaluation.teacher_answers=teacher"],
        ("evaluation.teacher_answers='teacher'", "'auto' or"),
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_bad_overrides_are_refused(case, scene):
    overrides, words = OVERRIDES[case]
    scene.write("ungraded.jsonl", [{"prompt": "1+2="}])
    overrides = [override.replace("{folder}", str(scene.folder)) for override in overrides]
    refuse(scene, words, "train", *scene.options(*overrides))


LAYOUTS: dict[str, tuple[int, list[str], tuple[str, ...]]] = {
    "more stages than layers": (4, ["parallel.pipeline=4"], ("parallel.pipeline=4", "2 layers", "at most 2")),
    "more virtual stages than layers": (
        2,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        ("parallel.pipeline=2 x parallel.virtual_pipeline=2", "2 layers", "use parallel.virtual_pipeline=null"),
    ),
    "virtual stages of one stage": (
        2,
        ["parallel.virtual_pipeline=2"],
        ("parallel.virtual_pipeline=2", "parallel.pipeline of at least 2 or parallel.virtual_pipeline=null"),
    ),
    "sequence without tensor": (
        2,
        ["parallel.sequence=true"],
        ("parallel.sequence=true", "parallel.tensor of at least 2 or parallel.sequence=false"),
    ),
    "heads": (3, ["parallel.tensor=3"], ("parallel.tensor=3", "student's attention heads (8)", "use one of 1, 2")),
    "key-value heads": (4, ["parallel.tensor=4"], ("parallel.tensor=4", "key-value heads (2)", "use one of 1, 2")),
    "no multiple of tensor": (3, ["parallel.tensor=2"], ("parallel.tensor=2", "multiple of 2 processes, not 3")),
    "no multiple of pipeline": (3, ["parallel.pipeline=2"], ("parallel.pipeline=2", "multiple of 2 processes, not 3")),
    "no multiple of context": (3, ["parallel.context=2"], ("parallel.context=2", "multiple of 2 processes, not 3")),
    "no multiple of all": (
        6,
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"],
        ("multiple of 8 processes, not 6", "--nproc-per-node 8"),
    ),
    "experts of a dense model": (2, ["parallel.expert=2"], ("parallel.expert=2", "no experts", "parallel.expert=1")),
    "a number of experts": (
        3,
        ["student.path={experts}", "parallel.expert=3"],
        ("parallel.expert=3", "student's 4 experts", "use one of 1, 2, 4"),
    ),
    "more expert ranks than a stage has": (
        4,
        ["student.path={experts}", "parallel.expert=4", "parallel.pipeline=2"],
        ("parallel.expert=4", "2 processes of a pipeline stage", "use one of 1, 2"),
    ),
    "experts of whole tokens": (
        2,
        ["student.path={experts}", "parallel.tensor=2"],
        ("parallel.tensor=2", "4 experts", "parallel.sequence=true"),
    ),
    "recomputed chunks": (
        2,
        ["parallel.pipeline=2", "recompute.granularity=full", "recompute.num_layers=2"],
        ("recompute.num_layers=2", "(1, 1)", "use 1, or recompute.method=block"),
    ),
}


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_impossible_layouts_are_refused(case, command, scene):
    world_size, overrides, words = LAYOUTS[case]
    overrides = [override.format(experts=scene.experts) for override in overrides]
    options = scene.options(*overrides) if command == "train" else evaluation(scene, *overrides)
    refuse(scene, words, command, *options, environment=waiting_for(world_size))


TEACHER_LAYOUTS: dict[str, tuple[int, list[str], tuple[str, ...]]] = {
    "heads": (3, ["teacher.parallel.tensor=3"], ("teacher.parallel.tensor=3", "teacher's attention heads (8)")),
    "key-value heads": (
        4,
        ["teacher.parallel={{tensor: 4}}"],
        ("teacher.parallel.tensor=4", "teacher's key-value heads (2)", "use one of 1, 2"),
    ),
    "more stages than layers": (
        4,
        ["teacher.parallel={{pipeline: 4}}"],
        ("teacher.parallel.pipeline=4", "2 layers", "teacher.parallel.pipeline of at most 2"),
    ),
    "no multiple": (
        2,
        ["teacher.parallel={{tensor: 2, pipeline: 2}}"],
        ("teacher.parallel.tensor=2 x teacher.parallel.pipeline=2", "multiple of 4 processes, not 2"),
    ),
    "experts of a dense model": (
        2,
        ["student.path={experts}", "teacher.parallel.expert=2"],
        ("teacher.parallel.expert=2", "no experts", "use teacher.parallel.expert=1"),
    ),
    "a number of experts": (
        3,
        ["teacher.path={experts}", "teacher.parallel.expert=3"],
        ("teacher.parallel.expert=3", "teacher's 4 experts", "use one of 1, 2, 4"),
    ),
    "more expert ranks than a stage has": (
        2,
        ["teacher.path={experts}", "teacher.parallel={{pipeline: 2, expert: 2}}"],
        ("teacher.parallel.expert=2", "1 processes of a pipeline stage"),
    ),
    "experts of the teacher in the student's layout": (
        3,
        ["teacher.path={experts}", "parallel.expert=3"],
        ("parallel.expert=3", "teacher's 4 experts", "use one of 1, 2, 4"),
    ),
    "experts of the teacher alone": (
        2,
        ["teacher.path={experts}", "teacher.parallel={{tensor: 2, expert: 2}}", "parallel.expert=2"],
        ("parallel.expert=2: the model has no experts",),
    ),
}


@pytest.mark.parametrize("case", TEACHER_LAYOUTS)
def test_impossible_layouts_of_the_teacher_are_refused(case, scene):
    world_size, overrides, words = TEACHER_LAYOUTS[case]
    overrides = [override.format(experts=scene.experts) for override in overrides]
    refuse(scene, words, "train", *scene.options(*overrides), environment=waiting_for(world_size))


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_layout_that_divides_only_one_of_two_models_names_the_other(model, scene):
    scene.edit(f"{model}/config.json", intermediate_size=111)
    words = ("parallel.tensor=2", f"the {model}'s intermediate size (111)", "use one of 1")
    refuse(scene, words, "train", *scene.options("parallel.tensor=2"), environment=waiting_for(2))


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_every_rank_refuses_a_layout_and_one_prints_it(command, scene):
    before = scene.contents()
    options = scene.options("parallel.expert=2") if command == "train" else evaluation(scene, "parallel.expert=2")
    first, *others = run_ranks(4, scene.folder, command, *options)
    assert_refused(first, "parallel.expert=2", "no experts")
    assert [(other.code, other.stderr) for other in others] == [(2, "")] * 3
    assert scene.contents() == before


def test_cuda_without_a_gpu_is_refused(scene):
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    for command in ("train", "evaluate"):
        options = scene.generating("train.device=cuda", f"evaluation.data=[{scene.folder / 'prompts.jsonl'}]")
        refuse(scene, ("train.device=cuda", "train.device=cpu or auto"), command, *options, environment=environment)


CONFIG_FILES: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "missing": (None, ("config.yaml", "No such file")),
    "not YAML": (b"train: [1,\nstudent: {", ("config.yaml", "not valid YAML")),
    "not UTF-8": (b"train: \xff\xfe", ("config.yaml", "not UTF-8")),
    "control character": (b"train: \x00", ("config.yaml", "not valid YAML")),
    "a list": (b"- 1\n- 2\n", ("config.yaml", "is a list; write sections")),
    "empty": (b"", ("student is required", "train is required")),
    "a key twice": (b"train:\n  run_dir: a\n  run_dir: b\n", ("config.yaml", "'run_dir' occurs twice", "line 3")),
    "number as key": (b"train:\n  3: 4\n", ("train.3", "unknown key train.3")),
    "itself inside": (b"train: &a\n  run_dir: *a\n", ("config.yaml",)),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_bad_configuration_files_are_refused(case, scene):
    content, words = CONFIG_FILES[case]
    if content is not None:
        (scene.folder / "config.yaml").write_bytes(content)
    refuse(scene, words, "train", "--config", str(scene.folder / "config.yaml"))


def cut(path: Path, kept: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])


def weights(scene: Scene, change: Callable[[dict], object]) -> None:
    tensors = load_file(scene.student / "model.safetensors")
    change(tensors)
    save_file(tensors, scene.student / "model.safetensors", metadata={"format": "pt"})


def index(scene: Scene, content: str) -> None:
    """Write an index for the weights, which are then in `shard.safetensors`: a single file comes before an index."""
    (scene.student / "model.safetensors").rename(scene.student / "shard.safetensors")
    (scene.student / INDEX).write_text(content)


def in_shards(scene: Scene) -> None:
    model = random_hf_model("Qwen3", vocab_size=259, num_hidden_layers=2, hidden_size=32)
    save(model, scene.student, max_shard_size="30KB")
    (scene.student / "model.safetensors").unlink()


def lose_a_shard(scene: Scene) -> None:
    in_shards(scene)
    sorted(scene.student.glob("model-*.safetensors"))[1].unlink()


def lose_the_index(scene: Scene) -> None:
    in_shards(scene)
    (scene.student / INDEX).unlink()


def config(**changes: object) -> Callable[[Scene], None]:
    return lambda scene: scene.edit("student/config.json", **changes)


BROKEN_STUDENTS: dict[str, tuple[Callable[[Scene], object], tuple[str, ...]]] = {
    "config missing": (lambda s: (s.student / "config.json").unlink(), ("config.json", "No such file")),
    "config no JSON": (lambda s: cut(s.student / "config.json"), ("config.json is not valid JSON",)),
    "config a list": (lambda s: (s.student / "config.json").write_text("[]"), ("must hold a JSON object",)),
    "config not UTF-8": (lambda s: (s.student / "config.json").write_bytes(b'"\xff"'), ("config.json",)),
    "config nested": (
        lambda s: (s.student / "config.json").write_text("[" * 99999),
        ("config.json is not valid JSON",),
    ),
    "architecture": (config(architectures=["GemmaForCausalLM"]), ("GemmaForCausalLM", "use one of Qwen2ForCausalLM")),
    "architectures no list": (config(architectures=7), ("config.json", "architecture")),
    "rope scaling": (
        config(rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
        ("rope scaling of type dynamic",),
    ),
    "rope no mapping": (config(rope_parameters=3), ("config.json", "rope")),
    "chunked attention": (config(layer_types=["chunked_attention"]), ("chunked_attention", "not supported")),
    "quantised": (config(quantization_config={"bits": 4}), ("quantization_config", "not supported")),
    "no width": (config(hidden_size=...), ("hidden_size 4096", "student's width")),
    "width a word": (config(hidden_size="wide"), ("hidden_size='wide'", "positive whole number")),
    "depth a fraction": (config(num_hidden_layers=2.5), ("num_hidden_layers=2.5",)),
    "depth true": (config(num_hidden_layers=True), ("num_hidden_layers=True",)),
    "heads a word": (config(num_key_value_heads="two"), ("num_key_value_heads='two'",)),
    "heads": (config(num_key_value_heads=3), ("num_attention_heads=8", "num_key_value_heads=3")),
    "eos": (lambda s: s.edit("student/generation_config.json", eos_token_id="end"), ("eos_token_id",)),
    "another width": (config(hidden_size=48), ("hidden_size 48", "hidden_size 32", "student's width")),
    "another width inside": (config(intermediate_size=64), ("has shape [32, 112]", "asks for [32, 64]")),
    "weights missing": (lambda s: (s.student / "model.safetensors").unlink(), ("neither model.safetensors", INDEX)),
    "weights empty": (lambda s: (s.student / "model.safetensors").write_bytes(b""), ("truncated or corrupt",)),
    "weights cut": (lambda s: cut(s.student / "model.safetensors"), ("model.safetensors", "truncated or corrupt")),
    "weights cut in the header": (lambda s: cut(s.student / "model.safetensors", 0.001), ("truncated or corrupt",)),
    "weights overwritten": (lambda s: (s.student / "model.safetensors").write_bytes(b"x" * 999), ("corrupt",)),
    "weights a folder": (
        lambda s: ((s.student / "model.safetensors").unlink(), (s.student / "model.safetensors").mkdir()),
        ("model.safetensors",),
    ),
    "tensor missing": (lambda s: weights(s, lambda t: t.pop("model.norm.weight")), ("misses 1", "model.norm.weight")),
    "tensor unknown": (
        lambda s: weights(s, lambda t: t.update({"extra.weight": t["model.norm.weight"].clone()})),
        ("holds unknown 1", "extra.weight"),
    ),
    "tensor of integers": (
        lambda s: weights(s, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()})),
        ("model.norm.weight", "I32"),
    ),
    "shard missing": (lose_a_shard, ("model-00002-of-", "is missing")),
    "index missing": (lose_the_index, ("holds shards but not their index", INDEX)),
    "index no JSON": (lambda s: index(s, "{"), (f"{INDEX} is not valid JSON",)),
    "index empty": (lambda s: index(s, '{"metadata": {}}'), (f"{INDEX} has no weight_map",)),
    "index lies": (
        lambda s: index(s, '{"metadata": {}, "weight_map": {"a": "shard.safetensors"}}'),
        ("holds lm_head.weight, but", "does not name it"),
    ),
    "index of numbers": (lambda s: index(s, '{"weight_map": {"a": 3}}'), (INDEX,)),
}


@pytest.mark.parametrize("case", BROKEN_STUDENTS)
def test_broken_students_are_refused(case, scene):
    damage, words = BROKEN_STUDENTS[case]
    damage(scene)
    refuse(scene, words, "train", *scene.options())


def test_a_broken_teacher_is_refused(scene):
    cut(scene.teacher / "model.safetensors")
    refuse(scene, ("teacher/model.safetensors", "truncated or corrupt"), "train", *scene.options())


def tokens(text: str) -> Callable[[Scene], object]:
    return lambda scene: (scene.student / "tokenizer.json").write_text(text)


def other_teacher_tokenizer(scene: Scene) -> None:
    path = scene.teacher / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(values))


def no_tokenizer(scene: Scene) -> None:
    for path in scene.student.glob("tokenizer*"):
        path.unlink()


def large_tokenizer(scene: Scene) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>", "<still more>"])
    tokenizer.save_pretrained(scene.student)


TOKENIZERS: dict[str, tuple[Callable[[Scene], object], tuple[str, ...]]] = {
    "missing": (no_tokenizer, ("no tokenizer in", "tokenizer.json")),
    "no JSON": (tokens("{"), ("tokenizer files in", "cannot be read")),
    "no tokenizer": (tokens('{"version": "1.0"}'), ("tokenizer files in", "cannot be read")),
    "of a larger vocabulary": (large_tokenizer, ("ids up to 260", "vocabulary of 259")),
    "other ids in the teacher": (other_teacher_tokenizer, ("tokenizers of student.path", "other ids")),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_broken_tokenizers_are_refused(case, scene):
    damage, words = TOKENIZERS[case]
    damage(scene)
    refuse(scene, words, "train", *scene.generating())


GOOD_PROMPT = b'{"prompt": "1+1"}\n'
PROMPTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("prompts.jsonl has no rows",)),
    "without the column": (GOOD_PROMPT + b'{"question": "1+1"}', ("line 2", "no 'prompt'", "it has: question")),
    "not UTF-8": (GOOD_PROMPT * 2 + b'{"prompt": "\xff"}', ("line 3", "not UTF-8")),
    "not JSON": (b'{"prompt": ', ("line 1", "not JSON")),
    "a list": (b"[1]", ("line 1", "a list; write one JSON object a line")),
    "a number": (b'{"prompt": 7}', ("line 1", "'prompt' must be a string", "not a int")),
    "a message without content": (b'{"prompt": [{"role": "user"}]}', ("line 1", "{role, content}")),
    "all too long": (
        b'{"prompt": "' + b"1" * 3000 + b'"}',
        ("no prompt is left", "1 too long", "max_prompt_tokens=2048"),
    ),
    "binary": (b"PAR1" + b"\0" * 50, ("prompts.jsonl cannot be read as Parquet",)),
    "too long with the answer": (
        b'{"prompt": "' + b"1" * 1999 + b'"}',
        ("does not hold the longest prompt", "raise it"),
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_bad_prompt_files_are_refused(case, scene):
    content, words = PROMPTS[case]
    (scene.folder / "prompts.jsonl").write_bytes(content)
    refuse(scene, words, "train", *scene.generating("batch.max_tokens_per_micro_batch=2000"))


def test_missing_prompt_files_are_named(scene):
    for name in ("/nowhere.jsonl", "/nowhere", "missing.parquet"):
        refuse(scene, (name, "does not exist"), "train", *scene.generating(f"data.prompts=[{name}]"))
    refuse(scene, ("is a folder", "name the files"), "train", *scene.generating(f"data.prompts=[{scene.folder}]"))


def test_a_hub_name_without_network_is_refused(scene):
    words = ("openai/no-such-data-set", "Parquet or JSONL")
    options = scene.generating("data.prompts=[openai/no-such-data-set]", "data.prompt_key=question")
    refuse(scene, words, "train", *options, environment={"HF_HUB_OFFLINE": "1"})


GOOD_ROLLOUT = b'{"prompt_ids": [1], "response_ids": [2]}\n'
REPLAYS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("replay.jsonl holds no rollouts",)),
    "not UTF-8": (GOOD_ROLLOUT + b'{"x": "\xff"}', ("replay.jsonl, line 2", "not UTF-8")),
    "not JSON": (b"{", ("line 1", "not JSON")),
    "no object": (b"3", ("line 1", "a int; write one JSON object")),
    "no prompt": (b'{"response_ids": [1]}', ("line 1", "prompt_ids is missing")),
    "empty prompt": (b'{"prompt_ids": [], "response_ids": [1]}', ("line 1", "prompt_ids is empty")),
    "text for ids": (b'{"prompt_ids": "ab", "response_ids": [1]}', ("line 1", "list of integers")),
    "beyond the vocabulary": (b'{"prompt_ids": [1], "response_ids": [259]}', ("contains 259", "ends at 258")),
    "mask of another length": (
        b'{"prompt_ids": [1], "response_ids": [1, 2], "response_mask": [1]}',
        ("response_mask has 1 entries for 2",),
    ),
}


@pytest.mark.parametrize("case", REPLAYS)
def test_bad_replay_files_are_refused(case, scene):
    content, words = REPLAYS[case]
    (scene.folder / "replay.jsonl").write_bytes(content)
    refuse(scene, words, "train", *scene.options())


def test_a_run_folder_that_cannot_be_written_is_named(scene):
    (scene.folder / "file").touch()
    data = f"evaluation.data=[{scene.folder / 'prompts.jsonl'}]"
    for place in (scene.folder / "file" / "run", scene.folder / "file", Path("/proc/run"), Path("/" + "x" * 300)):
        words = ("cannot write", str(place))
        refuse(scene, words, "train", *scene.options(f"train.run_dir={place}"))
        small = (data, "evaluation.samples=1", "evaluation.max_new_tokens=2", f"train.run_dir={place}")
        refuse(scene, words, "evaluate", *scene.options(*small))


RESUMES: dict[str, tuple[Callable[[Scene], object], list[str], tuple[str, ...]]] = {
    "never": (lambda s: None, ["checkpoint.resume=never"], ("holds a run", "checkpoint.resume=auto")),
    "other layers": (
        lambda s: None,
        ["loss.representation.layers=[1]"],
        ("layer pairs [1-1, 2-2]", "asks for [1-1]", "train.run_dir"),
    ),
    "other teacher": (
        lambda s: shutil.copy(s.student / "model.safetensors", s.teacher),
        [],
        ("another teacher", "teacher.path", "train.run_dir"),
    ),
    "state no JSON": (lambda s: cut(step_one(s) / "state.json"), [], ("state.json is not valid JSON",)),
    "state without keys": (
        lambda s: (step_one(s) / "state.json").write_text("{}"),
        [],
        ("state.json cannot be read", "remove this checkpoint"),
    ),
    "model gone": (lambda s: shutil.rmtree(step_one(s) / "model"), [], ("step_0000001/model",)),
    "weights cut": (lambda s: cut(next((step_one(s) / "model").glob("*.distcp"))), [], ("model/__0_0.distcp",)),
    "model index cut": (lambda s: cut(step_one(s) / "model" / ".metadata"), [], ("model/.metadata",)),
    "optimizer gone": (lambda s: shutil.rmtree(step_one(s) / "optimizer"), [], ("step_0000001/optimizer",)),
    "optimizer cut": (
        lambda s: cut(next((step_one(s) / "optimizer").glob("*.distcp"))),
        [],
        ("optimizer/__0_0.distcp is truncated", "remove this checkpoint"),
    ),
    "optimizer overwritten": (
        lambda s: overwrite(next((step_one(s) / "optimizer").glob("*.distcp"))),
        [],
        ("step_0000001/optimizer cannot be read", "remove this checkpoint"),
    ),
    "optimizer index gone": (
        lambda s: (step_one(s) / "optimizer" / ".metadata").unlink(),
        [],
        ("optimizer/.metadata is missing",),
    ),
}


def step_one(scene: Scene) -> Path:
    return scene.finished / "checkpoints" / "step_0000001"


def overwrite(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("case", RESUMES)
def test_a_run_that_cannot_be_resumed_is_refused(case, scene):
    damage, overrides, words = RESUMES[case]
    damage(scene)
    refuse(scene, words, "train", *scene.options(f"train.run_dir={scene.finished}", "train.steps=2", *overrides))


def test_a_full_disk_before_the_run_folder_exists_is_named(scene):
    outcome = run(scene.folder, "train", *scene.options(), largest_file=400)
    assert_refused(outcome, "cannot write", "File too large")
    assert not any(path.is_file() for path in scene.run.rglob("*"))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_full_disk_at_a_checkpoint_is_named(optimizer, scene):
    """Earlier checkpoints and the export of the run stay as they were; nothing half-written is left."""
    before = {name: value for name, value in scene.contents().items() if "checkpoints" in name or "/hf" in name}
    options = scene.options(f"train.run_dir={scene.finished}", "train.steps=2")
    outcome = run(scene.folder, "train", *options, largest_file=100_000 if optimizer == "sgd" else 400_000)
    assert_refused(outcome, "cannot write", "step_0000002")
    assert {name: value for name, value in scene.contents().items() if "checkpoints" in name or "/hf" in name} == before
    assert not list(scene.folder.rglob("*.partial")) and not list(scene.folder.rglob("*.tmp"))


def test_a_full_disk_at_the_export_is_named(scene):
    outcome = run(scene.folder, "train", *scene.options("checkpoint.every=0"), largest_file=100_000)
    assert_refused(outcome, "cannot write", "hf.new")
    assert not list(scene.run.glob("hf*"))


def evaluation(scene: Scene, *overrides: str) -> list[str]:
    data = f"evaluation.data=[{scene.folder / 'prompts.jsonl'}]"
    return scene.options(data, "evaluation.samples=1", "evaluation.max_new_tokens=2", *overrides)


EVALUATIONS: dict[str, tuple[Callable[[Scene], object], list[str], tuple[str, ...]]] = {
    "no data": (lambda s: None, ["evaluation.data=[]"], ("evaluation.data", "name at least one prompt file")),
    "data not there": (lambda s: None, ["evaluation.data=[/nowhere.jsonl]"], ("/nowhere.jsonl does not exist",)),
    "wrong column": (lambda s: None, ["data.prompt_key=question"], ("no 'question'", "it has: prompt")),
    "no tokenizer": (no_tokenizer, [], ("no tokenizer in",)),
    "weights cut": (lambda s: cut(s.student / "model.safetensors"), [], ("truncated or corrupt",)),
    "layout": (lambda s: None, ["parallel.pipeline=2"], ("multiple of 2",)),
    "unknown key": (lambda s: None, ["evaluation.n=3"], ("unknown key evaluation.n",)),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_bad_evaluation_settings_are_refused(case, scene):
    damage, overrides, words = EVALUATIONS[case]
    damage(scene)
    refuse(scene, words, "evaluate", *evaluation(scene, *overrides))


def manifest(**changes: object) -> Callable[[Scene], None]:
    return lambda scene: scene.edit("megatron/megatron_oprd.json", **changes)


BROKEN_MEGATRON: dict[str, tuple[Callable[[Scene], object], tuple[str, ...]]] = {
    "weights cut": (lambda s: cut(s.megatron / "__0_0.distcp"), ("__0_0.distcp is truncated",)),
    "weights overwritten": (lambda s: overwrite(s.megatron / "__0_0.distcp"), ("megatron cannot be read",)),
    "weights missing": (lambda s: (s.megatron / "__0_0.distcp").unlink(), ("__0_0.distcp is missing",)),
    "index missing": (lambda s: (s.megatron / ".metadata").unlink(), (".metadata is missing",)),
    "index cut": (lambda s: cut(s.megatron / ".metadata"), (".metadata is truncated or corrupt",)),
    "index overwritten": (lambda s: overwrite(s.megatron / ".metadata"), (".metadata is truncated or corrupt",)),
    "common state cut": (lambda s: cut(s.megatron / "common.pt"), ("common.pt is truncated or corrupt",)),
    "format": (lambda s: (s.megatron / "metadata.json").unlink(), ("metadata.json", "No such file")),
    "manifest missing": (lambda s: (s.megatron / "megatron_oprd.json").unlink(), ("megatron_oprd.json",)),
    "newer version": (manifest(format_version=9), ("format_version=9, not 1",)),
    "no dtype": (manifest(dtype="float99"), ("dtype='float99' must be bfloat16",)),
    "padding": (manifest(padded_vocabulary="all"), ("padded_vocabulary='all' must be a whole number",)),
    "another vocabulary": (lambda s: s.edit("megatron/config.json", vocab_size=300), ("vocabulary=259", "300")),
    "another depth": (
        lambda s: s.edit("megatron/config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ("misses decoder.layers.2",),
    ),
    "config missing": (lambda s: (s.megatron / "config.json").unlink(), ("config.json", "No such file")),
}


@pytest.mark.parametrize("case", BROKEN_MEGATRON)
def test_broken_megatron_checkpoints_are_refused(case, scene):
    damage, words = BROKEN_MEGATRON[case]
    damage(scene)
    refuse(scene, words, "megatron_to_hf.py", f"--megatron={scene.megatron}", f"--hf={scene.folder / 'out'}")


@pytest.mark.parametrize("case", ["weights cut", "weights overwritten", "index missing", "another depth"])
def test_a_broken_megatron_checkpoint_as_the_student_is_refused(case, scene):
    damage, words = BROKEN_MEGATRON[case]
    damage(scene)
    refuse(scene, words, "train", *scene.options(f"student.path={scene.megatron}"))


CONVERSIONS: dict[str, tuple[Callable[[Scene], object], list[str], tuple[str, ...]]] = {
    "no arguments": (lambda s: None, ["hf_to_megatron.py"], ("--hf or --checkpoint, and --megatron", "--help")),
    "no such folder": (lambda s: None, ["hf_to_megatron.py", "--hf=/nowhere", "--megatron={out}"], ("/nowhere",)),
    "dtype": (lambda s: None, ["hf_to_megatron.py", "--hf={student}", "--megatron={out}", "--dtype=int8"], ("int8",)),
    "tensor zero": (
        lambda s: None,
        ["hf_to_megatron.py", "--hf={student}", "--megatron={out}", "--tensor=0"],
        ("--tensor",),
    ),
    "not empty": (lambda s: None, ["hf_to_megatron.py", "--hf={student}", "--megatron={teacher}"], ("is not empty",)),
    "a file in the way": (
        lambda s: (s.folder / "out").touch(),
        ["hf_to_megatron.py", "--hf={student}", "--megatron={out}"],
        ("is not a folder",),
    ),
    "below a file": (
        lambda s: (s.folder / "out").touch(),
        ["hf_to_megatron.py", "--hf={student}", "--megatron={out}/x"],
        ("out/x", "Not a directory"),
    ),
    "weights cut": (
        lambda s: cut(s.student / "model.safetensors"),
        ["hf_to_megatron.py", "--hf={student}", "--megatron={out}"],
        ("truncated or corrupt",),
    ),
    "back, not empty": (
        lambda s: None,
        ["megatron_to_hf.py", "--megatron={megatron}", "--hf={student}"],
        ("not empty",),
    ),
    "back, no Megatron": (
        lambda s: None,
        ["megatron_to_hf.py", "--megatron={student}", "--hf={out}"],
        ("student is not a Megatron checkpoint", ".distcp"),
    ),
    "back, shard size": (
        lambda s: None,
        ["megatron_to_hf.py", "--megatron={megatron}", "--hf={out}", "--max-shard-gb=0"],
        ("--max-shard-gb must be positive",),
    ),
    "verify, no Megatron": (lambda s: None, ["verify.py", "--hf={student}", "--megatron=/nowhere"], ("/nowhere",)),
    "verify, weights cut": (
        lambda s: cut(s.megatron / "__0_0.distcp"),
        ["verify.py", "--hf={student}", "--megatron={megatron}"],
        ("__0_0.distcp is truncated",),
    ),
    "verify, other model": (
        lambda s: s.edit("student/config.json", num_hidden_layers=1, layer_types=["full_attention"]),
        ["verify.py", "--hf={student}", "--megatron={megatron}"],
        ("holds unknown",),
    ),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_bad_conversions_are_refused(case, scene):
    damage, arguments, words = CONVERSIONS[case]
    damage(scene)
    places = {name: scene.folder / name for name in ("student", "teacher", "megatron", "out")}
    refuse(scene, words, *(argument.format(**places) for argument in arguments))


@pytest.mark.parametrize("tool", ["hf_to_megatron.py", "megatron_to_hf.py"])
def test_a_full_disk_at_a_conversion_is_named(tool, scene):
    source, target = ("hf", "megatron") if tool == "hf_to_megatron.py" else ("megatron", "hf")
    folder = scene.student if source == "hf" else scene.megatron
    arguments = (f"--{source}={folder}", f"--{target}={scene.folder / 'out'}")
    refuse(scene, ("cannot write", "out.partial"), tool, *arguments, largest_file=100_000)


def shell(*command: str, timeout: int = 300) -> Outcome:
    """Run a command as a user types it, in a process group that ends with it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return Outcome(process.returncode, out, err)


def test_bad_command_lines_are_refused(scene):
    before = scene.contents()
    train = [sys.executable, "-m", "megatron_oprd.train", *scene.options("loss.representation.layer=[1]")]
    evaluate = [sys.executable, "-m", "megatron_oprd.evaluate", *evaluation(scene, "train.run_dir=/proc/run")]
    assert_refused(shell(*train), "did you mean loss.representation.layers?")
    assert_refused(shell(*evaluate), "cannot write /proc/run")
    assert scene.contents() == before


def test_under_torchrun_one_rank_prints_the_error(scene):
    (scene.folder / "replay.jsonl").write_bytes(b"{")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    outcome = shell(*torchrun, "-m", "megatron_oprd.train", *scene.options())
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "line 1: not JSON" in lines[0], outcome.stderr
    assert "/megatron_oprd/" not in outcome.stderr  # torchrun adds a traceback of its own, with none of our files
    assert not scene.run.exists()


GROUPS: dict[str, tuple[Callable[[Scene], object], list[str], int | None, tuple[str, ...]]] = {
    "read-only": (lambda s: None, ["train.run_dir=/proc/run"], None, ("cannot write /proc/run",)),
    "full disk at the start": (lambda s: None, [], 400, ("cannot write", "File too large")),
    "full disk at the curves": (lambda s: None, ["checkpoint.every=0", "train.steps=3"], 4_000, ("cannot write",)),
    "full disk at a checkpoint": (lambda s: None, [], 60_000, ("cannot write", "step_0000001")),
    "full disk at the export": (lambda s: None, ["checkpoint.every=0"], 100_000, ("cannot write", "hf.new")),
    "resumed with other layers": (
        lambda s: None,
        ["train.run_dir={finished}", "loss.representation.layers=[1]"],
        None,
        ("asks for [1-1]",),
    ),
    "optimizer overwritten": (
        lambda s: overwrite(next((step_one(s) / "optimizer").glob("*.distcp"))),
        ["train.run_dir={finished}", "train.steps=2"],
        None,
        ("step_0000001/optimizer", "cannot be read"),
    ),
    "student overwritten": (
        lambda s: overwrite(s.megatron / "__0_0.distcp"),
        ["student.path={megatron}"],
        None,
        ("megatron cannot be read",),
    ),
}


@pytest.mark.parametrize("layout", ["tensor", "data"])
@pytest.mark.parametrize("case", GROUPS)
def test_every_rank_ends_and_the_first_prints_why(case, layout, scene):
    """A mistake on one rank (writing is the work of rank 0) neither hangs the other rank nor gives it a traceback."""
    damage, overrides, largest_file, words = GROUPS[case]
    damage(scene)
    overrides = [override.format(finished=scene.finished, megatron=scene.megatron) for override in overrides]
    overrides += [] if layout == "data" else [f"parallel.{layout}=2"]
    first, second = run_ranks(2, scene.folder, "train", *scene.options(*overrides), largest_file=largest_file)
    assert_refused(first, *words)
    assert (second.code, second.stderr) == (2, "")
    assert not list(scene.folder.rglob("*.partial")) and not list(scene.folder.rglob("*.tmp"))


def test_every_rank_of_an_evaluation_ends(scene):
    first, second = run_ranks(2, scene.folder, "evaluate", *evaluation(scene, "train.run_dir=/proc/run"))
    assert_refused(first, "cannot write /proc/run")
    assert (second.code, second.stderr) == (2, "")
