"""A Gram that is written by pairs of parts is that of a loop of backward passes, of whichever rows and parts."""

import pytest
import torch
from explicit import setting
from torch import nn
from zoo import CASES

import fisherfunc as ff
from fisherfunc.linalg.krylov import stored
from fisherfunc.operators import by_pairs
from fisherfunc.operators.by_pairs import Joined, made_by_pairs, parts_of


def whole(gram):
    return gram.matmul(torch.eye(gram.num_rows, dtype=torch.float64))


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_gram_of_the_explicit_rows(name, tmp_path):
    fn, batch, loss, rows = setting(name)
    g = torch.cat(list(rows.values()), dim=1)
    count = max(1, len(g) // 4)
    gram = ff.operators.fisher_gram(tmp_path / "gram", fn, fn.params, batch, loss, part_rows=count, dtype=torch.float64)
    bound = 1e-3 if CASES[name].casts else 1e-9  # of float32 inside, that one's rounding
    assert relative(whole(gram), g @ g.mT) < bound
    assert gram.trace == pytest.approx(float(g.square().sum()), rel=bound)
    assert gram.squared_norm == pytest.approx(float((g @ g.mT).square().sum()), rel=2 * bound)
    assert (gram.num_rows, gram.num_tokens, gram.num_params) == (len(g), len(g), g.shape[1])


OPTIONS = {
    "block": {"block": "layer.1"},
    "sequences": {"unit": "sequence"},
    "draws": {"targets": ff.targets.sampled(2, seed=3)},
    "classes": {"targets": ff.targets.all_classes()},
    "some tokens": {"num_tokens": 5, "seed": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_matrix_that_the_operator_has_the_products_of(options, tmp_path):
    fn, batch, loss, _ = setting("gpt2")
    F = ff.operators.fisher(fn, fn.params, batch, loss, **options)
    gram = ff.operators.fisher_gram(tmp_path / "gram", fn, fn.params, batch, loss, part_rows=3, **options)
    assert (gram.num_rows, gram.num_tokens, gram.num_params) == (F.num_rows, F.num_tokens, F.num_params)
    u = torch.randn(F.num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative(gram.operator(F).token_product(u), F.token_product(u)) < 1e-6  # of float32 in the file


@pytest.mark.parametrize("entries", [1, 100, 2**24])  # tiles that divide parts, and that are divided by them
@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 5, 2, 2, 9, 1], [1] * 9])
def test_parts_are_put_together_to_tiles(sizes, entries, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "ENTRIES", entries)
    sequence = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    g = torch.randn(len(sequence), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    done = []
    made = made_by_pairs(parts_of(sequence, 3), lambda index: g[index] @ g[index].mT, lambda *both: done.append(both))
    gram = ff.operators.stored_gram(tmp_path / "gram", Joined(made).rows, num_rows=len(g), dtype=torch.float64)
    assert relative(whole(gram), g @ g.mT) < 1e-13
    assert done == [(number, len(done)) for number in range(1, len(done) + 1)]


def test_no_pass_has_more_rows_than_two_parts():
    sizes = []

    def gram(index):
        sizes.append(len(index))
        return torch.outer(index, index).double()

    bounds = [(0, 4), (4, 8), (8, 12), (12, 13)]
    parts = list(made_by_pairs(bounds, gram))
    assert max(sizes) == 8 and len(sizes) == 6
    assert [(part.start, part.stop) for part in parts] == [(0, 8), (8, 12), (12, 13)]
    for part in parts:
        assert torch.equal(
            part.matrix, torch.outer(torch.arange(part.start, part.stop), torch.arange(part.stop)).double()
        )


def test_against_the_operator_bounds_hold_for_the_model_in_float64(tmp_path):
    fn, batch, loss, _ = setting("gpt2", dtype=torch.float32)
    _, _, _, rows = setting("gpt2")
    g = torch.cat(list(rows.values()), dim=1)
    exact = torch.linalg.eigvalsh(g @ g.mT).flip(0) / len(g)
    gram = ff.operators.fisher_gram(tmp_path / "gram", fn, fn.params, batch, loss, part_rows=4, dtype=torch.float64)
    F = ff.operators.fisher(fn, fn.params, batch, loss)
    solve = ff.kernels.lanczos(num_leading=4, tolerance=1e-12, num_steps=len(g))
    alone, held = solve(gram.operator()), solve(gram.operator(F))
    off = (held.eigenvalues - exact[:4]).abs()
    assert bool((off > alone.bounds).any()) and bool((off <= held.bounds).all())
    assert float(held.bounds.max()) < 1e-4 * float(exact[0])


def test_what_is_wrong_is_said(tmp_path):
    fn, batch, loss, _ = setting("lstm")
    write = ff.operators.fisher_gram
    with pytest.raises(ValueError, match="part_rows expected at least 1, got part_rows=0"):
        write(tmp_path / "gram", fn, fn.params, batch, loss, part_rows=0)
    with pytest.raises(ValueError, match=r"is below the \d+ bytes \(0 MiB\) that the smallest chunk needs"):
        write(tmp_path / "gram", fn, fn.params, batch, loss, memory_limit=1000)
    gram = write(tmp_path / "gram", fn, fn.params, batch, loss, num_tokens=4)
    with pytest.raises(ValueError, match="reference expected an operator of 4 rows and 4 tokens, as the file has, got"):
        gram.operator(ff.operators.fisher(fn, fn.params, batch, loss))


class Broken(nn.Module):
    """A weight whose gradient is not finite where an input is zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, x):
        return x + (x * self.weight).sqrt() * 0.0


def test_a_gradient_that_is_not_finite_names_its_token(tmp_path):
    fn, batch = ff.functionalize(Broken()), (torch.ones(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="the gradient of sequence 0, position 0 by block 'all' is not finite"):
        ff.operators.fisher_gram(tmp_path / "gram", fn, fn.params, batch, ff.losses.regression())
    assert not (tmp_path / "gram.safetensors").exists()


class StoppedError(Exception):
    """By whoever waits."""


@pytest.mark.parametrize("stopped_at", [1, 2, 4])
def test_a_run_that_was_stopped_goes_on_from_the_parts_that_it_has_made(stopped_at, tmp_path, monkeypatch):
    fn, batch, loss, rows = setting("mlp")
    g = torch.cat(list(rows.values()), dim=1)
    options = {"part_rows": max(1, len(g) // 4), "dtype": torch.float64, "checkpoint": tmp_path / "kept"}
    passed, each = [], by_pairs._passed
    monkeypatch.setattr(by_pairs, "_passed", lambda *given: passed.append(1) or each(*given))

    def stop(done, total):
        if done == stopped_at:
            raise StoppedError

    with pytest.raises(StoppedError):
        ff.operators.fisher_gram(tmp_path / "gram", fn, fn.params, batch, loss, progress=stop, **options)
    with pytest.raises(ValueError, match="is of another run; these differ: batch"):
        ff.operators.fisher_gram(tmp_path / "gram", fn, fn.params, (-batch[0], batch[1]), loss, **options)
    before, kept = len(passed), len(list((tmp_path / "kept").glob("part-*")))
    assert kept == {1: 0, 2: 1, 4: 2}[stopped_at]  # the first part takes a pair, the second two
    counts = []
    options["progress"] = lambda done, total: counts.append((done, total))
    gram = ff.operators.fisher_gram(tmp_path / "gram", fn, fn.params, batch, loss, **options)
    total = counts[-1][1]
    assert counts[-1] == (total, total) and len(passed) - before == total - {0: 0, 1: 1, 2: 3}[kept]
    assert relative(whole(gram), g @ g.mT) < 1e-9
    assert list((tmp_path / "kept").glob("part-*")) == []
