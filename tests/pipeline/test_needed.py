"""The rule of tokens: what is extrapolated comes out where Gaussian populations have it in closed form."""

import json
from dataclasses import replace

import pytest
import torch
from builders import grams_of
from click.testing import CliRunner
from commands import run, tiny
from consoles import shown

import fisherfunc as ff
from fisherfunc.pipeline.needed import tokens_needed
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.cli import cli
from fisherfunc.surface.files import read_spectrum
from fisherfunc.surface.reports.plan_report import summary
from fisherfunc.surface.reports.report import report
from fisherfunc.testing import clustered_grams


def of_truth(result, **truths):
    """The result with points of the population as they are, and not as estimated."""
    found = result.population

    def full(estimates, value):
        return type(estimates)(dict(estimates), replace(estimates.full, estimate=value))

    norms = full(found.squared_norm, truths["squared_norm"])
    error = replace(found.block_diagonal_error, estimate=truths.get("error", found.block_diagonal_error.estimate))
    return replace(result, population=replace(found, squared_norm=norms, block_diagonal_error=error))


def test_the_sample_of_a_gaussian_population_takes_ten_times_its_participation_ratio():
    """E‖F̂‖² = ‖F‖² + ((tr F)² + ‖F‖²)/N for independent rows: 1.1 ‖F‖² at N = 10 (q + 1), whatever was passed over."""
    values = torch.arange(1, 41, dtype=torch.float64).rsqrt()
    norm, trace = float(values.square().sum()), float(values.sum())
    want, found = 10 * (trace**2 / norm + 1), []
    for seed in range(12):
        grams = clustered_grams(values.tolist(), num_sequences=60, num_tokens=1, correlation=0.0, seed=seed)
        result = of_truth(ff.spectrum_of_grams(grams, population=True), squared_norm=norm)
        found.append(float(tokens_needed(result)["participation_ratio"].sample))
    found = torch.tensor(found)
    assert abs(found.mean() - want) < 4 * found.std() / 12**0.5


def test_the_block_diagonal_error_is_off_by_the_share_at_the_number_that_is_said():
    """(O + o/N)/(‖F‖² + f/N), f and o from the result, is 1.1² or 1/1.1² of its limit there."""
    tree = {n: torch.randn(24, 9, generator=torch.Generator().manual_seed(s)).double() for s, n in enumerate("ab")}
    result = ff.spectrum_of_grams(grams_of({"a": tree["a"], "b": tree["b"] + tree["a"]}), population=True, blocks=str)
    found = result.population
    norm, error = found.squared_norm.full.estimate, found.block_diagonal_error.estimate
    count, own = 24, float(result.full.eigenvalues.square().sum())
    f, o = count * (own - norm), count * (result.coupling.block_diagonal_error**2 * own - error**2 * norm)
    for within in (0.01, 0.05):
        needed = tokens_needed(result, within=within)["block_diagonal_error"].sample
        at = [((error**2 * norm + o / n) / (norm + f / n)) ** 0.5 / error for n in (needed - 1, needed)]
        assert max(at[0], 1 / at[0]) >= 1 + within >= max(at[1], 1 / at[1])


def test_an_interval_falls_like_the_root():
    result = ff.spectrum_of_grams(grams_of({"w": 2 + torch.randn(30, 6).double()}), population=True)
    trace = result.population.trace.full
    half = (trace.high / trace.low) ** 0.5
    found = tokens_needed(result, within=half - 1)["trace"]
    assert found.sample is None and found.population in (30, 31)
    warned = replace(trace, warning="too short")
    estimates = type(result.population.trace)({}, warned)
    result = replace(result, population=replace(result.population, trace=estimates))
    assert tokens_needed(result)["trace"].population is None


def test_the_table_and_the_plan_say_it():
    model, batch = torch.nn.Linear(3, 2), (1 + torch.randn(12, 3), torch.arange(12) % 2)
    pilot = ff.fisher_spectrum(model, batch)
    needed = tokens_needed(pilot)
    assert "Within 10 % from so many tokens on" in shown(report(pilot, width=200), 200)
    plan = ff.plan(model, batch, calibrate=False, pilot=pilot)
    assert plan.needed_tokens["trace"]["population"] == needed["trace"].population
    assert plan.to_dict()["needed_tokens"]["participation_ratio"]["sample"] == needed["participation_ratio"].sample
    assert any("Within 10 %" in line for line in summary(plan, Provenance()))
    assert ff.plan(model, batch, calibrate=False).to_dict()["needed_tokens"] is None


def test_the_command_takes_a_pilot_of_the_same_model_and_text(hub, here):
    pilot = ["--context", 12, "--tokens", 33, "--out", "pilot", "--quiet"]
    assert run(*tiny(hub, "gpt2"), *pilot).exit_code == 0
    needed = tokens_needed(read_spectrum(here / "pilot"))["participation_ratio"]

    def plan(*options):
        words = ["plan", *tiny(hub, "gpt2"), "--tokens", 44, "--context", 12, "--pilot", "pilot", *options]
        return CliRunner().invoke(cli, list(map(str, words)), prog_name="fisherfunc")

    planned = json.loads(plan("--format", "json").stdout)["needed_tokens"]
    assert planned["participation_ratio"]["population"] == needed.population
    assert "Within 10 % from so many tokens on" in plan().stdout
    for option in ("--unit", "sequence"), ("--targets", "sampled"), ("--text", hub / "gpt2" / "config.json"):
        ran = plan(*option)
        assert ran.exit_code == 1 and "--pilot pilot is of " in ran.stderr


def test_without_estimates_there_is_no_rule():
    model, batch = torch.nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4) % 2)
    with pytest.raises(ValueError, match="got none: run fisher_spectrum with population=True"):
        tokens_needed(ff.fisher_spectrum(model, batch, population=False))
    with pytest.raises(ValueError, match="within=0"):
        tokens_needed(ff.fisher_spectrum(model, batch), within=0)
