"""The objectives on next-token distributions for one token, in float64 over the whole vocabulary.

They are written to be obviously right, not fast, and have no closed-form gradient: autograd differentiates them.
"""

import itertools
import math

import torch


def token_loss(student_logits, teacher_logits, token_id, config):
    """Return the loss of one token, a scalar that autograd can differentiate by the student's logits.

    Args:
        student_logits: [vocabulary], divided by the rollout temperature.
        teacher_logits: [vocabulary], divided by the teacher's temperature.
        token_id: the sampled token.
        config: the OutputConfig with the objective.
    """
    log_p = torch.log_softmax(student_logits.double(), dim=-1)
    log_q = torch.log_softmax(teacher_logits.double().detach(), dim=-1)
    if config.objective == "sampled":
        advantage = -(log_p[token_id] - log_q[token_id]).detach()
        loss = -advantage * log_p[token_id]
        if config.forward_above_entropy is not None and -(log_q.exp() * log_q).sum() > config.forward_above_entropy:
            loss = loss + sum(log_q[v].exp() * (log_q[v] - log_p[v]) for v in top_ids(teacher_logits, config.k))
        return loss
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
    """Return the divergence of two distributions, given as lists with the log-probability of each outcome.

    The Jensen-Shannon divergence is beta KL(q || m) + (1 - beta) KL(p || m) with m = (1 - beta) p + beta q.
    """
    if config.direction.startswith("skew"):
        first, second = (log_p, log_q) if config.direction == "skew_reverse" else (log_q, log_p)
        shares = math.log(config.skew), math.log(1 - config.skew)
        mixture = [torch.logaddexp(shares[0] + a, shares[1] + b) for a, b in zip(first, second, strict=True)]
        return kl(first, mixture)
    if config.direction == "adaptive":
        share = share_outside_of_the_tail(*([one.exp().item() for one in side] for side in (log_p, log_q)))
        return share * kl(log_q, log_p) + (1 - share) * kl(log_p, log_q)
    beta = config.beta
    if config.direction == "reverse" or (config.direction == "jsd" and beta == 1):
        return kl(log_p, log_q)
    if config.direction == "forward" or (config.direction == "jsd" and beta == 0):
        return kl(log_q, log_p)
    log_m = [torch.logaddexp(math.log(1 - beta) + p, math.log(beta) + q) for p, q in zip(log_p, log_q, strict=True)]
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def share_outside_of_the_tail(p, q):
    """Return the part of the sum of |q - p| outside of the least likely outcomes of q, which have at most half of q.

    Outcomes of equal probability are all in the tail or all outside of it.
    """
    head, tail, mass = 0.0, 0.0, 0.0
    for probability, outcomes in itertools.groupby(sorted(zip(q, p, strict=True)), key=lambda outcome: outcome[0]):
        gaps = [abs(of_q - of_p) for of_q, of_p in outcomes]
        mass += probability * len(gaps)
        if mass <= 0.5:
            tail += sum(gaps)
        else:
            head += sum(gaps)
    return head / (head + tail) if head + tail else 0.0


def kl(log_a, log_b):
    """Return KL(a || b) = sum of a (log a - log b)."""
    return sum(a.exp() * (a - b) for a, b in zip(log_a, log_b, strict=True))


def top_ids(logits, k):
    """Return the ids of the k largest logits, the largest first; of equal logits the lower id comes first."""
    values = logits.tolist()
    return sorted(range(len(values)), key=lambda v: (-values[v], v))[:k]


def support_ids(student_logits, teacher_logits, config):
    """Return the sorted ids on which a top-k objective is computed."""
    student, teacher = set(top_ids(student_logits, config.k)), set(top_ids(teacher_logits, config.k))
    return sorted({"student": student, "teacher": teacher, "union": student | teacher}[config.support])


def token_metrics(student_logits, teacher_logits, token_id, config):
    """Return the metrics `output/*` of one token by name. Arguments as in `token_loss`."""
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
