"""Which Fisher: Grams and spectra of the true one, exact and drawn, against closed forms, loops and curvlinops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import gram_errors
from plain_modules import VOCAB
from torch import nn
from torch.testing import assert_close
from true_fisher import assert_unbiased, by_draw, drawn_rows, exact_rows, grams_of, pass_rows
from zoo import CASES, Shifted, build, token_ids

import fisherfunc as ff
from fisherfunc.gradients.losses.predictive import predictive

ROUTES = ["factored", "dense"]


def softmax_regression(num_samples, num_classes, num_features, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(num_features, num_classes, bias=False).double()
    x = torch.randn(num_samples, num_features, dtype=torch.float64)
    return model, (x, torch.randint(num_classes, (num_samples,)))


def closed_form(model, x):
    """(1/N) Σ (diag p − p pᵀ) ⊗ x xᵀ."""
    p = model(x).detach().softmax(-1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return sum(torch.kron(h, torch.outer(a, a)) for h, a in zip(hessians, x, strict=True)) / len(x)


@settings(max_examples=6)
@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 3), st.sampled_from(ROUTES), st.integers(0, 99))
def test_all_classes_of_a_softmax_regression_are_its_closed_form(n, v, d, route, seed):
    model, batch = softmax_regression(n, v, d, seed)
    truth = closed_form(model, batch[0])
    found = ff.fisher_spectrum(model, batch, targets=ff.targets.all_classes(), route=route).full
    size = max(float(truth.trace()), 1.0)
    expected = torch.linalg.eigvalsh(truth).flip(0)[: len(found.eigenvalues)]
    assert_close(found.eigenvalues, expected, rtol=1e-10, atol=1e-12 * size)
    assert_close(found.eigenvalues.sum(), truth.trace(), rtol=1e-10, atol=1e-12 * size)
    assert found.num_tokens == n and len(found.eigenvalues) == min(n * v, d * v)


BY_FACTORS = ["gpt2 factored", "mlp factored", "shared factored"]
BY_ROWS = ["gpt2 dense", "shared dense"]


@pytest.mark.parametrize("case", [*BY_FACTORS, "resnet factored", *BY_ROWS, "bert dense"])
def test_grams_of_all_classes_are_those_of_a_loop(case):
    name, route = case.split()
    model, batch = build(name, dtype=torch.float64)
    kind = CASES[name].kind
    found = grams_of(model, batch, getattr(ff.losses, kind)(), targets=ff.targets.all_classes(), route=route)
    assert found.metadata["route"] == route and found.metadata["fisher"] == "true (exact)"
    assert max(gram_errors(found.grams, exact_rows(model, kind, batch), 1e-3).values()) <= 1e-10
    num_targets = {"shared": 2, "mlp": 3, "resnet": 3}.get(name, VOCAB)
    assert found.tokens.target.tolist() == list(range(num_targets)) * found.num_units


@pytest.mark.parametrize("case", [*BY_FACTORS, "bart factored", "lstm factored", *BY_ROWS, "t5 dense"])
def test_grams_of_draws_are_those_of_a_loop_at_the_targets_recorded(case):
    name, route = case.split()
    model, batch = build(name, dtype=torch.float64)
    kind, targets = CASES[name].kind, ff.targets.sampled(2, seed=5)
    found = grams_of(model, batch, getattr(ff.losses, kind)(), targets=targets, route=route)
    rows = drawn_rows(model, kind, batch, found.tokens.target, 2)
    assert found.metadata["route"] == route and found.metadata["fisher"] == "true (Monte-Carlo, 2 draws)"
    assert max(gram_errors(found.grams, rows, 1e-3).values()) <= (1e-5 if CASES[name].casts else 1e-10)


@pytest.mark.parametrize("targets", [ff.targets.sampled(2), ff.targets.all_classes()], ids=["sampled", "all"])
def test_the_fast_path_is_that_of_observed_targets(targets):
    model, batch = build("gpt2", dtype=torch.float64)[0], {"input_ids": token_ids(3, 4)}
    keys = ("route", "causal_prefixes", "output_layer", "stack_width")
    plain, many = (grams_of(model, batch, ff.losses.causal_lm(), targets=t).metadata for t in (None, targets))
    assert {key: many[key] for key in keys} == {key: plain[key] for key in keys}
    assert many["causal_prefixes"] and many["output_layer"] and many["stack_width"] == 3


def test_rows_of_a_place_are_on_the_shortest_prefix_that_holds_it(monkeypatch):
    from fisherfunc.gradients.factored import starts

    lengths, prefix = [], starts.trace_prefix
    model, batch = build("gpt2", dtype=torch.float64)[0], {"input_ids": token_ids(1, 5)}
    grams_of(model, batch, ff.losses.causal_lm(), targets=ff.targets.sampled(3))  # probes and checks, not counted

    def counted(work, batch, length, *rest, **options):
        lengths.append((length, work.num_tokens))
        return prefix(work, batch, length, *rest, **options)

    monkeypatch.setattr(starts, "trace_prefix", counted)
    grams_of(model, batch, ff.losses.causal_lm(), targets=ff.targets.sampled(3), chunk_size=3)
    assert [length for length, count in lengths if count == 12] == [1, 2, 3, 4]


def test_the_expected_gradient_is_zero():
    model, batch = build("gpt2", dtype=torch.float64)
    found = grams_of(model, batch, ff.losses.causal_lm(), targets=ff.targets.all_classes(), route="dense")
    logits = [model(input_ids=batch["input_ids"][b : b + 1]).logits[0] for b in range(3)]
    pairs = list(zip(found.tokens.sequence.tolist(), found.tokens.position.tolist(), strict=True))[::VOCAB]
    weights = torch.block_diag(*[logits[b][s].detach().softmax(0).sqrt()[None] for b, s in pairs])
    means = weights @ found.block() @ weights.mT  # of Σ_c √p_c (√p_c ∇ log p_c), a token a row
    assert float(means.abs().max()) <= 1e-12 * float(found.block().trace())


class Positions(nn.Module):
    """Two classes at each of two positions, from weights that they share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(2, 2, bias=False).double()

    def forward(self, x):
        return self.linear(x)


def positions():
    torch.manual_seed(2)
    return Positions(), (torch.randn(2, 2, 2, dtype=torch.float64), torch.randint(2, (2, 2)))


def test_draws_are_unbiased_for_the_true_fisher_of_tokens():
    model, batch = softmax_regression(3, 3, 2)
    _, rows = pass_rows(model, batch, ff.losses.classification(), ff.targets.sampled(1000))
    assert_unbiased(by_draw(rows, 1000, 3), closed_form(model, batch[0]))


def test_draws_of_a_sequence_are_unbiased_for_the_sum_of_the_true_fishers_of_its_tokens():
    model, batch = positions()
    truth = closed_form(model, batch[0].flatten(0, 1)) * 2  # a sum over two tokens, and a mean over two sequences
    loss = ff.losses.classification(class_axis=-1)
    work, rows = pass_rows(model, batch, loss, ff.targets.sampled(1000), unit="sequence")
    assert work.num_tokens == len(rows) == 2 * 1000
    assert_unbiased(by_draw(rows, 1000, 2), truth)


def test_draws_of_a_regression_are_unbiased_for_the_gauss_newton_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    batch = (torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64))
    _, exact = pass_rows(model, batch, ff.losses.regression(), ff.targets.all_classes())
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, batch[0]))(
        dict(model.named_parameters())
    )
    jacobian = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)  # (n, v, p)
    truth = (jacobian.mT @ jacobian).mean(0).detach()
    assert_close(exact.mT @ exact / 3, truth, rtol=1e-12, atol=1e-12)
    work, rows = pass_rows(model, batch, ff.losses.regression(), ff.targets.sampled(1000))
    assert_unbiased(by_draw(rows, 1000, 3), truth, errors=6)
    noise = (work.tokens.target.reshape(3, 1000, 2) - model(batch[0]).detach()[:, None]).flatten(0, 1)
    assert_close(noise.mT @ noise / len(noise), torch.eye(2, dtype=torch.float64), rtol=0, atol=0.1)
    assert float(noise.mean(0).abs().max()) < 0.06


def test_draws_have_the_probabilities_of_the_model():
    model, batch = softmax_regression(2, 4, 3)
    with torch.no_grad():
        model.weight[2] = -1e6 * batch[0][0]  # a class that the first sample cannot have
    found, _ = pass_rows(model, batch, ff.losses.classification(), ff.targets.sampled(2000))
    p = model(batch[0]).detach().softmax(-1)
    counts = torch.stack([t.bincount(minlength=4) for t in found.tokens.target.reshape(2, 2000)]) / 2000
    assert ((counts - p).abs() <= 4 * (p * (1 - p) / 2000).sqrt()).all()
    assert counts[0, 2] == 0 == p[0, 2]


def test_a_class_of_probability_zero_is_not_drawn_even_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    ends = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert predictive(ff.losses.classification()).draw(logits, ends).tolist() == [[1, 2]]


def test_one_token_and_one_parameter():
    model, batch = nn.Linear(1, 1, bias=False).double(), (torch.tensor([[3.0]]).double(), torch.zeros(1, 1).double())
    assert_close(ff.fisher_spectrum(model, batch, targets=ff.targets.all_classes()).full.eigenvalues.item(), 9.0)
    drawn = grams_of(model, batch, ff.losses.regression(), targets=ff.targets.sampled())
    noise = drawn.tokens.target - model(batch[0]).detach()
    assert_close(ff.spectrum_of_grams(drawn).full.eigenvalues, 9 * noise.square().flatten())


def test_a_class_of_probability_zero_has_no_row():
    model, batch = softmax_regression(2, 3, 2)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x) + torch.tensor([0.0, 0.0, -torch.inf], dtype=x.dtype)

    batch = (batch[0], batch[1] % 2)
    p = Masked()(batch[0]).detach().softmax(-1)
    for route in ROUTES:
        found = ff.fisher_spectrum(Masked(), batch, targets=ff.targets.all_classes(), route=route).full
        trace = ((p * (1 - p)).sum(1) * batch[0].square().sum(1)).mean()
        assert_close(found.eigenvalues.sum(), trace)


curvlinops = pytest.importorskip("curvlinops")


def dense_matrix(operator):
    return operator @ torch.eye(operator.shape[1], dtype=torch.float64)


def test_the_exact_matrix_is_curvlinops_gauss_newton_of_a_classifier_and_of_a_regression():
    for name, loss in (("mlp", nn.CrossEntropyLoss(reduction="mean")), ("shared", nn.MSELoss(reduction="sum"))):
        model, batch = build(name, dtype=torch.float64)
        parameters = list(model.parameters())
        theirs = dense_matrix(curvlinops.GGNLinearOperator(model, loss, parameters, [batch], check_deterministic=False))
        theirs = theirs / (1 if name == "mlp" else 2 * len(batch[0]))  # Σ‖f − y‖², and not half its mean
        ours = ff.fisher_spectrum(model, batch, targets=ff.targets.all_classes()).full.eigenvalues
        values = torch.linalg.eigvalsh((theirs + theirs.mT) / 2).flip(0)
        assert_close(ours, values[: len(ours)], rtol=0, atol=1e-10 * float(values[0]))
        assert float(values[len(ours) :].abs().sum()) < 1e-10 * float(values[0])


def test_the_exact_matrix_is_curvlinops_gauss_newton_of_a_transformer():
    model = build("gpt2", dtype=torch.float64)[0]
    model.set_attn_implementation("eager")
    ids = token_ids(1, 3)
    wrapped = Shifted(model)
    operator = curvlinops.GGNLinearOperator(
        wrapped, nn.CrossEntropyLoss(), list(wrapped.parameters()), [(ids, ids[:, 1:])], check_deterministic=False
    )
    rows = exact_rows(model, "causal_lm", {"input_ids": ids})
    g = torch.cat([rows[name.removeprefix("model.")] for name, _ in wrapped.named_parameters()], dim=1)
    basis = torch.linalg.qr(g.mT).Q
    compressed = basis.mT @ (operator @ basis)
    theirs = torch.linalg.eigvalsh((compressed + compressed.mT) / 2).flip(0)
    ours = ff.fisher_spectrum(model, {"input_ids": ids}, targets=ff.targets.all_classes()).full.eigenvalues
    assert_close(ours, theirs, rtol=0, atol=1e-10 * float(theirs[0]))


def test_curvlinops_monte_carlo_fisher_has_the_exact_one_for_its_mean():
    model, batch = softmax_regression(3, 3, 2)
    single = [
        dense_matrix(
            curvlinops.FisherMCLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                [model.weight],
                [batch],
                check_deterministic=False,
                seed=seed,
                mc_samples=10,
            )
        )
        for seed in range(40)
    ]
    _, rows = pass_rows(model, batch, ff.losses.classification(), ff.targets.all_classes())
    assert_unbiased(torch.stack(single), rows.mT @ rows / 3)
