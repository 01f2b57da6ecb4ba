"""Laws of kernels, metrics and operators: what takes a Gram, a spectrum or a vector.

A law of kernels draws G with known eigenvalues of F = (1/N) GᵀG; the oracle is how G was made, not another solver.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fisherfunc.linalg.gram import Gram, gram_of
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.testing.gradients import prescribed_spectra
from fisherfunc.testing.law import BrokenPartError, Report, check_laws, laws_for, relative
from fisherfunc.testing.matrices import gaussian

ROUND_OFF = 1e-12
"""Of float64 relative to λ_max: solvers of some hundred operations, on matrices of eight rows, are off by 1e-14."""

Spectral = Callable[..., Spectrum]


def spectrum_function(kernel: Callable[..., Any], *, of: str = "gram") -> Spectral:
    """Read a kernel as (G, N) → `Spectrum`: the one place here that knows what a kernel takes.

    Args:
        kernel: Of Grams, or of gradient matrices.
        of: "gram" or "rows".

    Raises:
        ValueError: If `of` is neither.
    """
    if of not in ("gram", "rows"):
        raise ValueError(f"of expected 'gram' or 'rows', got of={of!r}")

    def spectrum(rows: Tensor, num_units: int) -> Spectrum:
        given = gram_of(rows) if of == "gram" else rows.clone()
        before = given.clone()
        if of == "gram":
            found = kernel(Gram(matrix=given, num_units=num_units, num_params=rows.shape[-1]))
        else:
            found = kernel(given, num_tokens=num_units)
        if not isinstance(found, Spectrum):
            raise BrokenPartError(f"It returned {type(found).__name__}, expected a Spectrum.")
        if not torch._C._functorch.is_functorch_wrapped_tensor(given) and not torch.equal(given, before):
            raise BrokenPartError("It wrote to what it was given.")
        return found

    return spectrum


def check_kernel(
    kernel: Callable[..., Any],
    *,
    of: str = "gram",
    waive: Mapping[str, str] | None = None,
    tolerance: float | None = None,
    max_examples: int = 100,
) -> Report:
    """Try the laws of spectral kernels on a kernel.

    Args:
        kernel: A Gram, or rows, → `Spectrum`.
        of: What it takes: "gram" or "rows".
        waive: {law: why it need not hold}.
        tolerance: In place of that of float64, for a kernel that solves in a coarser dtype.
        max_examples: How many examples a law is tried on.

    Example:
        >>> from fisherfunc.linalg.kernels import gram_eigh
        >>> check_kernel(gram_eigh(), max_examples=5).failures
        ()
    """
    part = spectrum_function(kernel, of=of)
    return check_laws(KERNEL_LAWS, part, waive=waive, tolerance=tolerance, max_examples=max_examples)


def check_metric(
    metric: Callable[[Spectrum], Any], *, waive: Mapping[str, str] | None = None, max_examples: int = 100
) -> Report:
    """Try the laws of metrics on a function of a spectrum.

    Args:
        metric: `Spectrum` → a number as a tensor.
        waive: {law: why it need not hold}: "scale" of a metric with a damping, say.
        max_examples: How many examples a law is tried on.
    """
    return check_laws(METRIC_LAWS, metric, waive=waive, max_examples=max_examples)


def check_operator(
    operator: Callable[[Tensor], Tensor],
    *,
    size: int,
    dtype: torch.dtype = torch.float64,
    waive: Mapping[str, str] | None = None,
    tolerance: float | None = None,
    max_examples: int = 20,
) -> Report:
    """Try the laws of symmetric positive operators on a product with vectors, also of another library.

    Args:
        operator: x `(size,)` → A x.
        size: Of the vectors.
        dtype: Of the vectors.
        waive: {law: why it need not hold}: "positive" of a Hessian, say.
        tolerance: In place of that of float64.
        max_examples: How many pairs of vectors a law is tried on.
    """
    chosen: dict[str, Any] = {"waive": waive, "tolerance": tolerance, "max_examples": max_examples}
    return check_laws(OPERATOR_LAWS, operator, examples=vectors(size=size, dtype=dtype), **chosen)


def spectra(*, max_size: int = 6) -> st.SearchStrategy[Spectrum]:
    """Spectra of two or more eigenvalues, zeros, repeats and wide ranges among them.

    Args:
        max_size: The most eigenvalues.
    """
    eigenvalue = st.one_of(st.just(0.0), st.floats(-6, 6).map(lambda exponent: 10.0**exponent))

    def spectrum(values: list[float]) -> Spectrum:
        eigenvalues = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        none = torch.zeros((), dtype=torch.float64)
        facts: dict[str, Any] = {"num_units": 8, "num_params": 8, "solver": "drawn"}
        return Spectrum(eigenvalues=eigenvalues, resolution=1e-14 * eigenvalues[0], negative_part=none, **facts)

    return st.lists(eigenvalue, min_size=2, max_size=max_size).map(spectrum)


def vectors(*, size: int = 4, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Tensor]:
    """Pairs of vectors, `(2, size)`.

    Args:
        size: Their length.
        dtype: Their dtype.
    """

    @st.composite
    def pairs(draw: st.DrawFn) -> Tensor:
        return gaussian(draw, 2, size).to(dtype)

    return pairs()


def _known(part: Spectral, example: tuple[Tensor, Tensor]) -> float:
    rows, eigenvalues = example
    return relative(part(rows, len(rows)).eigenvalues[: len(eigenvalues)], eigenvalues)


def _ordered(part: Spectral, example: tuple[Tensor, Tensor]) -> float:
    values = part(example[0], len(example[0])).eigenvalues
    return float(torch.cat([values.diff(), -values]).clamp(min=0).max())


def _trace(part: Spectral, example: tuple[Tensor, Tensor]) -> float:
    rows, eigenvalues = example
    found, wanted = part(rows, len(rows)).eigenvalues.sum(), rows.square().sum() / len(rows)
    return relative(found, wanted, to=eigenvalues[0])


def _against(part: Spectral, rows: Tensor, other: Tensor, factor: float, num_units: int | None = None) -> float:
    wanted = factor * part(rows, len(rows)).eigenvalues
    return relative(part(other, num_units or len(other)).eigenvalues, wanted)


def _repeated(part: Spectral, example: tuple[Tensor, Tensor]) -> float:
    rows = example[0]
    return relative(part(rows, len(rows)).eigenvalues, part(rows, len(rows)).eigenvalues)


def _mapped(part: Spectral, example: tuple[Tensor, Tensor]) -> float:
    rows = example[0]
    stack = torch.stack([rows, 2 * rows, rows.flip(0)])
    wanted = torch.stack([part(each, len(rows)).eigenvalues for each in stack])
    found = torch.func.vmap(lambda each: part(each, len(rows)).eigenvalues)(stack)
    return relative(found, wanted)


_kernel_law = laws_for("kernel", prescribed_spectra)


KERNEL_LAWS = (
    _kernel_law("known", "The eigenvalues are those that G was made with.", ROUND_OFF, _known),
    _kernel_law("ordered", "Eigenvalues fall, and none is negative.", 0.0, _ordered),
    _kernel_law("trace", "The eigenvalues sum to Σ‖gₙ‖²/N.", ROUND_OFF, _trace),
    _kernel_law(
        "scale",
        "Gradients twice as long have eigenvalues four times as large.",
        ROUND_OFF,
        lambda part, example: _against(part, example[0], 2 * example[0], 4.0),
    ),
    _kernel_law(
        "permutation",
        "The order of the rows does not matter.",
        ROUND_OFF,
        lambda part, example: _against(part, example[0], example[0].flip(0), 1.0),
    ),
    _kernel_law(
        "normalisation",
        "Over twice as many units the same Gram has eigenvalues half as large.",
        ROUND_OFF,
        lambda part, example: _against(part, example[0], example[0], 0.5, 2 * len(example[0])),
    ),
    _kernel_law("mapped", "Mapped over a stack by vmap it gives what it gives of each.", ROUND_OFF, _mapped),
    _kernel_law("repeatable", "The same rows have the same eigenvalues, to the last bit.", 0.0, _repeated),
)


def _same(found: Any, wanted: Any) -> float:
    """NaN, what does not exist, equals itself."""
    found, wanted = (_number(value) for value in (found, wanted))
    both = bool(torch.isnan(found).all()) and bool(torch.isnan(wanted).all())
    return 0.0 if both else relative(found, wanted)


def _number(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise BrokenPartError(f"It returned {type(value).__name__}, expected a tensor.")
    return value.double()


def _scaled(spectrum: Spectrum, factor: float) -> Spectrum:
    return replace(spectrum, eigenvalues=factor * spectrum.eigenvalues, resolution=factor * spectrum.resolution)


def _homogeneous(part: Callable[..., Any], spectrum: Spectrum) -> float:
    once, twice, thrice = (_number(part(_scaled(spectrum, factor))) for factor in (1.0, 2.0, 4.0))
    return _same(once * thrice, twice.square())


def _lengthened(part: Callable[..., Any], spectrum: Spectrum) -> float:
    zero = torch.zeros(1, dtype=torch.float64)
    return _same(part(replace(spectrum, eigenvalues=torch.cat([spectrum.eigenvalues, zero]))), part(spectrum))


def _renamed(part: Callable[..., Any], spectrum: Spectrum) -> float:
    return _same(part(replace(spectrum, num_units=24, solver="another")), part(spectrum))


def _stacked(part: Callable[..., Any], spectrum: Spectrum) -> float:
    both = (spectrum, _scaled(spectrum, 2.0))
    names = ("eigenvalues", "resolution", "negative_part")
    stack: dict[str, Any] = {name: torch.stack([getattr(one, name) for one in both]) for name in names}
    found, alone = _number(part(replace(spectrum, **stack))), [_number(part(one)) for one in both]
    if found.shape != (2,) or any(value.shape != () for value in alone):
        raise BrokenPartError(f"It returned shape {tuple(found.shape)} of a stack of two, and {alone[0].shape} of one.")
    return max(_same(found[index], value) for index, value in enumerate(alone))


_metric_law = laws_for("metric", spectra)


METRIC_LAWS = (
    _metric_law("homogeneous", "m(4λ) m(λ) = m(2λ)²: it scales by a power of the scale of F.", ROUND_OFF, _homogeneous),
    _metric_law("zeros", "An eigenvalue that is zero more changes nothing.", ROUND_OFF, _lengthened),
    _metric_law("facts", "It is a function of the eigenvalues, not of N or of the solver.", ROUND_OFF, _renamed),
    _metric_law("stacked", "Of a stack of spectra it is the stack of its values.", ROUND_OFF, _stacked),
)


def _symmetric(part: Callable[[Tensor], Tensor], pair: Tensor) -> float:
    (x, y), (image_x, image_y) = pair, (part(pair[0]), part(pair[1]))
    return relative(x @ image_y, image_x @ y, to=x.norm() * image_y.norm() + image_x.norm() * y.norm())


def _positive(part: Callable[[Tensor], Tensor], pair: Tensor) -> float:
    image = part(pair[0])
    return max(0.0, -float(pair[0] @ image) / float(pair[0].norm() * image.norm() or 1.0))


def _linear(part: Callable[[Tensor], Tensor], pair: Tensor) -> float:
    images = part(pair[0]), part(pair[1])
    size = 2 * images[0].norm() + 3 * images[1].norm()
    return relative(part(2 * pair[0] - 3 * pair[1]), 2 * images[0] - 3 * images[1], to=size)


_operator_law = laws_for("operator", vectors)


OPERATOR_LAWS = (
    _operator_law("symmetric", "⟨x, A y⟩ = ⟨A x, y⟩.", 1e-10, _symmetric),
    _operator_law("positive", "⟨x, A x⟩ is not negative.", 1e-10, _positive),
    _operator_law("linear", "A (2 x − 3 y) = 2 A x − 3 A y.", 1e-10, _linear),
)
