"""What a sample can show: ceilings, and which metrics the number of rows sets."""

import json
import math
from dataclasses import replace

import pytest
import torch
from builders import grams_of

import fisherfunc as ff
from fisherfunc.statistics import sample_limits


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def limits(rows, *, center=False, **options):
    return sample_limits(ff.spectrum_of_gradients({"w": rows}, center=center, **options).full, centered=center)


@pytest.mark.parametrize(
    ("shape", "center", "ceiling"),
    [
        ((5, 9), False, 5),
        ((9, 5), False, 5),
        ((5, 9), True, 4),
        ((6, 5), True, 5),
        ((5, 5), True, 4),
        ((1, 1), False, 1),
    ],
)
def test_the_ceiling_is_the_rank_of_generic_rows(shape, center, ceiling):
    rows = gaussian(*shape)
    rank = int(torch.linalg.matrix_rank(rows - rows.mean(dim=0) if center else rows))
    assert limits(rows, center=center).rank_ceiling == ceiling == rank


def test_the_resolution_is_that_of_the_spectrum():
    rows = gaussian(30, 12)
    assert limits(rows).resolution == ff.spectrum_of_gradients({"w": rows}).full.resolution.item()


def test_the_population_rank_of_equal_eigenvalues_that_the_docstring_states():
    """The sample shows exp(−r/2N) r: at a third of N, four fifths of what there is."""
    num_rows, rank = 300, 124
    seen = ff.metrics.effective_rank(ff.spectrum_of_gradients({"w": gaussian(num_rows, rank)}).full).item()
    assert seen == pytest.approx(math.exp(-rank / 2 / num_rows) * rank, rel=0.01)
    assert seen / num_rows == pytest.approx(1 / 3, abs=0.01) and 0.78 < seen / rank < 0.83


def test_few_rows_of_many_directions_set_the_ranks():
    found = limits(gaussian(20, 500))
    assert set(found.set_by_sample) == {
        "numerical_rank",
        "smallest",
        "condition_number",
        "effective_rank",
        "participation_ratio",
    }
    assert (
        len(found.warnings) == 2
        and "the rows allow, 20" in found.warnings[0]
        and "a third of the 20" in found.warnings[1]
    )


def test_where_the_model_sets_the_ranks_there_is_no_warning():
    assert limits(gaussian(500, 20)).set_by_sample == ()  # many rows
    low = limits(gaussian(60, 3) @ gaussian(3, 400, seed=1))  # few directions
    assert low.set_by_sample == () and low.warnings == ()
    full_rank = limits(gaussian(60, 400) * 2.0 ** -torch.arange(400))  # a steep spectrum in float64
    assert "effective_rank" not in full_rank.set_by_sample
    assert limits(torch.zeros(3, 9)).warnings == ()


def test_ranks_are_set_by_the_sample_where_its_norm_is_beyond_that_of_the_population():
    """λ = 1/√k: the effective rank is below a third of the rows, and the participation ratio a third of the truth's."""
    values = torch.arange(1, 401, dtype=torch.float64).rsqrt()
    rows, norm = gaussian(150, 400) * values.sqrt(), float(values.square().sum())
    spectrum = ff.spectrum_of_gradients({"w": rows}).full
    assert float(spectrum.eigenvalues.square().sum()) > 1.5 * norm
    found = sample_limits(spectrum, squared_norm=norm)
    assert "effective_rank" in found.set_by_sample and "times that of the population" in found.warnings[-1]
    assert "effective_rank" not in sample_limits(spectrum, squared_norm=10 * norm).set_by_sample
    own = ff.spectrum_of_grams(grams_of({"w": rows}), population=True)
    estimate = own.population.squared_norm.full.estimate
    limits_of_own = own.to_dict()["sample_limits"]["full"]
    assert limits_of_own == sample_limits(own.full, squared_norm=estimate).to_dict()


def test_what_is_approximate_or_has_no_p_is_not_taken_for_its_length():
    rows = gaussian(40, 90)
    leading = limits(rows, kernel=ff.kernels.svd_lowrank(rank=2, oversampling=2))
    assert leading.rank_ceiling == 40
    alone = ff.kernels.gram_eigh()(rows @ rows.mT)
    found = sample_limits(alone)
    assert found.rank_ceiling == 40
    several = replace(alone, num_params=90, num_units=10)  # four rows a token
    assert sample_limits(several).rank_ceiling == 40


def test_the_limits_are_plain():
    plain = limits(gaussian(20, 500)).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
