"""Kernels of a user's own: they give the spectrum of the matrix, in whatever order, or an error with their name."""

from dataclasses import replace

import pytest
import torch
from builders import grams_of
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacrev, vmap
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.linalg.sound_spectrum import SolverError
from fisherfunc.testing import gradient_matrices

ROWS = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TRUTH = torch.linalg.svdvals(ROWS).square() / 12
GRAM = ROWS @ ROWS.T


def of_rows(kernel, rows=ROWS):
    return ff.spectrum_of_gradients({"w": rows}, blocks=ff.whole, kernel=kernel).full


def of_grams(kernel, rows=ROWS):
    return ff.spectrum_of_grams(grams_of({"w": rows}), blocks=ff.whole, kernel=kernel).full


def rows_by(function, **options):
    return lambda: of_rows(ff.kernels.row_kernel(function, solver="mine", **options))


def gram_by(function, rows=ROWS, **options):
    return lambda: of_grams(ff.kernels.gram_kernel(function, solver="mine", **options), rows)


def spectrum_by(**changes):
    def mine(gram):
        return replace(ff.kernels.gram_eigh()(gram), solver="mine", **changes)

    return lambda: of_grams(mine)


@given(gradient_matrices(), st.randoms(use_true_random=False))
def test_eigenvalues_in_any_order_are_the_same_spectrum(rows, random):
    def shuffled(values):
        return values[random.sample(range(len(values)), len(values))]

    mine = ff.kernels.row_kernel(lambda g: shuffled(torch.linalg.eigvalsh(g @ g.T)), solver="mine")
    own = ff.kernels.gram_kernel(lambda k: shuffled(torch.linalg.eigvalsh(k)), solver="own")
    want = ff.spectrum_of_gradients({"w": rows}, blocks=ff.whole).full
    for got in (of_rows(mine, rows), of_grams(own, rows), of_rows(ff.kernels.of_rows(own), rows)):
        assert_close(got.eigenvalues, want.eigenvalues, atol=1e-12 * float(rows.square().sum()), rtol=0)
        assert bool((got.eigenvalues[:-1] >= got.eigenvalues[1:]).all())
        assert_close(ff.metrics.largest(got), ff.metrics.largest(want), rtol=1e-11, atol=0)


def eig(k):
    return torch.linalg.eigvalsh(k)


def as_before(gram, *, num_tokens=None, num_params=None, precision=None, scale=None):
    """What a kernel was before there was `ff.Gram`."""
    return ff.kernels.gram_eigh()(gram, num_tokens=num_tokens, num_params=num_params, precision=precision, scale=scale)


WRONG = {
    "NaN of rows": (rows_by(lambda g: torch.full((12,), float("nan"))), ValueError, "'mine' returned a NaN"),
    "NaN of a Gram": (gram_by(lambda k: torch.full((12,), float("nan"))), ValueError, "'mine' returned a NaN"),
    "one NaN": (gram_by(lambda k: eig(k).index_fill(0, torch.tensor([3]), float("nan"))), ValueError, "'mine'.* a NaN"),
    "infinite": (rows_by(lambda g: torch.full((12,), float("inf"))), ValueError, "'mine' returned a NaN or infinite"),
    "negative": (gram_by(lambda k: eig(k) - 50.0), ValueError, "by kernel 'mine', below minus the resolution"),
    "complex": (gram_by(torch.linalg.eigvals), TypeError, "'mine' expected a real .*, got torch.complex128"),
    "integers": (gram_by(lambda k: eig(k).round().long()), TypeError, "'mine' expected a real .*, got torch.int64"),
    "with vectors": (gram_by(torch.linalg.eigh), TypeError, "'mine' expected a tensor, got linalg_eigh"),
    "a list": (gram_by(lambda k: eig(k).tolist()), TypeError, "'mine' expected a tensor, got list"),
    "a matrix": (gram_by(torch.linalg.cholesky), ValueError, r"'mine' expected the shape .*, got \(12, 12\)"),
    "a number": (gram_by(lambda k: k.trace()), ValueError, r"'mine' expected the shape .*, got \(\)"),
    "none": (gram_by(lambda k: eig(k)[:0]), ValueError, r"'mine' expected the shape .*, got \(0,\)"),
    "too many": (gram_by(lambda k: eig(k).repeat(2)), ValueError, r"'mine' expected the shape .*, got \(24,\)"),
    "too many of rows": (rows_by(lambda g: torch.ones(21)), ValueError, r"'mine' expected the shape .*, got \(21,\)"),
    "too few": (gram_by(lambda k: eig(k)[6:]), ValueError, r"'mine' returned 6 of min\(N, P\) = 12 .*exact=False"),
    "of rank 3": (gram_by(lambda k: k.diagonal(), ROWS[:, :3]), ValueError, r"'mine' have the sum .*tr K/N"),
    "singular values": (rows_by(torch.linalg.svdvals), ValueError, r"'mine' have the sum .*tr K/N"),
    "a right trace": (gram_by(lambda k: k.diagonal()), ValueError, r"'mine' have the Euclidean norm .*‖K‖/N"),
    "a right trace of rows": (rows_by(lambda g: g.square().sum(1)), ValueError, r"'mine' have the Euclidean norm"),
    "not divided": (spectrum_by(eigenvalues=12 * TRUTH), ValueError, "'mine' have the sum"),
    "divided twice": (spectrum_by(num_units=144), ValueError, "'mine' .* of num_units=144, expected 12"),
    "other parameters": (spectrum_by(num_params=None), ValueError, "'mine' .* of num_params=None, expected 20"),
    "ascending": (spectrum_by(eigenvalues=TRUTH.flip(0)), ValueError, "'mine' are not in descending order"),
    "below zero": (spectrum_by(eigenvalues=TRUTH - 1), ValueError, "'mine' returned a negative eigenvalue"),
    "indefinite": (spectrum_by(negative_part=-TRUTH[0]), ValueError, "by kernel 'mine', below minus the resolution"),
    "no floor": (spectrum_by(resolution=torch.tensor(float("nan"))), ValueError, "'mine' returned a NaN"),
    "two spectra": (
        spectrum_by(eigenvalues=TRUTH.expand(2, 12), resolution=TRUTH[:2] * 0, negative_part=TRUTH[:2] * 0),
        ValueError,
        r"eigenvalues of kernel 'mine' expected the shape \('k',\), got \(2, 12\)",
    ),
    "13 values": (
        spectrum_by(eigenvalues=TRUTH[[0] * 13]),
        ValueError,
        r"'mine' returned 13 .*from 1 to min\(N, P\) = 12",
    ),
    "a tensor": (
        lambda: of_grams(lambda gram: eig(gram.matrix)),
        TypeError,
        "<lambda>' returned Tensor, expected an ff",
    ),
    "of a matrix": (
        lambda: of_grams(lambda gram: eig(gram)),
        TypeError,
        "<lambda>' could not take an ff.Gram: .*matrix",
    ),
    "as a matrix": (
        lambda: of_grams(lambda gram: eig(gram.double())),
        TypeError,
        "could not take an ff.Gram: .*matrix",
    ),
    "as before": (
        lambda: of_grams(as_before),
        TypeError,
        r"takes a matrix and \['num_tokens', .* one ff.Gram, which has",
    ),
    "no argument": (
        lambda: of_grams(lambda: None),
        TypeError,
        r"<lambda>' cannot be called as kernel\(gram\): too many",
    ),
    "torch's": (lambda: of_grams(torch.linalg.eigvalsh), TypeError, "linalg_eigvalsh' cannot be called as kernel"),
    "of rows": (
        lambda: of_grams(ff.kernels.svd()),
        TypeError,
        r"cannot be called as kernel\(gram\).*gradient matrices",
    ),
    "cheapest": (lambda: of_grams(ff.kernels.cheapest()), TypeError, r"cannot be called as kernel\(gram\).*gradient"),
    "of Grams": (
        lambda: of_rows(ff.kernels.gram_eigh()),
        ValueError,
        r"expected a square Gram .*\(12, 20\); .*of_rows",
    ),
    "of Grams, square": (
        lambda: of_rows(ff.kernels.gram_eigh(), ROWS[:, :12]),
        ValueError,
        "num_params=None, expected 12",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_spectrum_of_the_matrix_is_refused_by_the_name_of_the_kernel(what):
    call, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda found: {"eigenvalues": found.eigenvalues[None]}, ValueError, "'mine' expected the shape"),
        (lambda found: {"eigenvalues": found.eigenvalues.flip(0)}, ValueError, "'mine' are not in descending order"),
        (lambda found: {"eigenvalues": found.eigenvalues * float("nan")}, ValueError, "'mine' returned a NaN"),
        (lambda found: {"negative_part": -found.eigenvalues[0]}, ValueError, "by kernel 'mine', below minus the resol"),
        (lambda found: {"eigenvalues": 1.5 * found.eigenvalues}, ValueError, "'mine' have the sum .*tr K/N"),
        (lambda found: {"num_units": found.num_units + 1}, ValueError, "'mine' .* of num_units=6, expected 5"),
    ],
)
def test_the_main_function_believes_no_kernel(wrong, error, message):
    def mine(gram):
        found = ff.kernels.gram_eigh()(gram)
        return replace(found, solver="mine", **wrong(found))

    torch.manual_seed(0)
    batch = (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))
    with pytest.raises(error, match=message):
        ff.fisher_spectrum(torch.nn.Linear(2, 3), batch, kernel=mine)


@pytest.mark.parametrize("wrap", [ff.kernels.checked, ff.kernels.fallback, lambda k: ff.kernels.fallback(k, k)])
def test_the_combinators_believe_no_kernel(wrap):
    for function in (lambda k: torch.full((12,), float("nan")), lambda k: k.diagonal(), lambda k: eig(k)[6:]):
        with pytest.raises((ValueError, torch.linalg.LinAlgError), match="'mine'"):
            wrap(ff.kernels.gram_kernel(function, solver="mine"))(GRAM)


def test_a_kernel_that_is_wrong_has_failed_and_the_next_is_asked():
    for wrong in (lambda k: torch.full((12,), float("nan")), lambda k: k.diagonal()):
        kernel = ff.kernels.fallback(ff.kernels.gram_kernel(wrong, solver="mine"), ff.kernels.gram_eigh())
        found = kernel(GRAM)
        assert found.solver == "gram_eigh(float64)" and found.fallback.startswith("SolverError: ")
        assert_close(found.eigenvalues, TRUTH, atol=1e-13 * float(TRUTH[0]), rtol=0)


def test_a_solver_that_failed_is_an_error_of_values_and_of_torch():
    assert issubclass(SolverError, ValueError) and issubclass(SolverError, torch.linalg.LinAlgError)


@pytest.mark.parametrize("make", [ff.kernels.row_kernel, ff.kernels.gram_kernel])
def test_an_approximation_that_is_marked_may_have_fewer_eigenvalues(make):
    def leading(matrix):
        return torch.linalg.eigvalsh(GRAM)[-3:]

    ask = of_rows if make is ff.kernels.row_kernel else of_grams
    found = ask(make(leading, solver="mine", exact=False))
    assert not found.exact and found.eigenvalues.shape == (3,)
    assert_close(found.eigenvalues, TRUTH[:3], atol=1e-13 * float(TRUTH[0]), rtol=0)
    exact = ask(ff.kernels.svd_lowrank(rank=2)) if ask is of_rows else None  # its sketch holds the whole spectrum
    assert exact is None or exact.exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(gradient_matrices(dtype=torch.float32), st.booleans())
def test_round_off_of_a_coarser_kernel_is_not_taken_for_another_spectrum(dtype, rows, center):
    coarse = ff.kernels.gram_kernel(lambda k: torch.linalg.eigvalsh(k.float()).to(dtype), solver="mine")
    in_float32 = ff.kernels.of_rows(ff.kernels.gram_eigh(dtype=torch.float32), dtype=torch.float32)
    for kernel in (ff.kernels.of_rows(coarse), in_float32, ff.kernels.svd(dtype=torch.float32)):
        ff.spectrum_of_gradients({"w": rows}, blocks=ff.whole, kernel=kernel, center=center)


def test_every_kernel_of_ours_passes_for_many_rows_and_few_parameters():
    tall = torch.randn(200, 7, generator=torch.Generator().manual_seed(1))
    for kernel in (
        ff.kernels.svd(),
        ff.kernels.cheapest(),
        ff.kernels.covariance_eigh(),
        ff.kernels.svd_lowrank(rank=2),
    ):
        assert of_rows(kernel, tall).eigenvalues.shape == (7,)
    for kernel in (ff.kernels.gram_eigh(), ff.kernels.gram_svd(), ff.kernels.jittered(ff.kernels.gram_eigh())):
        assert of_grams(kernel, tall.double()).eigenvalues.shape == (7,)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_gradients_of_any_size_have_a_spectrum(scale):
    assert of_rows(ff.kernels.svd(), scale * ROWS).eigenvalues[0].item() == pytest.approx(scale**2 * TRUTH[0].item())
    assert of_grams(ff.kernels.gram_eigh(), scale * ROWS).solver == "gram_eigh(float64)"


def test_own_kernels_and_the_fallback_survive_vmap_and_jacrev():
    mine = ff.kernels.gram_kernel(torch.linalg.eigvalsh, solver="mine")
    stack = torch.stack([GRAM, 2 * GRAM])
    for kernel in (mine, ff.kernels.fallback(mine, ff.kernels.gram_eigh())):
        found = vmap(kernel)(stack).eigenvalues
        assert_close(found, torch.stack([TRUTH, 2 * TRUTH]), atol=1e-13 * float(TRUTH[0]), rtol=0)
        vectors = torch.linalg.eigh(GRAM).eigenvectors.flip(-1)
        want = torch.stack([torch.outer(u, u) / 12 for u in vectors.mT])
        derivatives = jacrev(lambda gram, kernel=kernel: kernel(gram).eigenvalues)
        for derivative in (derivatives(GRAM), vmap(derivatives)(GRAM[None])[0]):
            assert_close((derivative + derivative.mT) / 2, want, atol=1e-9, rtol=0)


def test_a_kernel_that_writes_to_its_gram_is_refused():
    grams = grams_of({"w": ROWS})
    mine = ff.kernels.gram_kernel(lambda k: torch.linalg.eigvalsh(k.div_(2)), solver="mine")
    with pytest.raises(ValueError, match=r"'mine' wrote to the matrix .*clone"):
        ff.spectrum_of_grams(grams, blocks=ff.whole, kernel=mine)


def test_a_stack_of_grams_is_checked_as_one():
    kernel = ff.kernels.checked(ff.kernels.gram_eigh())
    assert kernel(torch.stack([GRAM, 3 * GRAM])).eigenvalues.shape == (2, 12)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        kernel(torch.stack([GRAM, -GRAM]))
