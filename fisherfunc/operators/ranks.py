"""The operator of all ranks of a `torch.distributed` group, each with its own sequences; every vector is on each rank.

With G the rows of rank 0, then of rank 1 and so on, Gᵀ u is the sum over ranks of Gᵣᵀ uᵣ, and G v their G_r v one after
the other: one all-reduce of P numbers and one all-gather of n a product. All collectives of operators are here; each
waits as long as the group's timeout says.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fisherfunc.linalg.tokens import concatenated
from fisherfunc.operators.fisher import FisherOperator, Sides, token_product_of
from fisherfunc.records.axes import Params
from fisherfunc.records.hashing import hash_of


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
    everyone = _gathered_objects({"marks": _marks(operator), "tokens": operator.tokens.map(Tensor.cpu)}, group)
    _check_alike([each["marks"] for each in everyone])
    counts = [len(each["tokens"].sequence) for each in everyone]
    rank, num_rows = dist.get_rank(group), sum(counts)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    num_tokens = num_rows // operator.tokens.num_targets

    def across(sides: Sides) -> Sides:
        def gradient(u: Tensor) -> dict[str, Tensor]:
            if u.shape != (num_rows,):
                raise ValueError(f"u expected a weight for each of {num_rows} rows, got shape {tuple(u.shape)}")
            return _summed(sides.weighted_gradient(u[mine]), group)

        def along(tree: Params, slope: float | None) -> Tensor:
            return _joined(sides.derivatives(tree, slope), counts, group)

        return Sides(weighted_gradient=gradient, derivatives=along)

    def parameter_product(tree: Params) -> dict[str, Tensor]:
        own = {name: value * operator.num_tokens for name, value in operator.parameter_product(tree).items()}
        return {name: value / num_tokens for name, value in _summed(own, group).items()}

    sides = across(operator.sides)
    metadata = _joined_metadata(operator, num_tokens, num_rows, group)
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
        tokens=_numbered([each["tokens"] for each in everyone], operator.device),
        metadata=metadata,
        fingerprint=lambda: {"ranks": hash_of([dict(one) for one in _gathered_objects(operator.fingerprint(), group)])},
    )


def _marks(operator: FisherOperator) -> dict[str, Any]:
    """What all ranks must have in common."""
    facts = ("loss", "loss_id", "shift", "targets", "unit", "dtype", "derivative", "round_off_measured_by", "versions")
    return {"parameters": hash_of(operator.params), **{name: operator.metadata[name] for name in facts}}


def _check_alike(marks: list[Mapping[str, Any]]) -> None:
    for rank, other in enumerate(marks[1:], start=1):
        differing = [name for name in marks[0] if marks[0][name] != other[name]]
        if differing:
            raise ValueError(
                f"rank {rank} and rank 0 differ in {differing[0]}: {other[differing[0]]} and {marks[0][differing[0]]}; "
                "give all ranks the same model, loss and options, and each its own sequences"
            )


def _joined_metadata(operator: FisherOperator, num_tokens: int, num_rows: int, group: Any) -> dict[str, Any]:
    own = {name: operator.metadata[name] for name in ("batch", "num_tokens", "num_valid_tokens", "mean_loss")}
    each = _gathered_objects(own, group)
    return {
        **operator.metadata,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "num_valid_tokens": sum(one["num_valid_tokens"] for one in each),
        "mean_loss": sum(one["mean_loss"] * one["num_tokens"] for one in each) / num_tokens,
        "batch": hash_of([one["batch"] for one in each])[: len(own["batch"])],
        "num_ranks": len(each),
    }


def _numbered(each: list[Any], device: torch.device) -> Any:
    """The tokens of all ranks, with sequences counted over all of them."""
    before, found = 0, []
    for tokens in each:
        found.append(replace(tokens, sequence=tokens.sequence + before))
        before += int(tokens.sequence.max()) + 1
    return concatenated(found).map(lambda column: column.to(device))


def _summed(tree: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    for value in tree.values():
        dist.all_reduce(value, group=group)
    return tree


def _joined(mine: Tensor, counts: list[int], group: Any) -> Tensor:
    """The numbers of all ranks, one after the other; shorter ones are filled up on their way."""
    longest = max(counts)
    sent = torch.cat([mine, mine.new_zeros(longest - len(mine))])
    received = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(received, sent, group=group)
    return torch.cat([values[:count] for values, count in zip(received, counts, strict=True)])


def _gathered_objects(value: Any, group: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
