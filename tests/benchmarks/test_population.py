"""The simulation of coverage and the pool of windows: truths are those of matrices, and a small part of each runs."""

from dataclasses import replace

import pytest
import torch

import fisherfunc as ff
from benchmarks import population_cost
from benchmarks.coverage import MIXING, NUM_BLOCKS, Cell, main, markdown, population, sample
from benchmarks.coverage import pooled as pooled_cells
from benchmarks.pool import of_population, of_sample, other_windows, subsets, tables
from fisherfunc.testing import clustered_grams


def formed(of):
    """F, its blocks in order: Q diag(λ) Qᵀ."""
    places = len(of.eigenvalues)
    f = torch.zeros(NUM_BLOCKS * places, NUM_BLOCKS * places, dtype=torch.float64)
    for place, values in enumerate(of.eigenvalues):
        index = torch.arange(NUM_BLOCKS) * places + place
        f[index[:, None], index] = MIXING.mT @ values.diag() @ MIXING
    return f


def test_truths_are_those_of_the_formed_matrix():
    of = population("1/k", "gaussian")
    f, found = formed(of), of.truths()
    values = torch.linalg.eigvalsh(f).flip(0)
    size = len(f) // NUM_BLOCKS
    blocks = f.reshape(NUM_BLOCKS, size, NUM_BLOCKS, size).transpose(1, 2)
    squares = blocks.square().sum(dim=(2, 3))
    want = {
        "trace": values.sum(),
        "squared norm": values.square().sum(),
        "participation ratio": values.sum() ** 2 / values.square().sum(),
        "block-diagonal error": (1 - squares.diagonal().sum() / squares.sum()).sqrt(),
        "alignment": squares[0, 1] / (squares[0, 0] * squares[1, 1]).sqrt(),
        "leading eigenvalue": values[0],
        "three leading": values[:3].sum(),
        "effective rank": torch.special.entr(values / values.sum()).sum().exp(),
    } | {f"dimension at {share:g} λ₁": (values / (values + share)).sum() for share in (0.1, 0.01, 0.001)}
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), value, rtol=1e-9, atol=1e-9)


def test_samples_have_the_second_moments_of_the_population():
    for spectrum, norms in (("1/k^2", "gaussian"), ("1/k^2", "heavy")):
        of = population(spectrum, norms)
        generator = torch.Generator().manual_seed(0)
        traces = [
            sum(float(k.trace()) for k in sample(of, num_sequences=5, num_tokens=4, generator=generator).grams.values())
            for _ in range(200)
        ]
        means = torch.tensor(traces) / 20
        assert abs(means.mean() - of.truths()["trace"]) < 4 * means.std() / 200**0.5


def test_a_small_part_of_the_simulation_runs_and_its_intervals_hold():
    """Of 11 estimators at nominal 95 %, on 5 samples: at a coverage of 0.9 each, 70 % and more of all intervals."""
    said = []
    main(
        ["--samples", "5", "--sequences", "8", "--tokens", "8", "--spectra", "1/k", "--norms", "gaussian"], said.append
    )
    rows = [line for line in said[0].splitlines() if "| 1/k |" in line]
    assert len(rows) == 11
    cells = [row.split("|")[4].split() for row in rows]
    held = [float(word.strip("*()")) for cell in cells for word in cell if word.strip("*()").isdigit()]
    assert len(held) >= 11 and sum(held) / len(held) > 70


def test_a_small_part_of_the_paired_simulation_runs():
    """Its truths are ratios to the population 1/k; of one spectrum to itself each draw would give one."""
    said = []
    options = [
        "--samples",
        "3",
        "--sequences",
        "8",
        "--tokens",
        "4",
        "--norms",
        "gaussian",
        "--spectra",
        "spiked",
        "1/k",
    ]
    main(["--paired", *options], said.append)
    rows = {line.split("|")[1].strip(): line.split("|") for line in said[0].splitlines() if "| spiked |" in line}
    assert len(rows) == 4 and not [line for line in said[0].splitlines() if "| 1/k |" in line]
    truths = [population(name, "gaussian").truths() for name in ("spiked", "1/k")]
    for told, name in (("ratio of traces", "trace"), ("ratio of participation ratios", "participation ratio")):
        assert rows[told][3].strip() == f"{truths[0][name] / truths[1][name]:.4g}"
    kappa = 0.1 * truths[0]["leading eigenvalue"]  # of the larger of the two
    dimensions = [population(name, "gaussian").dimension(kappa) for name in ("spiked", "1/k")]
    assert rows["ratio of dimensions at 0.1 λ₁"][3].strip() == f"{dimensions[0] / dimensions[1]:.4g}"


def test_what_falls_short_is_marked():
    facts = {"spectrum": "1/k", "norms": "heavy", "num_sequences": 20, "truth": 1.0, "num_samples": 100}
    good = Cell(name="trace", printed=1.0, held=0.93, held_all=0.93, bias=0.01, **facts)
    short = Cell(name="trace", printed=1.0, held=0.80, held_all=0.80, bias=0.01, **facts)
    biased = Cell(name="trace", printed=1.0, held=0.93, held_all=0.93, bias=0.2, **facts)
    silent = Cell(name="trace", printed=0.2, held=0.5, held_all=0.5, bias=0.5, **facts)
    assert "🔴" not in markdown([good]) and "falls short" in markdown([short]) and "biased" in markdown([biased])
    assert "not printed" in markdown([silent]) and not silent.falls_short and not silent.is_biased
    wide = replace(good, held=0.995)
    assert ", wide" in markdown([wide]) and ", wide" not in markdown([good])
    at_an_end = replace(wide, truth=0.0), replace(wide, name="participation ratio", spectrum="flat")
    assert not any(cell.is_wide for cell in (*at_an_end, replace(wide, name="three leading")))


def test_seeds_are_pooled_by_their_samples_and_each_is_measured_once(tmp_path):
    """Shares of what is printed go by what is printed; a mean over all samples is that of all."""
    facts = {"spectrum": "1/k", "norms": "heavy", "num_sequences": 20, "name": "trace", "truth": 1.0}
    one = Cell(printed=1.0, held=0.9, held_all=0.9, bias=0.1, num_samples=30, **facts)
    other = Cell(printed=0.1, held=0.0, held_all=0.6, bias=-0.2, num_samples=100, seed=1, **facts)
    none = Cell(printed=0.0, held=None, held_all=0.5, bias=None, num_samples=70, seed=2, **facts)
    (cell,) = pooled_cells([one, other, none])
    assert cell.num_samples == 200 and cell.printed == pytest.approx(0.2) and cell.held == pytest.approx(27 / 40)
    assert cell.held_all == pytest.approx((27 + 60 + 35) / 200) and cell.bias == pytest.approx((3 - 2) / 40)

    size = [
        "--samples",
        "2",
        "--sequences",
        "8",
        "--tokens",
        "3",
        "--spectra",
        "1/k",
        "--norms",
        "gaussian",
        "--moments",
    ]
    size += ["--cells", str(tmp_path / "cells.jsonl")]
    said: list[str] = []
    for seed in ("0", "1", "1"):
        main([*size, "--seed", seed], said.append)
    assert "gaussian, 8 (2)" in said[0] and "gaussian, 8 (4)" in said[2] and said[2:4] == said[4:]


def pooled():
    grams = clustered_grams([1 / k for k in range(1, 60)], num_sequences=12, num_tokens=3, correlation=0.3, seed=0)
    gram = grams.block()
    names = {"h.0.weight": gram / 2, "h.1.weight": gram / 2}
    return ff.TokenGrams(**{**vars(grams), "grams": names, "num_params": dict.fromkeys(names, 59)})


def test_the_pool_is_dealt_into_disjoint_subsets_and_compared():
    grams = pooled()
    masks = subsets(grams, 5)
    assert len(masks) == 2 and not bool((masks[0] & masks[1]).any()) and int(masks[0].sum()) == 15
    others = other_windows(grams, masks[0]).tokens.sequence.unique().tolist()
    assert len(others) == 7 and not {*others} & {*grams.tokens.sequence[masks[0]].tolist()}
    found = ff.population.summary(grams, kappas=[10.0])
    assert of_population(found).keys() <= of_sample(grams).keys()
    text = tables(grams, [5])
    assert "| embedded model | 15 tokens | 36 tokens |" in text and "2 of 2: " in text


def test_second_moments_alone_are_those_of_the_whole_simulation():
    """The same samples, no eigensolve."""
    size = ("--samples", "2", "--sequences", "8", "--tokens", "6", "--spectra", "1/k", "--norms", "gaussian")
    said, alone = [], []
    main([*size], said.append)
    main([*size, "--moments"], alone.append)
    rows = alone[0].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [
        *("trace", "squared norm", "participation ratio", "block-diagonal error", "alignment")
    ]
    assert set(rows) < set(said[0].splitlines())


def test_a_bias_is_counted_where_the_truth_is_not_zero():
    cell = Cell(
        "flat", "gaussian", 20, "alignment", truth=0.0, printed=1.0, held=1.0, held_all=1.0, bias=0.07, num_samples=9
    )
    assert not cell.is_biased and replace(cell, truth=0.5).is_biased


def test_the_cost_of_estimates_is_measured_beside_the_eigensolve():
    said = []
    population_cost.main(["--tokens", "40", "--sequences", "8", "--params", "32"], said.append)
    *_, row = said[0].splitlines()
    count, solve, rest, _, held = [cell.strip() for cell in row.strip("|").split("|")]
    assert count == "40" and float(solve) >= 0 and float(rest) >= 0 and float(held) >= 0
