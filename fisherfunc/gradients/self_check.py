"""A check of Grams by ordinary backward passes, one a sequence.

For random weights c on a few tokens, cᵀ K_p c = ‖Σ_n c_n ∇_p ℓ_n‖², and the right side is the squared gradient of the
weighted loss: what every training step computes, with no batching, factor or assumption of sparsity in it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherfunc.gradients.nature import coarsest
from fisherfunc.gradients.pullback import leaves_of, strided
from fisherfunc.gradients.rows import losses_of, runs
from fisherfunc.gradients.workload import Workload


def gram_errors(
    grams: Mapping[str, Tensor],
    work: Workload,
    *,
    labels: Mapping[str, str] | None = None,
    seed: int = 0,
    room: int | None = None,
) -> dict[str, float]:
    """|cᵀ K c − ‖Σ_n c_n ∇ℓ_n‖²| over Σ_n c_n² K_nn a parameter or label, c drawn by seed, one entry a token.

    Args:
        grams: Of the tokens.
        work: The tokens.
        labels: {parameter: the label that its Gram was added under}.
        seed: Of the weights.
        room: Bytes of gradients at a time, each time by passes of their own; all at once where None.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(work.num_tokens, generator=generator, dtype=torch.float64, device="cpu")
    matrices = {name: gram.double().cpu() for name, gram in grams.items()}
    sizes = {name: float(weights.square() @ matrix.diagonal()) for name, matrix in matrices.items()}
    floor = torch.finfo(weights.dtype).tiny + sum(sizes.values()) * _eps(work)
    found = {name: float(weights @ matrix @ weights) for name, matrix in matrices.items()}
    expected = dict.fromkeys(matrices, 0.0)
    for names in parts(work.params, room):
        for name, g in _weighted_gradient(work, weights, names).items():
            size = float(torch.linalg.vector_norm(g, dtype=torch.float64))
            expected[name if labels is None else labels[name]] += size**2
    return {name: abs(found[name] - expected[name]) / (sizes[name] + floor) for name in matrices}


def wrong(errors: Mapping[str, float], work: Workload) -> list[str]:
    """The parameters whose error is beyond round-off: a wrong rule is off by percents (or by NaN)."""
    tolerance = max(_eps(work) ** 0.5, 1e-3)
    return [name for name, error in errors.items() if not error <= tolerance]


def _eps(work: Workload) -> float:
    """Of the coarsest dtype that anything was computed in: weights of a finer one make nothing more exact."""
    return torch.finfo(coarsest(work.nature.precision, *(p.dtype for p in work.params.values()))).eps


def parts(params: Mapping[str, Tensor], room: int | None) -> list[list[str]]:
    """The parameters in parts whose gradients take so many bytes, or are those of one."""
    found: list[list[str]] = [[]]
    left = room
    for name, param in params.items():
        size = param.numel() * param.element_size()
        if left is not None and room is not None:
            if size > left and found[-1]:
                found.append([])
                left = room
            left -= size
        found[-1].append(name)
    return found


def _weighted_gradient(work: Workload, weights: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Σ_n c_n ∇_p ℓ_n for some parameters."""
    leaves = leaves_of(work.params)
    losses = losses_of(work.fn, work.params, work.sequences, work.loss)
    for first, last in runs(work.tokens.sequence):
        with torch.enable_grad():
            values = losses(int(work.tokens.sequence[first]))(leaves)[work.tokens.entry[first:last]]
        weighted = weights[first:last].to(values) @ values
        # This adds in place, as it goes: one gradient is held, not three.
        weighted.backward(inputs=[leaves[name] for name in names])
    gradients = {name: leaves[name].grad for name in names}
    return {name: strided(gradient) for name, gradient in gradients.items() if gradient is not None}
