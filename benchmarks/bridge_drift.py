"""Measure how training with a bridge moved a student's states, inside and outside the directions of the bridge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_oprd.bridge.store import read_bridge

PROBLEMS = 500


def what_moved(folder: Path, trained: Path, rank: int, answer_width: int) -> dict[str, Any]:
    """Compare the states of the start student and the trained student at the tokens of right answers.

    Args:
        folder: folder with `pair/` and `bridge/`.
        trained: folder of the trained student.
        rank: rank of the bridge.
        answer_width: tokens of an answer, one per symbol.

    Returns:
        layers: by layer, `share` (part of the squared length of the change that lies in the rows of P_S) and
            `relative` (length of the change divided by the length of the state).
        next_token: accuracy on the next token of the start student and of the trained student, and of the trained
            student's head on the start states of the last layer plus only the change inside, or outside, these rows.
    """
    bridge = read_bridge(folder / "bridge" / f"rank_{rank}")
    tokenizer = AutoTokenizer.from_pretrained(folder / "pair" / "student")
    rows = [json.loads(line) for line in (folder / "pair" / "validation.jsonl").read_text().splitlines()[:PROBLEMS]]
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (folder / "pair" / "student", trained)
    ]
    ids, labels = _right_answers(rows, tokenizer, answer_width)
    (before, start_head), (after, head) = (_states(model, ids, answer_width) for model in models)
    layers = {}
    inside_last = None
    for pair, maps in bridge.maps.items():
        change = after[pair.student] - before[pair.student]
        basis = torch.linalg.qr(maps.student_map.T)[0]  # [d_S, r]
        inside = change @ basis @ basis.T
        layers[pair.student] = {
            "share": (inside.pow(2).sum() / change.pow(2).sum()).item(),
            "relative": (change.norm() / before[pair.student].norm()).item(),
        }
        inside_last = inside if pair.student == len(before) else inside_last
    assert inside_last is not None  # bridges of the demo join all layers
    last, change = before[len(before)], after[len(before)] - before[len(before)]
    states = {
        "start": (last, start_head),
        "trained": (last + change, head),
        "inside": (last + inside_last, head),
        "outside": (last + change - inside_last, head),
    }
    found = {name: ((h @ w.T).argmax(-1) == labels).float().mean().item() for name, (h, w) in states.items()}
    return {"rank": rank, "width": last.shape[-1], "layers": layers, "next_token": found}


def _right_answers(rows: list[dict[str, Any]], tokenizer: Any, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids [problems, tokens] of prompts with answers, and the labels of the answer tokens."""
    answers = [row["reward_model"]["ground_truth"].rjust(width) for row in rows]
    texts = [row["prompt"] + answer for row, answer in zip(rows, answers, strict=True)]
    encoded = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    ids = torch.tensor(encoded)
    return ids[:, :-1], ids[:, -width:].flatten()


@torch.no_grad()
def _states(model: PreTrainedModel, ids: torch.Tensor, width: int) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Return the states [problems * answer tokens, d_S] by layer at the answer tokens, and the LM head."""
    output = model(ids, output_hidden_states=True)
    states = {layer: h[:, -width:].flatten(0, 1) for layer, h in enumerate(output.hidden_states) if layer}
    return states, model.get_output_embeddings().weight
