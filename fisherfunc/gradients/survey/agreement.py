"""Whether losses of other calls are those of before, within what rounding does, and what it means where not."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff.nature import Nature
from fisherfunc.gradients.autodiff.pullback import leaves_of
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.rows.gradient_rows import losses_of
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.grams.tokens import Tokens

ROUNDING = 1024
"""In eps: what a loss may lose of its own, as it is a difference of logits, where little is left of these."""


def goes_on(sequence: int) -> str:
    """Say what it means that a sequence has other losses when it runs again."""
    return (
        f"sequence {sequence} has other losses when it runs again, where each call starts from the module as it was "
        "given: the model, or the loss, goes on from what it keeps elsewhere (in a class, a closure, a function); keep "
        "that in attributes of the module, or start it afresh in forward"
    )


def check_apart(each: Tokens, together: Tokens, loss: TokenLoss, nature: Nature, group: Sequence[int]) -> None:
    """Raise where the losses of sequences that run together are not those that each has alone."""
    if same_losses(each.loss, together.loss, nature):
        return
    if each.loss.shape != together.loss.shape:
        told = f"{len(together.loss)} tokens count in the batch and {len(each.loss)} of each alone"
    else:
        row = int((each.loss - together.loss).abs().nan_to_num().argmax())
        told = (
            f"at sequence {int(each.sequence[row])}, position {int(each.position[row])} it is "
            f"{together.loss[row].item():.6g} in the batch and {each.loss[row].item():.6g} alone"
        )
    which = f"sequences {group[0]} to {group[-1]}" if len(group) > 1 else f"sequence {group[0]} beside others"
    raise ValueError(f"of {which}, {told}: {samples_meet(loss)}")


def check_losses(work: Workload, losses: Float[Tensor, " n"]) -> None:
    """Raise where ordinary calls have other losses than the survey found, sequence by sequence.

    Args:
        work: What was surveyed; of rows for drawn targets the losses are not known.
        losses: Of its rows, by ordinary calls.

    Raises:
        ValueError: It says whether samples meet, or the model goes on from what it keeps elsewhere.
    """
    tokens = work.tokens
    if tokens.draw is not None or not tokens.loss.numel():
        return
    known, here = tokens.loss.double(), losses.double()
    columns = torch.stack([known, here, known - here, torch.ones_like(known)]).square()
    sums = columns.new_zeros(len(columns), len(work.sequences)).index_add_(1, tokens.sequence, columns)
    sizes, (off, counts) = sums[:2].amax(dim=0).sqrt(), sums[2:].sqrt()
    agrees = off <= _allowed(sizes, counts, work.nature)  # NaN does not
    if bool(agrees.all()):
        return
    for number in (~agrees).nonzero().squeeze(-1).tolist():
        rows = (tokens.sequence == number).nonzero().squeeze(-1)
        mine = tokens.select(rows)
        alone, again = _alone(work, mine), _alone(work, mine)
        if work.loss.each_alone or not same_losses(alone, again, work.nature):
            raise ValueError(goes_on(number))
        for together in (mine.loss, losses[rows]):
            check_apart(replace(mine, loss=alone), replace(mine, loss=together), work.loss, work.nature, [number])


def _alone(work: Workload, tokens: Tokens) -> Tensor:
    """The losses of some tokens of one sequence when it runs by itself."""
    losses = losses_of(work.fn, work.params, work.sequences, work.loss)(int(tokens.sequence[0]))
    return losses(leaves_of(work.params)).detach()[tokens.entry]


def samples_meet(loss: TokenLoss) -> str:
    """Say what it means that a batch has other losses, or gradients, than each of its samples alone."""
    return (
        f"the samples of a batch depend on each other, in the model or in the loss {loss.name!r}, so that a token's "
        "gradient in the batch is not that of its sample alone, which is what is computed; "
        "loss=ff.losses.each_alone(loss) says that each sample alone is meant"
    )


def same_losses(alone: Tensor, here: Tensor, nature: Nature) -> bool:
    """Return whether losses agree within rounding, all together: of a router a tie may be decided otherwise."""
    if alone.shape != here.shape:
        return False
    pair = torch.stack([alone, here]).double()
    if not bool(pair.isfinite().all()):
        finite = pair.isfinite().all(dim=0)
        return torch.equal(alone.isfinite(), here.isfinite()) and same_losses(alone[finite], here[finite], nature)
    size = torch.linalg.vector_norm(pair, dim=1).amax()
    return bool(torch.linalg.vector_norm(pair[0] - pair[1]) <= _allowed(size, len(alone) ** 0.5, nature))


def _allowed(size: Tensor, root: Tensor | float, nature: Nature) -> Tensor:
    """By how much losses of a norm may differ, the root of their number given."""
    eps = torch.finfo(nature.precision).eps
    return eps**0.5 * size + ROUNDING * eps * root
