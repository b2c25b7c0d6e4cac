"""A name of the Hugging Face hub in place of a folder: every command says how to download the model."""

import pytest

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError
from tests.helpers.commands import run_until_start
from tests.helpers.scene import assert_refused
from tests.helpers.tokenizer import byte_tokenizer

NAME = "Qwen/Qwen3-0.6B"
RUN = ["train.run_dir={}/run", "data.prompts=[{}/p.jsonl]", "evaluation.data=[{}/p.jsonl]", "precision.dtype=fp32"]
STUDENT, TEACHER = [f"student.path={NAME}", "teacher.path={}/model"], ["student.path={}/model", f"teacher.path={NAME}"]
COMMANDS = {
    "train": ("train", *STUDENT, *RUN),
    "train, teacher": ("train", *TEACHER, *RUN),
    "plan": ("train", "--dry-run", *STUDENT, *RUN),
    "evaluate": ("evaluate", NAME, *RUN),
    "bridge fit": ("bridge.fit", *STUDENT, *RUN),
    "bridge fit, teacher": ("bridge.fit", *TEACHER, *RUN),
    "fp8-error": ("fp8_error", *STUDENT, *RUN, "precision.teacher_fp8=weights", "precision.dtype=bf16"),
    "prune": ("commands.prune", "--model", NAME, "--to", "{}/to", "--prompts", "{}/p.jsonl", "--drop", "1"),
    "convert": ("hf_to_megatron.py", "--hf", NAME, "--megatron", "{}/to"),
    "verify": ("verify.py", "--hf", NAME, "--megatron", "{}/model"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_how_to_download_a_model_of_the_hub(name, tmp_path):
    model = save(random_hf_model("Qwen3", num_hidden_layers=1, vocab_size=259), tmp_path / "model")
    byte_tokenizer().save_pretrained(model)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    outcome = run_until_start(*(argument.replace("{}", str(tmp_path)) for argument in COMMANDS[name]))
    assert_refused(outcome)
    assert f"error: {NAME} is not a folder" in outcome.stderr
    assert f"`hf download {NAME} --local-dir models/Qwen3-0.6B` and use models/Qwen3-0.6B" in outcome.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "to").exists()


@pytest.mark.parametrize("path", ["models/student", "models/absent", "./a/b", "a/b/c", "student", "/a/b"])
def test_other_missing_folders_are_not_taken_for_names_of_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path == "models/student":
        (tmp_path / "models").mkdir()
    if path == "./a/b":
        (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"is not a folder with a .* model; name one with a config\.json"):
        read_model_spec(path)
