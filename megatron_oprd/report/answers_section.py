"""Show the answers of a run: to the same held-out prompts before, after and by the teacher, and during the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.evaluation.records import Record, get, is_number, read_json, read_jsonl
from megatron_oprd.report.charts import escape
from megatron_oprd.report.differences import marked
from megatron_oprd.report.page import folded, number, section
from megatron_oprd.report.plain_text import answer, question
from megatron_oprd.report.run_files import RunFiles

MOST_CHARACTERS = 3000  # of an answer
MOST_PROMPTS = 24
OPEN_PROMPTS = 6  # the others unfold
SAMPLES_PER_STEP = 4
TEACHER = "teacher"


@dataclass(frozen=True)
class Column:
    """The answers of one model, by the rendered text of the prompt."""

    title: str
    answers: Mapping[str, Record]


def answers_section(run: RunFiles) -> str:
    """Return the answers to the same prompts before and after the training and by the teacher, as far as stored."""
    files = _evaluated(run.run_dir)
    shown = [files[0], *files[1:][-1:]] if files else []
    columns = [Column(_title(answers), _first_of_each(answers)) for answers in shown]
    return side_by_side("Answers", [*columns, *teacher_column(run)])


def last_answers(run: RunFiles, title: str) -> Column | None:
    """Return the answers of the last evaluation of a run under a title, or None without one."""
    files = _evaluated(run.run_dir)
    return Column(title, _first_of_each(files[-1])) if files else None


def teacher_column(run: RunFiles) -> list[Column]:
    """Return the stored answers of the teacher to the held-out prompts, as a list of one column at most."""
    folder = Path(get(run.config, "evaluation", "answers_dir") or run.run_dir / "teacher_answers")
    path = get(run.config, "teacher", "path")
    files = sorted(folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime, reverse=True)
    own = (file for file in files if get(read_json(file.with_suffix(".json")), "teacher", "path") == path)
    answers = _first_of_each([line for file in own for line in read_jsonl(file)])
    return [Column(TEACHER, answers)] if answers else []


def side_by_side(title: str, columns: Sequence[Column]) -> str:
    """Return a section with the answers to each prompt beside each other, or an empty string without a student's.

    Words are marked that the teacher's answer does not have; without a teacher, those that the first answer has not.
    """
    students = [column for column in columns if column.title != TEACHER]
    if not students:
        return ""
    teacher = next((column for column in columns if column.title == TEACHER), None)
    prompts = [text for text in students[0].answers if all(text in column.answers for column in columns)]
    teacher = teacher if prompts else None
    shown_columns = columns if prompts else students
    blocks = [_prompt(text, shown_columns, teacher) for text in (prompts or [*students[0].answers])[:MOST_PROMPTS]]
    rest = f"<div class='stack'>{''.join(blocks[OPEN_PROMPTS:])}</div>"
    more = folded(f"{len(blocks) - OPEN_PROMPTS} more prompts", rest) if len(blocks) > OPEN_PROMPTS else ""
    other = "the teacher's" if teacher is not None else "the first"
    note = "The same held-out prompts. "
    note += f"Marked words are not in {other} answer at that place; the percentage is the share of common words."
    note = note if len(shown_columns) > 1 else ""
    return section(title, f"<div class='stack'>{''.join(blocks[:OPEN_PROMPTS])}{more}</div>", note)


def training_answers(run: RunFiles, *, is_open: bool) -> str:
    """Return samples of the first and the last step. `is_open`: unfold the first of each step."""
    files = [path for path in sorted((run.run_dir / "rollouts").glob("*.jsonl")) if path.stat().st_size]
    blocks = []
    for path in dict.fromkeys((*files[:1], *files[-1:])):
        samples = [item for item in read_jsonl(path) if is_number(item.get("step"))][:SAMPLES_PER_STEP]
        if samples:
            shown = [_sample(item, is_open=is_open and item is samples[0]) for item in samples]
            blocks.append(f"<h3>Step {number(samples[0]['step'])}</h3>{''.join(shown)}")
    return section("Answers during training", "".join(blocks), "Samples on which the student was trained.")


def _evaluated(run_dir: Path) -> list[list[Record]]:
    """Return the answers of the first and of the last evaluation that stored any."""
    files = [path for path in sorted((run_dir / "evaluations").glob("step_*.jsonl")) if path.stat().st_size]
    found = (read_jsonl(path) for path in dict.fromkeys((*files[:1], *files[-1:])))
    return [answers for answers in found if answers]


def _first_of_each(answers: Sequence[Record]) -> dict[str, Record]:
    """Return the first sample of each prompt, by the rendered text of the prompt."""
    first: dict[str, Record] = {}
    for item in answers:
        first.setdefault(str(item.get("prompt", "")), item)
    return first


def _title(answers: Sequence[Record]) -> str:
    step = answers[0].get("step")
    return "before training" if step == 0 else f"step {number(step)}"


def _prompt(text: str, columns: Sequence[Column], teacher: Column | None) -> str:
    reference = columns[0] if teacher is None else teacher
    other = _shortened(answer(str(reference.answers.get(text, {}).get("response", ""))))
    cells = []
    for column in columns:
        item = column.answers.get(text, {})
        own = _shortened(answer(str(item.get("response", ""))))
        html, share = (escape(own), 1.0) if column is reference else marked(own, other)
        facts = [] if column is reference or not other else [f"{share:.0%} in common"]
        title = escape(" · ".join([column.title, *facts, *_facts(item)]))
        cells.append(f'<div><h4>{title}</h4><div class="answer">{html}</div></div>')
    prompt_text = escape(_shortened(question(text)))
    return (
        f'<div class="card"><div class="question">{prompt_text}</div><div class="answers">{"".join(cells)}</div></div>'
    )


def _facts(item: Record) -> list[str]:
    facts = []
    if item.get("finish_reason") == "length":
        facts.append(f"cut at {item['num_tokens']} tokens" if is_number(item.get("num_tokens")) else "cut off")
    if isinstance(item.get("correct"), bool) and item.get("ground_truth") is not None:
        facts.append("right" if item["correct"] else f"wrong, it is {item['ground_truth']}")
    return facts


def _sample(item: Record, *, is_open: bool) -> str:
    prompt_text = _shortened(question(str(item.get("prompt", ""))))
    text = _shortened(answer(str(item.get("response", ""))))
    title = " · ".join([" ".join(prompt_text.split())[:120] or "an empty prompt", *_facts(item)])
    body = f'<div class="question">{escape(prompt_text)}</div><div class="answer">{escape(text)}</div>'
    return folded(title, body, is_open=is_open)


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
