"""Names only: Megatron-Core mentions them in annotations."""

import torch


class FusibleOperation(torch.nn.Module):
    pass


class Sequential(torch.nn.Module):
    pass
