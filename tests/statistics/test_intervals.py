"""Bootstrap and jackknife: replicates are those of rows drawn again or left out, intervals their formulas."""

import json
import math

import pytest
import torch
from builders import grams_of, matrices, total_square
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.linalg.kernels import svd
from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.linalg.union import union
from fisherfunc.partitioning import by_parameter
from fisherfunc.statistics import Intervals, bootstrap, jackknife
from fisherfunc.statistics.block_grams import gathered, sequences_of
from fisherfunc.statistics.resampling import replicates as module
from fisherfunc.statistics.resampling.bootstrap import draws
from fisherfunc.statistics.resampling.interval import student_quantile
from fisherfunc.testing import gradient_trees

SEQUENCE = torch.tensor([7, 3, 3, 9, 7, 7, 4, 9])


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TREE = {"a.weight": gaussian(8, 4, 5), "b.bias": gaussian(8, 2, seed=1)}


def drawn_rows(rows, sequence, counts):
    """The rows of each sequence as often as it is drawn."""
    parts = [rows[sequence == s].repeat(int(m), 1) for s, m in zip(sequence.unique(), counts, strict=True)]
    return torch.cat(parts)


@given(gradient_trees(max_rows=8), st.data(), st.booleans())
def test_a_replicate_is_the_spectrum_of_the_rows_drawn(tree, data, center):
    rows = matrices(tree)
    num_rows = len(next(iter(rows.values())))
    sequence = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=num_rows, max_size=num_rows)))
    count = len(sequence.unique())
    some = st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(any)
    weights = torch.tensor(data.draw(st.lists(some, min_size=1, max_size=4)), dtype=torch.float64)
    grams = grams_of(tree, sequence=sequence)
    grams = grams.center() if center else grams
    blocks, together, full = module.replicate_spectra(
        grams, gathered(grams, by_parameter), sequences_of(grams), weights
    )
    for index, counts in enumerate(torch.cat([torch.ones(1, count), weights])):
        drawn = {name: drawn_rows(g, sequence, counts) for name, g in rows.items()}
        drawn = {name: g - g.mean(dim=0) if center else g for name, g in drawn.items()}
        want = {name: svd()(g) for name, g in drawn.items()}
        tolerance = 1e-12 * total_square(tree)
        for got, expected in [
            *((blocks[name], want[name]) for name in rows),
            (full, svd()(torch.cat(list(drawn.values()), dim=1))),
            (together, union(want)),
        ]:
            length = max(got.eigenvalues.shape[-1], len(expected.eigenvalues))
            assert_close(
                _padded(got.eigenvalues[index], length), _padded(expected.eigenvalues, length), atol=tolerance, rtol=0
            )


def _padded(values, length):
    return torch.cat([values, values.new_zeros(length - len(values))])


@pytest.mark.parametrize("bytes_", [1, 2**28])
def test_the_batches_change_nothing(monkeypatch, bytes_):
    monkeypatch.setattr(module, "BATCH_BYTES", bytes_)
    grams = grams_of(TREE, sequence=SEQUENCE)
    weights = draws(4, 20, seed=0)
    _, _, full = module.replicate_spectra(grams, gathered(grams, by_parameter), sequences_of(grams), weights)
    for got, counts in zip(full.eigenvalues[1:], weights, strict=True):
        rows = drawn_rows(torch.cat(list(matrices(TREE).values()), dim=1), SEQUENCE, counts)
        want = torch.linalg.svdvals(rows).square() / len(rows)
        assert_close(got[: len(want)], want[: len(got)], atol=1e-12, rtol=0)


def test_the_draws_are_sequences_with_replacement():
    counts = draws(5, 4000, seed=3)
    assert bool((counts.sum(dim=1) == 5).all()) and torch.equal(counts, draws(5, 4000, seed=3))
    assert not torch.equal(counts, draws(5, 4000, seed=4))
    assert_close(counts.mean(dim=0), torch.ones(5).double(), atol=0.06, rtol=0)
    assert_close(counts.var(dim=0), torch.full((5,), 0.8).double(), atol=0.08, rtol=0)  # binomial(5, 1/5)


def test_of_a_mean_the_jackknife_is_the_textbook():
    """With one token a sequence the trace is a mean of squared norms: its standard error is known, it has no bias."""
    grams = grams_of(TREE)
    square = gaussian(8, 4, 5).square().sum(dim=(1, 2)) + gaussian(8, 2, seed=1).square().sum(dim=1)
    got = jackknife(grams, metrics={"minus": lambda s: -ff.metrics.trace(s)}, level=0.9).full["minus"]
    error = square.std().item() / math.sqrt(8)
    assert got.estimate == pytest.approx(-square.mean().item(), rel=1e-12)
    assert got.standard_error == pytest.approx(error, rel=1e-9) and got.bias == pytest.approx(0, abs=1e-9)
    assert (got.low, got.high) == pytest.approx(
        (got.estimate - 1.894579 * error, got.estimate + 1.894579 * error),
        rel=1e-6,  # t of 7 degrees of freedom
    )
    assert (got.method, got.num_sequences, got.level) == ("jackknife", 8, 0.9)


def test_the_jackknife_takes_off_the_bias_of_a_variance():
    """Centred, the trace divides by S where S − 1 would be unbiased: the correction is exact (Quenouille 1956)."""
    grams = grams_of(TREE).center()
    unbiased = sum(g.var(dim=0).sum().item() for g in matrices(TREE).values())
    minus = jackknife(grams, metrics={"minus": lambda s: -ff.metrics.trace(s)}).full["minus"]
    assert -minus.corrected == pytest.approx(unbiased, rel=1e-9)
    assert -minus.estimate == pytest.approx(unbiased * 7 / 8, rel=1e-9)


def test_bootstrap_intervals_are_their_formulas():
    grams, counts = grams_of(TREE, sequence=SEQUENCE), draws(4, 50, seed=2)
    rows = torch.cat(list(matrices(TREE).values()), dim=1)
    values = torch.stack([drawn_rows(rows, SEQUENCE, c).square().sum(dim=1).mean() for c in counts]).log()
    sample = rows.square().sum(dim=1).mean().log()
    inflation = math.sqrt(4 / 3)
    center, reach = 2 * sample - values.mean(), 3.182446 * inflation * values.std()  # t of 3 degrees of freedom
    low, high = values.quantile(0.025), values.quantile(0.975)
    want = {
        "normal": (center - reach, center + reach),
        "basic": (2 * sample - high, 2 * sample - low),
        "percentile": (low, high),
    }
    for method, ends in want.items():
        got = bootstrap(grams, num_replicates=50, seed=2, method=method).full["trace"]
        assert (got.low, got.high) == pytest.approx([end.exp().item() for end in ends], rel=1e-6), method
        assert got.corrected == pytest.approx(center.exp().item(), rel=1e-9)
        assert got.standard_error == pytest.approx((inflation * values.exp().std()).item(), rel=1e-9)
        assert got.method == f"bootstrap, {method}, 50 replicates"


@given(gradient_trees(max_rows=8), st.data(), st.booleans())
def test_a_replicates_trace_is_that_of_its_spectrum(tree, data, center):
    """Linear in what sequences contribute, of centred rows less their mean: as the eigenvalues of the rows drawn."""
    num_rows = len(next(iter(tree.values())))
    sequence = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=num_rows, max_size=num_rows)))
    grams = grams_of(tree, sequence=sequence)
    grams = grams.center() if center else grams
    sequences = sequences_of(grams)
    weights = draws(sequences.num_sequences, 5, seed=0)
    found = module.replicates_of(grams, gathered(grams, by_parameter), sequences, weights, solve=True)
    for of in (*found.blocks.values(), found.block_diagonal, found.full):
        assert_close(of.traces, of.spectra.eigenvalues.sum(dim=-1), atol=1e-12 * total_square(tree), rtol=0)


@pytest.mark.parametrize("interval", [bootstrap, jackknife])
def test_every_metric_has_an_interval_or_the_reason_why_not(interval):
    """The trace, a mean over sequences, has one; what is of the spectrum of these rows has none, and why."""
    grams = grams_of({name: 3 + g for name, g in TREE.items()}, sequence=SEQUENCE)  # of no heavy tails
    found = interval(grams, blocks=by_parameter)
    result = ff.spectrum_of_grams(grams, blocks=by_parameter)
    named = {**result.blocks, "together": result.block_diagonal, "full": result.full}
    for label, of in {**found.blocks, "together": found.block_diagonal, "full": found.full}.items():
        assert list(of) == list(SUMMARY)
        for name, metric in SUMMARY.items():
            assert of[name].estimate == pytest.approx(metric(named[label]).item(), rel=1e-9), name
            assert of[name].known == (name == "trace"), name
        assert "resampling does not show" in of["gap"].note
    assert found == interval(grams, blocks=by_parameter)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert Intervals.from_dict(plain) == found


@pytest.mark.parametrize("interval", [bootstrap, jackknife])
def test_an_interval_follows_the_scale_of_the_gradients(interval):
    metrics = {"trace": SUMMARY["trace"], "mine": lambda s: ff.metrics.stable_rank(s)}
    plain = interval(grams_of(TREE, sequence=SEQUENCE), metrics=metrics).full
    scaled = interval(grams_of({n: 10 * g for n, g in TREE.items()}, sequence=SEQUENCE), metrics=metrics).full
    for name, factor in {"trace": 100.0, "mine": 1.0}.items():
        for end in ("estimate", "low", "high", "standard_error"):
            assert getattr(scaled[name], end) == pytest.approx(factor * getattr(plain[name], end), rel=1e-9)


@pytest.mark.parametrize("interval", [bootstrap, jackknife])
def test_of_one_sequence_there_is_no_interval(interval):
    with pytest.raises(ValueError, match=r"at least 2 sequences, got 1: the tokens of a sequence depend"):
        interval(grams_of(TREE, sequence=torch.zeros(8, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"at least 2 sequences, got 1"):
        interval(grams_of({"w": gaussian(1, 1)}))


@pytest.mark.parametrize("interval", [bootstrap, jackknife])
def test_zero_gradients_and_one_parameter(interval):
    metrics = {"trace": SUMMARY["trace"], **{n: lambda s, n=n: SUMMARY[n](s) for n in ("condition_number", "largest")}}
    zero = interval(grams_of({"w": torch.zeros(4, 3)}), metrics=metrics).full
    assert (zero["trace"].low, zero["trace"].high) == (0.0, 0.0)
    assert zero["condition_number"].estimate is None and not zero["condition_number"].known
    assert "does not exist" in zero["condition_number"].note and zero["trace"].note is None
    one = interval(grams_of({"w": gaussian(6, 1)}), metrics=metrics).full
    assert one["condition_number"].standard_error == 0.0
    assert one["largest"].low < one["largest"].estimate < one["largest"].high


@pytest.mark.parametrize("interval", [bootstrap, jackknife])
def test_of_sequences_that_differ_too_much_the_trace_has_no_interval(interval):
    """Lognormal norms of a standard deviation of three: by simulation such intervals hold in three of four samples."""
    found = interval(grams_of({"w": gaussian(20, 1).mul(3).exp()})).full["trace"]
    assert not found.known and "too short" in found.note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, r"between 0 and 1, got level=1\.0"),
        ({"num_replicates": 1}, "at least 2, got num_replicates=1"),
        ({"method": "bca"}, "got method='bca'"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(grams_of(TREE), **options)


def test_quantiles_of_student_are_those_of_the_tables():
    for degrees, want in {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 30: 2.0423, 1000: 1.9623}.items():
        assert student_quantile(0.975, degrees) == pytest.approx(want, abs=6e-5)
        assert student_quantile(0.025, degrees) == pytest.approx(-want, abs=6e-5)
