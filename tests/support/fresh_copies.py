"""Copies of a module for each token, by Python's own means: what isolation is held against."""

import copy
from collections.abc import Callable

import torch
from oracle import gram_errors
from torch import nn
from torch.nn import functional

import fisherfunc as ff


def fresh_rows(model: nn.Module, batch: tuple, extra: tuple = ()) -> dict[str, torch.Tensor]:
    """The gradients of samples, each of a copy of the module of its own, whose flags say evaluation."""
    rows: dict[str, list[torch.Tensor]] = {}
    for b in range(len(batch[0])):
        private = copy.deepcopy(model)
        for part in private.modules():
            part.training = False
        inputs = [x[b : b + 1].clone() for x in batch[:-1]]
        functional.cross_entropy(private(*inputs, *copy.deepcopy(extra)), batch[-1][b : b + 1]).backward()
        for name, p in private.named_parameters():
            if p.requires_grad:
                rows.setdefault(name, []).append((torch.zeros_like(p) if p.grad is None else p.grad).flatten())
    return {name: torch.stack(r) for name, r in rows.items()}


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double()
    if hasattr(model, "state"):
        model.state = model.state.double()
    return model


def errors_of(model: nn.Module, batch: tuple, rows: dict[str, torch.Tensor], route: str) -> dict[str, float]:
    fn = ff.functionalize(model)
    loss = ff.losses.each_alone(ff.losses.classification())  # what is kept, or asked of a sum, lets samples meet
    got = ff.token_grams(fn, fn.params, batch, loss, route=route, blocks=lambda name: name)
    return gram_errors(got.grams, rows, floor=1e-15)
