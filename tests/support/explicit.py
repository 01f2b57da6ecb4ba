"""F as an explicit P × P matrix in float64, from the loop of backward passes in oracle.py; and trees as vectors."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from oracle import gradient_rows, terms
from torch import Tensor
from zoo import CASES, build

import fisherfunc as ff


def flat(tree: Mapping[str, Tensor]) -> Tensor:
    """One tree as a vector, in float64."""
    return torch.cat([value.flatten().double() for value in tree.values()])


def flat_stack(vectors: Mapping[str, Tensor]) -> Tensor:
    """A stack of k trees as rows `(k, p)`, in float64."""
    return torch.cat([value.reshape(len(value), -1).double() for value in vectors.values()], dim=1)


def rows_of(name: str, model: torch.nn.Module, batch: Any, *, unit: str = "token", center: bool = False) -> dict:
    """{name: (N, P)}, one row a token or a sequence, less their mean where centred."""
    kind = CASES[name].kind
    rows = gradient_rows(model, kind, batch)
    if unit == "sequence":
        of = torch.tensor([term.sequence for term in terms(kind, batch)])
        rows = {n: torch.stack([g[of == s].sum(0) for s in of.unique()]) for n, g in rows.items()}
    return {n: g - g.mean(0) if center else g for n, g in rows.items()}


def fisher_of(rows: Mapping[str, Tensor], names: Any = None) -> Tensor:
    """(1/N) Gᵀ G of the named parameters, all of them where None."""
    g = torch.cat([rows[name] for name in names or rows], dim=1)
    return g.mT @ g / len(g)


def loss_for(name: str) -> ff.losses.TokenLoss:
    return getattr(ff.losses, CASES[name].kind)()


def random_tree(params: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for n, p in params.items()}


def tree_of(vector: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vector as a tree of the shapes of the parameters."""
    pieces = vector.split([p.numel() for p in params.values()])
    return {name: piece.reshape(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}


@cache
def setting(name, *, dtype=torch.float64, **options):
    """The model as a function, its batch and loss, and the rows of a loop of backward passes."""
    model, batch = build(name, dtype=dtype)
    fn = ff.functionalize(model)
    rows = rows_of(name, model, batch, **options)
    return fn, batch, loss_for(name), {n: rows[n] for n in fn.params}
