"""The limit of each step's responses, what refuses it, and which rollouts count as cut by it."""

import dataclasses

import pytest

from megatron_oprd.bridge.fitting.setup import fitting_config
from megatron_oprd.config import Config, load_config
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.lengths import check_lengths, check_rotary_factors
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.rollout.engine import FinishedRollouts
from megatron_oprd.rollout.horizon import HorizonEngine, horizon_metrics, longest_response, response_limit
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import Prompt, Rollout, UserError

FIRST_STATES = ("loss.representation.positions=first_k", "loss.representation.k=30")
FULL_KL = "loss.output.objective=full_kl"
FIRST_OUTPUTS = ("loss.output.positions=first_k", "loss.output.positions_k=40")


def config(*settings) -> Config:
    base = ("student.path=s", "teacher.path=t", "data.prompts=[p]", "train.run_dir=r", "rollout.max_new_tokens=100")
    return load_config(None, [*base, *settings])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), [100] * 7),
        (("rollout.horizon={start: 20, grow: 30, every: 2}",), [20, 20, 50, 50, 80, 80, 100]),
        (("rollout.horizon={start: 150, grow: 1, every: 1}",), [100] * 7),
        (("rollout.horizon={start: 20, grow: 0, every: 1}",), [20] * 7),
        (("rollout.horizon=auto", *FIRST_STATES), [30] * 7),
        (("rollout.horizon=auto", *FIRST_STATES, FULL_KL, *FIRST_OUTPUTS), [40] * 7),
        (("rollout.horizon=auto", "loss.representation.weight=0", FULL_KL, *FIRST_OUTPUTS), [40] * 7),
        (("rollout.horizon=auto", "loss.representation.positions=first_k"), [100] * 7),  # k is 2000
    ],
)
def test_the_limit_of_a_step_depends_on_the_configuration_alone(settings, expected):
    settings = config(*settings, "train.steps=7")
    assert [response_limit(settings, step) for step in range(7)] == expected
    assert longest_response(settings) == max(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("rollout.horizon=auto",), r"because loss\.representation\.positions=last_k compares"),
        (("rollout.horizon=auto", *FIRST_STATES, FULL_KL), r"because loss\.output\.positions=all compares"),
        (
            ("rollout.horizon=auto", FULL_KL),
            r"positions=last_k and loss\.output\.positions=all compares its last token; use first_k for every loss",
        ),
        (("rollout.horizon={start: 5, grow: 1}",), r"^rollout\.horizon\.every is required$"),
        (("rollout.horizon=7",), r"rollout\.horizon=7: Input should be 'auto' or a section with start, grow, every"),
        (("rollout.horizon=auto", *FIRST_STATES, "rollout.engine=replay", "rollout.path=f"), "has stored responses"),
    ],
)
def test_an_impossible_horizon_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        config(*settings)


def test_a_fit_has_no_growing_horizon():
    """The steps of a fit are not those of the training that follows."""
    assert fitting_config(config("rollout.horizon={start: 5, grow: 1, every: 1}")).rollout.horizon is None
    assert fitting_config(config("rollout.horizon=auto", *FIRST_STATES)).rollout.horizon == "auto"


class RecordingEngine:
    """Returns one finished rollout for each prompt, as long as its limit and ended by it, and records the limits."""

    def __init__(self):
        self.calls = []

    def submit(self, prompts, step, limits=None):
        return FinishedRollouts(self.generate(prompts, step, limits))

    def generate(self, prompts, step, limits=None):
        self.calls.append((step, limits))
        lengths = [min(limit, 12 - len(p.prompt_ids)) for p, limit in zip(prompts, limits, strict=True)]
        return [Rollout(p.prompt_ids, (1,) * n, (1,) * n, "length") for p, n in zip(prompts, lengths, strict=True)]


def test_a_rollout_is_cut_by_the_horizon_only_if_nothing_else_ends_it():
    """Prompts of 2, 4, 5 and 11 tokens leave 10, 8, 7 and 1 of the student's 12 positions."""
    engine = RecordingEngine()
    horizon = HorizonEngine(engine, lambda step: 4 + step, max_new_tokens=9, positions=12)
    prompts = [Prompt(number, (7,) * length) for number, length in enumerate((2, 4, 5, 11))]
    for step, reasons in {
        0: ["horizon", "horizon", "horizon", "length"],
        3: ["horizon", "horizon", "length", "length"],
        4: ["horizon", "length", "length", "length"],
        5: ["length"] * 4,
    }.items():
        rollouts = horizon.submit(prompts, step).result()
        assert [rollout.finish_reason for rollout in rollouts] == reasons
        assert horizon.generate(prompts, step) == rollouts
        assert engine.calls[-2:] == [(step, [4 + step] * 4)] * 2
    horizon.generate(prompts, 0, [1, 2, 8, 4])
    assert engine.calls[-1] == (0, [1, 2, 4, 4])


def test_a_response_that_ends_with_eos_at_the_horizon_is_not_cut():
    horizon = HorizonEngine(RecordingEngine(), lambda step: 3, max_new_tokens=9, positions=12)
    ended = Rollout((5,), (1, 1, 2), (1, 1, 1), "eos")
    assert horizon.mark([ended], 0) == [ended]


def test_metrics_count_cut_rollouts():
    rollouts = [Rollout((5,), (1,), (1,), reason) for reason in ("eos", "length", "horizon", "eos")]
    assert horizon_metrics(config(), 3, rollouts) == {}
    growing = config("rollout.horizon={start: 5, grow: 2, every: 3}")
    assert horizon_metrics(growing, 3, rollouts) == {"rollout/horizon": 7, "rollout/horizon_fraction": 0.25}


def planned(spec, config):
    return {"": PlannedTeacher(config.teacher, spec, None, None)}


def test_a_horizon_that_changes_longrope_is_refused(tmp_path):
    """The factors change above 10 positions, for the student or for the teacher with its longer prompt."""
    plain = read_model_spec(save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path / "plain"))
    long = read_model_spec(save(random_hf_model("Phi3", num_hidden_layers=1), tmp_path / "long"))
    settings = config("rollout.horizon=auto", "loss.representation.positions=first_k", "loss.representation.k=4")

    def check(student, teacher, *lengths, most=7):
        limited = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"max_new_tokens": most})})
        prompts = [Prompt(0, (1,) * lengths[0], teacher_prompt_ids=(1,) * lengths[-1])]
        check_rotary_factors(limited, student, planned(teacher, limited), prompts)

    check(plain, plain, 5)
    check(long, long, 3)  # 7 with the horizon and 10 without: short factors
    check(long, long, 7)  # 11 and 14: long factors
    check(long, long, 5, most=4)  # the horizon cuts nothing
    check(long, plain, 3, 5)
    for models, lengths in (((long, plain), (4, 1)), ((long, plain), (6, 6)), ((plain, long), (1, 5))):
        with pytest.raises(UserError, match=r"LongRoPE.*1 prompts reach.*lower rollout\.max_new_tokens to 4"):
            check(*models, *lengths)


def test_lengths_are_checked_with_the_longest_horizon(tmp_path):
    spec = read_model_spec(save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path / "hf"))
    settings = config("batch.max_tokens_per_micro_batch=30", "rollout.horizon={start: 9, grow: 8, every: 2}")
    teacher = planned(dataclasses.replace(spec, max_position_embeddings=29), settings)
    for steps, length, message in (
        (2, 20, None),
        (2, 22, "prompt with the 9 tokens of rollout.horizon .31 tokens.; raise it to 31 or lower rollout.max_new"),
        (3, 14, "prompt with the 17 tokens of rollout.horizon .31 tokens.; raise it to 31"),
        (3, 13, "prompt with the 17 tokens of rollout.horizon needs 30; lower rollout.max_new_tokens to 16"),
    ):
        run = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": steps})})
        arguments = (run, spec, teacher, [Prompt(0, (1,) * length)])
        if message is None:
            check_lengths(*arguments)
            continue
        with pytest.raises(UserError, match=message):
            check_lengths(*arguments)
