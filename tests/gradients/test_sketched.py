"""Projected rows: exactly the projections of the gradients of a plain loop, unbiased over seeds, and marked."""

import json

import pytest
import torch
import zoo
from rich.console import Console
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.rows.workload import PassOptions
from fisherfunc.gradients.sketched import _difference, _formed
from fisherfunc.gradients.start import started
from fisherfunc.linalg.grams.sketches import projections, variance
from fisherfunc.surface.files import read_spectrum, to_json
from fisherfunc.surface.reports.report import report

SKETCH = ff.sketches.kronecker(rank=3, seed=5)


def explicit(model, batch, loss, sketch):
    """{name: (2, n, k)}: the gradients of each token, formed one by one, projected by explicit matrices."""
    fn = ff.functionalize(model)
    gradients = ff.per_token_gradients(fn, fn.params, batch, loss)
    found = {}
    for name, g in gradients.items():
        shape = (g[0].numel(), 1) if g.ndim < 3 else (g.shape[1], g[0, 0].numel())
        halves = []
        for one in projections(sketch, name, g.shape[1:], like=g):
            left = torch.eye(shape[0]).to(g) if one.left is None else one.left
            right = torch.eye(shape[1]).to(g) if one.right is None else one.right
            halves.append(g.flatten(1) @ torch.kron(left, right).mT)
        found[name] = torch.stack(halves)
    return found


NAMES = ["gpt2", "llama", "bert", "t5", "mamba"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_projected_gradients(name):
    model, batch = zoo.build(name, dtype=torch.float64)
    loss = ff.losses.infer(model, batch)
    fn = ff.functionalize(model)
    found = ff.sketches.rows(fn, fn.params, batch, loss, sketch=SKETCH)
    assert found.metadata["route"] == "factored"
    wanted = explicit(model, batch, loss, SKETCH)
    whole = sum(float(want.square().sum()) for want in wanted.values()) ** 0.5  # some gradients are zero by symmetry
    for parameter, want in wanted.items():
        bound = 1e-10 * float(want.norm()) + 1e-13 * whole
        torch.testing.assert_close(found.rows[parameter], want, rtol=0, atol=bound)


class Odd(nn.Module):
    """Convolutions, one of them grouped, ids that are looked up, a weight used twice, and one that is transposed."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 3, groups=2)
        self.ids, self.twice = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.scale, self.out = nn.Parameter(torch.rand(8)), nn.Linear(8, 5)

    def forward(self, x, ids):
        hidden = self.grouped(self.conv(x).tanh()).mean(dim=-1) + self.ids(ids).sum(dim=1)
        hidden = self.twice(self.twice(hidden).tanh()) * self.scale
        return self.out(hidden @ self.twice.weight)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rows_of_odd_uses_are_the_projected_gradients(rank):
    torch.manual_seed(0)
    model = Odd().double()
    batch = (torch.randn(6, 4, 7).double(), torch.randint(9, (6, 3)), torch.randint(5, (6,)))
    fn, loss, sketch = ff.functionalize(model), ff.losses.classification(), ff.sketches.kronecker(rank=rank)
    found = ff.sketches.rows(fn, fn.params, batch, loss, sketch=sketch)
    assert found.metadata["route"] == "factored"
    for parameter, want in explicit(model, batch, loss, sketch).items():
        torch.testing.assert_close(found.rows[parameter], want, rtol=0, atol=1e-10 * float(want.norm()))


def small(sketch=SKETCH, *, rows=6, seed=0, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    generator = torch.Generator().manual_seed(seed)
    batch = (torch.randn(rows, 7, generator=generator).double(), torch.randint(5, (rows,), generator=generator))
    fn = ff.functionalize(model)
    found = ff.sketches.rows(fn, fn.params, batch, ff.losses.classification(), sketch=sketch, **options)
    return found, fn, batch


def test_gradients_that_are_formed_are_projected_alike():
    found, fn, batch = small()

    work = started(fn, fn.at(fn.params), batch, ff.losses.classification()).work
    halves = {name: projections(SKETCH, name, p.shape, like=p) for name, p in work.params.items()}
    for name, formed in _formed(work, PassOptions(chunk_size=4), halves).items():
        torch.testing.assert_close(formed, found.rows[name], rtol=1e-10, atol=1e-12)


def test_grams_and_products_of_grams_are_unbiased_with_the_stated_variance():
    """Over 1,000 seeds, means of AAᵀ and of tr AAᵀBBᵀ are K and ‖K‖² within five standard errors, variances too."""
    _, fn, batch = small()
    gradients = ff.per_token_gradients(fn, fn.params, batch, ff.losses.classification())
    g = gradients["0.weight"]
    exact = (g.flatten(1) @ g.flatten(1).mT, g.shape[0])
    grams, products = [], []
    for seed in range(1_000):
        sketch = ff.sketches.kronecker(rank=2, seed=seed)
        one, other = (half.of_gradients(g.flatten(1)) for half in projections(sketch, "w", g.shape[1:], like=g))
        grams.append(one @ one.mT)
        products.append((grams[-1] * (other @ other.mT)).sum())
    grams, products = torch.stack(grams), torch.stack(products)
    for n in range(exact[1]):
        for m in range(n + 1):
            stated = variance(g[n], g[m], sketch=ff.sketches.kronecker(rank=2))
            entry = grams[:, n, m]
            assert abs(entry.mean() - exact[0][n, m]) <= 5 * (stated / 1_000).sqrt()
            spread = (entry - entry.mean()).square()
            assert abs(spread.mean() - stated) <= 5 * spread.std() / 1_000**0.5
    error = products.std() / 1_000**0.5
    assert abs(products.mean() - exact[0].square().sum()) <= 5 * error
    alone = grams.square().sum(dim=(1, 2))
    assert alone.mean() > exact[0].square().sum() + 5 * alone.std() / 1_000**0.5  # of one sketch it is biased


def test_moments_of_rows_are_products_of_their_grams():
    found, _, _ = small()
    one, other = (found.half(half).summed().matrix for half in (0, 1))
    torch.testing.assert_close(found.squared_norm(), float((one * other).sum()) / 36)
    traces = float(one.trace() * other.trace())
    torch.testing.assert_close(found.participation_ratio(), traces / float((one * other).sum()))
    torch.testing.assert_close(found.grams().summed().matrix, (one + other) / 2)


def test_a_rank_as_large_as_every_side_is_exact_and_not_marked():
    found, fn, batch = small(ff.sketches.kronecker(rank=7))
    exact = ff.token_grams(fn, fn.params, batch, ff.losses.classification())
    torch.testing.assert_close(found.grams().summed().matrix, exact.summed().matrix, rtol=1e-10, atol=1e-12)
    result = ff.sketches.spectrum(found)
    assert result.metadata["approximations"] == [] and result.full.exact
    assert max(v for v in result.metadata["sketch"]["errors"]["full"].values() if v is not None) <= 1e-9


def test_a_sequence_is_the_sum_of_its_tokens():
    model, batch = zoo.build("gpt2", dtype=torch.float64)
    fn, loss = ff.functionalize(model), ff.losses.causal_lm()
    tokens, whole = (ff.sketches.rows(fn, fn.params, batch, loss, sketch=SKETCH, unit=u) for u in ("token", "sequence"))
    for name, both in whole.rows.items():
        want = torch.zeros_like(both).index_add_(1, tokens.tokens.sequence, tokens.rows[name])
        torch.testing.assert_close(both, want, rtol=0, atol=1e-10 * float(want.norm()) + 1e-15)
    assert (whole.unit, whole.num_units) == ("sequence", 3)
    result = ff.sketches.spectrum(whole)
    assert result.full.num_units == 3 and result.metadata["unit"] == "sequence"


def test_a_result_is_marked_wherever_it_is_shown_with_its_error_beside_it(tmp_path):
    found, _, _ = small()
    result = ff.sketches.spectrum(found)
    marked = "approximation: gradients projected by two Kronecker sketches of rank 3, seed 5"
    errors = result.metadata["sketch"]["errors"]["full"]
    one, other = (ff.spectrum_of_grams(found.half(half)).full for half in (0, 1))
    assert errors["trace"] == pytest.approx(abs(float(ff.metrics.trace(one) - ff.metrics.trace(other))) / 2, rel=1e-6)
    spread = abs(float(one.eigenvalues[0] - other.eigenvalues[0])) / 2
    shift = float(one.eigenvalues[0] + other.eigenvalues[0]) / 2 - float(result.full.eigenvalues[0])
    assert shift > 0 and errors["largest"] == pytest.approx((spread**2 + shift**2) ** 0.5)
    beside = f"± of the sketch alone, full matrix: λ_max {errors['largest']:.2g}"
    (tmp_path / "spectrum.json").write_text(to_json(result))
    again = read_spectrum(tmp_path)
    assert again.metadata["sketch"] == json.loads(json.dumps(result.metadata["sketch"]))
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(report(again, width=200))
    for shown in (str(result), console.export_text()):
        assert marked in shown and beside in shown
    assert not result.full.exact and result.population is None and result.coupling is None
    with pytest.raises(ValueError, match="or of projections, which have no directions"):
        _, fn, batch = small()
        ff.directions.eigenvectors(fn, fn.params, batch, ff.losses.classification(), found.grams(), num=1)


def test_a_spectrum_by_a_sketch_is_that_of_its_rows_and_refuses_what_they_are_made_without():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    batch, loss = (torch.randn(7, 8).double(), torch.randint(5, (7,))), ff.losses.classification()
    fn = ff.functionalize(model)
    want = ff.sketches.spectrum(ff.sketches.rows(fn, fn.params, batch, loss, sketch=SKETCH, num_tokens=6, seed=2))
    found = ff.fisher_spectrum(model, batch, loss=loss, sketch=SKETCH, num_tokens=6, seed=2)
    assert found.matrices.keys() == want.matrices.keys()
    for label, spectrum in want.matrices.items():
        assert torch.equal(found.matrices[label].eigenvalues, spectrum.eigenvalues)
    assert want.metadata.items() <= found.metadata.items() and found.metadata["approximations"]
    assert not found.full.exact and found.population is None
    beside = {"center": True, "drop_nonfinite": True, "intervals": "jackknife", "checkpoint": "kept", "route": "dense"}
    beside["self_check"] = False
    for name, value in {**beside, "max_coordinates": 3, "clusters": range(7), "plan": ff.plan(model, batch)}.items():
        with pytest.raises(ValueError, match=f"sketch= got {name}.* beside it"):
            ff.fisher_spectrum(model, batch, loss=loss, sketch=SKETCH, **{name: value})
    with pytest.raises(TypeError, match=r"sketch expected that of ff\.sketches\.kronecker\(rank=…\), got 3"):
        ff.fisher_spectrum(model, batch, loss=loss, sketch=3)


def test_rows_of_several_batches_go_to_one_folder_and_are_one(tmp_path):
    parts = [small(seed=seed, rows=count)[0] for seed, count in ((1, 4), (2, 6), (3, 1))]
    for part in parts:
        part.append(tmp_path / "rows")
    joined = ff.sketches.SketchedRows.load(tmp_path / "rows")
    _, fn, _ = small()
    batches = [small(seed=seed, rows=count)[2] for seed, count in ((1, 4), (2, 6), (3, 1))]
    whole = ff.sketches.rows(fn, fn.params, batches, ff.losses.classification(), sketch=SKETCH)
    assert joined.tokens.sequence.tolist() == whole.tokens.sequence.tolist() == list(range(11))
    for name, gram in whole.grams().grams.items():
        torch.testing.assert_close(joined.grams().grams[name], gram, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(joined.squared_norm(), whole.squared_norm())
    assert ff.sketches.spectrum(joined).full.num_units == 11


def test_what_does_not_belong_together_is_refused(tmp_path):
    found, fn, batch = small()
    found.append(tmp_path)
    with pytest.raises(ValueError, match=r"the batch of number 1 is in .* already, as number 0; no token counts twice"):
        found.append(tmp_path)
    with pytest.raises(ValueError, match=r"are of sketch \[3, 5\], and number 1 of \[2, 5\]; give a folder of its own"):
        small(ff.sketches.kronecker(rank=2, seed=5), seed=9)[0].append(tmp_path)
    moved = {name: p + 1 for name, p in fn.params.items()}
    loss = ff.losses.classification()
    other = ff.sketches.rows(fn, moved, (batch[0] + 1, batch[1]), loss, sketch=SKETCH)
    with pytest.raises(ValueError, match="are of parameters '"):
        other.append(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError, match="no projected rows in"):
        ff.sketches.SketchedRows.load(tmp_path / "nothing")
    (tmp_path / "rows-000000.safetensors").write_bytes(b"no rows")
    with pytest.raises(ValueError, match="is damaged"):
        ff.sketches.SketchedRows.load(tmp_path)


def test_rows_that_do_not_add_up_are_seen():
    found, fn, batch = small()

    work = started(fn, fn.at(fn.params), batch, ff.losses.classification()).work
    halves = {name: projections(SKETCH, name, p.shape, like=p) for name, p in work.params.items()}
    rows = {name: both.clone() for name, both in found.rows.items()}
    assert _difference(work, rows, halves) is None
    rows["2.weight"][1, 3] *= 1 + 1e-3
    assert "by '2.weight' they differ by" in _difference(work, rows, halves)
    rows["2.weight"][1, 3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"gradient by '2\.weight' is not finite"):
        _difference(work, rows, halves)


def test_ranks_are_counts():
    with pytest.raises(ValueError, match="rank expected at least 1, got rank=0"):
        ff.sketches.kronecker(rank=0)
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        ff.sketches.variance(torch.ones(2), torch.ones(3), sketch=SKETCH)
