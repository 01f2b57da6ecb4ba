"""F x and (F + γI)⁻¹ x on parameter-shaped trees {name: tensor}, without the rows of G.

F = (1/N) Gᵀ H G, with H = I or, where rows are centred, H = I − 11ᵀ/N.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.directions.matching import grams_of_parameters, rows_of
from fisherfunc.gradients.directions.passes import Passes, passes_of
from fisherfunc.gradients.directions.products import adjoint_methods, derivatives_along, weighted_gradients
from fisherfunc.gradients.losses.asked import AnyLoss
from fisherfunc.gradients.rows.summed import summed
from fisherfunc.gradients.survey.prepare import check_options, prepared
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.kernels import gram_eigh
from fisherfunc.linalg.lifting import solved
from fisherfunc.linalg.trees import check_alike
from fisherfunc.records.axes import Batch, Params
from fisherfunc.runtime.precision import full_precision

Product = Callable[[Params], dict[str, Tensor]]
"""x → A x, on trees of the shape of the parameters."""


def fisher_vector_product(
    fn: ModelFunction,
    params: Params,
    batch: Batch,
    loss: AnyLoss,
    *,
    unit: str = "token",
    num_tokens: int | None = None,
    seed: int = 0,
    center: bool = False,
) -> Product:
    """The product F x = (1/N) Gᵀ(G x), for the F of `token_grams` with the same arguments. Exact; no row of G is held.

    Cost: a forward pass a sequence and a product at once; then, each product, a Jacobian-vector and a vector-Jacobian
    product a sequence. Where an operation of the model has no forward-mode derivative, or one that is not adjoint to
    the backward pass, a second derivative takes its place, and else a backward pass a token.

    Args:
        fn: The model as a pure function.
        params: Where to differentiate, and by what: those of a block give its diagonal block of F.
        batch: A batch, or a list of them.
        loss: The token loss.
        unit: What a row of G is: "token" or "sequence".
        num_tokens: At most this many tokens, picked by seed.
        seed: Of whatever is picked.
        center: Whether to subtract the mean row: the gradient covariance.

    Returns:
        x → F x, in the dtype of the parameters, or float32 if that is narrower. It raises a ValueError where names or
        shapes of a tree differ from those of `params`; the error names them.

    Raises:
        ValueError: If no token is valid, an option is out of range, a loss is not finite, or the backward pass is not
            linear in what comes from above (gradients are clipped on their way).

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994; Schraudolph, "Fast
    curvature matrix-vector products for second-order gradient descent", Neural Computation 2002.
    """
    check_options(num_tokens, None, None, "factored", unit)
    with full_precision(), torch.inference_mode(mode=False):
        work = prepared(fn, params, batch, loss, num_tokens=num_tokens, seed=seed).work
        work = summed(work) if unit == "sequence" else work
        passes = passes_of(work)
        return product_with(passes, num_units=passes.num_rows, center=center)


def product_with(passes: Passes, *, num_units: int, center: bool) -> Product:
    """The product (1/N) Gᵀ H G x.

    Args:
        passes: Over the rows.
        num_units: N.
        center: Whether to subtract the mean row.
    """
    derivatives = _derivatives(passes)

    @full_precision()
    @torch.inference_mode(mode=False)
    def product(tree: Params) -> dict[str, Tensor]:
        along = projected(derivatives(tree), center=center)
        total = weighted_gradients(passes, along[None])
        return {name: value[0] / num_units for name, value in total.items()}

    return product


@full_precision()
@torch.inference_mode(mode=False)
def damped_inverse(
    fn: ModelFunction, params: Params, batch: Batch, loss: AnyLoss, grams: TokenGrams, *, gamma: int | float
) -> Product:
    """The product (F + γI)⁻¹ x = (x − Gᵀ (K + NγI)⁻¹ G x)/γ, by Woodbury's identity in N dimensions.

    Cost: a forward pass a sequence, a product and 5/3 N³ operations at once; then, each product, a Jacobian-vector and
    a vector-Jacobian product a sequence. Round-off is about λ_max/γ times that of the model's dtype.

    Args:
        fn: The model as a pure function.
        params: Where to differentiate, and by what: those of a block give its diagonal block of F.
        batch: What the Grams are of.
        loss: Their loss.
        grams: Grams of the parameters; where they are centred, F is the gradient covariance.
        gamma: γ, the damping.

    Returns:
        x → (F + γI)⁻¹ x (see `fisher_vector_product`).

    Raises:
        ValueError: If γ is not positive or below the resolution of the Grams, or the Grams are not of these parameters,
            this batch and this loss.

    Source: Woodbury, "Inverting modified matrices", Princeton 1950.
    """
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma expected a positive number, got gamma={gamma!r}; F alone has no inverse where P > N")
    work = rows_of(grams, fn, params, batch, loss)
    names = grams_of_parameters(grams, work.params)
    gram, spectrum = grams.block(names), solved(gram_eigh(), grams.summed(names))
    if gamma < spectrum.resolution:
        raise ValueError(
            f"gamma={gamma!r} is below the resolution {spectrum.resolution.item():.1e} of these Grams: the inverse "
            "would be one of round-off; take a larger gamma, or compute in float64"
        )
    damped = gram.double() + grams.num_units * gamma * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    factor = torch.linalg.cholesky(damped)
    derivatives = _derivatives(passes := passes_of(work))

    @full_precision()
    @torch.inference_mode(mode=False)
    def product(tree: Params) -> dict[str, Tensor]:
        along = projected(derivatives(tree), center=grams.centered)
        solved = torch.cholesky_solve(along[:, None], factor)[:, 0]
        inside = weighted_gradients(passes, solved[None])  # H solved = solved: its right side and K are centred
        return {name: (tree[name].to(value) - value[0]) / gamma for name, value in inside.items()}

    return product


def projected(weights: Tensor, *, center: bool) -> Tensor:
    """H u: weights `(…, n)` less their mean where rows are centred."""
    return weights - weights.mean(dim=-1, keepdim=True) if center else weights


def _derivatives(passes: Passes) -> Callable[[Params], Tensor]:
    """X → G x, by methods that are found once."""
    methods = adjoint_methods(passes)
    shapes = {name: p.shape for name, p in passes.params.items()}

    def along(tree: Params) -> Tensor:
        check_alike(tree, shapes, what="the tree")
        return derivatives_along(passes, tree, methods)

    return along
