"""Residual blocks one above the other, that segments divide, and samples for them."""

import torch
from torch import nn


class Tower(nn.Module):
    """Residual blocks of samples; `variant` says what bypasses them, if anything."""

    def __init__(self, variant="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)
        self.variant = variant
        self.double()

    def forward(self, x):
        first = h = self.blocks[0](x[0] if self.variant == "without batch axis" else x)
        for block in self.blocks[1:]:
            if self.variant == "overwritten":
                h = h * 1.0
                h += block(h.clone()).softmax(-1)
            else:
                h = h + block(h).softmax(-1)
        if self.variant == "bypassed" or (self.variant == "at times" and bool((x[:, :1] > 0).any())):
            h = h + first
        return self.head(torch.tanh(h)).view(-1, 3)


def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    x[:5, 0] = -x[:5, 0].abs()
    x[5:, 0] = x[5:, 0].abs()
    return x, torch.arange(9) % 3
