"""Products with F over tokens and parameters, against a loop of backward passes; their laws; what is refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from explicit import flat, random_tree, rows_of, setting
from forward_modes import (
    BackwardOnly,
    By,
    Clipped,
    NoForwardMode,
    Reversed,
    Rounded,
    WithoutGradient,
    WrongForwardMode,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import CASES, build

import fisherfunc as ff
from fisherfunc.linalg.trees import inner, stacked

FEW = settings(max_examples=8)


def operator_of(name, **options):
    fn, batch, loss, rows = setting(name)
    return ff.operators.fisher(fn, fn.params, batch, loss, **options), torch.cat(list(rows.values()), dim=1)


def weights(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_explicit_rows(name):
    operator, g = operator_of(name)
    u, v = weights(len(g)), random_tree(operator.params)
    assert (operator.num_rows, operator.num_params) == g.shape
    assert operator.derivative == ("central difference" if name == "bloom" else "forward mode")  # a GELU of its own
    # in float64 a few products of eps each; of float32 inside, that one's rounding, and eps^(2/3) of it by differences
    bound = 1e-3 if CASES[name].casts else 1e-9
    assert relative(operator.token_product(u), g @ (g.mT @ u) / len(g)) < bound
    assert relative(flat(operator.parameter_product(v)), g.mT @ (g @ flat(v)) / len(g)) < bound


def loss_of(drawn):
    if drawn.loss is not None:
        return ff.losses.custom(drawn.loss)
    return ff.losses.infer(drawn.module, drawn.batch) if isinstance(drawn.batch, tuple) else ff.losses.causal_lm()


@FEW
@given(ff.testing.tiny_models(), st.integers(0, 99), st.sampled_from(["forward mode", "central difference"]))
def test_products_are_symmetric_adjoint_and_linear(drawn, seed, derivative):
    fn = ff.functionalize(drawn.module)
    operator = ff.operators.fisher(fn, fn.params, drawn.batch, loss_of(drawn), derivative=derivative)
    u, w = weights(operator.num_rows, seed), weights(operator.num_rows, seed + 100)
    v = random_tree(fn.params, seed)
    ku, kw = operator.token_product(u), operator.token_product(w)
    scale = float(ku.norm() * w.norm() + kw.norm() * u.norm()) + 1e-30
    # forward mode rounds in float64; a difference of losses of order 1 has eps^(2/3) of what it is of, with a margin
    eps = 1e-11 if derivative == "forward mode" else 1e-6
    allowed = eps * scale + (0 if derivative == "forward mode" else 1e-9 * float(u.norm() * w.norm()))
    assert abs(float(ku @ w - kw @ u)) <= allowed and float(ku @ u) >= -allowed
    gv, gu = operator.derivatives(v), operator.weighted_gradient(u)
    size = float(gv.norm() * u.norm()) + float(inner(stacked(gu), stacked(v)).abs()) + 1e-30
    assert abs(float(gv @ u) - float(inner(stacked(gu), stacked(v)))) <= (1e-11 if eps < 1e-10 else 1e-5) * size + 1e-12
    both = operator.token_product(2 * u - w)
    assert float((both - (2 * ku - kw)).norm()) <= 10 * allowed + 10 * eps * float(both.norm())


def test_of_a_block_of_all_classes_and_of_sequences():
    fn, batch, loss, rows = setting("gpt2")
    part = ff.operators.fisher(fn, fn.params, batch, loss, block="layer.1")
    names = [name for name in rows if ".h.1." in name]
    assert list(part.params) == names
    g, u = torch.cat([rows[name] for name in names], dim=1), weights(part.num_rows)
    assert relative(part.token_product(u), g @ (g.mT @ u) / len(g)) < 1e-10
    summed, s = ff.operators.fisher(fn, fn.params, batch, loss, unit="sequence"), setting("gpt2", unit="sequence")[3]
    s, u = torch.cat(list(s.values()), dim=1), weights(summed.num_rows)
    assert summed.num_tokens == len(s) and relative(summed.token_product(u), s @ (s.mT @ u) / len(s)) < 1e-10
    for targets in (ff.targets.all_classes(), ff.targets.sampled(2, seed=3)):
        grams = ff.token_grams(fn, fn.params, batch, loss, targets=targets, self_check=False)
        whole = sum(grams.grams.values())
        other = ff.operators.fisher(fn, fn.params, batch, loss, targets=targets)
        u = weights(other.num_rows)
        assert other.num_tokens == len(g) and relative(other.token_product(u), whole @ u / len(g)) < 1e-10


def test_the_same_tokens_are_picked_as_for_grams():
    fn, batch, loss, _ = setting("lstm")
    grams = ff.token_grams(fn, fn.params, batch, loss, num_tokens=4, seed=2)
    operator = ff.operators.fisher(fn, fn.params, batch, loss, num_tokens=4, seed=2)
    u = weights(4)
    assert relative(operator.token_product(u), sum(grams.grams.values()) @ u / 4) < 1e-10
    assert torch.equal(operator.tokens.position, grams.tokens.position)
    assert operator.metadata["batch"] == grams.metadata["batch"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operation", [NoForwardMode, BackwardOnly, WrongForwardMode])
def test_operations_without_a_right_derivative_take_central_differences_that_are_certified(operation, dtype):
    torch.manual_seed(0)
    model, batch = By(operation).to(dtype), (torch.randn(30, 4, dtype=dtype), torch.randint(3, (30,)))
    fn = ff.functionalize(model)
    operator = ff.operators.fisher(fn, fn.params, batch, ff.losses.classification())
    assert operator.derivative == "central difference"
    rows = ff.per_token_gradients(fn, fn.params, batch, ff.losses.classification(), self_check=False)
    g = torch.cat([r.flatten(1).double() for r in rows.values()], dim=1)
    true = torch.linalg.eigvalsh(g @ g.mT / 30).flip(0)
    found = ff.kernels.lanczos(num_leading=4, tolerance=1e-4)(operator)
    rounding = 30 * torch.finfo(dtype).eps * float(true[0])  # of the rows that it is held against
    assert bool(((found.eigenvalues[:, None] - true).abs().min(dim=1).values <= found.bounds + rounding).all())
    assert float(found.bounds[0]) < 0.05 * float(true[0])


class AfterTheFirst(By):
    """One whose gradients are not those of its values, in sequences longer than three alone."""

    def forward(self, x):
        hidden = self.layer(x)
        return self.head(self.operation.apply(hidden) if x.shape[1] > 3 else hidden)


@pytest.mark.parametrize("operation", [Rounded, Reversed, WithoutGradient])
@pytest.mark.parametrize("model_of", [By, AfterTheFirst])
def test_gradients_that_are_not_those_of_the_values_are_those_of_the_backward_pass(operation, model_of):
    torch.manual_seed(0)
    model, loss = model_of(operation).double(), ff.losses.classification()
    batches = [(torch.randn(2, s, 4, dtype=torch.float64), torch.randint(3, (2, s))) for s in (2, 5)]
    fn = ff.functionalize(model)
    rows = ff.per_token_gradients(fn, fn.params, batches, loss)
    g = torch.cat([r.flatten(1) for r in rows.values()], dim=1)
    u, x = weights(len(g)), random_tree(fn.params)
    operator = ff.operators.fisher(fn, fn.params, batches, loss)
    product = ff.directions.fisher_vector_product(fn, fn.params, batches, loss)
    assert relative(operator.token_product(u), g @ (g.T @ u) / len(g)) < 1e-12
    assert relative(operator.derivatives(x), g @ flat(x)) < 1e-12
    for found in (operator.parameter_product(x), product(x)):
        assert relative(flat(found), g.T @ (g @ flat(x)) / len(g)) < 1e-12


def test_a_backward_pass_that_is_not_linear_has_no_products():
    torch.manual_seed(0)
    batch, loss = (torch.randn(5, 4), torch.randint(3, (5,))), ff.losses.classification()
    fn = ff.functionalize(By(Clipped))
    for product in (ff.operators.fisher, ff.directions.fisher_vector_product):
        with pytest.raises(ValueError, match="not linear in what comes from above"):
            product(fn, fn.params, batch, loss)
    with pytest.raises(ValueError, match="derivative='central difference': these derivatives are not adjoint"):
        ff.operators.fisher(ff.functionalize(By(Reversed)), fn.params, batch, loss, derivative="central difference")


class InAutocast(By):
    """A model in float32 that computes in bfloat16."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_derivatives_are_held_against_the_backward_pass_by_the_dtype_of_what_is_computed():
    torch.manual_seed(0)
    batch, loss = (torch.randn(5, 4), torch.randint(3, (5,))), ff.losses.classification()
    fn = ff.functionalize(InAutocast(NoForwardMode))
    rows = ff.per_token_gradients(fn, fn.params, batch, loss)
    g, x = torch.cat([r.flatten(1).double() for r in rows.values()], dim=1), random_tree(fn.params)
    for product in (
        ff.operators.fisher(fn, fn.params, batch, loss).parameter_product,
        ff.directions.fisher_vector_product(fn, fn.params, batch, loss),
    ):
        assert relative(flat(product(x)).double(), g.T @ (g @ flat(x).double()) / 5) < 10 * 2**-8


class Recomputed(nn.Module):
    """Two layers whose activations are made again by the older, reentrant checkpointing, which needs `.backward()`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(checkpoint(lambda y: self.first(y).tanh(), x.requires_grad_(), use_reentrant=True))


def test_a_model_that_recomputes_its_activations_has_right_products_and_stays_as_it_was():
    model, batch = Recomputed().double(), (torch.randn(7, 4).double(), torch.randint(3, (7,)))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    fn = ff.functionalize(model)
    operator = ff.operators.fisher(fn, fn.params, batch, ff.losses.classification())
    rows = []
    for x, y in zip(*batch, strict=True):
        loss = nn.functional.cross_entropy(model.second(model.first(x).tanh())[None], y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g, u = torch.stack(rows), weights(7)
    assert relative(operator.token_product(u), g @ (g.mT @ u) / 7) < 1e-8
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


def test_scipy_takes_both_sides_and_finds_one_spectrum():
    operator, g = operator_of("shared")
    from scipy.sparse.linalg import eigsh

    expected = torch.linalg.eigvalsh(g @ g.mT / len(g))[-2:].tolist()
    for space, size in (("token", len(g)), ("parameter", g.shape[1])):
        linear = operator.to_scipy(space)
        assert linear.shape == (size, size) and linear.dtype == "float64"
        assert sorted(eigsh(linear, k=2)[0]) == pytest.approx(expected, rel=1e-8)
    with pytest.raises(ValueError, match="space 'token' or 'parameter', got space='rows'"):
        operator.to_scipy("rows")


def test_an_eigenvector_over_tokens_gives_one_in_parameter_space():
    operator, _ = operator_of("multihead")
    found = ff.kernels.lanczos(num_leading=2, tolerance=1e-10, vectors=True)(operator)
    for value, y in zip(found.eigenvalues, found.vectors, strict=True):
        v = {n: w / (value * operator.num_tokens).sqrt() for n, w in operator.weighted_gradient(y).items()}
        assert float(flat(v).norm()) == pytest.approx(1, rel=1e-9)
        assert relative(flat(operator.parameter_product(v)), value * flat(v)) < 1e-8


def test_float32_measures_its_round_off_in_float64():
    model, batch = build("mlp", dtype=torch.float32)
    fn, loss = ff.functionalize(model), ff.losses.classification()
    operator = ff.operators.fisher(fn, fn.params, batch, loss)
    assert operator.reference == "float64"
    wider, u = fn.to(dtype=torch.float64), weights(operator.num_rows)
    wide = ff.operators.fisher(wider, wider.params, (batch[0].double(), batch[1]), loss)
    assert relative(operator.reference_product(u), wide.token_product(u)) < 1e-12
    assert 0 < relative(operator.token_product(u), wide.token_product(u)) < 1e-4


def test_what_cannot_be_is_refused_with_the_next_step():
    fn, batch, loss, _ = setting("mlp")
    with pytest.raises(ValueError, match=r"derivative expected one of .*'auto'.* got derivative='complex step'"):
        ff.operators.fisher(fn, fn.params, batch, loss, derivative="complex step")
    with pytest.raises(ValueError, match="there is no block 'head'; the blocks are"):
        ff.operators.fisher(fn, fn.params, batch, loss, block="head")
    operator = ff.operators.fisher(fn, fn.params, batch, loss)
    with pytest.raises(ValueError, match=r"u expected a weight for each of 4 rows, got shape \(3,\)"):
        operator.token_product(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="the tree lacks"):
        operator.parameter_product({})


def test_squared_norms_are_the_diagonal_of_the_gram_whatever_the_memory():
    for name in ("gpt2", "cnn", "shared"):
        fn, batch, loss, rows = setting(name)
        expected = sum(g.square().sum(dim=1) for g in rows.values())
        for limit in (None, 10**6):
            got = ff.gradient_norms(fn, fn.params, batch, loss, memory_limit=limit)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    model, batch = build("gpt2", dtype=torch.float64)
    sums = torch.cat(list(rows_of("gpt2", model, batch, unit="sequence").values()), dim=1).square().sum(dim=1)
    fn, _, loss, _ = setting("gpt2")
    torch.testing.assert_close(ff.gradient_norms(fn, fn.params, batch, loss, unit="sequence"), sums, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="memory_limit=10 has no room for the gradient of one token"):
        ff.gradient_norms(fn, fn.params, batch, loss, memory_limit=10)


def test_sparse_gradients_and_several_passes_are_summed():
    """Sequences of two lengths run in two passes, whose gradients of a sparse embedding add up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(0, 1), nn.Linear(4, 9)).double()
    batches = [
        (torch.tensor([[1, 2, 3]]), torch.tensor([[4, 1, 0]])),
        (torch.tensor([[1, 5]]), torch.tensor([[2, 8]])),
    ]
    fn = ff.functionalize(model)
    loss = ff.losses.custom(lambda out, batch: nn.functional.cross_entropy(out, batch[1][0], reduction="none")[None])
    operator = ff.operators.fisher(fn, fn.params, batches, loss)
    rows = []
    for x, y in batches:
        for position in range(x.shape[1]):
            value = nn.functional.cross_entropy(model(x), y[0], reduction="none")[position]
            grads = torch.autograd.grad(value, list(model.parameters()))
            rows.append(torch.cat([g.to_dense().flatten() for g in grads]))
    g, u = torch.stack(rows), weights(5)
    assert relative(operator.token_product(u), g @ (g.mT @ u) / 5) < 1e-12
    v = random_tree(fn.params)
    assert relative(flat(operator.parameter_product(v)), g.mT @ (g @ flat(v)) / 5) < 1e-12


def test_half_precision_sums_in_float32_and_says_how_far_off_it_is():
    model, batch = build("mlp", dtype=torch.bfloat16)
    fn, loss = ff.functionalize(model), ff.losses.classification()
    operator = ff.operators.fisher(fn, fn.params, batch, loss)
    assert {g.dtype for g in operator.weighted_gradient(weights(4)).values()} == {torch.float32}
    wider = fn.to(dtype=torch.float64)
    exact = ff.operators.fisher(wider, wider.params, (batch[0].double(), batch[1]), loss)
    true = ff.kernels.lanczos(num_leading=4, tolerance=1e-10)(exact).eigenvalues
    found = ff.kernels.lanczos(num_leading=3)(operator)
    assert bool(((found.eigenvalues[:, None] - true).abs().min(dim=1).values <= found.bounds).all())
    assert float(found.round_off) > 1e-4 * float(true[0])


def test_a_product_adds_to_no_gradient_but_its_own():
    torch.manual_seed(0)
    scale = torch.ones(3, requires_grad=True)  # of the user's, and no parameter of the model

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * scale

    fn = ff.functionalize(Scaled(2, 3))
    batch = (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))
    operator = ff.operators.fisher(fn, fn.params, batch, ff.losses.classification())
    for gradient in (None, torch.full((3,), 2.0)):
        scale.grad = gradient
        operator.token_product(weights(5))
        operator.parameter_product(random_tree(fn.params))
        assert scale.grad is gradient and (gradient is None or bool((gradient == 2).all()))


def test_threads_have_the_products_that_each_has_alone():
    """Levels of forward mode belong to the process: one that a thread ends is gone for all."""
    fn, batch, loss, rows = setting("mlp")
    g, x = torch.cat(list(rows.values()), dim=1), random_tree(fn.params)
    expected = g.T @ (g @ flat(x)) / len(g)
    products = [ff.operators.fisher(fn, fn.params, batch, loss).parameter_product for _ in range(2)]
    products += [ff.directions.fisher_vector_product(fn, fn.params, batch, loss) for _ in range(2)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: flat(products[number % 4](x)), range(80)))
    assert max(relative(product, expected) for product in found) < 1e-10
