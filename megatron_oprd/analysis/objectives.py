"""The objectives whose gradients are compared. Nothing here imports torch, so that a wrong name is reported at once."""

HIDDEN_STATES = "hidden_states"
# All but the first are output-space objectives, with the names of `loss.output.objective`.
OBJECTIVES = (HIDDEN_STATES, "sampled", "topk_surrogate", "topk_kl", "full_kl")
