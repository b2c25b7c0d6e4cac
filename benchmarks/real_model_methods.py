"""The methods of benchmarks/real_model.py: what each adds to the recipe of the demo."""

REFERENCE = "both"  # the demo's recipe
HIDDEN = ("loss.representation.weight=1", "loss.output.objective=none")
ALONE = "loss.representation.weight=0"
FADED = "loss.schedule={{representation: [[0, 1.0], [12, 0.0]], output: [[0, 0.0], [12, 1.0]]}}"
# Names in braces are values that `real_model._placeholders` returns.
METHODS: dict[str, tuple[str, ...]] = {
    REFERENCE: (),
    "hidden_states": HIDDEN,
    "full_kl": (ALONE,),
    "hidden_off_policy": (*HIDDEN, "rollout.engine=replay", "rollout.path={teacher_rollouts}"),
    "hidden_next_input": (*HIDDEN, "loss.representation.pairs={next_input_pairs}"),
    "hidden_proportional": (*HIDDEN, "loss.representation.pairs=null"),
    "hidden_last": (*HIDDEN, "loss.representation.pairs={last_pair}"),
    "top16": (ALONE, "loss.output.objective=topk_surrogate", "loss.output.k=16"),
    "hidden_inverse_square": (*HIDDEN, "loss.representation.layer_weights=inverse_square"),
    "faded": (FADED,),
    "forward_kl": (ALONE, "loss.output.direction=forward"),
    "skew_kl": (ALONE, "loss.output.direction=skew_reverse"),
    "adaptive_kl": (ALONE, "loss.output.direction=adaptive"),
    "full_kl_off_policy": (ALONE, "rollout.engine=replay", "rollout.path={teacher_rollouts}"),
}
NAMES = {
    "both": "hidden states and full KL",
    "hidden_states": "hidden states",
    "full_kl": "full KL",
    "hidden_off_policy": "hidden states, teacher's answers",
    "hidden_next_input": "hidden states, next-input pairs",
    "hidden_proportional": "hidden states, proportional pairs",
    "hidden_last": "hidden states, last layer only",
    "top16": "top 16, as the authors",
    "hidden_inverse_square": "hidden states, `inverse_square`",
    "faded": "hidden states faded into full KL",
    "forward_kl": "forward KL",
    "skew_kl": "skew KL",
    "adaptive_kl": "adaptive KL",
    "full_kl_off_policy": "full KL, teacher's answers",
}
SWEPT = ("both", "hidden_states", "full_kl", "hidden_off_policy")  # at other learning rates too
EQUAL_TIME = ("hidden_states", "full_kl", "hidden_off_policy", "top16")  # also for the time of the recipe
# These run after the others.
LATER = ("hidden_inverse_square", "faded", "forward_kl", "skew_kl", "adaptive_kl", "full_kl_off_policy")
