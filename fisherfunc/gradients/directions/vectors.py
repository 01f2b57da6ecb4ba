"""Leading eigenvectors of F in parameter space, by weighted backward passes: v = Gᵀu/√(λN), where K u = λN u.

With centred rows G is HG, so that v = Gᵀ(Hu)/√(λN). Axis order: vectors {name: (k, *shape)}, coefficients `(k, n)`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.directions.matching import (
    WHOLE,
    grams_of_parameters,
    names_of_block,
    restricted,
    rows_of,
    rule_of,
)
from fisherfunc.gradients.directions.operators import Product, product_with, projected
from fisherfunc.gradients.directions.passes import passes_of
from fisherfunc.gradients.directions.products import weighted_gradients
from fisherfunc.gradients.losses.asked import AnyLoss
from fisherfunc.linalg.grams.eigenpairs import Eigenpairs, leading_pairs
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.subspaces import departure, orthonormalised
from fisherfunc.linalg.trees import inner, stacked
from fisherfunc.population.clusters import clusters_of
from fisherfunc.population.leading import held_out
from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.provenance import Provenance
from fisherfunc.records.record import record
from fisherfunc.runtime.precision import full_precision


@record(static=("label",), notes=("provenance",))
class Eigenvectors(Eigenpairs):
    """The leading eigenvectors of F, or of one of its blocks, in parameter space.

    Attributes:
        eigenvalues: λ_k of F, largest first, all above the resolution.
        coefficients: u_k, of norm 1: u_n = ⟨g_n, v⟩/√(λN), so that u_n² is the share of token n in λ; of centred
            Grams ⟨g_n − ḡ, v⟩/√(λN), ḡ the mean row.
        resolution: What eigenvalues are told from zero above.
        tokens: Which token (or sequence) each entry of u_k is.
        out_of_sample: What direction k of all other sequences holds of a sequence, per token; see `Eigenpairs`.
        vectors: v_k, {name: (k, *shape)}, orthonormal over all tensors together.
        residuals: ‖F v − λ v‖/λ, by products with F that do not use the Grams.
        label: The block.
        provenance: What F this is, of which Grams, and how far the vectors were from orthonormal before and after they
            were made so.
    """

    vectors: dict[str, Tensor]
    residuals: Float[Tensor, " k"]


def eigenpairs(
    grams: TokenGrams, *, num: int = 1, block: str | None = None, blocks: Callable[[str], str] | None = None
) -> Eigenpairs:
    """The leading eigenvalues and what each token contributes to them, from Grams alone. Cost about 9 N³ operations.

    With what each direction of all other sequences holds of a sequence, which tells those that exist beyond the sample
    from those that are one token.

    Args:
        grams: The Grams of a pass.
        num: How many.
        block: The label of a block; the full matrix where None.
        blocks: Parameter name → label; where None, the blocks that the Grams were accumulated by, or `by_layer`.

    Raises:
        ValueError: If there is no such block, or fewer eigenvalues are above the resolution.
    """
    return _pairs(grams, names_of_block(grams.labels or grams.grams, block, rule_of(grams, blocks)), block, num)


@full_precision()
@torch.inference_mode(mode=False)
def eigenvectors(
    fn: ModelFunction,
    params: Params,
    batch: Batch,
    loss: AnyLoss,
    grams: TokenGrams,
    *,
    num: int = 1,
    block: str | None = None,
    blocks: Callable[[str], str] | None = None,
) -> Eigenvectors:
    """The leading eigenvectors v = Gᵀu/√(λN) of F, or of a diagonal block of it, in parameter space.

    Vectors are made orthonormal by the inverse square root of their Gram, which moves them least; the provenance says
    how far from it they were. Cost: the eigenvectors of the Gram (9 N³ operations), a forward pass a sequence, a
    weighted backward pass a sequence and vector, and for the residuals a product with F a vector. Two stacks of
    vectors are held.

    Args:
        fn: The model as a pure function.
        params: Where the Grams are of.
        batch: What the Grams are of.
        loss: Their loss.
        grams: The Grams of a pass; where they are centred, F is the gradient covariance.
        num: k, how many vectors.
        block: The label of a block; the full matrix where None.
        blocks: Parameter name → label; where None, the blocks that the Grams were accumulated by, or `by_layer`.

    Raises:
        ValueError: If there is no such block, fewer eigenvalues are above the resolution, or the Grams are not of these
            parameters, this batch and this loss.

    Example:
        >>> import fisherfunc as ff
        >>> fn = ff.functionalize(torch.nn.Linear(1, 1, bias=False))
        >>> batch, loss = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]])), ff.losses.regression()
        >>> params = {"weight": torch.tensor([[3.0]])}
        >>> found = eigenvectors(fn, params, batch, loss, ff.token_grams(fn, params, batch, loss))
        >>> round(found.eigenvalues.item(), 3), found.vectors["weight"].flatten()
        (76.5, tensor([1.]))
    """
    some = restricted(params, names_of_block(params, block, rule_of(grams, blocks)))
    pairs = _pairs(grams, some, block, num)
    passes = passes_of(rows_of(grams, fn, some, batch, loss))
    weights = pairs.coefficients / (pairs.eigenvalues * grams.num_units).sqrt()[:, None]
    raw = weighted_gradients(passes, projected(weights, center=grams.centered))
    vectors, error = orthonormalised(raw)
    del raw
    product = product_with(passes, num_units=grams.num_units, center=grams.centered)
    return Eigenvectors(
        eigenvalues=pairs.eigenvalues,
        coefficients=pairs.coefficients,
        resolution=pairs.resolution,
        tokens=pairs.tokens,
        out_of_sample=pairs.out_of_sample,
        vectors=vectors,
        residuals=torch.stack([_residual(product, vectors, row, value) for row, value in enumerate(pairs.eigenvalues)]),
        label=pairs.label,
        provenance=replace(
            pairs.provenance, orthonormality_before=error, orthonormality=departure(inner(vectors, vectors))
        ),
    )


def _pairs(grams: TokenGrams, names: Iterable[str], block: str | None, num: int) -> Eigenpairs:
    chosen = grams_of_parameters(grams, names)
    values, coefficients, resolution = leading_pairs(grams, chosen, num=num)
    num_params = sum(grams.num_params[label] for label in chosen)
    known = grams.provenance
    provenance = Provenance(
        fisher=known.fisher,
        targets=known.targets,
        loss=known.loss,
        seed=known.seed,
        dtype=known.dtype,
        unit=grams.unit,
        centered=grams.centered,
        num_tokens=grams.num_units,
        num_params=num_params,
    )
    return Eigenpairs(
        eigenvalues=values,
        coefficients=coefficients,
        resolution=resolution,
        tokens=grams.tokens,
        out_of_sample=_out_of_sample(grams, chosen, num),
        label=WHOLE if block is None else block,
        provenance=provenance,
    )


def _out_of_sample(grams: TokenGrams, chosen: Iterable[str], num: int) -> Float[Tensor, " k"] | None:
    try:
        clusters = clusters_of(grams, None, "a direction")
    except ValueError:  # centred, sampled, or too few sequences
        return None
    return held_out(grams.block(chosen).double(), clusters, num).eigenvalues


def _residual(product: Product, vectors: Params, row: int, eigenvalue: Tensor) -> Tensor:
    """‖F v − λ v‖/λ."""
    v = {name: stack[row] for name, stack in vectors.items()}
    rest = stacked({name: value - eigenvalue.to(value) * v[name] for name, value in product(v).items()})
    return inner(rest, rest)[0, 0].sqrt() / eigenvalue
