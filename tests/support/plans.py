"""A language model with a parameter that no rule knows, and its plan."""

import torch
from torch import nn

import fisherfunc as ff

WIDTH, WORDS, LENGTH = 16, 23, 12


class Language(nn.Module):
    """A causal model, by a running mean, with a parameter that no rule knows."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.outer = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.angle = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        x = x + self.outer(torch.tanh(self.inner(x.cumsum(1) / LENGTH)))
        return self.head(self.norm(x) * self.angle.sin())


def language(sequences=3, *, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    ids = torch.randint(WORDS, (sequences, length), generator=generator)
    return Language().double(), {"input_ids": ids, "labels": ids}


def settings(model):
    return {"loss": ff.losses.causal_lm()} if isinstance(model, Language) else {}


def planned(model, batch, **options):
    return ff.plan(model, batch, calibrate=False, **settings(model), **options)
