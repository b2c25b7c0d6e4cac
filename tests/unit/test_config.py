"""The configuration is strict: every mistake is one line that names the key and what would work."""

import pytest
import yaml

from megatron_oprd.config import dump_config, load_config, parse_config
from megatron_oprd.types import UserError

REQUIRED = ["student.path=s", "teacher.path=t", "train.run_dir=r", "data.prompts=[p.jsonl]"]


def test_a_dumped_configuration_reads_back_equal():
    config = load_config(None, [*REQUIRED, "loss.representation.pairs=[[1,2],[3,4]]", "optimizer.betas=[0.8,0.9]"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert config.loss.representation.pairs == [(1, 2), (3, 4)]


def test_the_last_override_wins_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("student: {path: a}\nteacher: {path: b}\ntrain: {run_dir: r, steps: 3}\ndata: {prompts: [p]}\n")
    assert load_config(path, ["train.steps=5", "train.steps=7"]).train.steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensr=2", "did you mean parallel.tensor?"),
        ("paralel.tensor=2", "did you mean parallel?"),
        ("parallel.tensor=two", "parallel.tensor='two'"),
        ("parallel.tensor=0", "parallel.tensor=0"),
        ("optimizer.lr=-1", "optimizer.lr=-1"),
        ("optimizer.name=adam", "'adamw' or 'sgd'"),
        ("rollout.engine=replay", "rollout.path"),
        ("data.prompts=[]", "data.prompts"),
        ("loss.representation.shift=3", "loss.representation.shift=3"),
        ("precision.fp8=hybrid", "precision.fp8"),
        ("train", "key=value"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key(override, message):
    with pytest.raises(UserError) as caught:
        load_config(None, [*REQUIRED, override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- 1", b"student: {path: ${nowhere}}"])
def test_a_broken_file_is_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path, [])
    assert "c.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml", [])
