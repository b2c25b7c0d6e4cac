"""Bad arguments of `megatron-oprd prune` are refused in one line, and good ones choose blocks and pairs."""

import pytest

from megatron_oprd.commands.dropped_blocks import lowest_blocks
from megatron_oprd.config import load_config
from megatron_oprd.models.layer_pairs import pairs_of_kept_blocks
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError
from tests.helpers.commands import run_until_start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model of five blocks, a file of rollouts, and other files."""
    folder = tmp_path_factory.mktemp("prune")
    save(random_hf_model("Qwen2"), folder / "model")
    (folder / "rollouts.jsonl").write_text('{"prompt_ids": [1], "response_ids": [2, 3]}\n')
    (folder / "empty.jsonl").write_text('{"prompt_ids": [1], "response_ids": []}\n')
    (folder / "pairs.yaml").write_text("pairs:\n- [1, 1]\n- [2, 3]\n")
    (folder / "none.yaml").write_text("teacher: model\n")
    (folder / "broken.yaml").write_text("pairs: [[1, 2\n")
    return folder


ROLLOUTS = ("--rollouts", "{}/rollouts.jsonl")
REFUSED = {
    ("--drop", "2"): "--prompts FILE is required to score the blocks",
    ROLLOUTS: "one of the arguments --drop --layers --share --blocks is required",
    ("--drop", "1", "--share", "0.5", *ROLLOUTS): "--share: not allowed with argument --drop",
    ("--drop", "1", "--prompts", "x.jsonl", *ROLLOUTS): "--prompts and --rollouts: name one of them",
    ("--drop", "4", *ROLLOUTS): "--drop 4 drops 4 of 5 blocks; between 0 and 3 can be dropped",
    ("--drop", "-1", *ROLLOUTS): "--drop -1 drops -1 of 5 blocks",
    ("--layers", "0", *ROLLOUTS): "--layers 0 drops 5 of 5 blocks",
    ("--layers", "7", *ROLLOUTS): "--layers 7 drops -2 of 5 blocks",
    ("--share", "1", *ROLLOUTS): "--share 1 must be at least 0 and below 1",
    ("--drop", "2", "--keep-first", "4", *ROLLOUTS): "between 0 and 0 can be dropped with --keep-first 4",
    ("--drop", "2", "--keep-last", "-1", *ROLLOUTS): "--keep-last -1 must not be negative",
    ("--blocks", "2,x"): "--blocks 2,x must be whole numbers with commas",
    ("--blocks", "2,2"): "--blocks 2,2 names a block twice",
    ("--blocks", "2,6"): "block 6 does not exist; blocks go from 1 to 5",
    ("--blocks", "1,2,3,4,5"): "leaves no block",
    ("--drop", "2", "--rollouts", "{}/empty.jsonl"): "has no response tokens to score on",
    ("--drop", "2", "--rollouts", "{}/absent.jsonl"): "absent.jsonl: No such file",
    ("--drop", "2", "--prompts", "{}/rollouts.jsonl"): "no tokenizer in",
    ("--drop", "2", "--model", "{}/absent", *ROLLOUTS): "absent is not a folder with a Hugging Face model",
    ("--drop", "2", "--to", "{}/model", *ROLLOUTS): "model exists and is not empty",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_bad_arguments_are_refused_in_one_line(arguments, folder):
    given = [argument.replace("{}", str(folder)) for argument in arguments]
    paths = ["--model", str(folder / "model"), "--to", str(folder / "new")]
    outcome = run_until_start("commands.prune", *paths, *given)
    assert outcome is not None and outcome.code == 2
    assert REFUSED[arguments] in outcome.stderr and outcome.stderr.count("\n") == 1
    assert not list(folder.glob("new*"))


def test_the_lowest_scores_are_dropped_but_not_at_the_ends():
    scores = [0.0, 0.5, 0.1, 0.3, 0.2, 0.0]
    assert lowest_blocks(scores, 2, keep_first=1, keep_last=1) == [3, 5]
    assert lowest_blocks(scores, 2, keep_first=3, keep_last=1) == [4, 5]
    assert lowest_blocks(scores, 3, keep_first=0, keep_last=0) == [1, 3, 6]
    assert lowest_blocks(scores, 0, keep_first=0, keep_last=0) == []


def test_pairs_follow_the_blocks_that_were_kept():
    assert pairs_of_kept_blocks([1, 2, 5, 7], 7, "output") == [(1, 1), (2, 2), (3, 5), (4, 7)]
    assert pairs_of_kept_blocks([1, 2, 5, 7], 7, "next_input") == [(1, 1), (2, 4), (3, 6), (4, 7)]


@pytest.mark.parametrize("kind", ["output", "next_input"])
def test_the_last_layers_of_both_models_are_a_pair_also_if_the_last_block_is_dropped(kind):
    assert pairs_of_kept_blocks([2, 3], 4, kind)[-1] == (2, 4)


def load_pairs(value):
    keys = ["student.path=a", "teacher.path=b", "data.prompts=[c]", "train.run_dir=d"]
    return load_config(None, [*keys, f"loss.representation.pairs={value}"]).loss.representation.pairs


def test_pairs_may_be_a_file(folder):
    assert load_pairs(folder / "pairs.yaml") == [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.yaml", "No such file"),
        ("none.yaml", "must have `pairs`"),
        ("broken.yaml", "the file is not YAML"),
        ("model", "Is a directory"),
    ],
)
def test_a_file_without_pairs_is_refused(name, message, folder):
    with pytest.raises(UserError, match=f"loss.representation.pairs='{folder / name}': .*{message}"):
        load_pairs(folder / name)
