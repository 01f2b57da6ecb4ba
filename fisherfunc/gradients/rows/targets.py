"""Which targets the gradients are taken at, and so which Fisher F = (1/N) Gᵀ G is: `targets=ff.targets.…`.

| targets | rows of token n | F |
| --- | --- | --- |
| `observed()` | ∇ −log p(y_n), y_n of the batch | the empirical Fisher |
| `sampled(D)` | ∇ −log p(y_d) / √D, y_1 … y_D drawn from p | an estimate of the true Fisher, unbiased as a matrix |
| `all_classes()` | √p_c ∇ −log p_c, one a class c, p_c held constant | the true Fisher: the Gauss-Newton matrix |

p is the model's own distribution at the token: softmax for cross-entropy; N(f, 1) for regression, where draws are f + ε
and `all_classes` has a row ∇f_c an output; σ(f_c) for each logit of a binary classification, with a row
√(p_c (1 − p_c)) ∇f_c. N stays the number of tokens. Sources: Martens, "New insights and perspectives on the natural
gradient method", JMLR 2020; Kunstner, Hennig and Balles, "Limitations of the empirical Fisher approximation",
NeurIPS 2019. Axis order: b sequences, s positions, t targets of a position, v outputs.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.data.batches import Aimed
from fisherfunc.gradients.data.sequences import Sequences, one_by_one
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.losses.predictive import predictive
from fisherfunc.gradients.rows.gradient_rows import runs
from fisherfunc.gradients.rows.summed import of_first
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.linalg.grams.which_fisher import EMPIRICAL, EXACT, check_center, check_sums, monte_carlo

__all__ = ["Targets", "all_classes", "observed", "sampled"]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What `observed`, `sampled` and `all_classes` return.

    Attributes:
        name: What metadata call them, options included.
        fisher: Which Fisher their rows make.
        rows: (tokens of observed targets, options of the pass) → the rows.
    """

    name: str
    fisher: str
    rows: Callable[[Workload, PassOptions], Workload]


def observed() -> Targets:
    """The targets of the batch: the empirical Fisher."""
    return Targets(name="observed", fisher=EMPIRICAL, rows=lambda work, options: work)


def sampled(num_draws: int = 1, *, seed: int = 0) -> Targets:
    """Draw targets from the model's own distribution at each valid position: F is right on average, its spectrum not.

    Each entry of F has the expectation of the true Fisher's, and so has the trace. Eigenvalues are not linear in F: the
    largest is too large on average (Jensen), as is ‖F‖_F, the more so the fewer the draws. Rows of two sequences have
    independent draws, so that second moments, moments and effective dimensions of `ff.population`, which are made of
    products of distinct sequences, are those of the true Fisher at one draw as well.

    A draw depends on the seed, the number of its sequence, its position and its own number, and on the predictions
    there; on nothing else. Cost: one forward pass a sequence, then D rows a token.

    Args:
        num_draws: D, the draws a token.
        seed: Another seed, other draws.

    Raises:
        ValueError: If `num_draws` < 1.
    """
    if num_draws < 1:
        raise ValueError(f"sampled expected num_draws >= 1, got num_draws={num_draws}")

    def rows(work: Workload, options: PassOptions) -> Workload:
        _check_likelihood(work)
        sequences, target = _drawn(work, num_draws, seed)
        loss = _at_targets(work.loss, num_draws)
        return _multiplied(replace(work, fn=of_first(work.fn), sequences=sequences, loss=loss), num_draws, target)

    return Targets(name=f"sampled(num_draws={num_draws}, seed={seed})", fisher=monte_carlo(num_draws), rows=rows)


def all_classes() -> Targets:
    """Every class at its probability, every output of a regression, every binary logit: the true Fisher, exactly.

    Cost: V rows a token, for V classes or outputs. The pass raises a ValueError that states it where the Grams of
    these N V rows are beyond the memory limit.
    """

    def rows(work: Workload, options: PassOptions) -> Workload:
        every = predictive(work.loss).every
        count = _check_likelihood(work)
        _check_room(work, count, options)

        def losses(predictions: Float[Tensor, "b s v"], _: Any) -> Tensor:
            if predictions.shape[-1] != count:
                raise ValueError(f"all_classes expected {count} classes everywhere, got {predictions.shape[-1]}")
            return every(predictions)

        loss = replace(work.loss, targets=lambda batch: None, negative_log_likelihood=losses)
        target = torch.arange(count, device=work.tokens.sequence.device).repeat(work.num_tokens)
        return _multiplied(replace(work, loss=loss), count, target)

    return Targets(name="all_classes", fisher=EXACT, rows=rows)


def chosen(targets: Any, *, unit: str, center: bool = False) -> Targets:
    """The targets asked for, the observed ones where None.

    Raises:
        TypeError: If they are no targets.
        ValueError: If they are not for this unit, or not to be centred.
    """
    if targets in (observed, sampled, all_classes):
        raise TypeError(f"targets={targets.__name__} is a factory; call it: targets=ff.targets.{targets.__name__}()")
    found = observed() if targets is None else targets
    if not isinstance(found, Targets):
        raise TypeError(f"targets expected ff.targets.observed(), sampled(...) or all_classes(), got {targets!r}")
    if unit == "sequence":
        check_sums(found.fisher)
    if center:
        check_center(found.fisher)
    return found


def _drawn(work: Workload, num_draws: int, seed: int) -> tuple[Sequences, Tensor]:
    """The sequences with targets drawn at the positions of their tokens, and the targets of all tokens."""
    family = predictive(work.loss)
    sequences, found = [Aimed(sequence, torch.empty(0, device="cpu")) for sequence in work.sequences], []
    for first, last in runs(work.tokens.sequence):
        number, position = int(work.tokens.sequence[first]), work.tokens.position[first:last].cpu()
        predictions = _predictions(work, number)
        uniform = _uniform(seed, number, num_draws, predictions.shape[: family.num_uniform])
        drawn = family.draw(predictions.cpu()[position], uniform[position])
        everywhere = drawn.new_zeros(1, len(predictions), *drawn.shape[1:])
        everywhere[0, position] = drawn
        sequences[number] = Aimed(work.sequences[number], everywhere.to(predictions.device))
        found.append(drawn.flatten(0, 1))
    if len({drawn.shape[1:] for drawn in found}) > 1:
        raise ValueError(f"loss {work.loss.name!r}: samples have different numbers of outputs; make one run of each")
    return one_by_one(sequences), torch.cat(found).to(work.tokens.sequence.device)


def _at_targets(loss: TokenLoss, num_draws: int) -> TokenLoss:
    """The losses at the targets that a sequence comes with, over √num_draws."""
    family = predictive(loss)
    return replace(
        loss,
        predictions=lambda output, batch: loss.predictions(output, batch.sequence),
        targets=lambda batch: batch.targets,
        negative_log_likelihood=lambda predictions, targets: family.losses(predictions, targets) / num_draws**0.5,
    )


def _predictions(work: Workload, number: int) -> Float[Tensor, "s v"]:
    """The predictions of a sequence."""
    with torch.no_grad():
        return work.loss.predictions(work.fn.apply(work.params, work.sequences[number]), work.sequences[number])[0]


def _check_likelihood(work: Workload) -> int:
    """Hold the loss of the first sequence against the distribution that it names; the number of classes or outputs."""
    family = predictive(work.loss)
    if work.fn.sees_class:
        raise ValueError(
            f"{work.fn.name} predicts from the targets that it is given (a margin?), so there is no distribution to "
            "draw others from; take targets=ff.targets.observed(), or a model that is not given them"
        )
    first, last = next(runs(work.tokens.sequence))
    number, position = int(work.tokens.sequence[first]), work.tokens.position[first:last]
    predictions, targets = _predictions(work, number), work.loss.targets(work.sequences[number])
    assert targets is not None
    aimed = targets[:, :, None] if targets.is_floating_point() else targets[:, :, None].long().clamp(min=0)
    own, given = family.losses(predictions[None], aimed)[0, position], work.tokens.loss[first:last]
    tolerance = max(1e-3, torch.finfo(given.dtype).eps ** 0.5)
    if not torch.allclose(own, given.to(own), rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"loss {work.loss.name!r} has distribution {work.loss.distribution!r}, and is {given[0].item():.4g} where "
            f"minus its log-likelihood is {own[0].item():.4g}; name it 'custom', and take targets=ff.targets.observed()"
        )
    return predictions.shape[-1]


def _check_room(work: Workload, count: int, options: PassOptions) -> None:
    """Raise where the Grams of all classes are beyond the memory limit."""
    rows, num_grams = work.num_tokens * count, len({*map(options.label, work.params)})
    needed = (num_grams + 1) * rows**2 * options.gram_dtype.itemsize
    limit = options.limit(next(iter(work.params.values())).device)
    if needed > limit:
        raise ValueError(
            f"targets=all_classes() has {rows} rows, {work.num_tokens} tokens of {count} classes: {num_grams} Gram(s) "
            f"and one in the making need {needed} bytes ({needed / 2**30:.1f} GiB), memory_limit is {limit}; take "
            "targets=ff.targets.sampled(num_draws=...), which has a row a draw, fewer tokens, or a higher limit"
        )


def _multiplied(work: Workload, num_targets: int, target: Tensor) -> Workload:
    """Each token's row repeated, once for each of its targets."""
    tokens = replace(work.tokens, target=None).map(partial(torch.repeat_interleave, repeats=num_targets))
    draw = torch.arange(num_targets, device=target.device).repeat(work.num_tokens)
    return replace(work, tokens=replace(tokens, target=target, draw=draw, num_targets=num_targets))


def _uniform(seed: int, sequence: int, num_draws: int, shape: tuple[int, ...]) -> Float[Tensor, "s t ..."]:
    """Uniform numbers for each position and draw; each draw has its own generator, by a stable hash (SHA-1)."""

    def of(draw: int) -> Tensor:
        digest = hashlib.sha1(f"{seed}:{sequence}:{draw}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")

    return torch.stack([of(draw) for draw in range(num_draws)], dim=1)
