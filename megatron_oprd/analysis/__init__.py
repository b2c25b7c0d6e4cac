"""The paper's analyses of a student and its teacher on the same rollouts: hidden states and gradients."""
