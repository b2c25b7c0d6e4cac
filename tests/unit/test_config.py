"""The configuration is strict: every mistake is one line that names the key and what would work."""

import json

import pytest

from megatron_oprd.config import TeacherConfig, TeacherParallelConfig, dump_config, load_config, parse_config
from megatron_oprd.config.hints import SYNONYMS, known_keys
from megatron_oprd.config.template import template
from megatron_oprd.config.yaml_core import dump_yaml, load_yaml
from megatron_oprd.types import UserError

TEACHERLESS = ["student.path=s", "train.run_dir=r", "data.prompts=[p.jsonl]"]
REQUIRED = [*TEACHERLESS, "teacher.path=t"]


def test_a_dumped_configuration_loads_equal():
    config = load_config(None, [*REQUIRED, "loss.representation.pairs=[[1,2],[3,4]]", "optimizer.betas=[0.8,0.9]"])
    assert parse_config(load_yaml(dump_config(config))) == config
    assert config.loss.representation.pairs == [(1, 2), (3, 4)]


def test_a_dumped_configuration_of_objectives_and_teachers_loads_equal():
    chosen = {
        "objective": "topk_kl", "weight": 0.5, "k": 8, "support": "union", "tail_bucket": True, "direction": "jsd",
        "beta": 0.1, "teacher_temperature": 0.7, "positions": "last_k", "positions_k": 9,
        "aggregation": "sequence_mean", "chunk_tokens": None, "metrics_every": 0,
        "skew": 0.2, "forward_above_entropy": None, "importance": 0.0,
    }  # fmt: skip
    output = [f"loss.output.{key}={'null' if value is None else value}" for key, value in chosen.items()]
    teachers = "teachers={math: {path: m, parallel: {tensor: 2}}, 'big code.v1': {path: c, offload_targets: true}}"
    others = ["loss.representation.weight=0", "teachers_in_memory=one", "data.teacher_prompt_key=solved"]
    others += ["data.teacher_chat_template_kwargs={enable_thinking: true}", "loss.schedule.output=[[0, 0.5], [4, 1]]"]
    config = load_config(None, [*TEACHERLESS, *output, teachers, *others])
    assert parse_config(load_yaml(dump_config(config))) == config
    assert config.loss.output.model_dump() == chosen
    assert not config.loss.reads_layers and config.loss.reads_output
    assert config.teacher is None and config.named_teachers == {
        "math": TeacherConfig(path="m", parallel=TeacherParallelConfig(tensor=2)),
        "big code.v1": TeacherConfig(path="c", offload_targets=True),
    }


def test_a_single_teacher_has_an_empty_name():
    assert load_config(None, REQUIRED).named_teachers == {"": TeacherConfig(path="t")}
    assert list(load_config(None, [*TEACHERLESS, "teachers.math.path=m"]).named_teachers) == ["math"]


@pytest.mark.parametrize(("written", "value"), [("null", None), ("auto", "auto"), ("7", 7)])
def test_chunk_tokens_may_be_null_auto_or_a_number(written, value):
    assert load_config(None, [*REQUIRED, f"loss.output.chunk_tokens={written}"]).loss.output.chunk_tokens == value


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
        ("precision.fp8=e5m2", "precision.fp8='e5m2': Input should be 'hybrid' or 'e4m3'"),
        ("parallel.overlap_param_gather=true", "needs parallel.distributed_optimizer=true and parallel.overlap_grad_"),
        ("parallel.tp_comm_overlap=true", "parallel.tp_comm_overlap=true needs parallel.sequence=true"),
        ("train", "key=value"),
        ("loss.output=full_kl", "loss.output='full_kl' must be a section with objective, weight, k,"),
        ("loss.output.objective=kl", "loss.output.objective='kl': Input should be 'none', 'sampled', 'topk_surrogate'"),
        ("loss.output.objective=null", "loss.output.objective=null"),
        ("loss.output.objectve=sampled", "unknown key loss.output.objectve (did you mean loss.output.objective?)"),
        ("loss.output.weight=0", "loss.output.weight=0: Input should be greater than 0"),
        ("loss.output.weight=-1", "loss.output.weight=-1: Input should be greater than 0"),
        ("loss.output.weight=.inf", "loss.output.weight=inf: Input should be a finite number"),
        ("loss.output.k=0", "loss.output.k=0: Input should be greater than or equal to 1"),
        ("loss.output.support=both", "loss.output.support='both': Input should be 'student', 'teacher' or 'union'"),
        ("loss.output.tail_bucket=2", "loss.output.tail_bucket=2: Input should be a valid boolean"),
        (
            "loss.output.direction=up",
            "loss.output.direction='up': Input should be 'reverse', 'forward', 'jsd', 'skew_reverse', 'skew_forward' "
            "or 'adaptive'",
        ),
        (
            "loss.representation.map={kind: mlp, init: closed_form}",
            "loss.representation.map.init=closed_form fits a matrix, and loss.representation.map.kind=mlp; use kind",
        ),
        (
            "loss.output={objective: full_kl, importance: 0.5}",
            "loss.output.importance=0.5 weighs the sampled tokens of complete responses, and loss.output.objective="
            "full_kl; use sampled, or importance 0",
        ),
        ("loss.output={objective: sampled, importance: 1, positions: last_k}", "loss.output.positions=last_k; use all"),
        (
            "loss.output={objective: sampled, importance: 1, forward_above_entropy: 1}",
            "loss.output.forward_above_entropy=1.0; use null",
        ),
        ("loss.output.beta=2", "loss.output.beta=2: Input should be less than or equal to 1"),
        ("loss.output.beta=-0.1", "loss.output.beta=-0.1: Input should be greater than or equal to 0"),
        ("loss.output.teacher_temperature=0", "loss.output.teacher_temperature=0: Input should be greater than 0"),
        ("loss.output.teacher_temperature=.inf", "loss.output.teacher_temperature=inf: Input should be a finite"),
        ("loss.output.positions=some", "loss.output.positions='some': Input should be 'all', 'last', 'last_k' or"),
        ("loss.output.positions_k=0", "loss.output.positions_k=0: Input should be greater than or equal to 1"),
        ("loss.output.aggregation=mean", "loss.output.aggregation='mean': Input should be 'token_mean' or"),
        ("loss.output.metrics_every=-1", "loss.output.metrics_every=-1: Input should be greater than or equal to 0"),
        ("loss.representation.weight=0", "loss.output.objective=none leave nothing to learn; set one of them"),
        ("loss.representation.weight=.nan", "loss.representation.weight=nan: Input should be a finite number"),
        ("teachers_in_memory=two", "teachers_in_memory='two': Input should be 'all' or 'one'"),
        ("teachers.math.path=m", "teacher and teachers are both given: name one teacher for all prompts, or several"),
        ("teacher=null", "teacher is required: teacher.path, or teachers with one for each data_source"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key(override, message):
    with pytest.raises(UserError) as caught:
        load_config(None, [*REQUIRED, override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.output.chunk_tokens=0", "=0: Input should be 'auto' or greater than or equal to 1"),
        ("loss.output.chunk_tokens=some", "='some': Input should be 'auto' or a valid integer"),
        ("loss.output.chunk_tokens=1.5", "=1.5: Input should be 'auto' or a valid integer"),
        ("loss.output.chunk_tokens=true", "=true: Input should be 'auto' or a valid integer"),
        ("loss.representation.layers=most", "='most': Input should be 'all', 'last', 'even' or 'odd' or a valid list"),
        ("loss.representation.layers=[1, two]", ".1='two': Input should be a valid integer"),
        ("data.append_instruction=maybe", "='maybe': Input should be 'auto' or a valid boolean"),
        ("data.append_instruction=yes", "='yes': Input should be 'auto' or a valid boolean; write true or false"),
    ],
)
def test_a_value_of_several_types_has_one_message(override, message):
    with pytest.raises(UserError) as caught:
        load_config(None, [*REQUIRED, override])
    assert str(caught.value) == override.partition("=")[0] + message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "teacher is required: teacher.path, or teachers with one for each data_source"),
        (["teachers={}"], "teacher is required: teacher.path, or teachers with one for each data_source"),
        (["teachers=m"], "teachers='m': Input should be a valid dictionary"),
        (
            ["teachers.math=m"],
            "teachers.math='m' must be a section with path, hf, parallel, offload_targets, base, ema; "
            "write teachers.math.path=m",
        ),
        (["teachers.math.parallel.tensor=2"], "teachers.math.path is required"),
        (
            ["teachers.math.path=m", "teachers.math.offload=true"],
            "unknown key teachers.math.offload (did you mean teachers.math.offload_targets?)",
        ),
        (
            ["teachers.math={path: m, parallel: {tensors: 2}}"],
            "unknown key teachers.math.parallel.tensors (did you mean teachers.math.parallel.tensor?)",
        ),
        (
            ["teachers.math={path: m, parallel: {tensor: 0}}"],
            "teachers.math.parallel.tensor=0: Input should be greater than or equal to 1",
        ),
        (["teachers={3: {path: m}}"], "teachers: the name 3 is no text; put it in quotes"),
        (
            ["teachers={'': {path: m}}"],
            "teachers: the name '' is empty; name each teacher by the data_source of its prompts",
        ),
    ],
)
def test_a_bad_teacher_is_one_line_that_names_the_teacher(overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(None, [*TEACHERLESS, *overrides])
    assert str(caught.value) == message


@pytest.mark.parametrize("objective", ["sampled", "topk_surrogate", "topk_kl", "full_kl"])
def test_objectives_on_distributions_need_a_temperature_above_0(objective):
    overrides = [*REQUIRED, f"loss.output.objective={objective}"]
    load_config(None, overrides)
    load_config(None, [*REQUIRED, "rollout.temperature=0"])
    with pytest.raises(UserError, match=rf"^rollout\.temperature=0 has no .*{objective}; use one above 0$"):
        load_config(None, [*overrides, "rollout.temperature=0"])


def test_replay_and_a_teacher_prompt_column_exclude_each_other():
    overrides = [*REQUIRED, "data.teacher_prompt_key=solved"]
    load_config(None, overrides)
    with pytest.raises(UserError, match=r"^data\.teacher_prompt_key=solved is not read .*; put teacher_prompt_ids"):
        load_config(None, [*overrides, "rollout.engine=replay", "rollout.path=r.jsonl"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "rollout.engine=vllm needs rollout.server.addresses or rollout.server.python; neither is given"),
        (["addresses=[a:1]", "python=p"], "rollout.server.python; both are given"),
        (["addresses=[a]"], "rollout.server.addresses: 'a' is not of the form host:port"),
        (["addresses=['https://a:1']"], "rollout.server.addresses: 'https://a:1' is not of the form host:port"),
        (["addresses=['a:1','http://a:1/']"], "rollout.server.addresses=['a:1', 'http://a:1/'] names a server twice"),
        (["python=p", "devices=[0,0]", "tensor=2"], "rollout.server.devices=[0, 0] must name 2 different GPUs"),
        (["addresses=[a:1]", "stall_seconds=0"], "rollout.server.stall_seconds=0: Input should be greater than 0"),
    ],
)
def test_a_bad_server_section_is_one_line_that_names_the_key(overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(None, [*REQUIRED, "rollout.engine=vllm", *(f"rollout.server.{one}" for one in overrides)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vllm_needs_prompts_and_a_temperature_that_it_samples_with():
    overrides = [*REQUIRED, "rollout.engine=vllm", "rollout.server.addresses=['http://[::1]:8000','a.b:8000']"]
    assert load_config(None, [*overrides, "rollout.temperature=0"]).rollout.generates
    for temperature in ("0.001", "2.5"):
        with pytest.raises(UserError, match=rf"rollout\.temperature={temperature}: vLLM samples with 0 or with 0\.01"):
            load_config(None, [*overrides, f"rollout.temperature={temperature}"])
    with pytest.raises(UserError, match=r"data\.prompts"):
        load_config(None, [*overrides, "data.prompts=[]"])


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


def load_both_ways(tmp_path, key, written):
    """Return the value of a key that a file and an override write alike. Both must give the same value."""
    section, _, name = key.partition(".")
    others = [override for override in REQUIRED if not override.startswith(key + "=")]
    path = tmp_path / "c.yaml"
    path.write_text(f"{section}:\n  {name}: {written}\n")
    values = []
    for config in (load_config(path, others), load_config(None, [*others, f"{key}={written}"])):
        values.append(getattr(getattr(config, section), name))
    assert values[0] == values[1] and type(values[0]) is type(values[1])
    return values[0]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("optimizer.lr", "1e-4", 1e-4),
        ("optimizer.lr", "1E-5", 1e-5),
        ("optimizer.lr", "1e5", 1e5),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "2", 2),
        ("train.seed", "010", 10),
        ("train.seed", "0o10", 8),
        ("train.seed", "0x10", 16),
        ("data.shuffle", "false", False),
        ("data.shuffle", "True", True),
        ("student.path", "no", "no"),
        ("student.path", "12:30:00", "12:30:00"),
        ("student.path", "2024-01-31", "2024-01-31"),
        ("student.path", "1_000", "1_000"),
        ("student.path", "'007'", "007"),
        ("student.path", "a=b", "a=b"),
        ("student.path", "${oc.env:FOLDER}/m", "/data/m"),
        ("student.path", "~/m", "/home/me/m"),
        ("data.prompts", "[a.jsonl, ~/b.jsonl]", ["a.jsonl", "/home/me/b.jsonl"]),
        ("rollout.path", "null", None),
        ("rollout.path", "", None),
    ],
)
def test_a_value_means_the_same_in_a_file_and_on_the_command_line(tmp_path, monkeypatch, key, written, value):
    monkeypatch.setenv("FOLDER", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    assert load_both_ways(tmp_path, key, written) == value


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        ("data.shuffle", "yes", "data.shuffle='yes': Input should be a valid boolean; write true or false"),
        ("data.shuffle", "off", "data.shuffle='off': Input should be a valid boolean; write true or false"),
        ("train.seed", "12:30:00", "train.seed='12:30:00': Input should be a valid integer"),
        ("train.seed", "1_000", "train.seed='1_000': Input should be a valid integer; write the digits without _"),
        (
            "student.path",
            "007",
            "student.path=7: Input should be a valid string; put it in quotes, on the command line",
        ),
        ("student.path", "", "student.path=null: Input should be a valid string"),
        ("student.path", "' '", "student.path=' ': the path is empty"),
        ("student.path", "$DATA/m", "student.path='$DATA/m': write an environment variable as ${oc.env:DATA}"),
        ("bridge.ranks", "8.5", "bridge.ranks=8.5: Input should be a valid list"),
        ("train.steps", "1e3", "train.steps=1000.0: Input should be a valid integer; write 1000"),
        ("train.seed", "5.0", "train.seed=5.0: Input should be a valid integer; write 5"),
        ("train.seed", "0b11", "train.seed='0b11': Input should be a valid integer; write a plain number"),
        ("train.seed", "'5'", "train.seed='5': Input should be a valid integer; write the number without quotes"),
        ("optimizer.lr", "'1e-4'", "optimizer.lr='1e-4': Input should be a valid number; write the number without"),
        ("optimizer.lr", "10^-4", "optimizer.lr='10^-4': Input should be a valid number; write a plain number"),
        (
            "checkpoint.every_minutes",
            "00:30:00",
            "checkpoint.every_minutes='00:30:00': Input should be a valid number; write a plain number in minutes",
        ),
        (
            "watchdog.timeout_seconds",
            "30m",
            "watchdog.timeout_seconds='30m': Input should be a valid number; write a plain number in seconds",
        ),
        ("parallel.sequence", "'true'", "parallel.sequence='true': Input should be a valid boolean; write true or"),
        ("parallel.sequence", "y", "parallel.sequence='y': Input should be a valid boolean; write true or false"),
        ("parallel.sequence", "1", "parallel.sequence=1: Input should be a valid boolean; write true or false"),
        ("train.steps", "null", "train.steps=null: Input should be a valid integer; leave the key out for its default"),
        (
            "evaluation.data",
            "",
            "evaluation.data=null: Input should be a valid list; leave the key out for its default",
        ),
        ("precision.fp8", "none", "precision.fp8='none': Input should be 'hybrid' or 'e4m3'; write null"),
        ("rollout.path", "''", "rollout.path='': the path is empty"),
        ("data.prompts", "['']", "data.prompts.0='': the path is empty"),
        (
            "optimizer.betas",
            "(0.9,0.95)",
            "optimizer.betas='(0.9,0.95)': Input should be a valid tuple; write a list as [0.9, 0.95]",
        ),
        ("bridge.ranks", "8;16", "bridge.ranks='8;16': Input should be a valid list; write a list as [8, 16]"),
        ("bridge.ranks", "8 16", "bridge.ranks='8 16': Input should be a valid list; write a list as [8, 16]"),
        (
            "train.run_dir",
            "${oc.env:NO_SUCH_NAME}",
            "the environment variable NO_SUCH_NAME is not set; set it, or write ${oc.env:NO_SUCH_NAME,DEFAULT}",
        ),
        ("train.run_dir", "${NO_SUCH_NAME}/a", "${NO_SUCH_NAME} names no key; an environment variable is ${oc.env:NO_"),
        ("train.run_dir", "a-${optimizer.lr}", "${optimizer.lr} is not set here; set optimizer.lr too"),
    ],
)
def test_a_value_that_yaml_takes_for_another_type_is_refused_with_advice(tmp_path, key, written, message):
    for load in (
        lambda: load_both_ways(tmp_path, key, written),
        lambda: load_config(None, [*REQUIRED, f"{key}={written}"]),
    ):
        with pytest.raises(UserError) as caught:
            load()
        assert str(caught.value).removeprefix(f"the configuration {tmp_path / 'c.yaml'}: ").startswith(message)


@pytest.mark.parametrize("value", ["*a", "'a", "%a", "!!python/object:a", "---", "... a"])
def test_an_override_without_a_yaml_value_is_refused_with_advice(value):
    with pytest.raises(UserError, match=r"student\.path=.* has no YAML value .*put it in quotes"):
        load_config(None, [*REQUIRED, f"student.path={value}"])


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("optimizer={null: 1}", "write the name of a key before the colon"),
        ("student.path=${oc.env:A", "write ${oc.env:NAME} with its closing brace"),
    ],
)
def test_an_override_with_a_null_key_or_an_open_brace_is_refused_with_advice(override, advice):
    with pytest.raises(UserError) as caught:
        load_config(None, [*REQUIRED, override])
    assert str(caught.value).startswith(f"override {override!r}: ") and str(caught.value).endswith(f"; {advice}")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", ".train.steps=3", "train.=3"])
def test_an_override_of_another_form_is_answered_with_an_example(override):
    with pytest.raises(UserError, match=r"is not of the form key=value; write for example train\.steps=100$"):
        load_config(None, [*REQUIRED, override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.run_dir: r", "unknown key train.run_dir (write run_dir under the section train)"),
        ("optimizer: {null: 1}", ", optimizer: a key is null or not text (Incompatible key type 'NoneType')"),
        ("student: {path: '${oc.env:A'}", ", student.path: a ${...} is not valid (missing BRACE_CLOSE at '<EOF>')"),
        ("optimizer: &a {lr: *a}", "an alias (*) contains itself, or values are nested too deeply; write the"),
        ("loss: {output.k: 3}", "unknown key loss.output.k (write k under the section loss.output)"),
        ("rollout:\n  server.tensor: 2", "unknown key rollout.server.tensor (write tensor under the section rollout.s"),
        ("optimizer: {lr:1e-3}", "unknown key optimizer.lr:1e-3 (write a space after the colon)"),
        ("train:\n  steps:5", "train='steps:5' must be a section with steps, seed, device, run_dir; write a space a"),
        ("train: {steps: 1,000}", "unknown key train.0; write a number without a comma inside"),
        ("optimizer:", "optimizer=null must be a section with name, lr, betas, eps, weight_decay, clip_grad, schedule, "
         "warmup_fraction, precision_aware, cpu_offload; leave it out for its defaults"),
        ("train:\n\tsteps: 5", "found character '\\t' that cannot start any token in line 2; indent with spaces in p"),
        ("train: {steps: !!python/object:os.x 5}", "could not determine a constructor for the tag 'tag:yaml.org,2002:py"
         "thon/object:os.x' in line 1; write the value without a tag"),
        ("train: {steps: !steps 5}", "the tag '!steps' in line 1; write the value without a tag"),
        ("train: {steps: 1}\ntrain: {seed: 1}", "the key 'train' occurs twice in line 2; keep one of them"),
        ("train: {steps: 1, steps: 1}", "the key 'steps' occurs twice in line 1; keep one of them"),
        ("train:\n  steps: 1\n   seed: 1", "mapping values are not allowed here in line 3; check the indentation"),
        ("train: {}\n---\ntrain: {}", "keep one document and remove the lines ---"),
        ('train: {run_dir: "C:\\x"}', "in line 1; write a backslash in single quotes"),
        ('train: {run_dir: "C:\\runs"}', "train.run_dir='C:\\runs': the path has a control character; write a "),
        ("train: [1", "in line 1; check the brackets and quotes"),
        ("train", "is a str; write sections, each with keys below it"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_yet_a_configuration_is_refused_with_advice(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path, [])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "---\n", "%YAML 1.2\n---\n", "# comment\n\n"])
def test_a_file_may_have_a_mark_of_its_encoding_and_ends_of_lines_of_windows(tmp_path, encoding, end, start):
    path = tmp_path / "c.yaml"
    text = start + "student: {path: s}\nteacher: {path: t}\ndata: {prompts: [p]}\ntrain:\n  run_dir: é\n  steps: 5\n"
    path.write_bytes(text.replace("\n", end).encode(encoding))
    assert load_config(path, []).train.model_dump(include={"steps", "run_dir"}) == {"steps": 5, "run_dir": "é"}


@pytest.mark.parametrize("written", ["[a.jsonl,b.jsonl]", "[a.jsonl, b.jsonl]", '["a.jsonl","b.jsonl"]'])
def test_a_list_on_the_command_line_is_written_in_brackets(written):
    assert load_config(None, [*TEACHERLESS, "teacher.path=t", f"data.prompts={written}"]).data.prompts == [
        "a.jsonl",
        "b.jsonl",
    ]


def test_an_override_does_not_hide_a_section_of_the_file_that_is_text(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\n  steps:5")
    with pytest.raises(UserError, match=r"train=.steps:5. must be a section with .*; write a space after"):
        load_config(tmp_path / "c.yaml", [*REQUIRED, "train.run_dir=r"])


def test_an_override_replaces_a_list_of_the_file_and_extends_a_mapping(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {prompts: [a, b], chat_template_kwargs: {mood: calm}}\n")
    others = ["student.path=s", "teacher.path=t", "train.run_dir=r"]
    config = load_config(path, [*others, "data.prompts=[c]", "data.chat_template_kwargs.enable_thinking=false"])
    assert config.data.prompts == ["c"]
    assert config.data.chat_template_kwargs == {"mood": "calm", "enable_thinking": False}
    assert load_config(path, [*others, "data.prompts[0]=c"]).data.prompts == ["c", "b"]


def test_a_key_with_dots_is_written_in_brackets():
    config = load_config(None, [*TEACHERLESS, "teachers[big.code].path=c", "teachers.math.path=m"])
    assert {name: teacher.path for name, teacher in config.teachers.items()} == {"big.code": "c", "math": "m"}
    for override in ("teachers={a.b: {path: c}}", "teachers['a.b'].path=c", 'teachers["a.b"].path=c'):
        assert list(load_config(None, [*TEACHERLESS, override]).teachers) == ["a.b"]


def test_spaces_around_the_key_of_an_override_are_ignored():
    assert load_config(None, [*REQUIRED, " train.seed = 5"]).train.seed == 5


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  run_dir: a\n  seed: 1\n  run_dir: b\n")
    with pytest.raises(UserError, match=r"c\.yaml.*the key 'run_dir' occurs twice.*line 4"):
        load_config(path, [])


@pytest.mark.parametrize(
    "text", ["1e-5", "on", "no", "12:30:00", "010", "0o7", "null", "~", "", "2024-01-31", "<<", "=", "a: b"]
)
def test_written_text_stays_text(text):
    assert load_yaml(dump_yaml({"a": text, text: [text]})) == {"a": text, text: [text]}


def test_merged_mappings_of_a_file_are_read():
    text = "a: &base {path: x, parallel: {tensor: 2}}\nb: {<<: *base, path: y}\n"
    assert load_yaml(text)["b"] == {"path": "y", "parallel": {"tensor": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 2000, "nested too deeply"),
        ("9" * 5000, "5000 digits is too long"),
        ("!!timestamp a", "does not fit its value"),
        ('"\\ud83d"', "half of a surrogate pair"),
    ],
)
def test_text_that_breaks_the_parser_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(f"train:\n  run_dir: {text}\n")
    for path, overrides in ((tmp_path / "c.yaml", []), (None, [f"train.run_dir={text}"])):
        with pytest.raises(UserError, match=message):
            load_config(path, overrides)


def test_two_escapes_of_a_surrogate_pair_are_one_character_as_in_json():
    assert load_yaml('"\\ud83d\\ude00"') == json.loads('"\\ud83d\\ude00"')


@pytest.mark.parametrize("written", ["bfloat16", "torch.bfloat16", "bf16"])
def test_names_of_torch_are_taken_for_a_dtype(written):
    assert load_config(None, [*REQUIRED, f"precision.dtype={written}"]).precision.dtype == "bf16"


def test_one_value_without_brackets_is_taken_for_a_list_of_one(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("student: {path: s, freeze: lm_head}\nteacher: {path: t}\ndata: {prompts: a.jsonl}\n")
    config = load_config(path, ["evaluation.data=b.jsonl", "train.run_dir=r", "bridge.ranks=8", "bridge.ridges=0.5"])
    assert (config.data.prompts, config.evaluation.data) == (["a.jsonl"], ["b.jsonl"])
    assert (config.student.freeze, config.bridge.ranks, config.bridge.ridges) == (["lm_head"], [8], [0.5])


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=1", "optimizer.lr or bridge.lr or loss.representation.map.lr"),
        ("train.learning_rate=1", "optimizer.lr"),
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("batch_size=4", "rollout.prompts_per_step or batch.max_tokens_per_micro_batch"),
        ("tp=2", "parallel.tensor"),
        ("steps=5", "train.steps"),
        ("model=m", "student.path"),
        ("prompts=p", "data.prompts or health.prompts or bridge.prompts"),
        ("train.temperature=1", "rollout.temperature or evaluation.temperature"),
    ],
)
def test_an_unknown_key_is_answered_with_the_key_that_was_meant(override, hint):
    with pytest.raises(UserError, match=rf"unknown key \S+ \(did you mean {hint}\?\)"):
        load_config(None, [*REQUIRED, override])


def test_a_model_without_its_section_is_answered_with_the_key_of_its_path():
    with pytest.raises(
        UserError, match=r"student='m' must be a section .*; write student\.path=m; train is required: set"
    ):
        load_config(None, ["student=m", "teacher.path=t", "data.prompts=p"])


def test_every_synonym_names_an_existing_key():
    assert {key for keys in SYNONYMS.values() for key in keys} <= set(known_keys())


def test_the_default_configuration_can_be_saved_and_used():
    text = template().replace("path:  # required", "path: x").replace("run_dir:  # required", "run_dir: r")
    values = load_yaml(text)
    values["data"]["prompts"] = ["p"]
    assert parse_config(values) == load_config(
        None, ["student.path=x", "teacher.path=x", "train.run_dir=r", "data.prompts=p"]
    )
