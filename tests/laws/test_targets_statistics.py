"""What is made of Grams where a token has several rows: intervals, limits and couplings divide by the tokens."""

import pytest
import torch
from tight import tighten
from torch.testing import assert_close
from towers import Tower, samples

import fisherfunc as ff
from fisherfunc.gradients.factored import plan as plans


def grams(targets, **options):
    fn = ff.functionalize(Tower())
    return ff.token_grams(fn, fn.params, samples(), ff.losses.classification(), targets=targets, **options)


def test_intervals_and_couplings_of_the_true_fisher_are_those_of_its_formed_blocks():
    exact = grams(ff.targets.all_classes())
    assert (exact.num_units, exact.num_rows) == (9, 27)
    found = ff.statistics.jackknife(exact, blocks=ff.whole)
    trace = exact.block().diagonal().view(9, 3).sum(dim=1)  # a token each
    without = (trace.sum() - trace) / 8
    assert found.full["trace"].estimate == pytest.approx(float(trace.mean()), rel=1e-12)
    mean = without.log().mean()
    expected = (8 / 9 * (without.log() - mean).square().sum()).sqrt()
    ends = (torch.tensor([found.full["trace"].low, found.full["trace"].high]).log()).diff()
    assert float(ends / 2 / expected) == pytest.approx(2.306, rel=1e-3)  # Student's t of 8 degrees of freedom
    coupling = ff.statistics.block_coupling(exact, blocks=ff.whole)
    assert coupling.squared_norms[0][0] == pytest.approx(float(exact.block().square().sum()) / 81, rel=1e-10)


def test_at_one_draw_pairs_of_sequences_are_without_bias_and_eigenvalues_are_not():
    """Σ_{s≠t} ⟨g_s, g_t⟩² of one draw each has the expectation Σ_{s≠t} tr F_s F_t; λ_max is convex in F (Jensen)."""
    num_draws = 50
    drawn, exact = grams(ff.targets.sampled(num_draws)), grams(ff.targets.all_classes())
    replicates = [
        num_draws * drawn.block()[drawn.tokens.draw == d][:, drawn.tokens.draw == d] for d in range(num_draws)
    ]
    pairs = torch.stack([k.square().sum() - k.diagonal().square().sum() for k in replicates])
    squares = exact.block().view(9, 3, 9, 3).square().sum(dim=(1, 3))
    truth = squares.sum() - squares.trace()
    assert abs(pairs.mean() - truth) < 4 * pairs.std() / num_draws**0.5
    largest = torch.stack([torch.linalg.eigvalsh(k)[-1] for k in replicates])
    assert largest.mean() - 4 * largest.std() / num_draws**0.5 > torch.linalg.eigvalsh(exact.block())[-1]


def test_the_rank_that_rows_allow_counts_rows_not_tokens():
    spectrum = ff.spectrum_of_grams(grams(ff.targets.all_classes()), blocks=ff.whole).full
    assert ff.statistics.sample_limits(spectrum).rank_ceiling == 27
    assert int(ff.metrics.numerical_rank(spectrum)) > 9


def test_the_mean_gradient_is_of_observed_targets():
    noise = (ff.statistics.gradient_noise_scale, ff.statistics.mean_gradient_norm)
    for statistic in noise:
        with pytest.raises(ValueError, match=r"true Fisher.*observed"):
            statistic(grams(ff.targets.sampled(2)))


def test_segments_give_the_same_rows(monkeypatch):
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    for targets in (ff.targets.sampled(2), ff.targets.all_classes()):
        expected = grams(targets)
        with monkeypatch.context() as patch:
            tighten(patch, share=5)
            found = grams(targets, chunk_size=2)
        assert found.metadata["segments"] > 1
        for name, gram in expected.grams.items():
            assert_close(found.grams[name], gram, rtol=1e-10, atol=1e-13)
