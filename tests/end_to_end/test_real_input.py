"""The genuine Qwen tokenizer and vocabulary, real prompts, the real command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.tokenizer import SHARED, qwen_tokenizer

ROOT = Path(__file__).parents[2]
PROMPTS = SHARED / "data" / "dapo-math-17k-boxed.parquet"


@pytest.mark.skipif(not PROMPTS.exists(), reason=f"no {PROMPTS.name} beside the repository")
def test_real_prompts_and_vocabulary_train_with_time_and_memory_in_the_metrics(tmp_path):
    tokenizer = qwen_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        model = random_hf_model(
            "Qwen3",
            seed,
            vocab_size=151936,
            num_hidden_layers=2,
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=4096,
        )
        tokenizer.save_pretrained(save(model, tmp_path / name))
    settings = [
        f"student.path={tmp_path / 'student'}",
        f"teacher.path={tmp_path / 'teacher'}",
        f"data.prompts=[{PROMPTS}]",
        "rollout.prompts_per_step=8",
        "rollout.samples_per_prompt=1",
        "rollout.max_new_tokens=64",
        "train.steps=2",
        f"train.run_dir={tmp_path / 'run'}",
        "checkpoint.every=0",
        "checkpoint.export_hf=false",
    ]
    command = [sys.executable, "-m", "megatron_oprd.train", *settings]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert all(step[f"time/{part}"] > 0 for part in ("rollout", "teacher", "student", "step"))
        assert step["memory/peak_bytes"] > 2**20
        assert 0 < step["rollout/length_max"] <= 64
    texts = [json.loads(line) for line in next((tmp_path / "run" / "rollouts").iterdir()).read_text().splitlines()]
    assert all(text["prompt"].startswith("<|im_start|>user\n") for text in texts)
    assert all(text["prompt"].count("\\boxed") >= 1 for text in texts)
