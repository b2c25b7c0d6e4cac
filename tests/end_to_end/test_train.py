"""The commands train and evaluate: the files of a run folder and their contents."""

import importlib.metadata
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oprd.commands.status import status_lines
from megatron_oprd.config import load_config
from megatron_oprd.data.prompts import load_prompts
from megatron_oprd.evaluation.sampling import sample_and_grade
from megatron_oprd.evaluation.scores import score_by_source
from megatron_oprd.runtime.readable import significant
from megatron_oprd.types import Prompt, Rollout
from tests.helpers.killable import finish
from tests.helpers.runs import HINTED, complete_steps, in_folder, metrics, prompt_run, read_lines

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a training with generated rollouts; return its arguments, its folder and its output."""
    folder = tmp_path_factory.mktemp("train")
    settings = ("evaluation.every=2", "evaluation.teacher_answers=true")
    arguments = prompt_run(folder, STEPS, *settings, num_hidden_layers=2)
    return arguments, folder / "run", finish([*arguments, "--profile-start"], folder / "log")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_run_folder_records_configuration_environment_and_plan(run):
    arguments, run_dir, log = run
    assert load_config(run_dir / "config.yaml", []) == load_config(None, arguments)
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    plan = json.loads((run_dir / "plan.json").read_text())
    assert [(pair["student"], pair["teacher"]) for pair in plan["pairs"]] == [(1, 1), (2, 2)]
    answers = "2 answers of the student to each prompt and the teacher's answers, up to 6 new tokens"
    assert f"evaluation every 2 steps: {answers}; 5 rows: 5 kept" in log
    assert log.splitlines()[-1] == f"report: {run_dir / 'report.html'}"


def test_the_profile_of_the_start_has_every_phase_and_is_printed_after_the_first_step(run):
    _, run_dir, log = run
    phases = {one["phase"] for one in json.loads((run_dir / "start.json").read_text())["phases"]}
    assert phases >= {"tokenizers and prompts", "process groups", "build modules", "read weights", "optimizer"}
    assert phases >= {"evaluation", "rollout", "teacher", "student", "log"}
    first, total, second = (log.index(text) for text in (f"1/{STEPS} ", "end of the first step ", f"2/{STEPS} "))
    assert first < total < second


def test_every_step_logs_every_metric(run):
    _, run_dir, _ = run
    rows = read_lines(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    wanted = {"loss", "grad_norm", "lr", "memory/peak_bytes", "rep/num_tokens"}
    wanted |= {f"rep/{name}{of}" for name in ("mse", "cosine", "student_norm") for of in ("", "/layer_1", "/layer_2")}
    wanted |= {f"rollout/{name}" for name in ("length_mean", "length_max", "truncated_fraction", "empty_count")}
    wanted |= {f"time/{part}" for part in ("rollout", "teacher", "student", "step")}
    for row in rows:
        assert wanted <= row.keys(), wanted - row.keys()
        assert all(isinstance(row[name], (int, float)) and row[name] == row[name] for name in wanted)
        assert row["time/rollout"] + row["time/teacher"] + row["time/student"] <= row["time/step"]
        assert row["rep/num_tokens"] == 4 * row["rollout/length_mean"]
    assert rows[-1]["lr"] < rows[0]["lr"] == 1e-3


def test_the_run_folder_contains_rollouts_evaluations_curves_and_checkpoints(run):
    _, run_dir, _ = run
    assert complete_steps(run_dir) == [2, 4]
    for step in range(1, STEPS + 1):
        rollouts = read_lines(run_dir / "rollouts" / f"step_{step:07d}.jsonl")
        assert len(rollouts) == 4
        assert all(rollout["prompt"].startswith("<|im_start|>user") for rollout in rollouts)
    evaluations = read_lines(run_dir / "evaluations.jsonl")
    assert [(row["step"], row["name"]) for row in evaluations] == [(0, "before"), (2, "step 2"), (4, "after")]
    assert all(list(row["data"]) == ["sums/0", "sums/1", "all"] for row in evaluations)
    assert len(read_lines(run_dir / "evaluations" / "step_0000002.jsonl")) == 5 * 2
    assert any((run_dir / "tensorboard").iterdir())
    assert "<html" in (run_dir / "report.html").read_text()
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".tmp", ".partial", ".new")]


def measure(student, teacher, answers):
    """Return the metrics of stored answers over all their tokens, from two models of transformers in float64."""
    sums, tokens = Counter(), 0
    for answer in answers:
        prompts = [answer["prompt_ids"], answer.get("teacher_prompt_ids", answer["prompt_ids"])]
        inputs = [torch.tensor([[*prompt, *answer["response_ids"]]]) for prompt in prompts]
        with torch.no_grad():
            outputs = [
                model(ids, output_hidden_states=True) for model, ids in zip((student, teacher), inputs, strict=True)
            ]
        count = len(answer["response_ids"])
        log_p, log_q = (output.logits[0, -count - 1 : -1].log_softmax(-1) for output in outputs)
        chosen = range(len(log_p)), answer["response_ids"]
        sums["perplexity"] -= log_p[chosen].sum().item()
        sums["teacher_perplexity"] -= log_q[chosen].sum().item()
        sums["forward_kl"] += (log_q.exp() * (log_q - log_p)).sum().item()
        sums["reverse_kl"] += (log_p.exp() * (log_p - log_q)).sum().item()
        sums["argmax_agreement"] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        for layer in (1, 2):
            states = (output.hidden_states[layer][0, -count:] for output in outputs)
            sums[f"cosine/layer_{layer}"] += torch.nn.functional.cosine_similarity(*states, dim=-1).sum().item()
        tokens += len(log_p)
    means = {name: total / tokens for name, total in sums.items()}
    return {name: math.exp(value) if "perplexity" in name else value for name, value in means.items()}


def test_the_student_is_measured_on_the_teachers_answers_before_during_and_after(run):
    arguments, run_dir, _ = run
    config = load_config(None, arguments)
    paths = (config.student.path, run_dir / "hf", config.teacher.path)
    before, after, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths)
    (path,) = (run_dir / "teacher_answers").glob("*.jsonl")
    answers, evaluations = read_lines(path), read_lines(run_dir / "evaluations.jsonl")
    assert len(answers) == 5
    for student, evaluation in ((before, evaluations[0]), (after, evaluations[-1])):
        for source, found in evaluation["data"].items():
            own = [answer for answer in answers if source in ("all", answer["data_source"])]
            expected = measure(student, teacher, own)
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert found["cosine"] == pytest.approx((found["cosine/layer_1"] + found["cosine/layer_2"]) / 2)
    for row in metrics(run_dir):
        logged = {name: value for name, value in row.items() if name.startswith("evaluation/")}
        measured = [one["data"]["all"] for one in evaluations if one["step"] == row["step"]]
        assert bool(logged) == bool(measured)
        assert all(value == measured[0][name.removeprefix("evaluation/")] for name, value in logged.items())


def test_each_teacher_answers_for_itself_and_once(run, tmp_path):
    arguments, _, _ = run
    prompts = read_lines(Path(load_config(None, arguments).evaluation.data[0]))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in prompts))
    student, teacher = (getattr(load_config(None, arguments), model).path for model in ("student", "teacher"))
    shared = ["evaluation.temperature=0", "evaluation.samples=0", "train.steps=0", "evaluation.teacher_answers=auto"]
    shared += [f"evaluation.data={tmp_path / 'prompts.jsonl'}", f"evaluation.answers_dir={tmp_path / 'answers'}"]
    known: set[Path] = set()
    for number, path in enumerate((teacher, student, teacher)):
        run_dir = tmp_path / f"run_{number}"
        log = finish([*in_folder(arguments, run_dir), *shared, f"teacher.path={path}"], tmp_path / "log")
        new = set((tmp_path / "answers").glob("*.jsonl")) - known
        assert len(new) == (number < 2) and ("read from" in log) == (number == 2)
        assert "prompts: not graded, perplexity " in log
        assert "unanswered" not in log
        known |= new
        for answers in map(read_lines, new):
            tokenizer, model = (cls.from_pretrained(path) for cls in (AutoTokenizer, AutoModelForCausalLM))
            model.generation_config.eos_token_id = tokenizer.eos_token_id
            prompts_of_teacher = [Prompt(index, tuple(answer["prompt_ids"])) for index, answer in enumerate(answers)]
            expected = greedy(model, tokenizer, 6)(prompts_of_teacher, 0)
            assert [tuple(answer["response_ids"]) for answer in answers] == [one.response_ids for one in expected]


def test_a_teacher_with_prompts_of_its_own_answers_these(run, tmp_path):
    arguments, _, _ = run
    run_dir, config = tmp_path / "run", load_config(None, arguments)
    settings = ["train.steps=0", "evaluation.temperature=0", "evaluation.samples=0"]
    settings += [f"data.teacher_prompt_key={HINTED}"]
    finish([*in_folder(arguments, run_dir), *settings], tmp_path / "log")
    (path,) = (run_dir / "teacher_answers").glob("*.jsonl")
    answers, (evaluation,) = read_lines(path), read_lines(run_dir / "evaluations.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(config.teacher.path)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(getattr(config, model).path, dtype=torch.float64)
        for model in ("student", "teacher")
    )
    teacher.generation_config.eos_token_id = tokenizer.eos_token_id
    own = [Prompt(index, tuple(answer["teacher_prompt_ids"])) for index, answer in enumerate(answers)]
    assert all(tokenizer.decode(prompt.prompt_ids).startswith("<|im_start|>user\nIt is") for prompt in own)
    expected = greedy(teacher, tokenizer, 6)(own, 0)
    assert [tuple(answer["response_ids"]) for answer in answers] == [one.response_ids for one in expected]
    measured = measure(student, teacher, answers)
    found = evaluation["data"]["all"]
    assert {name: found[name] for name in measured} == pytest.approx(measured, rel=1e-5, abs=1e-6)


def test_transformers_loads_the_export_and_all_trained_weights_have_changed(run):
    arguments, run_dir, _ = run
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    assert tokenizer.decode(tokenizer("1+2=")["input_ids"]) == "1+2="
    student = load_config(None, arguments).student.path
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (student, run_dir / "hf"))
    # No hidden state depends on the untied LM head; all other weights have changed.
    assert {name for name, tensor in before.items() if torch.equal(tensor, after[name])} == {"lm_head.weight"}


def test_running_a_finished_run_again_changes_no_file(run):
    arguments, run_dir, _ = run
    changing = ("tensorboard", "environment.json")
    before = {path: data for path, data in contents(run_dir).items() if not any(name in str(path) for name in changing)}
    log = finish(arguments, run_dir.parent / "again.log")
    assert "tok/s" not in log and "continuing from" in log
    after = {path: data for path, data in contents(run_dir).items() if not any(name in str(path) for name in changing)}
    assert after.keys() == before.keys()
    assert [path for path in before if after[path] != before[path]] == []


def test_a_student_can_start_from_a_training_checkpoint(run, tmp_path):
    arguments, run_dir, _ = run
    checkpoint = run_dir / "checkpoints" / "step_0000004" / "model"
    settings = [f"student.path={checkpoint}", "train.steps=1", "evaluation.every=1"]
    finish([*in_folder(arguments, tmp_path / "next"), *settings], tmp_path / "log")
    (first, _), (*_, last) = (
        read_lines(tmp_path / "next" / "evaluations.jsonl"),
        read_lines(run_dir / "evaluations.jsonl"),
    )
    assert first["data"] == last["data"]
    # A new run begins at the maximum of the cosine schedule.
    assert metrics(tmp_path / "next")[0]["lr"] == 1e-3
    AutoTokenizer.from_pretrained(tmp_path / "next" / "hf")


def greedy(model, tokenizer, length):
    """Return a function that generates greedy answers with transformers, one prompt at a time."""

    def generate(prompts, step):
        rollouts = []
        for prompt in prompts:
            ids = torch.tensor([prompt.prompt_ids])
            out = model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            answer = tuple(out[0, ids.shape[1] :].tolist())
            reason = "eos" if answer[-1] == tokenizer.eos_token_id else "length"
            rollouts.append(Rollout(prompt.prompt_ids, answer, (1,) * len(answer), reason, prompt_index=prompt.index))
        return rollouts

    return generate


def test_evaluate_samples_and_grades_the_same_answers_as_transformers(run, tmp_path):
    arguments, run_dir, _ = run
    settings = ["evaluation.temperature=0", "evaluation.samples=1", "evaluation.teacher_answers=false"]
    settings += [f"student.path={run_dir / 'hf'}"]
    arguments = [*in_folder(arguments, tmp_path / "run"), *settings]
    finish(arguments, tmp_path / "log", module="evaluate")
    config = load_config(None, arguments)
    tokenizer, model = (cls.from_pretrained(run_dir / "hf") for cls in (AutoTokenizer, AutoModelForCausalLM))
    prompts = load_prompts(config.evaluation.data, tokenizer, config.data).prompts
    samples = sample_and_grade(greedy(model, tokenizer, 6), prompts, tokenizer, step=0)
    scores = json.loads((tmp_path / "run" / "evaluation" / "scores.json").read_text())
    assert scores["data"] == score_by_source(samples, 1)
    written = read_lines(tmp_path / "run" / "evaluation" / "samples.jsonl")
    assert [row["response"] for row in written] == [sample.response_text for sample in samples]
    assert [row["correct"] for row in written] == [sample.correct for sample in samples]


def test_evaluate_needs_no_more_than_a_model_and_prompts(run, tmp_path, monkeypatch):
    arguments, run_dir, _ = run
    config, settings = load_config(None, arguments), ["evaluation.samples=1", "evaluation.max_new_tokens=6"]
    prompts = [{key: row[key] for key in ("prompt", "data_source")} for row in read_lines(Path(config.data.prompts[0]))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    data, scores = f"evaluation.data={tmp_path / 'prompts.jsonl'}", tmp_path / "evaluation" / "scores.json"
    monkeypatch.chdir(tmp_path)
    log = finish([str(run_dir / "hf"), data, *settings], tmp_path / "log", module="evaluate")
    assert "right answers" in log and "not graded" in log and "unanswered" not in log
    assert json.loads(scores.read_text())["data"]["all"].keys() == {"mean_length", "truncated"}
    # With a teacher: the same answers and the same numbers as at the end of training.
    teacher = [f"teacher.path={config.teacher.path}", "evaluation.samples=0", "batch.max_tokens_per_micro_batch=96"]
    finish([data, *settings, *teacher, str(run_dir / "hf")], tmp_path / "log", module="evaluate")
    names = [path.name for folder in (tmp_path, run_dir) for path in (folder / "teacher_answers").glob("*.jsonl")]
    assert names[0] == names[1]
    found, last = json.loads(scores.read_text())["data"], read_lines(run_dir / "evaluations.jsonl")[-1]["data"]
    assert list(found) == ["sums/0", "sums/1", "all"]
    for source, metrics_of_source in found.items():
        assert metrics_of_source == {name: last[source][name] for name in metrics_of_source}
        assert {"perplexity", "forward_kl", "cosine/layer_2"} <= metrics_of_source.keys()


def test_the_best_checkpoint_is_kept_and_exported_and_a_run_that_no_longer_improves_ends(run, tmp_path):
    arguments, _, _ = run
    run_dir, teacher = tmp_path / "run", load_config(None, arguments).teacher.path
    # At this learning rate the student soon gets worse.
    settings = ["optimizer.lr=0.02", "optimizer.schedule=constant", "train.steps=30", "checkpoint.every=7"]
    settings += ["evaluation.every=1", "evaluation.samples=0", "evaluation.best=perplexity", "evaluation.patience=3"]
    arguments = [*in_folder(arguments, run_dir), *settings, "checkpoint.keep=1"]
    log = finish(arguments, tmp_path / "log")
    values = {row["step"]: row["data"]["all"]["perplexity"] for row in read_lines(run_dir / "evaluations.jsonl")}
    best = min(list(values)[1:], key=values.get)
    assert best + 3 == list(values)[-1] < 30
    assert complete_steps(run_dir) == [best, best + 3]
    assert log.splitlines()[-1].startswith(f"stopped early: 3 evaluations in a row were not better than step {best} (")
    (path,) = (run_dir / "teacher_answers").glob("*.jsonl")
    names = (run_dir / "hf_best", run_dir / "hf", teacher)
    exported, last, teacher = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64) for name in names)
    for model, step in ((exported, best), (last, best + 3)):
        assert measure(model, teacher, read_lines(path))["perplexity"] == pytest.approx(values[step], rel=1e-5)
    status = "\n".join(status_lines(run_dir))
    assert "finished: stopped early by evaluation.patience" in status
    assert f"perplexity {significant(values[best])} at step {best}, checkpoints/step_{best:07d}; 3 evalua" in status
    page = (run_dir / "report.html").read_text()
    assert f"finished: {best + 3} steps of 30" in page and "stopped early by evaluation.patience" in page
    # The same command does not train on; with more patience it does.
    assert "tok/s" not in finish(arguments, tmp_path / "again.log")
    finish([*arguments, "evaluation.patience=4"], tmp_path / "log")
    assert read_lines(run_dir / "evaluations.jsonl")[-1]["step"] > best + 3
