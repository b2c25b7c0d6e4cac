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


def aggregate(per_sequence, aggregation):
    """AGG of a list of values for each sequence that has any."""
    if aggregation == "sequence_mean":
        return sum(sum(values) / len(values) for values in per_sequence) / len(per_sequence)
    every = [value for values in per_sequence for value in values]
    return sum(every) / len(every)


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
        layer_losses.append(aggregate(per_sequence, aggregation))
    return sum(layer_losses) / len(layer_losses) + torch.zeros((), dtype=torch.float64)
