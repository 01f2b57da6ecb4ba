"""What a result says of the population: what ff.population says, in files and under the table, or why nothing."""

import json
from dataclasses import replace

import pytest
import torch
from builders import grams_of
from consoles import shown
from torch.utils._python_dispatch import TorchDispatchMode

import fisherfunc as ff
from fisherfunc.partitioning import by_parameter
from fisherfunc.pipeline.sheets import short, told
from fisherfunc.population import summary
from fisherfunc.surface.files import read_spectrum, to_json
from fisherfunc.surface.reports import html_report
from fisherfunc.surface.reports.report import report

SEQUENCE = torch.arange(5).repeat_interleave(6)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRAMS = grams_of({"a": gaussian(30, 20), "b": gaussian(30, 4, seed=1)}, sequence=SEQUENCE)


def result_of(grams=GRAMS, **options):
    return ff.spectrum_of_grams(grams, blocks=by_parameter, **options)


def printed(result, width=200):
    return shown(report(result, width=width), width)


class Solves(TorchDispatchMode):
    """How many symmetric matrices of each size are solved."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._linalg_eigh:
            self.sizes.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("blocks", [by_parameter, ff.partitioning.whole])
def test_the_full_matrix_is_solved_once_and_as_without_estimates(blocks):
    with Solves() as counted:
        result = ff.spectrum_of_grams(GRAMS, blocks=blocks, population=True)
    count = len(result.blocks)
    assert counted.sizes.count(30) == (count + 1 if count > 1 else 1)
    alone = ff.spectrum_of_grams(GRAMS, blocks=blocks)
    bound = 30 * torch.finfo(torch.float64).eps * float(alone.full.eigenvalues[0])  # of a backward stable solver
    torch.testing.assert_close(result.full.eigenvalues, alone.full.eigenvalues, rtol=0, atol=bound)
    assert result.full.solver == alone.full.solver
    own = ff.spectrum_of_grams(GRAMS, blocks=blocks, population=True, kernel=ff.kernels.gram_svd())
    assert "gram_svd" in own.full.solver and own.population == result.population


def test_a_result_has_the_summary_of_its_grams_also_from_its_file(tmp_path):
    result = result_of(population=True)
    expected = summary(GRAMS, blocks=by_parameter)
    assert result.population.to_dict() == expected.to_dict() and result.population.num_clusters == 5
    plain = json.loads(to_json(result))
    assert plain["population"] == json.loads(json.dumps(expected.to_dict()))
    assert {"per_block", "global", "full", "eigenvalues"} <= plain.keys()
    path = tmp_path / "spectrum.json"
    path.write_text(to_json(result))
    assert read_spectrum(path).population.to_dict() == expected.to_dict()


def test_what_is_not_asked_for_is_not_there():
    result = result_of()
    assert result.population is None and result.to_dict()["population"] is None
    assert "population" not in printed(result) and "population" not in result.metadata


def test_the_headline_is_of_the_population_with_the_sample_beside_it_and_below():
    result = result_of(population=True)
    text, found = printed(result), result.population
    headline, alone = text.split("Of these 30 tokens alone: all but the trace move with their number")
    assert "Of the population that these 5 sequences were drawn from (95% intervals)" in headline
    error = found.block_diagonal_error
    row = f"left out by blocks ‖F − F_bd‖/‖F‖ {told(error)} {short(result.coupling.block_diagonal_error)}"
    curve = found.effective_dimension
    at, dimension = next(pair for pair in zip(curve.kappas, curve.estimates, strict=True) if pair[1].estimate)
    sample = float((result.full.eigenvalues / (result.full.eigenvalues + at)).sum())
    lines = [" ".join(line.split()) for line in headline.splitlines()]
    assert row in lines
    assert f"effective dimension at κ = {at:.2g}, the least resolved {told(dimension)} {short(sample)}" in lines
    assert (
        f"alignment of a and b {told(found.coupling.alignment[0][1])} {short(result.coupling.alignment[0][1])}" in lines
    )
    bracket = found.leading_eigenvalue
    assert bracket.estimate is None and f" {short(bracket.low)} … {short(bracket.high)} " in headline
    for label in ("a", "b"):
        of_block = told(found.trace[label]), told(found.participation_ratio[label])
        assert any(line.startswith(label) and all(part in line for part in of_block) for line in lines)
    assert "gap" in alone and "gap" not in headline


def test_an_interval_with_a_warning_is_not_printed():
    result = result_of(population=True)
    found = result.population
    ratios = type(found.participation_ratio)(
        found.participation_ratio, replace(found.participation_ratio.full, warning="its coverage is not known")
    )
    bracket = replace(found.leading_eigenvalue, warning="nor is that of this")
    result = replace(result, population=replace(found, participation_ratio=ratios, leading_eigenvalue=bracket))
    for text in (printed(result), repr(result), html_report.page({"": result})):
        assert f"{short(ratios.full.estimate)}, no interval" in text
        assert f"{short(ratios.full.low)} …" not in text and f"{short(bracket.low)} …" not in text
    assert "no interval of participation ratio: its coverage is not known" in printed(result)
    assert "no interval of λ_max: nor is that of this" in printed(result)


@pytest.mark.parametrize(
    ("grams", "reason"),
    [
        (grams_of({"a": gaussian(6, 9)}, sequence=torch.tensor([0, 0, 0, 1, 1, 1])), "at least 3 sequences, got 2"),
        (GRAMS.center(), "uncentred"),
    ],
    ids=["two sequences", "centred"],
)
def test_where_nothing_can_be_said_the_result_says_why(grams, reason):
    result = result_of(grams, population=True)
    assert result.population is None and reason in result.metadata["population"]
    assert f"All numbers are of these {result.full.num_tokens} rows" in printed(result)


def test_a_run_estimates_by_itself_and_takes_clusters():
    model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
    assert ff.fisher_spectrum(model, batch).population.num_clusters == 8
    assert ff.fisher_spectrum(model, batch, population=False).population is None
    clustered = ff.fisher_spectrum(model, batch, clusters=["a", "a", "b", "b", "c", "c", "d", "d"])
    assert clustered.population.num_clusters == 4
    two = ff.fisher_spectrum(model, batch, clusters=[0, 0, 0, 0, 1, 1, 1, 1])
    assert two.population is None and "at least 3 clusters, got 2" in two.metadata["population"]
    with pytest.raises(ValueError, match=r"one label per sequence \(8\), got 3"):
        ff.fisher_spectrum(model, batch, clusters=[0, 1, 2])


def test_clusters_of_a_pass_stay_with_its_tokens_wherever_these_go(tmp_path):
    """Selected, summed and through a file: the estimates are those of labels given afterwards, by sequence."""
    fn = ff.functionalize(torch.nn.Linear(3, 2).double())
    batch = gaussian(8, 3), torch.arange(8) % 2
    documents = ["d", "a", "b", "c", "d", "a", "b", "c"]
    options = {"loss": ff.losses.classification(), "num_tokens": 7}
    grams = ff.token_grams(fn, fn.params, batch, clusters=documents, **options)
    plain = ff.token_grams(fn, fn.params, batch, **options)
    labels = [documents[s] for s in plain.tokens.sequence.tolist()]
    want = ff.population.squared_norm(plain, clusters=labels).full
    assert want.num_clusters == 4 and ff.population.squared_norm(grams).full == want
    grams.save(tmp_path / "grams")
    assert ff.population.squared_norm(ff.TokenGrams.load(tmp_path / "grams")).full == want
    assert ff.population.squared_norm(grams.by_sequence()).full.num_clusters == 4
    order = torch.arange(6, -1, -1)
    turned = ff.population.squared_norm(grams.select(order)).full
    assert (turned.low, turned.high) == pytest.approx((want.low, want.high), rel=1e-12)
    assert ff.statistics.jackknife(grams).full["trace"].num_sequences == 4
