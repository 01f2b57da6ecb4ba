"""The one door of spectral kernels: what a kernel returns is a spectrum of its matrix, or an error with its name.

Looked at are the kind and shape of what it returns, order and sign of the eigenvalues, and, of a kernel that says that
it has computed all of them, the two moments that need no eigensolve:

    Σλ = tr K/N,    Σλ² = ‖K‖_F²/N²

Values are looked at, so nothing here is for `vmap`. Axis order: eigenvalues `(*stack, k)`.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.gram import Gram, gram_norm
from fisherfunc.linalg.mapped import check_not_mapped
from fisherfunc.linalg.spectrum import Spectrum

_HOW = (
    "make a kernel with ff.kernels.gram_kernel(eigenvalues, solver=name), of a function Gram -> eigenvalues, or with "
    "ff.kernels.row_kernel for gradient matrices"
)
_FORMER = ("num_tokens", "num_units", "num_params", "precision", "scale")
"""What kernels took beside a matrix before there was `ff.Gram`, and what kernels of rows take."""


class SolverError(torch.linalg.LinAlgError, ValueError):
    """An eigensolver gave no spectrum of its matrix, and did not say so: another one may (`kernels.fallback`)."""


class Moments(NamedTuple):
    """What is known of K without an eigensolve: tr K, and ‖K‖_F over tr K (None where it would cost too much)."""

    trace: Float[Tensor, "*stack"]
    relative_norm: Float[Tensor, "*stack"] | None


def moments_of_gram(gram: Float[Tensor, "*stack n n"]) -> Moments:
    """The moments of a Gram. Cost n² operations."""
    trace = gram.diagonal(dim1=-2, dim2=-1).double().sum(dim=-1)
    scaled = (
        gram / _nonzero(trace).to(gram.dtype)[..., None, None]
    )  # squares of its entries neither over- nor underflow
    return Moments(trace, torch.linalg.vector_norm(scaled, dim=(-2, -1), dtype=torch.float64))


def moments_of_rows(rows: Float[Tensor, "n p"]) -> Moments:
    """The moments of G Gᵀ. Cost 2 n p min(n, p) operations."""
    trace = rows.double().square().sum()
    return Moments(trace, gram_norm(rows.double() / _nonzero(trace).sqrt()))


def asked(kernel: Callable[..., Any], given: Gram | Tensor, *, moments: Moments, **context: Any) -> Spectrum:
    """Call a kernel, and return the spectrum that it found if it can be that of what it was given.

    Args:
        kernel: A Gram kernel or a row kernel.
        given: The Gram, or the gradient matrix G `(n, p)`.
        moments: Of K.
        **context: The other arguments of a row kernel.

    Raises:
        TypeError: If it cannot be called like a kernel, or returns no `Spectrum` of real numbers.
        ValueError: If number, shape, order or signs are not those of a spectrum, or it is of another N or P.
        SolverError: If a value is not finite, or the eigenvalues are not those of the matrix.
        RuntimeError: If `vmap` maps over the matrix.
    """
    name = _name(kernel)
    _check_signature(kernel, name, given, context)
    matrix = given.matrix if isinstance(given, Gram) else given
    check_not_mapped("the check of a kernel", [matrix], instead="map the kernel itself, and check stacks as they are")
    before = 0 if matrix.is_inference() else matrix._version
    try:
        found = kernel(given, **context)
    except (TypeError, AttributeError) as error:
        if "Gram" not in str(error):
            raise
        raise TypeError(f"kernel {name!r} could not take an ff.Gram: {error}; its matrix is gram.matrix") from error
    if not isinstance(found, Spectrum):
        raise TypeError(f"kernel {name!r} returned {type(found).__name__}, expected an ff.Spectrum; {_HOW}")
    if not matrix.is_inference() and matrix._version != before:
        raise ValueError(
            f"kernel {found.solver!r} wrote to the matrix that it was given; let it work on matrix.clone()"
        )
    _check_kind(found, matrix.shape[:-2])
    of = (given.num_units, given.num_params) if isinstance(given, Gram) else tuple(matrix.shape)
    _check_counts(found, matrix.shape[-2], *of)
    _check_values(found)
    if found.exact:
        _check_moments(found, moments, matrix.shape[-2])
    return found


def check_kernel(kernel: Any) -> None:
    """Raise where something can be seen, without a Gram, to be no kernel of Grams: before a pass, not after it.

    Raises:
        TypeError: If it cannot be called as kernel(gram).
    """
    if not callable(kernel):
        raise TypeError(f"kernel expected a function Gram -> Spectrum, got {kernel!r}; {_HOW}")
    gram = Gram(matrix=torch.eye(1, device="cpu"), num_units=1)
    _check_signature(kernel, _name(kernel), gram, {})


def _name(kernel: Callable[..., Any]) -> str:
    return getattr(kernel, "__qualname__", type(kernel).__name__)


def _check_signature(kernel: Callable[..., Any], name: str, given: Gram | Tensor, context: dict[str, Any]) -> None:
    """Raise a TypeError where a kernel does not take what it is about to be given."""
    kind = "gram" if isinstance(given, Gram) else "rows"
    expected = ", ".join([kind, *(f"{key}=" for key in context)])
    try:
        signature = inspect.signature(kernel)
        signature.bind(given, **context)
    except (TypeError, ValueError) as error:  # ValueError: a function in C that does not say what it takes
        raise TypeError(f"kernel {name!r} cannot be called as kernel({expected}): {error}; {_HOW}") from error
    beside = [key for key in _FORMER if key in signature.parameters]
    if kind == "gram" and beside:
        raise TypeError(
            f"kernel {name!r} cannot be called as kernel(gram): it takes a matrix and {beside} beside it; a kernel of "
            "Grams takes one ff.Gram, which has .matrix, .num_units, .num_params, .precision and .scale, and one of "
            "gradient matrices goes into spectrum_of_gradients"
        )


def _check_kind(found: Spectrum, stack: torch.Size) -> None:
    shapes = {"eigenvalues": (*stack, "k"), "resolution": tuple(stack), "negative_part": tuple(stack)}
    for field, expected in shapes.items():
        value = getattr(found, field)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"{field} of kernel {found.solver!r} expected a real floating-point tensor, got {kind}; {_HOW}"
            )
        if value.ndim != len(expected) or value.shape[: len(stack)] != stack:
            raise ValueError(
                f"{field} of kernel {found.solver!r} expected the shape {expected}, got {tuple(value.shape)}; {_HOW}"
            )


def _check_counts(found: Spectrum, num_rows: int, num_units: int, num_params: int | None) -> None:
    for field, expected_size in {"num_units": num_units, "num_params": num_params}.items():
        if getattr(found, field) != expected_size:
            raise ValueError(
                f"kernel {found.solver!r} returned a spectrum of {field}={getattr(found, field)}, expected "
                f"{expected_size}, which it was given; {_HOW}"
            )
    count, rank_bound = found.eigenvalues.shape[-1], num_rows if num_params is None else min(num_rows, num_params)
    if not 1 <= count <= rank_bound:
        raise ValueError(
            f"kernel {found.solver!r} returned {count} eigenvalues, expected from 1 to min(N, P) = {rank_bound}: no "
            f"others can differ from zero; {_HOW}"
        )
    if found.exact and count < rank_bound:
        raise ValueError(
            f"kernel {found.solver!r} returned {count} of min(N, P) = {rank_bound} eigenvalues and says that they are "
            "all; mark it exact=False, or return all of them"
        )


def _check_values(found: Spectrum) -> None:
    values, resolution, negative = found.eigenvalues, found.resolution, found.negative_part
    if not bool(values.isfinite().all() & resolution.isfinite().all() & negative.isfinite().all()):
        raise SolverError(f"kernel {found.solver!r} returned a NaN or infinite eigenvalue; check its eigensolver")
    if bool((values[..., 1:] > values[..., :-1]).any()):
        raise ValueError(
            f"eigenvalues of kernel {found.solver!r} are not in descending order: {values.flatten()[:3].tolist()} …; "
            "torch.linalg.eigvalsh sorts them in ascending order: flip them"
        )
    if bool((values < 0).any() | (resolution < 0).any() | (negative > 0).any()):
        raise ValueError(
            f"kernel {found.solver!r} returned a negative eigenvalue or resolution, or a positive negative_part: a "
            f"Spectrum has zero for eigenvalues below it, and the least of them in negative_part; {_HOW}"
        )
    if bool((negative < -resolution).any()):
        worst = (negative + resolution).argmin()
        raise ValueError(
            f"the Gram has an eigenvalue {negative.flatten()[worst].item():.3e} (of F) by kernel {found.solver!r}, "
            f"below minus the resolution {resolution.flatten()[worst].item():.3e}: it is not positive semi-definite, "
            "so it is not G Gᵀ, or the kernel is wrong; check how they were made"
        )


def _check_moments(found: Spectrum, moments: Moments, num_rows: int) -> None:
    """Eigenvalues are known to ρ each, to what is told from zero or to the round-off of the solver.

    With independent errors, the sum of n of them is known to √n ρ. The 4 is four standard deviations. Negative ones
    were set to zero (twice: a solver may have dropped their sign), and those beyond min(N, P) were cut off.
    """
    values, tiny = found.eigenvalues.double(), torch.finfo(found.eigenvalues.dtype).tiny
    dropped = num_rows - values.shape[-1]
    solver = num_rows * torch.finfo(found.eigenvalues.dtype).eps * values[..., 0]
    each = torch.maximum(found.resolution.double(), solver)
    off = (4 * math.sqrt(num_rows) + dropped) * each - 2 * num_rows * found.negative_part.double()
    scale = _nonzero(moments.trace) / found.num_units
    pairs = {"sum": (values.sum(dim=-1), moments.trace / found.num_units, "tr K/N")}
    if moments.relative_norm is not None:
        norm = torch.linalg.vector_norm(values / scale[..., None].to(values.device), dim=-1) * scale.to(values.device)
        pairs["Euclidean norm"] = (norm, moments.relative_norm * scale, "‖K‖/N")
    for what, (got, expected, name) in pairs.items():
        difference = (got - expected.to(got.device)).abs() - off - num_rows * tiny
        if bool((difference > 0).any()):
            worst = difference.argmax()
            raise SolverError(
                f"the eigenvalues of kernel {found.solver!r} have the {what} {got.flatten()[worst].item():.6e}, where "
                f"{name} is {expected.flatten()[worst].item():.6e}: they are not those of F = (1/N) GᵀG; check what it "
                "solves and what it divides by, or mark it exact=False if it is an approximation"
            )


def _nonzero(trace: Tensor) -> Tensor:
    return torch.where(trace > 0, trace, 1.0)
