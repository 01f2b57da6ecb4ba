"""From Grams back to what they are of: the block's parameters, and the tokens as rows that can be passed over again."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.data.sources import first_of
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.losses.asked import AnyLoss, token_loss_of
from fisherfunc.gradients.rows.summed import summed
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.gradients.survey.prepare import prepared
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.partitioning import by_layer, partition
from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.provenance import Provenance

WHOLE = "full matrix"
Rule = Callable[[str], str]


def names_of_block(names: Iterable[str], block: str | None, rule: Rule) -> tuple[str, ...]:
    """The parameters of a block, those with its label; all of them where `block` is None.

    Raises:
        ValueError: If no block is called so; it names those that there are.
    """
    if block is None:
        return tuple(names)
    parts = partition(names, rule)
    if block not in parts:
        raise ValueError(
            f"there is no block {block!r}; the blocks are {list(parts)}; give one of them, or other blocks"
        )
    return parts[block]


def rule_of(grams: TokenGrams, blocks: Rule | None) -> Rule:
    """The given rule, else the blocks that the Grams were accumulated by, else `by_layer`."""
    labels = grams.labels
    return blocks or (by_layer if labels is None else lambda name: labels.get(name, name))


def grams_of_parameters(grams: TokenGrams, names: Iterable[str]) -> list[str]:
    """The names of the Grams whose sum is that of exactly these parameters.

    Raises:
        ValueError: If one has no Gram, or its Gram is also of others.
    """
    labels = grams.labels or {name: name for name in grams.grams}
    wanted = set(names)
    missing = sorted(wanted - set(labels))
    if missing:
        raise ValueError(
            f"there is no Gram for {missing}; there are Grams for {list(labels)}; leave those out of params"
        )
    chosen = [label for label in grams.grams if any(labels[name] == label for name in wanted)]
    others = sorted(name for name, label in labels.items() if label in chosen and name not in wanted)
    if others:
        raise ValueError(
            f"the Grams {chosen} are also of {others}; take in these parameters as well, or pass again with finer "
            "blocks in token_grams"
        )
    return chosen


def rows_of(grams: TokenGrams, fn: ModelFunction, params: Params, batch: Batch, loss: AnyLoss) -> Workload:
    """The rows of Grams as a workload. Cost: a forward pass a sequence, by which their losses are compared.

    Args:
        grams: The Grams.
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        batch: The batch, or list of batches, that the Grams are of.
        loss: Their loss.

    Raises:
        ValueError: If the Grams are not of this model, batch and loss, or their rows are not plain gradients of them.
    """
    facts = grams.provenance
    batch = first_of(batch, facts.data["num_batches"]) if facts.data else batch
    loss = token_loss_of(loss, batch)
    _check_plain(facts, loss)
    ready = prepared(
        fn,
        params,
        batch,
        loss,
        num_tokens=facts.num_summed_tokens,  # of sequences: the tokens that their rows are sums of
        seed=facts.seed or 0,
        drop_nonfinite=True,
    )
    work = summed(ready.work) if grams.unit == "sequence" else ready.work
    work = work.select(_index(grams, work))
    _check_losses(grams, work)
    return work


def _check_plain(facts: Provenance, loss: TokenLoss) -> None:
    if facts.targets not in (None, "observed"):
        raise ValueError(
            f"directions are of gradients of the observed targets, and these Grams are of "
            f"targets={facts.targets!r}; compute them with the observed ones"
        )
    if facts.sampled_parameters:
        raise ValueError(
            f"these Grams are of a sample of the coordinates of {facts.sampled_parameters}, or of projections, "
            "which have no directions in parameter space; compute them without max_coordinates, and without a sketch"
        )
    if facts.loss not in (None, loss.name):
        raise ValueError(f"these Grams are of the loss {facts.loss!r}, got loss {loss.name!r}; give them the same")


def _index(grams: TokenGrams, work: Workload) -> Tensor:
    """Where each row of the Grams is among those of a workload."""
    position = grams.tokens.position.clamp(min=0)  # sequences have none in results
    known = zip(work.tokens.sequence.tolist(), work.tokens.position.tolist(), strict=True)
    place = {key: row for row, key in enumerate(known)}
    wanted = list(zip(grams.tokens.sequence.tolist(), position.tolist(), strict=True))
    for sequence, at in wanted:
        if (sequence, at) not in place:
            raise ValueError(
                f"the Grams have a row for sequence {sequence}, position {at}, where this batch has no valid token; "
                "give the batch that they were computed from"
            )
    return torch.tensor([place[key] for key in wanted], device="cpu")


def _check_losses(grams: TokenGrams, work: Workload) -> None:
    expected, found = grams.tokens.loss.double().cpu(), work.tokens.loss.double().cpu()
    eps = max(torch.finfo(dtype).eps for dtype in (grams.precision, *(p.dtype for p in work.params.values())))
    wrong = (found - expected).abs() > eps**0.5 * (1 + expected.abs())
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"the loss of sequence {int(grams.tokens.sequence[row])}, position {int(grams.tokens.position[row])} is "
            f"{found[row].item():.6g} here, and {expected[row].item():.6g} in the Grams; give the model, parameters, "
            "batch and loss that they were computed from (of sums over chosen tokens, keep the Grams of the tokens)"
        )


def restricted(params: Params, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters of these names."""
    return {name: params[name] for name in names}
