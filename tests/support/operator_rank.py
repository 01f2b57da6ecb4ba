"""One rank of tests/operators/test_ranks.py: `main(OUT, KINDS)`, with the environment that torchrun gives."""

from pathlib import Path

import torch
from torch import distributed as dist

import fisherfunc as ff

COUNTS = (7, 3)


def setting(dtype=torch.float64):
    """A model, and samples of both ranks together."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).to(dtype)
    return model, (torch.randn(sum(COUNTS), 4, dtype=dtype), torch.randint(3, (sum(COUNTS),)))


def operator_of(model, batch, **options):
    fn = ff.functionalize(model)
    return ff.operators.fisher(fn, fn.params, batch, ff.losses.classification(), **options)


def found_of(operator):
    """What is held against one process."""
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(operator.num_rows, generator=generator, dtype=torch.float64)
    v = {name: torch.randn(p.shape, generator=generator).to(p) for name, p in operator.params.items()}
    leading = ff.kernels.lanczos(num_leading=4, tolerance=1e-8)(operator)
    return {
        "u": operator.token_product(u),
        "v": operator.parameter_product(v),
        "derivatives": operator.derivatives(v),
        "eigenvalues": leading.eigenvalues,
        "bounds": leading.bounds,
        "trace": ff.kernels.lanczos_quadrature(num_probes=2, num_steps=3)(operator).trace().value,
        "num_tokens": operator.num_tokens,
        "sequence": operator.tokens.sequence,
        "mean_loss": operator.metadata["mean_loss"],
    }


def main(out, kinds):
    """Write what this rank found of each kind."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save({kind: _found(kind, rank) for kind in kinds}, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


def _found(kind, rank):
    model, batch = setting(torch.float32 if kind == "float32" else torch.float64)
    if kind == "other parameters" and rank == 1:
        torch.nn.init.ones_(model[0].weight)
    mine = tuple(x.split(COUNTS)[rank] for x in batch)
    derivative = "central difference" if kind == "central difference" else "auto"
    try:
        return found_of(ff.operators.over_ranks(operator_of(model, mine, derivative=derivative)))
    except ValueError as error:
        return {"error": str(error)}
