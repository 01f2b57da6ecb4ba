"""A Gram in a file has the products, sums and eigenvalues of the one in memory."""

import pytest
import torch
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.linalg.krylov import stored
from fisherfunc.records.tensor_files import DamagedError

EPS = torch.finfo(torch.float64).eps


def factors_of(num_rows, rank, seed=0):
    """Rows whose Gram has eigenvalues that fall."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, rank, generator=generator, dtype=torch.float64)
    return rows * torch.arange(1, rank + 1, dtype=torch.float64) ** -0.5


def written(folder, factors, **options):
    """The Gram of rows, in a file."""
    return ff.operators.stored_gram(
        folder / "gram", lambda start, stop: factors[start:stop] @ factors[:stop].mT, num_rows=len(factors), **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [1, 300, 2**24])  # tiles of one row, of some with a short one at the end, one tile
def test_a_stored_gram_has_the_products_and_sums_of_the_gram(tmp_path, monkeypatch, dtype, entries):
    monkeypatch.setattr(stored, "ENTRIES", entries)
    factors = factors_of(50, 8)
    matrix = factors @ factors.mT
    gram = written(tmp_path, factors, num_tokens=25, dtype=dtype)
    norm = float(torch.linalg.matrix_norm(matrix))
    rounding = (0.0 if dtype == torch.float64 else 2.0**-24) * norm + 100 * EPS * norm
    vectors = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    off = torch.linalg.vector_norm(gram.matmul(vectors) - matrix @ vectors, dim=0)
    assert bool((off <= rounding * torch.linalg.vector_norm(vectors, dim=0)).all())
    operator = gram.operator()
    assert operator.trace == pytest.approx(float(matrix.diagonal().sum()) / 25, rel=100 * EPS)
    assert operator.squared_norm == pytest.approx((norm / 25) ** 2, rel=100 * EPS)
    assert_close(operator.token_product(vectors[:, 0]), gram.matmul(vectors)[:, 0] / 25, rtol=1e-13, atol=1e-13 * norm)
    assert ff.operators.StoredGram.load(tmp_path / "gram") == gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_on_a_stored_gram_is_certified_against_dense_eigenvalues(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(stored, "ENTRIES", 1000)
    factors = factors_of(120, 30)
    exact = torch.linalg.eigvalsh(factors.mT @ factors).flip(0) / 120
    operator = written(tmp_path, factors, dtype=dtype).operator()
    found = ff.kernels.lanczos(num_leading=5, tolerance=1e-6, num_steps=60)(operator)
    assert found.complete is not None
    off = (exact[:, None] - found.eigenvalues).abs().amin(dim=0)
    assert bool((off <= found.bounds).all())
    assert bool((found.eigenvalues - exact[:5] <= found.round_off).all())
    rest = exact[5:]
    assert float(found.missed) >= float(rest[0]) - float(found.bounds.max())
    quadrature = ff.kernels.lanczos_quadrature(num_probes=2, num_steps=60)(operator)
    dimension = quadrature.effective_dimension(0.1)
    assert quadrature.trace().value == pytest.approx(float(exact.sum()), rel=1e-12)
    assert dimension.low <= float((exact / (exact + 0.1)).sum()) <= dimension.high


def test_a_read_serves_several_vectors(tmp_path, monkeypatch):
    factors = factors_of(120, 30)
    gram = written(tmp_path, factors)
    reads, tiles = [], stored.StoredGram.tiles
    monkeypatch.setattr(stored.StoredGram, "tiles", lambda self: reads.append(1) or tiles(self))
    found = ff.kernels.lanczos(num_leading=5, tolerance=1e-3, width=4)(gram.operator())
    assert len(reads) == -(-found.num_steps // 4) + 1  # and one to measure the round-off
    exact = torch.linalg.eigvalsh(factors.mT @ factors).flip(0)[:5] / 120
    assert bool(((found.eigenvalues - exact).abs() <= found.bounds).all())
    reads.clear()
    ff.kernels.lanczos_quadrature(num_probes=5, num_steps=7)(gram.operator())
    assert len(reads) == 7 + 1


def test_rounding_to_be_stored_is_in_the_bounds(tmp_path):
    """Of a rank-one Gram Lanczos is exact, so that what is off is the rounding of the file alone."""
    factors = factors_of(40, 1)
    found = ff.kernels.lanczos(num_leading=1)(written(tmp_path, factors).operator())
    exact = float(factors.square().sum()) / 40
    off = abs(float(found.eigenvalues[0]) - exact)
    assert 1e3 * EPS * exact < off <= float(found.bounds[0]) <= 2.0**-22 * exact


def test_a_gram_that_was_not_finished_or_is_damaged_is_not_opened(tmp_path):
    def rows(start, stop):
        raise KeyboardInterrupt

    written(tmp_path, factors_of(10, 2))
    with pytest.raises(KeyboardInterrupt):
        ff.operators.stored_gram(tmp_path / "gram", rows, num_rows=10)
    with pytest.raises(FileNotFoundError):
        ff.operators.StoredGram.load(tmp_path / "gram")
    gram = written(tmp_path, factors_of(10, 2))
    gram.path.write_bytes(gram.path.read_bytes()[:-4])
    with pytest.raises(DamagedError, match=r"has 396 bytes, expected 400; write it again"):
        ff.operators.StoredGram.load(gram.path)
    with pytest.raises(DamagedError, match="is not the file that was written"):
        gram.matmul(torch.ones(10, 1, dtype=torch.float64))


def test_a_file_that_was_changed_is_not_believed(tmp_path):
    old, vectors = written(tmp_path, factors_of(10, 2)), torch.ones(10, 1)
    new = written(tmp_path, factors_of(10, 2, seed=1))
    with pytest.raises(DamagedError, match="is not the file that was written; write it again by stored_gram"):
        old.matmul(vectors)
    assert new.matmul(vectors).dtype == torch.float64
    data = bytearray(new.path.read_bytes())
    data[200] ^= 1
    new.path.write_bytes(data)
    with pytest.raises(DamagedError, match="is not the file that was written"):
        ff.operators.StoredGram.load(new.path).matmul(vectors)


def test_numbers_that_are_too_small_to_be_stored_are_in_the_bounds(tmp_path):
    factors = factors_of(40, 1) * 1e-23
    found = ff.kernels.lanczos(num_leading=1)(written(tmp_path, factors).operator())
    off = abs(float(found.eigenvalues[0]) - float(factors.square().sum()) / 40)
    assert 1e-50 < off <= float(found.bounds[0])


def test_what_is_no_gram_is_refused(tmp_path):
    path = tmp_path / "gram"
    with pytest.raises(ValueError, match=r"rows\(0, 3\) expected finite numbers of shape \(3, 3\), got shape \(3, 4\)"):
        ff.operators.stored_gram(path, lambda start, stop: torch.zeros(3, 4), num_rows=3)
    with pytest.raises(ValueError, match="in float32 without overflow"):
        ff.operators.stored_gram(path, lambda a, b: torch.full((b - a, b), 1e300, dtype=torch.float64), num_rows=3)
    with pytest.raises(ValueError, match=r"dtype expected torch\.float32 or torch\.float64, got torch\.float16"):
        ff.operators.stored_gram(path, lambda a, b: torch.zeros(b - a, b), num_rows=3, dtype=torch.float16)
    with pytest.raises(ValueError, match="num_tokens expected at least 1, got num_tokens=0"):
        ff.operators.stored_gram(path, lambda a, b: torch.zeros(b - a, b), num_rows=3, num_tokens=0)
    with pytest.raises(ValueError, match="num_rows expected at least 1, got num_rows=0"):
        ff.operators.stored_gram(path, lambda a, b: torch.zeros(b - a, b), num_rows=0)
