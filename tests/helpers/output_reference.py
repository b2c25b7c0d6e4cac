"""The output-space objectives in float64, slow and obvious: one token, the whole vocabulary, gradients by autograd."""

import itertools
import math

import torch

from megatron_oprd.config import OutputConfig

DIRECTIONS = [{"direction": "reverse"}, {"direction": "forward"}] + [
    {"direction": "jsd", "beta": beta} for beta in (0.0, 0.1, 0.5, 1.0)
]


def every_config(ks):
    """Yield every objective with every option."""
    supports = [{"support": support, "k": k} for support in ("student", "teacher", "union") for k in ks]
    yield OutputConfig(objective="sampled")
    for direction in DIRECTIONS:
        yield OutputConfig(objective="full_kl", **direction)
    for support in supports:
        yield OutputConfig(objective="topk_surrogate", **support)
    for support, tail_bucket, direction in itertools.product(supports, (False, True), DIRECTIONS):
        yield OutputConfig(objective="topk_kl", tail_bucket=tail_bucket, **support, **direction)


def token_loss(student_logits, teacher_logits, token_id, config):
    """Return a scalar with the value of the loss and, through autograd for student_logits, its gradient.

    The formulas are those of docs/losses.md. student_logits, teacher_logits: [vocabulary], already divided by their
    temperatures; token_id: y_t.
    """
    log_p = torch.log_softmax(student_logits.double(), dim=-1)
    log_q = torch.log_softmax(teacher_logits.double().detach(), dim=-1)
    if config.objective == "sampled":
        advantage = -(log_p[token_id] - log_q[token_id]).detach()
        return -advantage * log_p[token_id]
    if config.objective == "full_kl":
        return divergence(list(log_p), list(log_q), config)
    support = support_ids(student_logits, teacher_logits, config)
    if config.objective == "topk_surrogate":
        mass = sum(log_p[v].exp() for v in support).detach()
        weights = {v: log_p[v].exp().detach() / mass for v in support}
        return sum(weights[v] * (log_p[v] - log_q[v]).detach() * log_p[v] for v in support)
    assert config.objective == "topk_kl"
    rest = [v for v in range(len(log_p)) if v not in support]
    outcomes = [[v] for v in support] + ([rest] if config.tail_bucket and rest else [])
    student, teacher = ([torch.logsumexp(side[outcome], dim=0) for outcome in outcomes] for side in (log_p, log_q))
    if not config.tail_bucket:
        student, teacher = (list(torch.log_softmax(torch.stack(side), dim=0)) for side in (student, teacher))
    return divergence(student, teacher, config)


def divergence(log_p, log_q, config):
    """log_p, log_q: lists of scalars, one for each outcome."""
    beta = config.beta
    if config.direction == "reverse" or (config.direction == "jsd" and beta == 1):
        return kl(log_p, log_q)
    if config.direction == "forward" or (config.direction == "jsd" and beta == 0):
        return kl(log_q, log_p)
    log_m = [torch.logaddexp(math.log(1 - beta) + p, math.log(beta) + q) for p, q in zip(log_p, log_q, strict=True)]
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def kl(log_a, log_b):
    return sum(a.exp() * (a - b) for a, b in zip(log_a, log_b, strict=True))


def top_ids(logits, k):
    """Highest first, of equals the lower id first."""
    values = logits.tolist()
    return sorted(range(len(values)), key=lambda v: (-values[v], v))[:k]


def support_ids(student_logits, teacher_logits, config):
    student, teacher = set(top_ids(student_logits, config.k)), set(top_ids(teacher_logits, config.k))
    return sorted({"student": student, "teacher": teacher, "union": student | teacher}[config.support])


def token_metrics(student_logits, teacher_logits, token_id, config):
    """{metric: value} of one token."""
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (student_logits, teacher_logits))
    student_top, teacher_top = top_ids(student_logits, config.k), top_ids(teacher_logits, config.k)
    support = support_ids(student_logits, teacher_logits, config)
    return {
        "reverse_kl": float(kl(list(log_p), list(log_q))),
        "sampled_kl": float(log_p[token_id] - log_q[token_id]),
        "student_entropy": -sum(float(p.exp() * p) for p in log_p),
        "teacher_entropy": -sum(float(q.exp() * q) for q in log_q),
        "topk_overlap": len(set(student_top) & set(teacher_top)) / len(student_top),
        "student_mass": sum(float(log_p[v].exp()) for v in support),
        "teacher_mass": sum(float(log_q[v].exp()) for v in support),
        "argmax_agreement": float(student_top[0] == teacher_top[0]),
    }
