"""Every kernel gives the same spectrum of F = (1/N) Gᵀ G, and obeys the same laws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacrev, vmap
from torch.testing import assert_close

from fisherfunc.linalg import kernels, metrics
from fisherfunc.linalg.gram import centred, gram_of, of_rows
from fisherfunc.testing import gradient_matrices, prescribed_spectra

KERNELS = {
    "gram_eigh": kernels.of_rows(kernels.gram_eigh()),
    "gram_svd": kernels.of_rows(kernels.gram_svd()),
    "jittered": kernels.of_rows(kernels.jittered(kernels.gram_eigh())),
    "robust_eigh": kernels.of_rows(kernels.robust_eigh()),
    "covariance_eigh": kernels.covariance_eigh(),
    "svd": kernels.svd(),
    "svd_lowrank": kernels.svd_lowrank(rank=12),
    "cheapest": kernels.cheapest(),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
PURE = {name: kernel for name, kernel in KERNELS.items() if name != "robust_eigh"}  # the one that looks at values
every_pure_kernel = pytest.mark.parametrize("kernel", PURE.values(), ids=PURE)


def assert_spectrum(got, want, *, largest=None, relative=1e-13):
    """Equal up to round-off, which is relative to the largest eigenvalue."""
    largest = float(want.max()) if largest is None else largest
    assert_close(got.eigenvalues, want, atol=relative * largest, rtol=0)


@every_kernel
@given(prescribed_spectra())
def test_a_prescribed_spectrum_is_found(kernel, pair):
    rows, eigenvalues = pair
    assert_spectrum(kernel(rows), eigenvalues)


@every_kernel
@given(prescribed_spectra(dtype=torch.float32))
def test_a_prescribed_spectrum_is_found_in_float32_within_its_resolution(kernel, pair):
    rows, eigenvalues = pair
    spectrum = kernel(rows)
    # Weyl, of singular values: rounding moves none by more than eps/2 ‖G‖_F, half the root of what eps² tr K/N is.
    assert_close(spectrum.eigenvalues.sqrt(), eigenvalues.sqrt(), atol=float(spectrum.resolution.sqrt()), rtol=0)
    assert spectrum.eigenvalues.dtype == torch.float64


@every_kernel
@given(st.floats(1e-60, 1e60) | st.floats(-1e60, -1e-60) | st.just(0.0))
def test_one_row_of_one_parameter_gives_its_square(kernel, g):
    spectrum = kernel(torch.tensor([[g]], dtype=torch.float64))
    assert_close(spectrum.eigenvalues, torch.tensor([g * g], dtype=torch.float64), atol=0, rtol=1e-15)
    assert spectrum.exact and (spectrum.num_tokens, spectrum.num_params) == (1, 1)


@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"jittered"}))
def test_one_row_of_one_parameter_loses_no_bit(name):
    assert KERNELS[name](torch.tensor([[0.1]], dtype=torch.float64)).eigenvalues.tolist() == [0.1 * 0.1]


@every_kernel
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 5), (5, 3)])
def test_zero_gradients_have_a_zero_spectrum(kernel, shape):
    spectrum = kernel(torch.zeros(shape))
    assert_close(spectrum.eigenvalues, torch.zeros(min(shape), dtype=torch.float64), atol=0, rtol=0)
    assert (spectrum.resolution.item(), spectrum.negative_part.item()) == (0.0, 0.0)
    assert (metrics.effective_rank(spectrum).item(), metrics.numerical_rank(spectrum).item()) == (0.0, 0)


@every_kernel
@given(gradient_matrices())
def test_eigenvalues_are_min_of_n_and_p_many_descending_and_none_negative(kernel, rows):
    eigenvalues = kernel(rows).eigenvalues
    assert eigenvalues.shape == (min(rows.shape),)
    assert bool((eigenvalues[:-1] >= eigenvalues[1:]).all()) and bool((eigenvalues >= 0).all())


@every_kernel
@given(gradient_matrices())
def test_the_trace_is_the_mean_square_norm_of_the_rows(kernel, rows):
    want = rows.square().sum() / len(rows)
    assert_close(metrics.trace(kernel(rows)), want, atol=0, rtol=1e-12)


@every_kernel
@given(gradient_matrices(), st.floats(1e-3, 1e3))
def test_scaling_the_loss_by_c_scales_eigenvalues_by_its_square(kernel, rows, c):
    want = c**2 * kernel(rows).eigenvalues
    assert_spectrum(kernel(c * rows), want)


@every_kernel
@given(gradient_matrices(), st.randoms(use_true_random=False))
def test_the_order_of_tokens_does_not_matter(kernel, rows, random):
    order = random.sample(range(len(rows)), len(rows))
    assert_spectrum(kernel(rows[order]), kernel(rows).eigenvalues)


@every_kernel
@given(gradient_matrices())
def test_repeating_all_tokens_changes_nothing_but_n(kernel, rows):
    twice = kernel(torch.cat([rows, rows])).eigenvalues[: min(rows.shape)]
    assert_close(twice, kernel(rows).eigenvalues, atol=1e-12 * float(rows.square().sum()), rtol=0)


@given(gradient_matrices())
def test_the_routes_share_their_nonzero_spectrum(rows):
    reference = KERNELS["svd"](rows)
    for kernel in KERNELS.values():
        assert_spectrum(kernel(rows), reference.eigenvalues)


@every_kernel
def test_num_units_is_what_the_gram_is_divided_by(kernel):
    rows = torch.eye(4, 6)
    for found in (kernel(rows, num_units=2), kernel(rows, num_tokens=2)):  # the name that it had before
        assert_close(found.eigenvalues, torch.full((4,), 0.5).double(), atol=1e-15, rtol=0)
        assert found.num_units == found.num_tokens == 2
    assert kernel(rows).num_units == kernel(rows).num_tokens == 4


@pytest.mark.parametrize("make", [kernels.gram_eigh, kernels.gram_svd, kernels.robust_eigh])
@given(gradient_matrices(), st.booleans())
def test_a_gram_is_what_its_matrix_and_its_fields_are(make, rows, center):
    gram = replace(of_rows(rows), num_units=2 * len(rows), precision=torch.float32)
    gram = centred(gram) if center else gram
    one, other = make()(gram), make()(gram.matrix, num_units=2 * len(rows), **beside(gram))
    old = make()(gram.matrix, num_tokens=2 * len(rows), **beside(gram))
    for found in (other, old):
        assert torch.equal(found.eigenvalues, one.eigenvalues) and torch.equal(found.resolution, one.resolution)
        assert (found.num_units, found.num_params) == (one.num_units, one.num_params) == (2 * len(rows), rows.shape[1])


def beside(gram):
    return {"num_params": gram.num_params, "precision": gram.precision, "scale": gram.scale}


@given(gradient_matrices())
def test_a_centred_kernel_solves_the_covariance(rows):
    got = kernels.centred(kernels.gram_eigh())(of_rows(rows))
    scale = float(rows.square().sum())
    assert_close(got.eigenvalues, KERNELS["svd"](rows - rows.mean(0)).eigenvalues, atol=1e-13 * scale, rtol=0)
    # What cancelled counts: ‖K‖_F of before is at least its λ_max, each right to its own round-off.
    assert got.resolution >= (1 - 1e-12) * kernels.gram_eigh()(of_rows(rows)).resolution


def test_what_is_no_gram_is_named():
    for kernel in (kernels.gram_eigh(), kernels.centred(kernels.robust_eigh()), kernels.checked(kernels.gram_svd())):
        with pytest.raises(TypeError, match=r"expected an ff\.Gram \(or its matrix, a tensor\), got ndarray"):
            kernel(np.eye(2))
        with pytest.raises(TypeError, match=r"got an ff\.Gram and \['num_units'\] beside it; .* dataclasses\.replace"):
            kernel(of_rows(torch.eye(2)), num_tokens=2)


@every_kernel
def test_precision_and_scale_set_the_resolution(kernel):
    rows = torch.eye(3, 6, dtype=torch.float64)
    fine, coarse = kernel(rows).resolution, kernel(rows, precision=torch.float32).resolution
    assert_close(coarse - fine, 3 * torch.tensor(torch.finfo(torch.float32).eps).double() ** 2 / 3, atol=0, rtol=1e-3)
    cancelled = kernel(rows, scale=torch.tensor(100.0)).resolution
    assert 57 * fine < cancelled < 101 * fine  # tr K is 3, and was at most √3 · 100
    assert_close(kernel(rows, scale=torch.tensor(1e-3)).resolution, fine, atol=0, rtol=1e-6)


def test_the_solver_sets_the_resolution_of_rows_in_float64():
    rows = torch.eye(3, 6, dtype=torch.float64)
    solver = (3 + 6**0.5) * torch.finfo(torch.float64).eps
    rounding = torch.finfo(torch.float64).eps ** 2
    for name, kernel in KERNELS.items():
        want = (solver**2 if name.startswith("svd") else solver) / 3 + rounding
        assert kernel(rows).resolution.item() == pytest.approx(want, rel=1e-6), name


def test_singular_values_tell_from_zero_what_the_gram_does_not():
    small = 1e-20  # of F: 1e-10 of the largest singular value, in rows of float64
    rows = torch.diag(torch.tensor([1.0, small**0.5], dtype=torch.float64))
    assert KERNELS["svd"](rows).eigenvalues[1].item() == pytest.approx(small / 2, rel=1e-5)
    assert int(metrics.numerical_rank(KERNELS["svd"](rows))) == 2
    assert int(metrics.numerical_rank(KERNELS["gram_eigh"](rows))) == 1


def test_rounded_rows_of_low_rank_have_that_rank():
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randn(size, generator=generator, dtype=torch.float64) for size in [(40, 5), (5, 90)])
    rows = torch.linalg.multi_dot([*factors]).float()
    for name, kernel in KERNELS.items():
        assert int(metrics.numerical_rank(kernel(rows))) == 5, name


def test_without_the_number_of_parameters_all_n_eigenvalues_are_kept():
    gram = gram_of(torch.ones(4, 2))
    assert kernels.gram_eigh()(gram).eigenvalues.shape == (4,)
    assert kernels.gram_eigh()(gram, num_params=2).eigenvalues.shape == (2,)


def test_the_solver_says_which_matrix_was_solved():
    wide, tall = torch.ones(2, 5), torch.ones(5, 2)
    assert KERNELS["cheapest"](wide).solver == "gram_eigh(float64)"
    assert KERNELS["cheapest"](tall).solver == "covariance_eigh(float64)"
    assert kernels.gram_eigh(dtype=torch.float32)(gram_of(wide)).solver == "gram_eigh(float32)"
    assert kernels.gram_eigh(dtype=torch.float32)(gram_of(wide)).eigenvalues.dtype == torch.float32


@every_pure_kernel
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 3), (3, 1)])
def test_kernels_survive_vmap(kernel, shape):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = vmap(kernel)(stack)
    for index, rows in enumerate(stack):
        alone = kernel(rows)
        assert_spectrum(alone, together.eigenvalues[index])
        assert_close(together.resolution[index], alone.resolution, atol=0, rtol=1e-9)
    assert together.solver == alone.solver and together.num_tokens == shape[0]


@pytest.mark.parametrize("inner", [kernels.gram_eigh(), kernels.gram_svd(), kernels.jittered(kernels.gram_eigh())])
def test_the_derivative_of_a_simple_eigenvalue_by_the_gram_is_u_uT_over_n(inner):
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = gram_of(rows)
    derivative = jacrev(lambda k: inner(k).eigenvalues)(gram)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)
    want = torch.stack([torch.outer(u, u) / 4 for u in vectors.mT])
    assert_close((derivative + derivative.mT) / 2, want, atol=1e-9, rtol=0)


@every_pure_kernel
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_the_derivative_of_a_simple_eigenvalue_by_the_rows_is_2_sigma_u_vT_over_n(kernel, shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    derivative = jacrev(lambda g: kernel(g).eigenvalues)(rows)
    left, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    want = torch.stack([2 * s * torch.outer(u, v) / shape[0] for u, s, v in zip(left.mT, sigma, right, strict=True)])
    assert_close(derivative, want, atol=1e-9, rtol=0)
