"""Laws of the dense route: what rows and Grams are, and what must not change them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_modules import Body, OddShapes, perceptron, samples
from oracle import gradient_rows
from torch import nn
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.autodiff import pullback

FEW = settings(max_examples=8)


def loss_of(model):
    return ff.losses.infer(model.module, model.batch) if model.loss is None else ff.losses.custom(model.loss)


def loss_for(drawn):
    return ff.losses.causal_lm() if isinstance(drawn.batch, dict) else loss_of(drawn)


def grams_of(drawn, batch=None, **options):
    fn, batch = ff.functionalize(drawn.module), drawn.batch if batch is None else batch
    return ff.token_grams(fn, fn.params, batch, loss_for(drawn), **{"route": "dense"} | options)


def rows_of(drawn, **options):
    fn = ff.functionalize(drawn.module)
    return ff.per_token_gradients(fn, fn.params, drawn.batch, loss_for(drawn), **options)


def assert_same_grams(got, expected):
    """To round-off: relative to the whole Gram, as a key bias has a Gram that is zero up to it."""
    assert set(got.grams) == set(expected.grams)
    size = float(torch.linalg.matrix_norm(expected.block()))
    for name, gram in expected.grams.items():
        torch.testing.assert_close(got.grams[name], gram, rtol=0, atol=1e-12 * size)


def take(batch, index):
    if isinstance(batch, tuple):
        return tuple(x[index] for x in batch)
    return {key: value[index] for key, value in batch.items()}


def size_of(batch):
    return len(batch[0] if isinstance(batch, tuple) else batch["input_ids"])


@FEW
@given(ff.testing.language_models())
def test_rows_equal_a_loop_of_backward_passes(drawn):
    expected = gradient_rows(drawn.module, "causal_lm", drawn.batch)
    for name, rows in rows_of(drawn).items():
        torch.testing.assert_close(rows.flatten(1), expected[name], rtol=1e-10, atol=1e-13)


@FEW
@given(ff.testing.tiny_models())
def test_grams_are_products_of_rows_and_their_trace_is_the_sum_of_squared_norms(drawn):
    grams, rows = grams_of(drawn), rows_of(drawn)
    size = float(torch.linalg.matrix_norm(grams.block()))
    for name, g in rows.items():
        torch.testing.assert_close(grams.grams[name], g.flatten(1) @ g.flatten(1).T, rtol=0, atol=1e-12 * size)
    squares = sum(g.square().sum() for g in rows.values())
    torch.testing.assert_close(grams.block().trace(), squares, rtol=1e-12, atol=1e-300)


@FEW
@given(ff.testing.tiny_models(), st.integers(1, 20))
def test_the_chunk_size_changes_nothing(drawn, chunk_size):
    assert_same_grams(grams_of(drawn, chunk_size=chunk_size), grams_of(drawn))
    expected = rows_of(drawn)
    for name, rows in rows_of(drawn, chunk_size=chunk_size).items():
        torch.testing.assert_close(rows, expected[name], rtol=1e-10, atol=1e-13)


@FEW
@given(ff.testing.tiny_models(), st.data())
def test_permuting_sequences_permutes_grams(drawn, data):
    order = torch.tensor(data.draw(st.permutations(range(size_of(drawn.batch)))))
    grams, permuted = grams_of(drawn), grams_of(drawn, take(drawn.batch, order))
    back = [
        [i for i, s in enumerate(permuted.tokens.sequence.tolist()) if order[s] == sequence]
        for sequence in range(len(order))
    ]
    assert_same_grams(permuted.select([row for rows in back for row in rows]), grams)


@FEW
@given(ff.testing.tiny_models())
def test_a_list_of_batches_is_one_batch(drawn):
    parts = [take(drawn.batch, slice(i, i + 1)) for i in range(size_of(drawn.batch))]
    whole, listed = grams_of(drawn), grams_of(drawn, parts)
    assert_same_grams(listed, whole)
    for field in ("sequence", "position"):
        assert torch.equal(getattr(listed.tokens, field), getattr(whole.tokens, field))


@FEW
@given(ff.testing.tiny_models(), st.integers(1, 10), st.integers(0, 3))
def test_fewer_tokens_are_a_submatrix_chosen_by_seed(drawn, num_tokens, seed):
    whole, part = grams_of(drawn), grams_of(drawn, num_tokens=num_tokens, seed=seed)
    every = list(zip(whole.tokens.sequence.tolist(), whole.tokens.position.tolist(), strict=True))
    chosen = list(zip(part.tokens.sequence.tolist(), part.tokens.position.tolist(), strict=True))
    assert len(set(chosen)) == len(chosen) == min(num_tokens, len(every)) and chosen == sorted(chosen)
    assert_same_grams(part, whole.select([every.index(token) for token in chosen]))
    again = grams_of(drawn, num_tokens=num_tokens, seed=seed)
    assert torch.equal(again.block(), part.block())


def test_another_seed_picks_other_tokens():
    model, batch = build("gpt2", dtype=torch.float64)
    picks = {
        tuple(ff.fisher_spectrum(model, batch, num_tokens=4, seed=seed).full.eigenvalues.tolist()) for seed in range(4)
    }
    assert len(picks) > 1


@FEW
@given(ff.testing.regressors(), st.floats(0.1, 10))
def test_scaling_the_loss_by_c_scales_grams_by_its_square(drawn, c):
    fn = ff.functionalize(drawn.module)

    def scaled(output, batch):
        return c * (output - batch[-1]).square().sum(-1) / 2

    got = ff.token_grams(fn, fn.params, drawn.batch, ff.losses.custom(scaled), route="dense")
    torch.testing.assert_close(got.block(), c**2 * grams_of(drawn).block(), rtol=1e-11, atol=1e-300)


@FEW
@given(ff.testing.language_models(), st.integers(1, 3))
def test_padding_on_the_right_changes_nothing(drawn, extra):
    batch = dict(drawn.batch)
    shape = batch["input_ids"].shape
    positions = drawn.module.positions
    longer = torch.cat([positions.weight.detach(), torch.ones(extra, positions.weight.shape[1]).double()])
    padding = torch.zeros(shape[0], extra, dtype=torch.long)
    batch.setdefault("attention_mask", torch.ones(shape, dtype=torch.long))
    padded = {key: torch.cat([value, padding], dim=1) for key, value in batch.items()}
    before = grams_of(drawn)
    drawn.module.positions = nn.Embedding.from_pretrained(longer, freeze=False)
    assert_same_grams(grams_of(drawn, padded), before)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_left_padding_with_positions_given_changes_nothing(name):
    model, _ = build(name, dtype=torch.float64)
    ids = torch.tensor([[5, 9, 11, 7]])
    plain = {"input_ids": ids, "position_ids": torch.arange(4)[None]}
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2, 3]]),
    }
    expected, got = (ff.fisher_spectrum(model, batch).full.eigenvalues for batch in (plain, padded))
    tolerance = 1e-10 if name == "gpt2" else 1e-4  # LLaMA casts to float32 inside
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected[0]))


def test_batches_of_different_lengths_equal_one_padded_batch():
    model, _ = build("gpt2", dtype=torch.float64)
    short, long = torch.tensor([[4, 8, 15]]), torch.tensor([[16, 23, 36, 9, 5]])
    padded = {
        "input_ids": torch.cat([torch.cat([short, torch.zeros(1, 2, dtype=torch.long)], dim=1), long]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
    }
    listed = ff.fisher_spectrum(model, [{"input_ids": short}, {"input_ids": long}])
    whole = ff.fisher_spectrum(model, padded)
    torch.testing.assert_close(listed.full.eigenvalues, whole.full.eigenvalues, rtol=1e-10, atol=1e-13)


def test_reruns_are_bitwise_the_same():
    model, batch = build("bert")
    first, second = (ff.fisher_spectrum(model, batch, num_tokens=3) for _ in range(2))
    for label, spectrum in first.blocks.items():
        assert torch.equal(spectrum.eigenvalues, second.blocks[label].eigenvalues)
    assert torch.equal(first.full.eigenvalues, second.full.eigenvalues)


class Mixed(nn.Module):
    """One layer in bfloat16 and one in float32, in either order."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6, dtype=first), nn.Linear(6, 3, dtype=second)

    def forward(self, x):
        x = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.second(x.to(self.second.weight.dtype)).float()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_keep_each_its_rows_and_the_precision_is_the_coarsest(dtypes):
    torch.manual_seed(0)
    model, (x, y) = Mixed(*dtypes), samples()
    fn, loss = ff.functionalize(model), ff.losses.classification()
    grams = ff.token_grams(fn, fn.params, (x.float(), y), loss, chunk_size=1, route="dense")
    rows = ff.per_token_gradients(fn, fn.params, (x.float(), y), loss, chunk_size=1)
    assert grams.precision == torch.bfloat16 and grams.metadata["dtype"] == "bfloat16+float32"
    for name, g in rows.items():
        assert g.dtype == fn.params[name].dtype
        torch.testing.assert_close(
            grams.grams[name], g.flatten(1).double() @ g.flatten(1).double().T, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_right_to_its_precision_and_says_so(dtype):
    model, (x, y) = build("mlp")
    exact = ff.fisher_spectrum(model, (x, y), dtype=torch.float64)
    half = ff.fisher_spectrum(model, (x, y), dtype=dtype)
    assert half.metadata["dtype"] == str(dtype).removeprefix("torch.")
    error = (half.full.eigenvalues - exact.full.eigenvalues).abs().max()
    assert 1e-9 * exact.full.eigenvalues[0] < error < 0.05 * exact.full.eigenvalues[0]
    rounded = ff.fisher_spectrum(model.to(dtype), (x.to(dtype), y), dtype=torch.float64)  # these weights, exactly
    assert (half.full.eigenvalues - rounded.full.eigenvalues).abs().max() <= half.full.resolution


def losses_at(model, batch):
    fn = ff.functionalize(model)
    return fn.params, lambda some: ff.losses.classification().values(fn.apply(some, batch), batch)[:, 0]


@pytest.mark.parametrize("method", pullback.METHODS)
def test_every_pullback_gives_the_same_gradients(method):
    params, losses = losses_at(perceptron(), samples())
    cotangents = torch.randn(3, 4, dtype=torch.float64)
    values, pull = pullback.METHODS[method](losses, params)
    expected_values, loop = pullback.by_loop(losses, params)
    torch.testing.assert_close(values, expected_values, rtol=1e-12, atol=0)
    expected = loop(cotangents)
    for name, gradient in pull(cotangents).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-15)


class WrongUnderVmap(torch.autograd.Function):
    """Right for one cotangent, zero for a batch of them."""

    @staticmethod
    def forward(x, scale):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        x, scale = ctx.saved_tensors
        batched = torch._C._functorch.is_batchedtensor(cotangent)
        return cotangent * scale, (cotangent * x).sum() * (0 if batched else 1)


class BatchedWrong(Body):
    """The wrong rule hits one number, whose gradient is small beside the others'."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def between(self, x):
        return x + 1e-5 * WrongUnderVmap.apply(x, self.scale)


def test_a_batching_rule_that_is_wrong_for_one_small_parameter_is_found_out():
    torch.manual_seed(0)
    params, losses = losses_at(BatchedWrong().double(), samples())
    assert pullback.choose(losses, params) == "loop"
    assert pullback.choose(losses, {name: p for name, p in params.items() if name != "scale"}) == "vmap"


@pytest.mark.parametrize("method", pullback.METHODS)
def test_a_parameter_that_is_not_used_has_zero_gradients(method):
    params, losses = losses_at(perceptron(), samples())
    unused = {"unused": torch.ones(2, 3, dtype=torch.float64)}
    _, pull = pullback.METHODS[method](lambda some: losses(params) + 0 * losses(params).detach(), unused)
    assert torch.equal(pull(torch.ones(3, 4, dtype=torch.float64))["unused"], torch.zeros(3, 2, 3, dtype=torch.float64))


def test_a_parameter_without_axes_has_rows_norms_and_a_measured_round_off():
    torch.manual_seed(0)
    model, (x, y), loss = OddShapes(), samples(), ff.losses.classification()
    fn, batch = ff.functionalize(model), (x.float(), y)
    expected = gradient_rows(model, "classification", batch)
    found = ff.per_token_gradients(fn, fn.params, batch, loss)
    torch.testing.assert_close(found["scalar"].double(), expected["scalar"][:, 0], rtol=1e-4, atol=1e-5)
    norms = sum(g.square().sum(dim=1) for g in expected.values())
    torch.testing.assert_close(ff.gradient_norms(fn, fn.params, batch, loss), norms, rtol=1e-4, atol=1e-6)
    for route in ("factored", "dense"):
        assert ff.token_grams(fn, fn.params, batch, loss, route=route).metadata["round_off"]["measured"]
