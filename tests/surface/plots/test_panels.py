"""`ff.plots`: what is drawn is what was computed, on a figure of one's own or of the user's."""

import io
import math
import sys

import matplotlib
import pytest
import torch
from figures import open_figures
from matplotlib.figure import Figure
from spectra import spectrum, unresolved

import fisherfunc as ff

MANY = tuple(f"layer.{index}.mlp.weight" for index in range(30))


def lines_of(axes):
    return {line.get_label(): [data.tolist() for data in line.get_data()] for line in axes.get_lines()}


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return ff.fisher_spectrum(model, (torch.randn(40, 4), torch.randint(3, (40,))))


def test_the_share_of_the_trace_is_the_sum_of_the_leading_eigenvalues(result):
    found = lines_of(ff.plots.cumulative_trace(result))
    for label, part in result.matrices.items():
        values = part.eigenvalues.tolist()
        wanted = [sum(values[: k + 1]) / sum(values) for k in range(len(values))]
        assert found[label][1] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("metric", ["trace", "effective_rank"])
def test_profiles_and_evolutions_are_the_metrics(result, metric):
    value = getattr(ff.metrics, metric)
    (line,) = ff.plots.profile(result, metric).get_lines()
    assert line.get_ydata().tolist() == [value(part).item() for part in result.blocks.values()]
    several = {"step-10": result, "step-1000": result, "step-50": result}
    for given in (several, ff.compare(several)):
        axes = ff.plots.evolution(given, metric)
        for label, part in result.matrices.items():
            assert lines_of(axes)[label] == [[10, 1000, 50], [pytest.approx(value(part).item())] * 3]
    assert axes.get_xlabel() == "step"


def test_the_density_has_as_many_eigenvalues_as_are_resolved(result):
    axes = ff.plots.density(result, num_bins=7)
    values, edges, _ = axes.patches[0].get_data()
    area = sum(v * math.log10(b / a) for v, a, b in zip(values, edges[:-1], edges[1:], strict=True))
    assert area == pytest.approx(int((result.full.eigenvalues > result.full.resolution).sum()))
    assert ff.plots.density(result.full, num_bins=7).patches[0].get_data().values.tolist() == values.tolist()


def test_couplings_are_of_the_tokens_or_of_the_population(result):
    shown = ff.plots.couplings(result).images[0].get_array().tolist()
    assert shown == [list(row) for row in result.coupling.alignment]
    other = ff.plots.couplings(result, of="population").images[0].get_array().tolist()
    assert other == [[entry.estimate for entry in row] for row in result.population.coupling.alignment] != shown


def test_the_effective_dimension_has_the_band_of_the_population(result):
    found = result.population.effective_dimension
    axes = ff.plots.effective_dimension(result)
    gammas, own = lines_of(axes)["of these tokens"]
    values = result.full.eigenvalues
    assert own == pytest.approx([float((values / (values + gamma)).sum()) for gamma in gammas], rel=1e-9)
    known = [(k, e) for k, e in zip(found.kappas, found.estimates, strict=True) if e.warning is None]
    assert known, "the law needs a band to look at"
    corners = axes.collections[0].get_paths()[0].vertices.tolist()
    assert all([k, end] in corners for k, e in known for end in (e.low, e.high))
    points = [[k, e.estimate] for k, e in known if e.estimate is not None]
    assert list(map(list, zip(*lines_of(axes)["of the population"], strict=True))) == points


ALL = sorted(set(ff.plots.__all__) - {"evolution"})


@pytest.mark.parametrize("name", ALL)
def test_on_the_users_axes_nothing_but_these_is_touched(result, name):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    before, open_before = dict(matplotlib.rcParams), open_figures()
    draw = getattr(ff.plots, name)
    assert draw(result, ax=right) is right
    assert not left.has_data() and right.has_data() and dict(matplotlib.rcParams) == before
    own = draw(result)
    assert own.figure is not figure and own.figure._repr_png_().startswith(b"\x89PNG")
    buffer = io.BytesIO()
    own.figure.savefig(buffer, format="pdf")
    assert buffer.getvalue().startswith(b"%PDF")
    assert open_figures() == open_before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [("a",), MANY])
def test_one_block_and_many_are_drawn_and_many_have_a_colour_bar(labels):
    found = spectrum(labels)
    for draw, has_bar in ((ff.plots.spectrum, True), (ff.plots.cumulative_trace, True), (ff.plots.profile, False)):
        axes = draw(found)
        axes.figure.draw_without_rendering()
        assert len(axes.figure.axes) == 1 + (has_bar and len(labels) > 12)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: ff.plots.profile(r, "speed"), r"no metric 'speed'; expected one of \['largest'"),
        (lambda r: ff.plots.evolution({"a": r, "b": r}, "speed"), r"no metric 'speed'"),
        (lambda r: ff.plots.couplings(r, of="text"), r"of='sample' or of='population', got of='text'"),
        (lambda r: ff.plots.couplings(spectrum()), r"has no couplings of the sample"),
        (lambda r: ff.plots.density(unresolved(spectrum())), r"no eigenvalue"),
        (lambda r: ff.plots.effective_dimension(unresolved(spectrum())), r"no eigenvalue is resolved"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(result, call, says):
    with pytest.raises(ValueError, match=says):
        call(result)


def test_a_dataset_has_the_eigenvalues_and_metrics_by_label(result):
    dataset = result.to_xarray()
    assert list(dataset["block"].values) == list(result.matrices) and dataset["eigenvalue"].attrs["units"]
    for label, part in result.matrices.items():
        row = dataset.sel(block=label)
        values = row["eigenvalue"].dropna("rank")
        assert values.values.tolist() == part.eigenvalues.tolist()
        assert values["rank"].values.tolist() == list(range(1, len(part.eigenvalues) + 1))
        assert row["resolved"].values.sum() == int((part.eigenvalues > part.resolution).sum())
        assert row["trace"].item() == pytest.approx(ff.metrics.trace(part).item())
    assert dataset.attrs["unit"] == "token"


def test_without_xarray_the_extra_is_named(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r'pip install "fisherfunc\[xarray\]"'):
        result.to_xarray()
