"""The operator of all ranks of a `torch.distributed` group, each with its own sequences; every vector is on each rank.

With G the rows of rank 0, then of rank 1 and so on, Gᵀ u is the sum over ranks of Gᵣᵀ uᵣ, and G v their G_r v one after
the other: one all-reduce of P numbers and one all-gather of n a product.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fisherfunc.distributed.collectives import Everyone, ranks
from fisherfunc.distributed.entering import standing
from fisherfunc.linalg.grams.tokens import concatenated
from fisherfunc.operators.fisher import FisherOperator, Sides, token_product_of
from fisherfunc.records.axes import Params
from fisherfunc.records.hashing import SHORT, hash_of
from fisherfunc.records.provenance import Provenance


def over_ranks(operator: FisherOperator, *, group: Any = None) -> FisherOperator:
    """Return the operator of the rows of all ranks, which every rank calls alike, and gets the same from.

    Each rank makes its own by `fisher`, of other sequences and the same parameters, and no rank more often than another
    calls a product. Cost: that of the rank with the most rows, an all-reduce of P numbers and an all-gather of n.

    Args:
        operator: That of this rank.
        group: The `torch.distributed` group; all ranks where None.

    Raises:
        ValueError: If ranks differ in parameters, loss, targets, unit or how derivatives are taken; it names two.
        RuntimeError: If no group was initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("over_ranks needs torch.distributed.init_process_group; under torchrun, call that first")
    everyone = standing(ranks(group=group))
    everyone.check_alike(
        _marks(operator), "give all ranks the same model, loss and options, and each its own sequences"
    )
    tokens = everyone.gathered("tokens", operator.tokens.map(Tensor.cpu))
    counts = [len(each.sequence) for each in tokens]
    rank, num_rows = everyone.rank, sum(counts)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    num_tokens = num_rows // operator.tokens.num_targets

    def across(sides: Sides) -> Sides:
        def gradient(u: Tensor) -> dict[str, Tensor]:
            if u.shape != (num_rows,):
                raise ValueError(f"u expected a weight for each of {num_rows} rows, got shape {tuple(u.shape)}")
            return _summed(sides.weighted_gradient(u[mine]), everyone)

        def along(tree: Params, slope: float | None) -> Tensor:
            return everyone.joined("derivatives", sides.derivatives(tree, slope), counts)

        return Sides(weighted_gradient=gradient, derivatives=along)

    def parameter_product(tree: Params) -> dict[str, Tensor]:
        own = {name: value * operator.num_tokens for name, value in operator.parameter_product(tree).items()}
        return {name: value / num_tokens for name, value in _summed(own, everyone).items()}

    sides = across(operator.sides)
    return replace(
        operator,
        token_product=token_product_of(lambda: sides, num_tokens, num_rows),
        reference_product=token_product_of(lambda: across(operator.reference_sides()), num_tokens, num_rows),
        num_rows=num_rows,
        num_tokens=num_tokens,
        trace=None,
        squared_norm=None,
        parameter_product=parameter_product,
        sides=sides,
        reference_sides=lambda: across(operator.reference_sides()),
        tokens=_numbered(tokens, operator.device),
        provenance=_of_all(operator.provenance, num_tokens, num_rows, everyone),
        fingerprint=lambda: {"ranks": hash_of([*map(dict, everyone.gathered("fingerprints", operator.fingerprint()))])},
    )


def _marks(operator: FisherOperator) -> dict[str, Any]:
    """What all ranks must have in common."""
    counts: dict[str, Any] = dict.fromkeys(("num_valid_tokens", "num_tokens", "num_rows"))
    own: dict[str, Any] = dict.fromkeys(("batch", "data", "summed_tokens", "mean_loss", "device", "seed"))
    return {"parameters": hash_of(operator.params), **replace(operator.provenance, **counts, **own).to_dict()}


def _of_all(own: Provenance, num_tokens: int, num_rows: int, everyone: Everyone) -> Provenance:
    each: list[Any] = everyone.gathered("provenance", own)
    return replace(
        own,
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_valid_tokens=sum(one.num_valid_tokens for one in each),
        mean_loss=sum(one.mean_loss * one.num_tokens for one in each) / num_tokens,
        batch=hash_of([one.batch for one in each])[:SHORT],
        num_ranks=len(each),
    )


def _numbered(each: list[Any], device: torch.device) -> Any:
    """The tokens of all ranks, with sequences counted over all of them."""
    before, found = 0, []
    for tokens in each:
        found.append(replace(tokens, sequence=tokens.sequence + before))
        before += int(tokens.sequence.max()) + 1
    return concatenated(found).map(lambda column: column.to(device))


def _summed(tree: dict[str, Tensor], everyone: Everyone) -> dict[str, Tensor]:
    return {name: everyone.summed(f"gradients of {name}", value) for name, value in tree.items()}
