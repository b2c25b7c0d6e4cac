"""The loss on hidden states in float64: a loop for each sum, no packing, no token weights, no closed-form gradients."""

import torch


def selected_indices(mask, mode, k):
    """Return the indices of the response tokens that are compared: the sampled tokens (mask 1) that `mode` selects."""
    sampled = [t for t in range(len(mask)) if mask[t] == 1]
    return {
        "all": sampled,
        "last": sampled[-1:],
        "last_k": sampled[max(len(sampled) - k, 0) :],
        "first_k": sampled[:k],
    }[mode]


def token_error(student, teacher, normalize):
    """Return the mean squared difference of two states [hidden], which `normalize="l2"` divides by their norms."""
    student, teacher = student.double(), teacher.double().detach()
    if normalize == "l2":
        student, teacher = student / student.norm(), teacher / teacher.norm()
    return ((student - teacher) ** 2).sum() / student.numel()


def aggregate(per_sequence, aggregation):
    """Return the mean of lists of values, one list per sequence.

    `sequence_mean` averages the means of the sequences, anything else averages over all values.
    """
    if aggregation == "sequence_mean":
        return sum(sum(values) / len(values) for values in per_sequence) / len(per_sequence)
    every = [value for values in per_sequence for value in values]
    return sum(every) / len(every)


def oprd_loss(pairs, sequences, term):
    """Return the OPRD loss, equation (6) of the paper: the mean over the layer pairs of the aggregated token errors.

    Args:
        pairs: (student layer, teacher layer).
        sequences: for each rollout the student's states {layer: [tokens, hidden]}, the teacher's states, the number of
            prompt tokens, and the response mask.
        term: the section `loss.representation` of the configuration. A response token is compared at its own position
            plus `term.shift`.
    """
    layer_losses = []
    for student_layer, teacher_layer in pairs:
        per_sequence = []
        for student, teacher, prompt_length, mask in sequences:
            rows = [prompt_length + t + term.shift for t in selected_indices(mask, term.positions, term.k)]
            errors = [token_error(student[student_layer][r], teacher[teacher_layer][r], term.normalize) for r in rows]
            if errors:
                per_sequence.append(errors)
        layer_losses.append(aggregate(per_sequence, term.aggregation))
    return sum(layer_losses) / len(layer_losses) + torch.zeros((), dtype=torch.float64)
