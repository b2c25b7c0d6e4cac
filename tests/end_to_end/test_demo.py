"""The demo reaches what its README says, and what it exports is an ordinary Hugging Face model."""

import json

import pytest
import torch
import transformers

from tests.end_to_end.conftest import read_demo, run_demo


def test_the_student_goes_from_half_to_almost_all(demo):
    before, after, teacher = (demo.accuracies[name] for name in ("student before", "student after", "teacher"))
    assert 40 <= before[0] <= 60
    assert after[0] >= 95 and after[1] >= 85
    assert teacher[0] >= 99
    assert demo.output.splitlines()[-1] == f"report: {demo.folder / 'report.html'}"
    assert (demo.folder / "report.html").stat().st_size > 1000


def test_the_exported_student_is_as_good_in_plain_transformers(demo):
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.folder / "hf", padding_side="left")
    rows = [json.loads(line) for line in (demo.folder / "pair" / "heldout.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(a.strip() == row["reward_model"]["ground_truth"] for a, row in zip(answers, rows, strict=True))
    assert abs(100 * right / len(rows) - demo.accuracies["student after"][0]) <= 0.2


@pytest.mark.nightly
def test_with_hybrid_models_the_student_recovers_most_of_the_teachers_lead(tmp_path):
    accuracies = read_demo(tmp_path, run_demo(tmp_path / "run", "demo=hybrid")).accuracies
    before, after, teacher = (accuracies[name][0] for name in ("student before", "student after", "teacher"))
    assert after - before >= 0.95 * (teacher - before)
