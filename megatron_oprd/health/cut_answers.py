"""Warn once, early in a run, if many answers are cut by the length limit.

`observers.py` calls this file. The rule has no state but the lines of `metrics.jsonl`, which a resumed run cuts back to
its checkpoint: so the warning comes once, also after a resume.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_oprd.data.end_tokens import EndTokens

FIRST_STEPS = 5  # judged after this step, or after the last step of a shorter run
LARGEST_SHARE = 0.5  # of the answers of these steps


def cut_answers_warning(run_dir: Path, step: int, last_step: int, limit: int, end_tokens: EndTokens | None) -> str:
    """Return the warning that is due after a step, or ''. No communication.

    Args:
        run_dir: the run folder, whose `metrics.jsonl` has the lines of all steps up to this one.
        step: the step that has just been logged, counted from 1.
        last_step: `train.steps`.
        limit: `rollout.max_new_tokens`.
        end_tokens: the tokens at which answers stop; None: nothing is generated.
    """
    if step != min(FIRST_STEPS, last_step) or end_tokens is None:
        return ""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    shares = [json.loads(line)["rollout/truncated_fraction"] for line in lines]
    share = sum(shares) / len(shares)
    if share <= LARGEST_SHARE:
        return ""
    causes = [
        f"rollout.max_new_tokens={limit} is too small",
        f"the student does not write a token that ends its answers: {end_tokens.summary()}",
    ]
    if not any("chat template" in source for source in end_tokens.sources.values()):
        causes.append("the chat template writes no end-of-turn token after an answer")
    causes.append("a base model has not learned to end an answer")
    return f"{share:.0%} of the answers of the first {len(shares)} steps were cut; likely causes: {'; '.join(causes)}"
