"""The predictive distribution of a loss: what is drawn from it, and the losses of a position at several targets.

Softmax for losses of distribution "categorical", independent Bernoulli(σ(f)) for "bernoulli", N(f, 1) for "gaussian".
Axis order: n tokens, b sequences, s positions, t targets of a position, v classes or outputs; losses of all targets are
`(b, st)`, entry s · T + t.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.losses.binary import binary_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Predictive:
    """A family of distributions.

    Attributes:
        draw: (predictions `(n, v)`, uniform numbers, one a draw or one a draw and output) → targets, one a draw.
        losses: (predictions `(b, s, v)`, targets `(b, s, t, …)`) → −log p of each.
        every: Predictions → losses whose gradients are the rows of the exact true Fisher.
        num_uniform: Of (positions, classes or outputs), how many axes the uniform numbers of a draw have.
    """

    draw: Callable[[Tensor, Tensor], Tensor]
    losses: Callable[[Tensor, Tensor], Float[Tensor, "b st"]]
    every: Callable[[Tensor], Float[Tensor, "b sv"]]
    num_uniform: int


def predictive(loss: TokenLoss) -> Predictive:
    """That of a loss.

    Raises:
        ValueError: If it has none.
    """
    if loss.distribution not in _FAMILIES:
        raise ValueError(
            f"loss {loss.name!r} has distribution {loss.distribution!r}: no predictive distribution, and so no true "
            "Fisher; take targets=ff.targets.observed(), or one of ff.losses"
        )
    return _FAMILIES[loss.distribution]


def _classes(logits: Float[Tensor, "n v"], uniform: Float[Tensor, "n t"]) -> Int[Tensor, "n t"]:
    """The first class whose cumulative probability is above a uniform number."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return found.clamp(max=logits.shape[-1] - 1)


def _values(means: Float[Tensor, "n v"], uniform: Float[Tensor, "n t v"]) -> Float[Tensor, "n t v"]:
    """Means and standard normal noise."""
    noise = torch.special.ndtri(uniform.clamp(min=torch.finfo(uniform.dtype).tiny))
    return (means[:, None] + noise).to(torch.promote_types(means.dtype, torch.float32))


def _bits(logits: Float[Tensor, "n v"], uniform: Float[Tensor, "n t v"]) -> Float[Tensor, "n t v"]:
    """1 where a uniform number is below the probability of 1."""
    drawn = uniform < logits.double().sigmoid()[:, None]
    return drawn.to(torch.promote_types(logits.dtype, torch.float32))


def _log_losses(logits: Float[Tensor, "b s v"], targets: Int[Tensor, "b s t"]) -> Float[Tensor, "b st"]:
    return -_log_softmax(logits).gather(-1, targets).flatten(1)


def _square_losses(means: Float[Tensor, "b s v"], targets: Float[Tensor, "b s t v"]) -> Float[Tensor, "b st"]:
    return (means[:, :, None] - targets).square().sum(dim=-1).flatten(1) / 2


def _binary_losses(logits: Float[Tensor, "b s v"], targets: Float[Tensor, "b s t v"]) -> Float[Tensor, "b st"]:
    each = binary_cross_entropy(logits[:, :, None].expand(targets.shape), targets)
    return each.sum(dim=-1).flatten(1)


def _every_class(logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b sv"]:
    """√p_c · −log p_c; a class of probability zero has no gradient."""
    log_p = _log_softmax(logits)
    weight = (log_p / 2).exp().detach()
    return torch.where(weight > 0, -weight * log_p, 0.0).flatten(1)


def _every_logit(logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b sv"]:
    """√(p (1 − p)) f, p held constant; over y, the gradients (p − y) ∇f make p (1 − p) ∇f ∇fᵀ."""
    at_least_float32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p, log_q = (functional.logsigmoid(f).detach() for f in (at_least_float32, -at_least_float32))
    weight = ((log_p + log_q) / 2).exp()
    return torch.where(weight > 0, weight * at_least_float32, 0.0).flatten(1)


def _every_output(means: Float[Tensor, "b s v"]) -> Float[Tensor, "b sv"]:
    return means.flatten(1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


_FAMILIES = {
    "categorical": Predictive(draw=_classes, losses=_log_losses, every=_every_class, num_uniform=1),
    "bernoulli": Predictive(draw=_bits, losses=_binary_losses, every=_every_logit, num_uniform=2),
    "gaussian": Predictive(draw=_values, losses=_square_losses, every=_every_output, num_uniform=2),
}
