"""The method in float64, slow and obvious: one loop a sum, no packing, no weights, no closed-form gradient."""

import torch


def selected_indices(mask, mode, k):
    sampled = [t for t in range(len(mask)) if mask[t] == 1]
    return {
        "all": sampled,
        "last": sampled[-1:],
        "last_k": sampled[max(len(sampled) - k, 0) :],
        "first_k": sampled[:k],
    }[mode]


def token_error(student, teacher, normalize):
    student, teacher = student.double(), teacher.double().detach()
    if normalize == "l2":
        student, teacher = student / student.norm(), teacher / teacher.norm()
    return ((student - teacher) ** 2).sum() / student.numel()


def oprd_loss(pairs, sequences, *, mode, k, normalize, aggregation, shift):
    """OPRD eq. (6). sequences: (student {layer: [tokens, d]}, teacher {layer: [tokens, d]}, prompt length, mask)."""
    layer_losses = []
    for student_layer, teacher_layer in pairs:
        per_sequence = []
        for student, teacher, prompt_length, mask in sequences:
            rows = [prompt_length + t + shift for t in selected_indices(mask, mode, k)]
            errors = [token_error(student[student_layer][r], teacher[teacher_layer][r], normalize) for r in rows]
            if errors:
                per_sequence.append(errors)
        if aggregation == "sequence_mean":
            layer_losses.append(sum(sum(errors) / len(errors) for errors in per_sequence) / len(per_sequence))
        else:
            every = [error for errors in per_sequence for error in errors]
            layer_losses.append(sum(every) / len(every))
    return sum(layer_losses) / len(layer_losses) + torch.zeros((), dtype=torch.float64)
