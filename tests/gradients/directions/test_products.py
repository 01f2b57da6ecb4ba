"""Products with F against the explicit matrix and curvlinops, whichever derivatives the operations have."""

from dataclasses import replace

import pytest
import torch
from explicit import fisher_of, flat, flat_stack, random_tree, rows_of, setting, tree_of
from forward_modes import BackwardOnly, By, NoForwardMode, WrongForwardMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.directions import products
from fisherfunc.gradients.directions.passes import passes_of
from fisherfunc.gradients.survey.prepare import prepared

FEW = settings(max_examples=6)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("name", ["shared", "lstm", "multihead"])
def test_products_are_those_of_the_explicit_matrix(name, unit, center):
    fn, batch, loss, rows = setting(name, unit=unit, center=center)
    product = ff.directions.fisher_vector_product(fn, fn.params, batch, loss, unit=unit, center=center)
    for seed in range(2):
        x = random_tree(fn.params, seed)
        torch.testing.assert_close(flat(product(x)), fisher_of(rows) @ flat(x), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_a_language_model_and_of_one_of_its_blocks(dtype):
    fn, batch, loss, rows = setting("gpt2", dtype=dtype)
    names = [name for name in fn.params if ".h.1." in name]
    for some in (fn.params, {name: fn.params[name] for name in names}):
        g, x = torch.cat([rows[name] for name in some], dim=1), random_tree(some)
        got = ff.directions.fisher_vector_product(fn, some, batch, loss)(x)
        expected = g.mT @ (g @ flat(x)) / len(g)
        assert list(got) == list(some) and got[names[0]].dtype == dtype
        error = float((flat(got) - expected).norm() / expected.norm())
        assert error < (1e-12 if dtype == torch.float64 else 1e-4)  # the loop is in float32, too


def test_the_same_tokens_are_picked_as_for_grams():
    fn, batch, loss, _ = setting("lstm")
    grams = ff.token_grams(fn, fn.params, batch, loss, num_tokens=4, seed=2)
    found = ff.directions.eigenvectors(fn, fn.params, batch, loss, grams)
    product = ff.directions.fisher_vector_product(fn, fn.params, batch, loss, num_tokens=4, seed=2)
    v = {name: stack[0] for name, stack in found.vectors.items()}
    torch.testing.assert_close(flat(product(v)), found.eigenvalues * flat(v), rtol=1e-9, atol=1e-12)


def test_curvlinops_has_the_same_products():
    curvlinops = pytest.importorskip("curvlinops")
    model, (inputs, targets) = build("cnn", dtype=torch.float64)
    theirs = curvlinops.EFLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="mean"),
        list(model.parameters()),
        [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])],
        check_deterministic=False,
    )
    fn = ff.functionalize(model)
    product = ff.directions.fisher_vector_product(fn, fn.params, (inputs, targets), ff.losses.classification())
    x = random_tree(fn.params)
    torch.testing.assert_close(flat(product(x)), (theirs @ flat(x)[:, None])[:, 0], rtol=1e-10, atol=1e-13)


@FEW
@given(ff.testing.tiny_models(), st.integers(0, 99))
def test_products_are_symmetric_positive_and_linear(drawn, seed):
    fn = ff.functionalize(drawn.module)
    loss = ff.losses.infer(drawn.module, drawn.batch) if drawn.loss is None and isinstance(drawn.batch, tuple) else None
    loss = loss or (ff.losses.custom(drawn.loss) if drawn.loss else ff.losses.causal_lm())
    product = ff.directions.fisher_vector_product(fn, fn.params, drawn.batch, loss)
    x, y = random_tree(fn.params, seed), random_tree(fn.params, seed + 100)
    fx, fy = flat(product(x)), flat(product(y))
    scale = 1e-11 * float(fx.norm() * flat(y).norm() + fy.norm() * flat(x).norm()) + 1e-30
    assert abs(float(fx @ flat(y) - fy @ flat(x))) <= scale and float(fx @ flat(x)) >= -scale
    both = product({name: 2 * x[name] - y[name] for name in x})
    torch.testing.assert_close(flat(both), 2 * fx - fy, rtol=1e-9, atol=scale)


@pytest.mark.parametrize(
    ("operation", "method"),
    [(NoForwardMode, "double backward"), (BackwardOnly, "rows"), (WrongForwardMode, "double backward")],
)
def test_operations_without_a_right_derivative_take_another_way(monkeypatch, operation, method):
    model = By(operation).double()
    batch = (torch.randn(4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))
    fn, x = ff.functionalize(model), random_tree(ff.functionalize(model).params)
    used = set()

    def noting(name, way):
        def noted(*arguments):
            found = way(*arguments)
            used.add(name)
            return found

        return noted

    monkeypatch.setattr(products, "METHODS", {name: noting(name, way) for name, way in products.METHODS.items()})
    got = ff.directions.fisher_vector_product(fn, fn.params, batch, ff.losses.classification())(x)
    g = torch.cat(list(rows_of("mlp", model, batch).values()), dim=1)
    torch.testing.assert_close(flat(got), g.mT @ (g @ flat(x)) / 4, rtol=1e-11, atol=1e-14)
    assert method in used and (operation is WrongForwardMode or "forward mode" not in used)


class Mixing(nn.Module):
    """Each sample sees the mean of its batch, which of one sample is itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(torch.tanh(x + self.layer.weight.sum(0) * x.mean(0)))


class MixingGradients(Mixing):
    """The same values whatever is in the batch, and other gradients."""

    def forward(self, x):
        y = self.layer(x)
        return y + (y.mean(0) - y.mean(0).detach())


@pytest.mark.parametrize(
    ("build_model", "widths"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), {40}),
        (Mixing, {1}),
        (MixingGradients, {1}),
    ],
)
def test_many_samples_run_together_only_where_they_are_separate(build_model, widths):
    torch.manual_seed(0)
    batch, loss = (torch.randn(40, 3, dtype=torch.float64), torch.randint(2, (40,))), ff.losses.classification()
    loss = loss if widths == {40} else ff.losses.each_alone(loss)
    fn = ff.functionalize(build_model().double())
    sizes = []
    watched = replace(fn, call=lambda tensors, one: (sizes.append(len(one[0])), fn.call(tensors, one))[1])
    g = flat_stack(ff.per_token_gradients(fn, fn.params, batch, loss))
    product = ff.directions.fisher_vector_product(watched, fn.params, batch, loss)
    sizes.clear()
    x = random_tree(fn.params)
    torch.testing.assert_close(flat(product(x)), g.mT @ (g @ flat(x)) / 40, rtol=1e-9, atol=1e-12)
    assert set(sizes) == widths


def test_all_three_ways_give_the_same():
    fn, batch, loss, rows = setting("lstm")
    x = random_tree(fn.params)
    passes = passes_of(prepared(fn, fn.params, batch, loss).work)
    expected = torch.cat(list(rows.values()), dim=1) @ flat(x)
    for way in products.METHODS.values():
        found = torch.cat([way(one, passes.params, x) for one in passes.each])
        torch.testing.assert_close(found, expected[torch.cat([one.rows for one in passes.each])], rtol=1e-10, atol=0)


def test_zero_gradients_leave_the_damping_alone():
    model = nn.Linear(3, 1).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    batch, fn, loss = (inputs, model(inputs).detach()), ff.functionalize(model), ff.losses.regression()
    x = tree_of(torch.arange(4.0, dtype=torch.float64), fn.params)
    assert flat(ff.directions.fisher_vector_product(fn, fn.params, batch, loss)(x)).abs().max() < 1e-30
    grams = ff.token_grams(fn, fn.params, batch, loss)
    inverse = ff.directions.damped_inverse(fn, fn.params, batch, loss, grams, gamma=4.0)
    torch.testing.assert_close(flat(inverse(x)), flat(x) / 4, rtol=1e-15, atol=0)


def test_trees_that_differ_are_errors_that_name_what_differs():
    fn, batch, loss, _ = setting("mlp")
    grams = ff.token_grams(fn, fn.params, batch, loss)
    x = random_tree(fn.params)
    for product in (
        ff.directions.fisher_vector_product(fn, fn.params, batch, loss),
        ff.directions.damped_inverse(fn, fn.params, batch, loss, grams, gamma=1.0),
    ):
        with pytest.raises(ValueError, match=r"the tree lacks '0.bias', has 'other', which is not expected"):
            product({"other" if name == "0.bias" else name: value for name, value in x.items()})
        with pytest.raises(ValueError, match=r"has '0.bias' of shape \(6, 1\), expected \(6,\)"):
            product({**x, "0.bias": x["0.bias"][:, None]})
        with pytest.raises(ValueError, match="along the tree are not finite"):
            product({**x, "0.bias": torch.full_like(x["0.bias"], torch.nan)})
    with pytest.raises(ValueError, match="unit='words'"):
        ff.directions.fisher_vector_product(fn, fn.params, batch, loss, unit="words")
