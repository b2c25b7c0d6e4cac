"""The loss on hidden states in float64: a loop for each sum, no packing, no token weights, no closed-form gradients."""

import itertools

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


def flow_parts(pairs, sequences, most):
    """Return direction, geometry and adjacent error of the hidden flow: means over layers and over sequences.

    Models of different widths have no direction error.

    Args:
        pairs: (student layer, teacher layer), in the order of the student's layers. Neighbouring layers are compared
            where the next pair has the next student layer.
        sequences: for each rollout the student's states {layer: [response, hidden]}, the teacher's, and the response
            mask.
        most: the largest number of positions of a response.
    """
    parts = []
    for student, teacher, mask in sequences:
        sampled = [t for t in range(len(mask)) if mask[t] == 1]
        m = min(len(sampled), most)
        if m < 2:
            continue
        at = [sampled[(i * (len(sampled) - 1)) // (m - 1)] for i in range(m)]

        def units(states, at=at):
            steps = torch.stack([states[b] - states[a] for a, b in itertools.pairwise(at)]).double()
            return steps / steps.norm(dim=1, keepdim=True)

        of = [(units(student[s]), units(teacher[t].detach())) for s, t in pairs]
        comparable = all(s.shape == t.shape for s, t in of)
        direction = sum((1 - (s * t).sum(1)).sum() / (m - 1) for s, t in of) / len(of) if comparable else 0.0
        geometry = sum(((s @ s.T - t @ t.T) ** 2).sum() / (m - 1) ** 2 for s, t in of) / len(of)
        next_to = [
            ((of[i][0] @ of[i + 1][0].T - of[i][1] @ of[i + 1][1].T) ** 2).sum() / (m - 1) ** 2
            for i in range(len(pairs) - 1)
            if pairs[i + 1][0] == pairs[i][0] + 1
        ]
        parts.append((direction, geometry, sum(next_to) / max(len(next_to), 1)))
    return [sum(values) / len(parts) for values in zip(*parts, strict=True)]


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
