"""Every output-space objective with every option, for tests that compare each of them with the reference."""

import itertools

from megatron_oprd.config import OutputConfig

DIRECTIONS = [{"direction": "reverse"}, {"direction": "forward"}] + [
    {"direction": "jsd", "beta": beta} for beta in (0.0, 0.1, 0.5, 1.0)
]
LATER = [
    {"direction": "skew_reverse", "skew": 0.1},
    {"direction": "skew_forward", "skew": 0.3},
    {"direction": "adaptive"},
]


def every_config(ks):
    """Yield an OutputConfig for every objective with every option; `ks` are the sizes of the support."""
    supports = [{"support": support, "k": k} for support in ("student", "teacher", "union") for k in ks]
    yield OutputConfig(objective="sampled")
    yield OutputConfig(objective="sampled", forward_above_entropy=2.0, k=ks[1])
    for direction in LATER:
        yield OutputConfig(objective="full_kl", **direction)
        yield OutputConfig(objective="topk_kl", tail_bucket=True, k=ks[1], **direction)
    for direction in DIRECTIONS:
        yield OutputConfig(objective="full_kl", **direction)
    for support in supports:
        yield OutputConfig(objective="topk_surrogate", **support)
    for support, tail_bucket, direction in itertools.product(supports, (False, True), DIRECTIONS):
        yield OutputConfig(objective="topk_kl", tail_bucket=tail_bucket, **support, **direction)
