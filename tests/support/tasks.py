"""Tiny tasks of the benchmarks, one of each kind."""

import torch
from torch import nn

from benchmarks.tasks import Task, gpt2

LANGUAGE = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 8}


def samples(kind: str, *shape: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    inputs = torch.randn(6, *shape, generator=generator)
    if len(shape) == 1:
        model = nn.Sequential(nn.Linear(*shape, 4), nn.Tanh(), nn.Linear(4, 3))
    else:
        layers = (nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
        model = nn.Sequential(*layers)
    return Task(kind=kind, model=model, inputs=inputs, targets=torch.tensor([0, 1, 2, 0, 1, 2]))


TASKS = {
    "tokens": lambda: gpt2(sequences=2, positions=5, **LANGUAGE),
    "samples": lambda: samples("classification", 5),
    "classes": lambda: samples("classes", 5),
    "images": lambda: samples("classification", 1, 4, 4),
}
