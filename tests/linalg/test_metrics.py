"""Every metric against an independent formula in NumPy, its limits, and its behaviour under `vmap`."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from fisherfunc.linalg import kernels, metrics
from fisherfunc.linalg.spectrum import Spectrum

FLOOR = 1e-3  # of λ_1


def spectrum_of(eigenvalues, *, floor=FLOOR, num_params=20):
    values = torch.tensor(sorted(eigenvalues, reverse=True), dtype=torch.float64)
    return Spectrum(
        eigenvalues=values,
        resolution=floor * values[0],
        negative_part=torch.zeros(()).double(),
        num_units=10,
        num_params=num_params,
        solver="given",
    )


def reference(eigenvalues) -> dict[str, float]:
    """The definitions, in NumPy; λ_1 > 0 and at least two eigenvalues."""
    lam = np.sort(np.array(eigenvalues, dtype=np.float64))[::-1]
    share = lam[lam > 0] / lam.sum()
    resolved = lam[lam > FLOOR * lam[0]]
    return {
        "largest": lam[0],
        "second": lam[1],
        "smallest": resolved[-1],
        "gap": lam[0] - lam[1],
        "relative_gap": 1 - lam[1] / lam[0],
        "condition_number": lam[0] / resolved[-1],
        "trace": np.sum(lam),
        "effective_rank": np.prod(share**-share),
        "stable_rank": np.sum(lam) / np.max(lam),
        "participation_ratio": np.sum(lam) ** 2 / np.sum(lam**2),
        "numerical_rank": len(resolved),
    }


eigenvalues = st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=2, max_size=12).filter(any)


@given(eigenvalues)
def test_every_metric_is_its_definition(values):
    spectrum, want = spectrum_of(values), reference(values)
    assert set(want) == set(metrics.SUMMARY)
    for name, metric in metrics.SUMMARY.items():
        assert metric(spectrum).item() == pytest.approx(want[name], rel=1e-9, abs=1e-12), name


@given(eigenvalues, st.floats(1e-3, 1e3))
def test_the_effective_dimension_is_its_definition_and_falls_with_damping(values, gamma):
    lam = np.array(values)
    got = metrics.effective_dimension(spectrum_of(values), gamma).item()
    assert got == pytest.approx(float(np.sum(lam / (lam + gamma))), rel=1e-9)
    assert 0 <= metrics.effective_dimension(spectrum_of(values), 2 * gamma).item() <= got <= np.count_nonzero(lam)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_the_effective_dimension_needs_a_positive_damping(gamma):
    with pytest.raises(ValueError, match=f"gamma > 0, got gamma={gamma}"):
        metrics.effective_dimension(spectrum_of([1.0]), gamma)


@given(st.integers(1, 12), st.floats(1e-6, 1e6))
def test_equal_eigenvalues_have_full_ranks_of_every_kind(count, value):
    spectrum = spectrum_of([value] * count)
    for rank in (metrics.effective_rank, metrics.stable_rank, metrics.participation_ratio, metrics.numerical_rank):
        assert rank(spectrum).item() == pytest.approx(count, rel=1e-12)
    assert metrics.condition_number(spectrum).item() == 1.0


@given(eigenvalues)
def test_the_ranks_are_ordered_and_at_least_one(values):
    spectrum = spectrum_of(values)
    effective, participation, stable = (
        metric(spectrum).item() for metric in (metrics.effective_rank, metrics.participation_ratio, metrics.stable_rank)
    )
    slack = 1 + 1e-12
    assert stable * slack >= 1 and stable <= participation * slack and participation <= effective * slack
    assert effective <= np.count_nonzero(values) * slack


@given(eigenvalues, st.floats(1e-3, 1e3))
def test_ranks_and_ratios_do_not_depend_on_the_scale(values, c):
    plain, scaled = spectrum_of(values), spectrum_of([c * value for value in values])
    for name in ("effective_rank", "stable_rank", "participation_ratio", "relative_gap"):
        metric = metrics.SUMMARY[name]
        assert metric(scaled).item() == pytest.approx(metric(plain).item(), rel=1e-9, abs=1e-12), name


def test_a_zero_spectrum_has_ranks_of_zero_and_no_ratio():
    summary = metrics.summary(spectrum_of([0.0, 0.0, 0.0]))
    for name in ("effective_rank", "stable_rank", "participation_ratio", "numerical_rank", "trace", "largest", "gap"):
        assert summary[name] == 0, name
    for name in ("smallest", "condition_number", "relative_gap"):
        assert summary[name] is None, name


@pytest.mark.parametrize(("num_params", "want"), [(1, None), (None, None), (7, 0.0)])
def test_the_second_of_one_eigenvalue_is_zero_only_where_f_is_larger(num_params, want):
    summary = metrics.summary(spectrum_of([3.0], num_params=num_params))
    assert summary["second"] == want and summary["gap"] == (None if want is None else 3.0)


def test_what_lies_under_the_floor_counts_for_no_rank_and_no_condition_number():
    spectrum = spectrum_of([1.0, 1e-2, 0.9e-3, 1e-9])
    assert metrics.numerical_rank(spectrum).item() == 2
    assert metrics.smallest(spectrum).item() == 1e-2
    assert metrics.condition_number(spectrum).item() == pytest.approx(100.0)


@pytest.mark.parametrize("name", metrics.SUMMARY)
def test_metrics_survive_vmap(name):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    stack[1] = 0
    kernel, metric = kernels.cheapest(), metrics.SUMMARY[name]
    together = vmap(lambda rows: metric(kernel(rows)))(stack)
    for got, rows in zip(together, stack, strict=True):
        assert got.item() == pytest.approx(metric(kernel(rows)).item(), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("rows", [torch.zeros(3, 2), torch.zeros(1, 1), torch.ones(1, 1), torch.eye(3, 5)])
def test_a_summary_is_plain_and_round_trips_through_json(rows):
    summary = metrics.summary(kernels.cheapest()(rows))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {type(value) for value in summary.values()} <= {int, float, str, bool, type(None)}
    assert isinstance(summary["numerical_rank"], int) and not math.isnan(summary["trace"])
    assert set(metrics.SUMMARY) < set(summary)
