"""Coverage where the truth is known: the simulation is what it says, and the intervals do what their docstring says."""

from functools import partial

import pytest
import torch

from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.statistics import bootstrap, jackknife
from fisherfunc.testing import clustered_grams, coverage

POWER_LAW = [k**-1.5 for k in range(1, 13)]
METRICS = {name: lambda s, m=SUMMARY[name]: m(s) for name in ("trace", "effective_rank", "largest")}
"""As a user's own functions: the package gives no intervals of the last two."""


def test_the_rows_have_the_covariance_and_the_correlation_that_are_asked_for():
    grams = clustered_grams([4.0], num_sequences=4000, num_tokens=2, correlation=0.6, seed=0)
    gram = grams.grams["weight"]
    assert gram.diagonal().mean().item() == pytest.approx(4.0, rel=0.1)
    pairs = gram[torch.arange(0, 8000, 2), torch.arange(1, 8000, 2)]  # the two tokens of a sequence
    assert pairs.mean().item() == pytest.approx(0.6 * 4.0, rel=0.15)
    others = gram[torch.arange(0, 7998, 2), torch.arange(2, 8000, 2)]
    assert others.mean().item() == pytest.approx(0, abs=0.3)
    assert grams.tokens.sequence.tolist()[:3] == [0, 0, 1]


@pytest.fixture(scope="module")
def found():
    """Of 40 samples of 12 sequences of 4 tokens: the error of a coverage of 0.9 is 0.05."""
    methods = {
        "jackknife": partial(jackknife, level=0.9, metrics=METRICS),
        "bootstrap": partial(bootstrap, level=0.9, metrics=METRICS, num_replicates=50),
        "percentile": partial(bootstrap, level=0.9, metrics=METRICS, num_replicates=50, method="percentile"),
    }
    size = {"num_sequences": 12, "num_tokens": 4, "num_samples": 40}
    return {name: coverage(method, POWER_LAW, **size) for name, method in methods.items()}


@pytest.mark.parametrize("method", ["jackknife", "bootstrap"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(found, method):
    assert found[method]["trace"].share >= 0.78 and found[method]["trace"].num_samples == 40
    assert found[method]["largest"].share >= 0.75
    assert found[method]["effective_rank"].share >= 0.7
    assert found[method]["largest"].truth == 1.0 and found[method]["trace"].truth == pytest.approx(sum(POWER_LAW))


def test_percentile_intervals_of_a_biased_metric_do_not(found):
    assert found["percentile"]["effective_rank"].share < found["bootstrap"]["effective_rank"].share - 0.2


@pytest.mark.parametrize("method", ["jackknife", "bootstrap"])
def test_the_correction_is_the_bias(found, method):
    rank = found[method]["effective_rank"]
    estimated = (rank.mean_estimate - rank.mean_corrected) / rank.truth
    assert estimated == pytest.approx(-0.078, abs=0.02)  # the bias over 3,000 other samples, ± 0.002


def test_ignoring_sequences_would_be_too_sure():
    """Tokens taken for independent: the intervals of the trace miss."""

    def naive(grams):
        apart = torch.arange(grams.num_units)
        tokens = type(grams.tokens)(sequence=apart, position=grams.tokens.position, loss=grams.tokens.loss)
        return jackknife(type(grams)(**{**vars(grams), "tokens": tokens}), level=0.9, metrics=METRICS)

    size = {"num_sequences": 12, "num_tokens": 6, "correlation": 0.9, "num_samples": 40}
    assert coverage(naive, POWER_LAW, **size)["trace"].share < 0.7
    right = partial(jackknife, level=0.9, metrics=METRICS)
    assert coverage(right, POWER_LAW, **size)["trace"].share > 0.75
