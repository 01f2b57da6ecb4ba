"""F = (1/N) Gᵀ G as an operator on both of its sides: over the rows of G (tokens), and over the parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.directions.matching import names_of_block, restricted
from fisherfunc.gradients.directions.passes import Passes, groups_of, passes_over
from fisherfunc.gradients.directions.products import gradient_of_derivatives
from fisherfunc.gradients.fingerprint import fingerprint
from fisherfunc.gradients.losses.asked import AnyLoss
from fisherfunc.gradients.provenance import provenance_of_rows
from fisherfunc.gradients.rows.subsample import EVERY
from fisherfunc.gradients.rows.summed import summed
from fisherfunc.gradients.rows.targets import Targets, chosen
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.gradients.survey.prepare import Prepared, check_options, prepared
from fisherfunc.linalg.grams.tokens import Tokens
from fisherfunc.linalg.krylov.token_operator import TokenOperator
from fisherfunc.linalg.trees import check_alike
from fisherfunc.operators.sweeps import (
    DERIVATIVES,
    FORWARD_MODE,
    Difference,
    Way,
    chosen_way,
    derivatives,
    gradient_along,
    name_of,
    norm,
    shares_primal,
    tried_difference,
    weighted_gradient,
)
from fisherfunc.partitioning import by_layer
from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.containers import mapped
from fisherfunc.records.provenance import Provenance, Traced
from fisherfunc.runtime.precision import full_precision

ANYTHING = 2**62
"""No limit of memory: rows are never held here."""
DIVIDED = 4
"""Into how many parts a group is divided for a sweep with a shared primal pass, which saves 3.9 times as much as a
backward pass does (measured on the embedded model)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sides:
    """The two halves of every product.

    Attributes:
        weighted_gradient: u → Gᵀ u.
        derivatives: (v, ‖G v‖/√n where it is known) → G v.
    """

    weighted_gradient: Callable[[Float[Tensor, " n"]], dict[str, Tensor]]
    derivatives: Callable[[Params, float | None], Float[Tensor, " n"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class FisherOperator(TokenOperator, Traced):
    """Products with F over its rows and over parameters; nothing of size N² or N · P is held.

    Attributes:
        token_product: u → K u/N, of a float64 vector over the rows, as a float64 vector.
        reference_product: The same with the model in float64; in float64 itself, `token_product`, or with a central
            difference of twice the step. The round-off of certificates is measured by it.
        num_rows: n, the rows of G: tokens, or sequences, once for each of their targets.
        num_tokens: N, what K is divided by.
        num_params: P.
        device: Where vectors lie.
        trace: tr F, where it is known.
        squared_norm: ‖F‖_F², where it is known.
        inexact: 0, as nothing was rounded to be stored.
        name: The model, and the block.
        block_product: None, as several vectors cost as much as one by one.
        parameter_product: v → F v, of a tree of the shape of the parameters, in their dtype or float32 if narrower.
        sides: The two halves of a product.
        reference_sides: () → those of the reference product.
        params: Where F is, and by what.
        tokens: Which token (or sequence) each row is.
        derivative: How derivatives are taken: "forward mode", "double backward" and "rows", exact but for round-off, or
            "central difference".
        reference: What round-off is measured against, in words.
        provenance: What F this is, as that of `token_grams`.
        fingerprint: () → what every product depends on, in a few lines of text.
    """

    parameter_product: Callable[[Params], dict[str, Tensor]]
    sides: Sides
    reference_sides: Callable[[], Sides]
    params: dict[str, Tensor]
    tokens: Tokens
    derivative: str
    reference: str
    provenance: Provenance
    fingerprint: Callable[[], Mapping[str, str]]

    def weighted_gradient(self, u: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """Gᵀ u, the gradient of Σ uₙ ℓₙ; Gᵀy/√(λN) is an eigenvector of F for an eigenvector y of K of norm 1."""
        return self.sides.weighted_gradient(u)

    def derivatives(self, v: Params) -> Float[Tensor, " n"]:
        """G v, the derivative of each loss along v, in float64."""
        return self.sides.derivatives(v, None)

    def to_scipy(self, space: str = "token") -> Any:
        """Return a SciPy LinearOperator, symmetric and in float64: `(n, n)` over rows, or `(P, P)` over parameters.

        Args:
            space: "token", or "parameter": the entries of all tensors, flattened one after the other.

        Raises:
            ValueError: If the space is neither.
        """
        from scipy.sparse.linalg import LinearOperator

        if space not in ("token", "parameter"):
            raise ValueError(f"to_scipy expected space 'token' or 'parameter', got space={space!r}")
        sizes = [p.numel() for p in self.params.values()]

        def over_tokens(x: Any) -> Any:
            u = torch.tensor(x, dtype=torch.float64, device=self.device).reshape(-1)
            return self.token_product(u).cpu().numpy()

        def over_parameters(x: Any) -> Any:
            flat = torch.tensor(x, dtype=torch.float64, device=self.device).reshape(-1).split(sizes)
            tree = {name: v.reshape(p.shape) for (name, p), v in zip(self.params.items(), flat, strict=True)}
            found = self.parameter_product(tree)
            return torch.cat([found[name].double().flatten() for name in self.params]).cpu().numpy()

        size, product = (self.num_rows, over_tokens) if space == "token" else (sum(sizes), over_parameters)
        return LinearOperator((size, size), matvec=product, rmatvec=product, dtype="float64")


@full_precision()
@torch.inference_mode(mode=False)
def fisher(
    fn: ModelFunction,
    params: Params,
    batches: Batch,
    loss: AnyLoss,
    *,
    targets: Targets | None = None,
    block: str | None = None,
    blocks: Callable[[str], str] = by_layer,
    unit: str = "token",
    num_tokens: int | None = None,
    seed: int = 0,
    derivative: str = "auto",
    trace: float | None = None,
) -> FisherOperator:
    """Return F, the same as that of `token_grams` with the same arguments, as an operator over rows and parameters.

    A product over rows is a backward pass of the u-weighted sum of the losses over the batches, then a derivative along
    what it gave: about six forward passes, five by central differences. A product over parameters is one sweep, about
    five. At once: some fourteen forward passes, by which tokens are found, sequences that run together are held
    against each alone, and derivatives against the backward pass. Memory beyond the model: a gradient, and what a pass
    saves for its backward pass; over parameters four times that where a pass is of a single sequence, as several are
    divided into four.

    Args:
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        batches: A batch, a list of them, or what gives them one after the other, as of `fisher_spectrum`; what is
            needed is read once, and passed over in each product.
        loss: The token loss: one of `ff.losses`, a loss of torch, or a function (output, batch) → losses.
        targets: Which Fisher: `ff.targets.observed()`, also where None, `sampled(num_draws)` or `all_classes()`.
        block: The label of a block of parameters, whose diagonal block of F it is; all of `params` where None.
        blocks: Parameter name → label.
        unit: What a row of G is: "token" or "sequence".
        num_tokens: At most this many tokens, picked by seed.
        seed: Of whatever is picked.
        derivative: "forward mode", "central difference" of two forward passes, or "auto": forward mode where the model
            has it, and its derivatives are adjoint to the backward pass; else differences, "double backward" or "rows",
            the first that is. The error of a central difference is measured with the round-off, and is in every
            certificate.
        trace: tr F, where it is known: `ff.gradient_norms(…).sum() / N`.

    Raises:
        ValueError: If no token is valid, there is no such block, an option is out of range, a loss is not finite, or no
            derivative, or not the one asked for, is adjoint to the backward pass.

    Example:
        >>> import fisherfunc as ff
        >>> fn = ff.functionalize(torch.nn.Linear(1, 1, bias=False))
        >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))
        >>> operator = fisher(fn, {"weight": torch.tensor([[3.0]])}, batch, ff.losses.regression())
        >>> operator.token_product(torch.tensor([1.0, 0.0], dtype=torch.float64))  # the rows of G are 3 and 12
        tensor([ 4.5000, 18.0000], dtype=torch.float64)
        >>> operator.parameter_product({"weight": torch.tensor([[1.0]])})
        {'weight': tensor([[76.5000]])}

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994; Schraudolph, "Fast
    curvature matrix-vector products for second-order gradient descent", Neural Computation 2002.
    """
    if derivative not in DERIVATIVES:
        raise ValueError(f"derivative expected one of {DERIVATIVES}, got derivative={derivative!r}")
    which: dict[str, Any] = {"targets": targets, "block": block, "blocks": blocks, "unit": unit}
    targets, ready, work = rows_of(fn, params, batches, loss, **which, num_tokens=num_tokens, seed=seed)
    groups = groups_of(work)
    passes = passes_over(work, groups)
    divided = passes_over(work, [group[i::DIVIDED] for group in groups for i in range(min(DIVIDED, len(group)))])
    way = chosen_way(passes, derivative)
    together = way == FORWARD_MODE and shares_primal(divided)
    device = next(iter(work.params.values())).device
    method = name_of(way)
    num_units = work.num_tokens // work.tokens.num_targets
    sides = _sides(passes, way)
    reference_sides, described = _reference(work, groups, passes, way)

    @full_precision()
    @torch.inference_mode(mode=False)
    def parameter_product(tree: Params) -> dict[str, Tensor]:
        check_alike(tree, {name: p.shape for name, p in work.params.items()}, what="the tree")
        found = gradient_of_derivatives(divided, tree) if together else gradient_along(passes, tree, way)
        return {name: g / num_units for name, g in found.items()}

    return FisherOperator(
        token_product=token_product_of(lambda: sides, num_units, work.num_tokens),
        reference_product=token_product_of(reference_sides, num_units, work.num_tokens),
        num_rows=work.num_tokens,
        num_tokens=num_units,
        num_params=sum(work.num_params.values()),
        device=device,
        trace=trace,
        name=fn.name if block is None else f"{fn.name}, block {block}",
        parameter_product=parameter_product,
        sides=sides,
        reference_sides=reference_sides,
        params=dict(work.params),
        tokens=work.tokens,
        derivative=method,
        reference=described,
        provenance=replace(
            provenance_of_rows(ready, work, targets, unit=unit, seed=seed),
            num_tokens=num_units,
            num_rows=work.num_tokens,
            mean_loss=float(ready.work.tokens.loss.double().mean()),
            derivative=method,
            round_off_measured_by=described,
        ),
        fingerprint=lambda: fingerprint(work, PassOptions(), f"operator, {method}", EVERY, targets.name),
    )


def rows_of(
    fn: ModelFunction,
    params: Params,
    batches: Batch,
    loss: AnyLoss,
    *,
    targets: Targets | None,
    block: str | None,
    blocks: Callable[[str], str],
    unit: str,
    num_tokens: int | None,
    seed: int,
) -> tuple[Targets, Prepared, Workload]:
    """Find the rows of G.

    Returns:
        The targets, the tokens that the rows are of, and the rows by the parameters of the block: see `fisher`, as for
        what it takes and raises.
    """
    check_options(num_tokens, None, None, "factored", unit)
    targets = chosen(targets, unit=unit)
    some = restricted(params, names_of_block(params, block, blocks))
    ready = prepared(fn, {**params}, batches, loss, num_tokens=num_tokens, seed=seed)
    work = replace(ready.work, params={name: ready.work.params[name] for name in some})
    work = targets.rows(work, PassOptions(memory_limit=ANYTHING))
    return targets, ready, summed(work) if unit == "sequence" else work


def token_product_of(
    sides: Callable[[], Sides], num_units: int, num_rows: int
) -> Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]:
    """U → K u/N from two halves.

    Args:
        sides: () → the halves.
        num_units: N.
        num_rows: n.
    """

    def product(u: Tensor) -> Tensor:
        both = sides()
        gradient = both.weighted_gradient(u)
        slope = norm(gradient) ** 2 / (float(u.norm()) or 1.0) / num_rows**0.5
        return both.derivatives(gradient, slope) / num_units

    return product


def _sides(passes: Passes, way: Way) -> Sides:
    @full_precision()
    @torch.inference_mode(mode=False)
    def gradient(u: Tensor) -> dict[str, Tensor]:
        if u.shape != (passes.num_rows,):
            raise ValueError(f"u expected a weight for each of {passes.num_rows} rows, got shape {tuple(u.shape)}")
        return weighted_gradient(passes, u)

    @full_precision()
    @torch.inference_mode(mode=False)
    def along(tree: Params, slope: float | None) -> Tensor:
        check_alike(tree, {name: p.shape for name, p in passes.params.items()}, what="the tree")
        return derivatives(passes, tree, way, slope=slope)

    return Sides(weighted_gradient=gradient, derivatives=along)


def _reference(work: Workload, groups: list[list[int]], passes: Passes, way: Way) -> tuple[Callable[[], Sides], str]:
    """The halves of a product by the most precise arithmetic that there is, and what that is."""

    def in_float64() -> Sides:
        exact = _exact_passes(work, groups)
        return _sides(exact, tried_difference(exact) if isinstance(way, Difference) else way)

    if all(p.dtype == torch.float64 for p in work.params.values()):
        reason = ""
    else:
        reason = _why_not_float64(work, groups)
        if not reason:
            return in_float64, "float64"
    if isinstance(way, Difference):
        twice = replace(way, change=2 * way.change)
        return lambda: _sides(passes, twice), f"a central difference of twice the step{reason}"
    return lambda: _sides(passes, way), f"products of sums{reason}"


def _why_not_float64(work: Workload, groups: list[list[int]]) -> str:
    """Why there is no product in float64, found out by one forward pass; empty where there is one."""
    if next(iter(work.params.values())).device.type == "mps":
        return ", as the device has no float64"
    exact = _exact_passes(work, groups[:1])
    try:
        with torch.no_grad():
            exact.each[0].ordinary(exact.params, ())[1]()
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return f", as the model does not run in float64 ({type(error).__name__}: {error})".splitlines()[0]
    return ""


def _exact_passes(work: Workload, groups: list[list[int]]) -> Passes:
    parts = [replace(part, batch=mapped(_widened, part.batch)) for part in work.sequences.parts]
    exact = replace(
        work,
        fn=work.fn.to(dtype=torch.float64),
        params={name: p.double() for name, p in work.params.items()},
        sequences=Sequences(parts),
    )
    return passes_over(exact, groups)


def _widened(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
