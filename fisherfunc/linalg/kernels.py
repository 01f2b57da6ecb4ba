"""Spectral kernels: a `Gram`, or a gradient matrix G itself, in; the `Spectrum` of F = (1/N) Gᵀ G out.

Factories bind the options, kernels take the data, combinators wrap kernels. A method says only how it gets
the eigenvalues of K; lifting.py makes a `Spectrum` of them. All survive `vmap`, and `jacrev` where the
spectrum is simple. Axis order: a Gram is `(n, n)`, a gradient matrix `(n, p)`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfunc.linalg import gram as algebra
from fisherfunc.linalg.gram import Gram, as_gram, gram_of
from fisherfunc.linalg.krylov.lanczos import lanczos
from fisherfunc.linalg.krylov.quadrature import lanczos_quadrature
from fisherfunc.linalg.lifting import After, Dtype, GramKernel, RowKernel, gram_kernel, rounding_floor, row_kernel
from fisherfunc.linalg.mapped import is_mapped
from fisherfunc.linalg.sound_spectrum import asked, moments_of_gram
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.records.plain import dtype_name

__all__ = [
    "after",
    "centred",
    "cheapest",
    "checked",
    "covariance_eigh",
    "fallback",
    "gram_eigh",
    "gram_svd",
    "jittered",
    "lanczos",
    "lanczos_quadrature",
    "of_rows",
    "robust_eigh",
    "svd",
    "svd_lowrank",
]

Device = torch.device | str | None


def gram_eigh(*, dtype: Dtype = torch.float64, device: Device = None) -> GramKernel:
    """eig(K)/N by a dense symmetric eigensolver, values only. Exact. Cost about 4/3 N³ operations.

    Args:
        dtype: The dtype to solve in.
        device: Where to solve; where the Gram lies if None.

    Example:
        >>> kernel = gram_eigh()
        >>> kernel(Gram(matrix=torch.tensor([[4.0, 0.0], [0.0, 2.0]]), num_units=2)).eigenvalues
        tensor([2., 1.], dtype=torch.float64)
        >>> torch.func.vmap(kernel)(torch.eye(2).expand(3, 2, 2)).eigenvalues.shape
        torch.Size([3, 2])
    """

    def eigenvalues(gram):
        return torch.linalg.eigvalsh(gram.to(device=device, dtype=dtype)).flip(-1)

    return gram_kernel(eigenvalues, solver=f"gram_eigh({dtype_name(dtype)})")


def gram_svd(*, dtype: Dtype = torch.float64, device: Device = None) -> GramKernel:
    """The singular values of K over N: its eigenvalues if K has no negative ones. Slower, and it converges.

    Singular values hide signs. Σσ − tr K is minus twice the sum of the negative eigenvalues: that sum is
    reported as the negative part.

    Args:
        dtype: The dtype to solve in.
        device: Where to solve; where the Gram lies if None.
    """

    def singular_values(gram):
        return torch.linalg.svdvals(gram.to(device=device, dtype=dtype))

    unsigned = gram_kernel(singular_values, solver=f"gram_svd({dtype_name(dtype)})")

    def kernel(gram: Gram | Tensor, **context: Any) -> Spectrum:
        gram = as_gram(gram, **context)
        spectrum = unsigned(gram)
        trace = gram.matrix.to(dtype).diagonal(dim1=-2, dim2=-1).sum(dim=-1) / spectrum.num_units
        negative = (trace - spectrum.eigenvalues.sum(dim=-1)) / 2
        return replace(spectrum, negative_part=negative.clamp(max=0))

    return kernel


def covariance_eigh(*, dtype: Dtype = torch.float64) -> RowKernel:
    """eig(Gᵀ G)/N from the P × P matrix. Exact; cheaper than the Gram where P < N. Cost 2 N P² + 4/3 P³.

    Args:
        dtype: The dtype to multiply and solve in.
    """

    def eigenvalues(rows):
        return torch.linalg.eigvalsh(gram_of(rows.mT, dtype=dtype)).flip(-1)

    return row_kernel(eigenvalues, solver=f"covariance_eigh({dtype_name(dtype)})")


def svd(*, dtype: Dtype = torch.float64) -> RowKernel:
    """σ(G)²/N by a dense SVD. Exact; of rows in float64 it resolves eigenvalues down to (n eps)² λ_max.

    Args:
        dtype: The dtype to solve in.
    """

    def eigenvalues(rows):
        return torch.linalg.svdvals(rows.to(dtype)).square()

    return row_kernel(eigenvalues, solver=f"svd({dtype_name(dtype)})", by_singular_values=True)


def svd_lowrank(
    *,
    rank: int,
    oversampling: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    dtype: Dtype = torch.float64,
) -> RowKernel:
    """An approximation of the `rank` leading eigenvalues by `torch.svd_lowrank`, marked `exact=False`.

    Where `rank + oversampling` reaches min(N, P), the sketch would hold the whole spectrum: then all of it is
    computed exactly, and marked exact. Cost about 4 N P (rank + oversampling) (power_iterations + 1).
    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011.

    Args:
        rank: The number of eigenvalues wanted.
        oversampling: Extra columns of the random sketch.
        power_iterations: Subspace iterations; more are more accurate where the spectrum decays slowly.
        seed: The seed of the sketch; the global random state is left as it was.
        dtype: The dtype to solve in.

    Raises:
        ValueError: If `rank` < 1, `oversampling` < 0 or `power_iterations` < 0.
    """
    options = {"rank": rank, "oversampling": oversampling, "power_iterations": power_iterations}
    for name, least in {"rank": 1, "oversampling": 0, "power_iterations": 0}.items():
        if options[name] < least:
            raise ValueError(f"svd_lowrank expected {name} >= {least}, got {name}={options[name]}")
    sketch = rank + oversampling

    def leading(rows):
        with _seeded(rows.device, seed):
            _, values, _ = torch.svd_lowrank(rows.to(dtype), q=sketch, niter=power_iterations)
        return values[..., :rank].square()

    described = ", ".join(f"{name}={value}" for name, value in (options | {"seed": seed}).items())
    approximate = row_kernel(leading, solver=f"svd_lowrank({described})", exact=False, by_singular_values=True)
    exact = svd(dtype=dtype)

    def kernel(rows, *, num_units=None, num_tokens=None, precision=None, scale=None):
        chosen = approximate if sketch < min(rows.shape[-2:]) else exact
        return chosen(rows, num_units=num_units or num_tokens, precision=precision, scale=scale)

    return kernel


def of_rows(inner: GramKernel, *, dtype: Dtype = torch.float64) -> RowKernel:
    """A Gram kernel applied to G Gᵀ: so that gradients at hand go into it. Cost 2 N² P more.

    Args:
        inner: The Gram kernel.
        dtype: The dtype to accumulate the Gram in.
    """

    def kernel(rows, *, num_units=None, num_tokens=None, precision=None, scale=None):
        gram = replace(algebra.of_rows(rows, dtype=dtype), precision=dtype, scale=scale)
        found = inner(replace(gram, num_units=num_units or num_tokens or gram.num_units))
        rounding = rounding_floor(rows, precision=precision, scale=scale) / found.num_units
        return replace(found, resolution=found.resolution + rounding.to(found.resolution))

    return kernel


def cheapest(*, dtype: Dtype = torch.float64) -> RowKernel:
    """`covariance_eigh` where P < N, else `gram_eigh` of the rows: the smaller matrix; the result says which.

    Args:
        dtype: The dtype to multiply and solve in.
    """
    by_gram, by_covariance = of_rows(gram_eigh(dtype=dtype), dtype=dtype), covariance_eigh(dtype=dtype)

    def kernel(rows, *, num_units=None, num_tokens=None, precision=None, scale=None):
        chosen = by_covariance if rows.shape[-1] < rows.shape[-2] else by_gram
        return chosen(rows, num_units=num_units or num_tokens, precision=precision, scale=scale)

    return kernel


def after(change: Callable[[Gram], Gram], inner: GramKernel) -> GramKernel:
    """Solve another Gram in place of K, such as one of `ff.gram`; the result says so.

    Args:
        change: Gram → Gram.
        inner: The kernel that solves.

    Example:
        >>> first_two = after(lambda gram: algebra.selected(gram, [0, 1]), gram_eigh())
        >>> first_two(algebra.of_rows(torch.eye(3))).eigenvalues
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return After(change=change, inner=inner)


def centred(inner: GramKernel) -> GramKernel:
    """Solve H K H in place of K, the rows less their mean: the spectrum of the gradient covariance.

    Args:
        inner: The kernel that solves.
    """
    return after(algebra.centred, inner)


def jittered(inner: GramKernel, *, relative: float = 1e-10, dtype: Dtype = torch.float64) -> GramKernel:
    """Solve K + εI and take ε off the eigenvalues, ε = relative · tr K / n: where a solver did not converge.

    Args:
        inner: The kernel that solves.
        relative: The jitter over the mean of the diagonal.
        dtype: The dtype to add the jitter in; one that holds 1 + `relative`.
    """

    def kernel(gram: Gram | Tensor, **context: Any) -> Spectrum:
        gram = as_gram(gram, **context)
        jitter = relative * gram.matrix.to(dtype).diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        lifted = gram.matrix + torch.diag_embed(jitter[..., None].expand(gram.matrix.shape[:-1]))
        spectrum = inner(replace(gram, matrix=lifted, precision=gram.rows_in))
        shift = jitter / spectrum.num_units
        shifted = spectrum.eigenvalues - shift[..., None]
        seen = spectrum.negative_part < 0  # else the least of the lifted eigenvalues is the one to look at
        return replace(
            spectrum,
            eigenvalues=shifted.clamp(min=0),
            negative_part=torch.where(seen, spectrum.negative_part - shift, shifted[..., -1].clamp(max=0)),
            solver=f"{spectrum.solver} after a jitter of {relative:g} tr K/n",
        )

    return kernel


def fallback(*kernels: GramKernel) -> GramKernel:
    """The first of the kernels that succeeds; the result records why those before it failed.

    Each is `checked`, so that a solver that returns NaN has failed like one that raises; but under `vmap`, where no
    value can be looked at.

    Args:
        *kernels: In order of preference.
    """

    def kernel(gram: Gram | Tensor, **context: Any) -> Spectrum:
        gram = as_gram(gram, **context)
        failures: list[str] = []
        for inner in kernels if is_mapped(gram.matrix) else map(checked, kernels):
            try:
                spectrum = inner(gram)
            except RuntimeError as error:  # LinAlgError, out of memory and GPU errors are all this
                failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
            else:
                return replace(spectrum, fallback="; ".join(failures) or None)
        raise torch.linalg.LinAlgError(
            f"all {len(kernels)} eigensolvers failed on a Gram of shape {tuple(gram.matrix.shape)}: "
            f"{'; '.join(failures)}; check the gradients for NaN or Inf (drop_nonfinite=True leaves them out)"
        )

    return kernel


def checked(inner: GramKernel) -> GramKernel:
    """Raise where a result is no spectrum of the Gram (see sound_spectrum.py). Not for `vmap`.

    A NaN, a wrong order, shape, dtype or number of eigenvalues, a negative one beyond round-off, and, of a kernel that
    says that it is exact, a sum or a sum of squares that is not that of the Gram.

    Args:
        inner: The kernel to check.
    """
    if isinstance(inner, After):
        return after(inner.change, checked(inner.inner))

    def kernel(gram: Gram | Tensor, **context: Any) -> Spectrum:
        gram = as_gram(gram, **context)
        return asked(inner, gram, moments=moments_of_gram(gram.matrix))

    return kernel


def robust_eigh(*, dtype: Dtype = torch.float64, device: Device = None) -> GramKernel:
    """`gram_eigh`; where it fails, float64 on the CPU, then a jitter, then the SVD; the result says which.

    Each attempt is checked, so that a solver that returns NaN has failed like one that raises.

    Args:
        dtype: The dtype of the first attempt.
        device: The device of the first attempt; where the Gram lies if None.
    """
    on_cpu = gram_eigh(dtype=torch.float64, device="cpu")
    last = gram_svd(dtype=torch.float64, device="cpu")
    return fallback(gram_eigh(dtype=dtype, device=device), on_cpu, jittered(on_cpu), last)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the one global generator that draws on `device`; put its state back on leaving."""
    on_cuda = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if on_cuda else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
