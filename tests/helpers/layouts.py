"""The matrix of layouts that must all give the reference's update, and the few of them that cover it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_oprd.config import Config, ParallelConfig
from megatron_oprd.launch.layouts import teacher_layout
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.testing.replayed_run import FEW, MANY, SOME, make_config
from tests.helpers.training import ADAMW

FAMILIES = {
    **{"qwen2": "Qwen2", "qwen3": "Qwen3", "moe": "Qwen3Moe", "llama": "Llama", "phi3": "Phi3"},
    "shared": "Qwen2Moe",  # a shared expert with its gate
    "mistral": "Mistral",  # a sliding window in every layer
}
# Families with Gated DeltaNet, which have cases of their own: they cannot have every layout.
HYBRIDS = {"qwen35": "Qwen3_5", "qwen35moe": "Qwen3_5Moe", "qwennext": "Qwen3Next"}
# Those that differ from another in the names of their weights, the angles of their positions, a shared expert or a
# window alone, and the features in which that could show: what cuts weights or positions, and the tied head.
LIKE_ANOTHER = ("Llama", "Phi3", "Qwen2Moe", "Mistral")
WITHOUT_CONTEXT = ("Mistral",)  # context parallelism does not divide a window
OF_NAMES_AND_ANGLES = {"tensor", "sequence", "pipeline", "context", "data", "tied", "output"}
ROLLOUTS = {"few": FEW, "some": SOME, "many": MANY}
SETTINGS = {
    **{f"tp{size}": (f"parallel.tensor={size}",) for size in (2, 4)},
    "sp": ("parallel.sequence=true",),
    **{f"pp{size}": (f"parallel.pipeline={size}",) for size in (2, 3, 4)},
    "vp2": ("parallel.virtual_pipeline=2",),
    **{f"cp{size}": (f"parallel.context={size}",) for size in (2, 4)},
    **{f"ep{size}": (f"parallel.expert={size}",) for size in (2, 4)},
    "distopt": ADAMW,
    "overlap": ("parallel.overlap_grad_reduce=true",),
    "gather": (*ADAMW, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
    "selective": ("recompute.granularity=selective",),
    "uniform1": ("recompute.granularity=full",),
    "uniform2": ("recompute.granularity=full", "recompute.num_layers=2"),
    "block": ("recompute.granularity=full", "recompute.method=block"),
    "unpacked": ("batch.packing=false",),
    "middle": ("loss.representation.layers=[2,3]",),
    "crossing": ("loss.representation.pairs=[[1,4],[4,2],[5,5]]",),
    "teacher-dp": ("teacher.parallel={tensor: 1, pipeline: 1}",),
    "teacher-tp2": ("teacher.parallel={tensor: 2, pipeline: 1}",),
    "teacher-tp4": ("teacher.parallel={tensor: 4, pipeline: 1}",),
    "teacher-pp4": ("teacher.parallel={tensor: 1, pipeline: 4}",),
    "teacher-tp2-pp2": ("teacher.parallel={tensor: 2, pipeline: 2}",),
    **{f"chunk{tokens}": (f"loss.output.chunk_tokens={tokens}",) for tokens in (1, 7, 1000)},
    "unchunked": ("loss.output.chunk_tokens=null",),
    "warm": ("rollout.temperature=0.8", "loss.output.teacher_temperature=1.5"),
    "weighed": ("loss.output.weight=2.5", "loss.output.aggregation=sequence_mean"),
    "last3": ("loss.output.positions=last_k", "loss.output.positions_k=3"),
    "headless": ("loss.representation.weight=0",),
    "extrapolated": ("teacher.base={path: unused, extrapolate: 1.5}",),
    "extrapolated-output": ("teacher.base={path: unused, extrapolate: 1.5, space: output}",),
    "extrapolated-both": ("teacher.base={path: unused, extrapolate: 1.5, space: both}",),
    "inverse-square": ("loss.representation.layer_weights=inverse_square",),
    "flow": ("loss.flow.weight=0.7", "loss.flow.positions=4"),
    "all-flow": ("loss.flow={weight: 0.7, positions: 128, direction: 0.3, geometry: 0.2, adjacent: 0.9}",),
    "wide-flow": ("loss.flow={weight: 2.0, direction: 0}",),
    "ema": ("teacher.ema=0.75",),
    # Multipliers at step 0: of both terms, and of the loss on hidden states alone.
    "scheduled": ("loss.schedule={representation: [[0, 0.75], [9, 0]], output: [[0, 0.25], [9, 1]]}",),
    "before-output": ("loss.schedule.output=[[0, 0], [9, 1]]",),
    "after-layers": ("loss.schedule.representation=[[0, 0], [9, 1]]",),
}
# Objectives on next-token distributions, with every option of theirs in some.
OBJECTIVES = {
    "sampled": ("objective=sampled",),
    "surrogate": ("objective=topk_surrogate", "k=5"),
    "surrogate-teacher": ("objective=topk_surrogate", "k=5", "support=teacher"),
    "surrogate-union": ("objective=topk_surrogate", "k=5", "support=union"),
    "surrogate-whole": ("objective=topk_surrogate", "k=1000"),
    "topk": ("objective=topk_kl", "k=5"),
    "topk-teacher": ("objective=topk_kl", "k=3", "support=teacher", "direction=forward"),
    "topk-union": ("objective=topk_kl", "k=5", "support=union", "direction=jsd", "beta=0.3"),
    "tail": ("objective=topk_kl", "k=5", "tail_bucket=true"),
    "tail-forward": ("objective=topk_kl", "k=5", "tail_bucket=true", "direction=forward", "support=teacher"),
    "tail-union": ("objective=topk_kl", "k=5", "tail_bucket=true", "direction=jsd", "support=union"),
    "reverse": ("objective=full_kl",),
    "forward": ("objective=full_kl", "direction=forward"),
    "jsd": ("objective=full_kl", "direction=jsd", "beta=0.3"),
}
MORE_OBJECTIVES = {
    "skew": ("objective=full_kl", "direction=skew_reverse", "skew=0.3"),
    "topk-skew": ("objective=topk_kl", "k=5", "tail_bucket=true", "direction=skew_forward"),
    "weighed-positions": ("objective=sampled", "importance=0.5"),
    "adaptive": ("objective=full_kl", "direction=adaptive"),
    "topk-adaptive": ("objective=topk_kl", "k=5", "direction=adaptive"),
    "gated": ("objective=sampled", "forward_above_entropy=4.5", "k=5"),
}
# A bridge to a teacher that is as wide as the student, wider or narrower.
WIDTHS = {"bridge": 64, "bridge-wide": 96, "bridge-narrow": 48}
SETTINGS |= {word: ("loss.representation.bridge=unused",) for word in WIDTHS}
# A trained map to the width of the teacher.
MAP_WIDTHS = {"linear-wide": 96, "mlp-narrow": 48, "fitted-wide": 96, "fitted-narrow": 48}
FLOW_WIDTHS = {"wide-flow": 96}  # without directions, which compare states of one width
SETTINGS |= {
    **{word: (f"loss.representation.map.kind={word.partition('-')[0]}",) for word in ("linear-wide", "mlp-narrow")},
    "fitted-wide": ("loss.representation.map={kind: linear, init: closed_form}",),
    "fitted-narrow": (
        "loss.representation.map={kind: linear, init: closed_form}",
        "loss.representation.normalize=none",
    ),
}
SETTINGS |= {word: tuple(f"loss.output.{key}" for key in keys) for word, keys in (OBJECTIVES | MORE_OBJECTIVES).items()}
# One process and each way to cut the tokens or the layers of a dense model over two, for tests of other things:
# processes and settings.
FEW_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "data": (2, ()),
    "tensor and sequence": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "pipeline": (2, ("parallel.pipeline=2",)),
    "context": (2, ("parallel.context=2",)),
}
TEACHERS = ("TP4", "TP2", "DP4", "PP4", "TP2xPP2")  # layouts of its own that a teacher has in some case


@dataclass(frozen=True)
class Case:
    """A case of the matrix: a layout, the models that run in it, and their rollouts."""

    name: str
    world: int
    family: str  # as transformers names the class
    overrides: tuple[str, ...]
    layers: tuple[int, int] = (5, 5)  # blocks of student and teacher
    teacher_width: int = 64
    tied: bool = False
    rollouts: str = "some"

    @cached_property
    def config(self) -> Config:
        return make_config(Path("student"), Path("teacher"), *self.overrides)

    @cached_property
    def data_size(self) -> int:
        parallel = self.config.parallel
        return self.world // (parallel.tensor * parallel.pipeline * parallel.context)

    @cached_property
    def features(self) -> frozenset[str]:
        """Return the features of this case, derived from its configuration."""
        return frozenset(name for name, present in _features(self).items() if present)


def _features(case: Case) -> dict[str, bool]:
    config, parallel, recompute = case.config, case.config.parallel, case.config.recompute
    stages = even_stages(case.layers[0], parallel.pipeline, parallel.virtual_pipeline or 1)
    teacher = teacher_layout(config)
    own = None if teacher is None else _teacher_name(teacher, case.world)
    full = recompute.method if recompute.granularity == "full" else None
    layers = config.loss.representation.layers
    useful = sum(any(mask) for mask in ROLLOUTS[case.rollouts])
    return {
        "data": case.data_size > 1,
        "tensor": parallel.tensor > 1,
        "sequence": parallel.sequence,
        "pipeline": parallel.pipeline > 1,
        "uneven": len(set(stages)) > 1,
        "virtual": parallel.virtual_pipeline is not None,
        "context": parallel.context > 1,
        "expert": parallel.expert > 1,
        "distributed optimizer": config.optimizer.name == "adamw" and case.data_size * parallel.context > 1,
        "recompute selective": recompute.granularity == "selective",
        "recompute uniform 1": full == "uniform" and recompute.num_layers == 1,
        "recompute uniform 2": full == "uniform" and recompute.num_layers == 2,
        "recompute block": full == "block",
        "unpacked": not config.batch.packing,
        "empty ranks": case.data_size > useful,
        **{f"teacher {name}": own == name for name in TEACHERS},
        "middle layers": isinstance(layers, list) and 1 < min(layers) <= max(layers) < case.layers[0],
        "shallower student": case.layers[0] < case.layers[1],
        "tied": case.tied,
        "output": config.loss.reads_output,
        "bridge": config.loss.representation.bridge is not None,
    }


def _teacher_name(layout: ParallelConfig, world: int) -> str:
    sizes = {"TP": layout.tensor, "PP": layout.pipeline}
    return "x".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or f"DP{world}"


def parse(line: str) -> Case:
    """`RANKS FAMILY SETTING...`: settings as named above, and for the models and rollouts `4of6` (blocks of student and
    teacher), `tied`, `few` and `many`. Data parallelism is what is left over."""
    world, family, *words = line.split()
    overrides: list[str] = []
    models: dict[str, object] = {}
    for word in words:
        if word in SETTINGS:
            overrides += SETTINGS[word]
            widths = WIDTHS | MAP_WIDTHS | FLOW_WIDTHS
            models |= {"teacher_width": widths[word]} if word in widths else {}
        elif word in ROLLOUTS:
            models["rollouts"] = word
        elif word == "tied":
            models["tied"] = True
        else:
            student, teacher = word.split("of")
            models["layers"] = int(student), int(teacher)
    return Case("-".join((world, family, *words)), int(world), (FAMILIES | HYBRIDS)[family], tuple(overrides), **models)


# What a feature cannot be without, where that is something: the features beside it in the case where it is alone.
COMPANIONS = {
    "sequence": {"tensor"},
    "uneven": {"pipeline"},
    "virtual": {"pipeline"},
    "expert": {"data"},
    "distributed optimizer": {"data"},
    "empty ranks": {"data"},
    "teacher DP4": {"tensor"},
    **{f"teacher {name}": {"data"} for name in TEACHERS if name != "DP4"},
}
ALONE = """
    1 qwen2 some
    2 qwen3 many
    2 qwen2 tp2
    2 qwen3 tp2 sp
    2 qwen2 pp2 4of4
    2 qwen3 pp2
    4 qwen2 pp4
    3 qwen2 pp3 4of4
    2 qwen3 pp2 vp2 4of4
    2 qwen2 cp2
    2 qwen3 cp2
    4 qwen3 cp4
    2 moe ep2
    4 moe ep4 many
    2 qwen2 distopt
    1 qwen3 selective
    1 qwen2 uniform1
    1 qwen3 uniform2 4of4
    1 qwen2 block
    1 qwen3 unpacked
    2 qwen2 few
    4 qwen2 tp4 teacher-dp
    2 qwen3 teacher-tp2
    4 qwen2 teacher-tp4
    4 qwen3 teacher-pp4
    4 qwen2 teacher-tp2-pp2
    1 qwen2 middle
    1 qwen3 4of6
    1 qwen2 tied
    1 moe some
    1 qwen3 reverse
    1 qwen3 bridge-wide
"""
# As many features as go together, so that few cases have all pairs of them.
MIXED = """
    3 qwen2 pp3 4of6 many
    4 moe pp2 vp2 ep2 selective unpacked teacher-tp2 middle few
    4 moe tp2 cp2 sp ep2 distopt uniform2 unpacked teacher-tp4 middle 4of6 tied
    4 moe tp2 pp2 sp vp2 ep2 distopt uniform1 unpacked teacher-dp 4of6 tied
    4 moe tp2 pp2 sp vp2 ep2 selective unpacked teacher-tp2-pp2 middle 4of6
    4 moe tp2 sp ep2 distopt block teacher-pp4 4of6 tied few
    4 qwen2 cp2 block unpacked teacher-tp2
    4 qwen2 cp2 selective unpacked teacher-dp tied
    4 qwen2 pp2 distopt selective unpacked teacher-tp4 4of6 tied few
    4 qwen2 pp2 tp2 sp vp2 distopt block teacher-tp2-pp2 many
    4 qwen2 pp2 uniform2 unpacked teacher-pp4 4of6 few
    4 qwen2 pp2 vp2 distopt uniform1 unpacked teacher-tp2 middle tied few
    4 qwen2 pp2 vp2 distopt uniform2 teacher-tp2 8of8 few
    4 qwen2 tp2 sp selective teacher-pp4
    4 qwen3 cp2 distopt block unpacked teacher-dp middle tied few
    4 qwen3 cp2 distopt uniform2 unpacked teacher-tp2-pp2 middle 8of8 tied few
    4 qwen3 cp2 pp2 vp2 distopt uniform1 teacher-pp4 middle tied many
    4 qwen3 pp2 cp2 vp2 uniform1 unpacked teacher-tp4
    4 qwen3 pp2 vp2 block teacher-dp tied
    4 qwen3 tp2 sp distopt selective teacher-tp2 middle 4of6 tied many
    4 qwen3 tp2 uniform1 teacher-tp2-pp2 few
    4 qwen3 tp4 sp block teacher-tp4
    4 qwen3 tp4 uniform2 teacher-dp 4of6
    4 qwen3 tp2 pp2 teacher-tp4
    4 qwen3 tp2 pp2 teacher-tp2
    4 qwen3 tp2 pp2 teacher-dp
    4 qwen3 tp2 pp2 teacher-pp4
    4 qwen3 tp2 pp2 teacher-tp2-pp2
    4 qwen3 tp2 sp pp2 crossing
    3 qwen2 pp3 4of6 many sampled
    4 moe pp2 vp2 ep2 selective unpacked teacher-tp2 middle few tail
    4 moe tp2 cp2 sp ep2 distopt uniform2 unpacked teacher-tp4 middle 4of6 tied reverse warm
    4 moe tp2 sp ep2 distopt block teacher-pp4 4of6 tied few jsd
    4 qwen2 cp2 selective unpacked teacher-dp tied topk
    4 qwen2 pp2 tp2 sp vp2 distopt block teacher-tp2-pp2 many surrogate
    4 qwen2 pp2 vp2 distopt uniform1 unpacked teacher-tp2 middle tied few forward chunk1
    4 qwen3 tp4 uniform2 teacher-dp 4of6 topk-union headless weighed
    4 qwen3 tp2 pp2 tied reverse chunk7
    4 qwen3 tp2 sp pp2 crossing sampled last3
    4 qwen3 tp4 sp block teacher-tp4 tail-union
    4 llama tp2 sp pp2 tied
    4 llama cp2 uniform1 reverse
    4 phi3 tp2 sp cp2 tied reverse
    4 phi3 pp2 unpacked teacher-tp2
    2 qwen3 bridge-narrow
    3 qwen2 pp3 4of6 many bridge-narrow
    4 moe pp2 vp2 ep2 selective unpacked teacher-tp2 middle few bridge-wide
    4 moe tp2 cp2 sp ep2 distopt uniform2 unpacked teacher-tp4 middle 4of6 tied bridge-narrow
    4 qwen2 pp2 tp2 sp vp2 distopt block teacher-tp2-pp2 many bridge-wide
    4 qwen3 tp4 uniform1 teacher-dp 6of4 bridge-wide reverse
    4 qwen3 cp2 pp2 teacher-pp4 bridge-narrow
    4 qwen3 tp2 sp pp2 crossing bridge-wide sampled tied
    4 llama tp2 sp bridge-wide
    4 phi3 pp2 cp2 bridge
    4 shared tp2 sp pp2 ep2 tied reverse
    4 shared cp2 ep2 uniform1
    4 mistral tp2 sp tied reverse
    2 mistral pp2 uniform1
"""
EIGHT_RANKS = """
    8 qwen3 many
    8 qwen2 few tied distopt
    8 qwen3 tp2 sp pp2 cp2 many
    8 qwen2 tp2 pp2 vp2 4of6 uniform1 many
    8 qwen3 tp2 sp pp2 vp2 block distopt many
    8 moe tp2 sp pp2 ep2 distopt many
    8 moe tp2 sp cp2 ep4 selective unpacked
    8 moe pp2 cp2 ep2 vp2 teacher-tp4 many
    8 qwen3 tp4 sp pp2 tied teacher-tp2-pp2
    8 qwen2 pp4 cp2 uniform1 middle teacher-tp4
    8 qwen3 cp4 tp2 4of6 teacher-pp4 block
    8 moe pp4 ep2 unpacked teacher-tp2-pp2 many
    8 qwen3 tp2 sp pp2 cp2 many tied reverse chunk7
    8 moe tp2 sp cp2 ep4 selective unpacked surrogate headless
    8 qwen3 tp2 sp pp2 cp2 many bridge-wide
    8 moe tp2 sp pp2 ep2 distopt many bridge-narrow
    8 qwen2 pp4 cp2 uniform1 middle teacher-tp4 bridge-wide
"""
# Every objective in every way that its vocabulary or its tokens can be cut, with chunks of several sizes.
CUTS = (
    *("1 qwen3 chunk7", "2 qwen2 tp2 warm chunk1", "4 qwen3 tp4 weighed chunk7", "2 qwen3 tp2 sp headless chunk1000"),
    *("2 qwen2 pp2 tied last3", "2 qwen3 cp2 headless unchunked"),
)
VOCABULARY_CUTS, TOKEN_CUTS = (1, 2, 3), (0, 4, 5)  # indices of CUTS
OBJECTIVE_CASES = tuple(parse(f"{cut} {objective}") for cut in CUTS for objective in OBJECTIVES)
# Gradients are reduced, and parameters gathered, during other work: each way to place layers and tokens, a
# tied head on one stage and on two, and a head whose gradient autograd does not bring.
OVERLAPS = (
    *("2 qwen3 gather tied reverse many", "4 moe cp2 ep2 overlap", "4 qwen3 tp2 sp gather reverse"),
    *("4 qwen2 pp2 overlap tied many", "4 qwen2 pp2 vp2 gather 4of4 many topk"),
)
OVERLAP_CASES = tuple(map(parse, OVERLAPS))
# Methods beyond the paper: schedules that weigh both losses or leave one out at step 0, trained maps, layers that count
# alike, extrapolated targets, more divergences, hidden flow, and a teacher that has followed the student once. The
# first ones run in CI.
METHODS = (
    "4 qwen3 tp2 sp pp2 vp2 4of4 uniform1 flow ema",
    "4 moe tp2 cp2 sp ep2 distopt block unpacked tied flow ema reverse",
    "4 qwen3 tp2 sp pp2 crossing mlp-narrow reverse scheduled",
    "4 qwen2 pp2 vp2 distopt uniform1 unpacked teacher-tp2 middle tied few forward before-output",
    "4 moe tp2 cp2 sp ep2 middle inverse-square",
    "4 qwen2 pp2 cp2 vp2 uniform1 teacher-tp2 4of6 tied extrapolated",
    "4 qwen2 tp2 pp2 teacher-tp2 middle tied reverse extrapolated-both",
    "2 qwen3 cp2 chunk7 weighed-positions",
    "4 qwen3 tp2 sp pp2 tied reverse scheduled",
    "2 qwen3 tp2 sp crossing extrapolated bridge-wide reverse",
    "4 moe tp2 cp2 sp ep2 distopt uniform2 unpacked teacher-tp4 middle 4of6 tied reverse after-layers",
    "4 qwen3 pp2 cp2 vp2 uniform1 unpacked teacher-tp4 linear-wide",
    "4 qwen2 pp2 vp2 uniform1 unpacked teacher-dp 4of6 tied inverse-square many",
    "4 qwen3 tp2 sp pp2 crossing fitted-wide reverse scheduled",
    "4 moe pp2 cp2 ep2 distopt unpacked teacher-tp2 middle many fitted-narrow",
    "2 qwen2 tp2 warm chunk1 skew",
    "2 qwen3 tp2 sp headless chunk7 gated",
    "2 qwen3 cp2 headless topk-skew",
    "2 qwen3 tp2 sp headless warm chunk7 topk-union extrapolated-output",
    "4 qwen2 tp4 tied headless warm chunk7 adaptive",
    "2 qwen3 cp2 headless topk-adaptive",
    "4 qwen3 tp2 sp cp2 headless warm chunk7 many weighed-positions",
    "4 qwen2 pp2 tp2 tied teacher-dp weighed weighed-positions",
    "1 qwen3 headless all-flow",
    "2 qwen2 tp2 headless flow",
    "2 qwen3 cp2 many all-flow",
    "4 qwen2 pp2 cp2 vp2 distopt tied teacher-tp2 4of6 flow",
    "4 qwen3 pp4 many headless flow selective",
    "2 qwen3 headless wide-flow",
    "4 qwen3 tp2 sp pp2 crossing bridge-wide wide-flow",
    "2 qwen2 distopt many ema",
    "4 moe tp2 sp ep2 distopt tied ema reverse",
    "4 qwen3 pp2 vp2 distopt tied ema reverse 4of4",
    "4 moe pp2 ep2 distopt middle ema",
    "4 qwen3 cp2 tp2 distopt ema reverse",
)
METHODS_IN_CI = 8
METHOD_CASES = tuple(map(parse, METHODS))
# The heads, the state and the convolution of Gated DeltaNet in each way to place tokens and layers.
HYBRID_LINES = (
    *("1 qwen35 some", "2 qwen35 tp2", "2 qwen35 tp2 sp selective reverse", "2 qwen35 distopt many unpacked"),
    *("2 qwen35 pp2 tied", "4 qwen35 tp2 sp pp2 vp2 uniform1 4of4 many", "4 qwen35 tp2 pp2 block teacher-dp 4of6"),
    *("2 qwen35moe ep2", "2 qwennext tp2 sp", "2 qwen35 cp2 uniform1 reverse", "4 qwennext cp2 tp2 sp selective tied"),
    *("4 qwen35moe cp2 pp2 ep2 many", "8 qwen35 tp2 sp pp2 cp2 distopt 4of6"),
)
HYBRIDS_IN_CI = (2, 3, 4, 9)
HYBRID_CASES = tuple(map(parse, HYBRID_LINES))
MATRIX = tuple(parse(line) for part in (ALONE, MIXED, EIGHT_RANKS) for line in part.strip().splitlines())
FEATURES = tuple(_features(MATRIX[0]))


def two_cuts_each() -> tuple[Case, ...]:
    """Return the cases of OBJECTIVE_CASES with one cut of the vocabulary and one of the tokens for each objective.

    The cuts rotate over the objectives, so that each cut has several objectives of each kind.
    """
    names = set()
    for number, objective in enumerate(OBJECTIVES):
        for cut in (VOCABULARY_CUTS[number % 3], TOKEN_CUTS[(number + number // 3) % 3]):
            names.add(parse(f"{CUTS[cut]} {objective}").name)
    return tuple(case for case in OBJECTIVE_CASES if case.name in names)


def pairs_that_cannot_be() -> dict[frozenset[str], str]:
    """Return every pair of features that no layout can have, with the reason."""
    recomputations = [name for name in FEATURES if name.startswith("recompute ")]
    teachers = [name for name in FEATURES if name.startswith("teacher ")]
    reasons = {frozenset(pair): "a run recomputes in one way" for pair in itertools.combinations(recomputations, 2)}
    reasons |= {frozenset(pair): "the teacher has one layout" for pair in itertools.combinations(teachers, 2)}
    reasons[frozenset({"uneven", "recompute uniform 2"})] = "stages differ by one block: two does not divide them all"
    return reasons


def pairs() -> list[frozenset[str]]:
    """Return every pair of features that a layout can have."""
    every = (frozenset(pair) for pair in itertools.combinations(FEATURES, 2))
    return [pair for pair in every if pair not in pairs_that_cannot_be()]


def covered(case: Case) -> set[frozenset[str]]:
    """Return the features of a case, alone, with its family, and in pairs."""
    features = sorted(case.features)
    return {
        *(frozenset(pair) for pair in itertools.combinations(features, 2)),
        *(frozenset({feature, case.family}) for feature in features),
    }


def covering(cases: Sequence[Case] = MATRIX) -> tuple[Case, ...]:
    """Few of the cases that speak for as much as all of them: the one that adds most, again and again; of equal ones
    that on fewer ranks, and of those the first."""
    missing = set().union(*map(covered, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: (len(covered(case) & missing), -case.world))
        chosen.append(best)
        missing -= covered(best)
    return tuple(case for case in cases if case in chosen)
