"""The laws of `ff.testing` hold for the package's own parts, find what is wrong with others, and say where."""

import subprocess
import sys

import pytest
import torch
from hypothesis import strategies as st

import fisherfunc as ff
from fisherfunc import testing

KERNELS = {
    "gram_eigh": (ff.kernels.gram_eigh(), "gram"),
    "gram_svd": (ff.kernels.gram_svd(), "gram"),
    "robust_eigh": (ff.kernels.robust_eigh(), "gram"),
    "svd": (ff.kernels.svd(), "rows"),
    "cheapest": (ff.kernels.cheapest(), "rows"),
}
LOSSES = {
    "classification": (ff.losses.classification(), None),
    "cross_entropy": (torch.nn.CrossEntropyLoss(), None),
    "regression": (ff.losses.regression(), testing.value_outputs()),
    "causal_lm": (ff.losses.causal_lm(), testing.token_outputs()),
    "masked_lm": (ff.losses.masked_lm(), testing.token_outputs()),
}


def names_of(report):
    return [failure.law.name for failure in report.failures]


@pytest.mark.parametrize("mutant", testing.mutants, ids=lambda m: f"{m.applies_to}-{m}")
def test_a_mutant_is_killed_by_the_law_that_it_names(mutant):
    assert mutant.killed_by in names_of(mutant.report())


def test_every_law_kills_something():
    assert {(law.applies_to, law.name) for law in testing.laws} == {
        (mutant.applies_to, mutant.killed_by) for mutant in testing.mutants
    }


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_obey_the_laws(name):
    kernel, of = KERNELS[name]
    assert not testing.check_kernel(kernel, of=of, max_examples=40).failures


@pytest.mark.parametrize("name", ff.metrics.SUMMARY)
def test_metrics_obey_the_laws(name):
    assert not testing.check_metric(ff.metrics.SUMMARY[name], max_examples=40).failures


@pytest.mark.parametrize("name", LOSSES)
def test_losses_obey_the_laws(name):
    loss, examples = LOSSES[name]
    assert not testing.check_loss(loss, examples=examples, max_examples=40).failures


@pytest.mark.parametrize("rule", [ff.by_layer, ff.by_module, ff.by_parameter, ff.whole])
def test_rules_obey_the_laws(rule):
    assert not testing.check_partition(rule).failures


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_rows_and_grams_obey_the_laws(route):
    """The dense route's rows; the factored route has none, so its Grams stand in by their square roots' Gram."""

    def rows(model):
        fn = ff.functionalize(model.module)
        loss = model.loss or ff.losses.infer(model.module, model.batch)
        found = ff.per_token_gradients(fn, fn.params, model.batch, loss)
        if route == "factored":
            grams = ff.token_grams(fn, fn.params, model.batch, loss).grams
            for name, gram in grams.items():
                flat = found[name].flatten(1)
                torch.testing.assert_close(gram, flat @ flat.mT, rtol=0, atol=1e-10 * float(flat.square().sum()))
        return found

    report = testing.check_representation(rows, max_examples=15)
    assert not report.failures, str(report)


def test_a_product_with_f_is_a_symmetric_positive_operator():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3).double()
    batch = (torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))
    fn = ff.functionalize(model)
    product = ff.directions.fisher_vector_product(fn, fn.params, batch, ff.losses.classification())

    def operator(vector):
        weight, bias = vector.split([6, 3])
        return torch.cat([part.flatten() for part in product({"weight": weight.reshape(3, 2), "bias": bias}).values()])

    assert not testing.check_operator(operator, size=9, max_examples=5).failures


def test_a_coarser_dtype_needs_a_coarser_tolerance():
    kernel = ff.kernels.gram_eigh(dtype=torch.float32)
    assert "known" in names_of(testing.check_kernel(kernel, max_examples=20))
    assert not testing.check_kernel(kernel, tolerance=1e-4, waive={}, max_examples=20).failures


def test_a_waiver_lasts_as_long_as_the_law_is_broken():
    damped = next(m for m in testing.mutants if m.name == "damped").part
    waived = testing.check_metric(damped, waive={"homogeneous": "it has a damping"})
    assert waived.failures == () and "homogeneous" in waived.held
    (stale,) = testing.check_metric(ff.metrics.trace, waive={"zeros": "once"}, max_examples=20).failures
    assert stale.law.name == "zeros" and "It holds, though it is waived (once)" in str(stale)
    with pytest.raises(ValueError, match=r"waive expected names of \['homogeneous'.*got \['homogenous'\]"):
        testing.check_metric(ff.metrics.trace, waive={"homogenous": "misspelt"})


def test_what_a_part_raises_returns_or_writes_is_a_finding():
    def raising(gram):
        raise RuntimeError("no memory")

    def writing(gram):
        gram.matrix.zero_()
        return ff.kernels.gram_eigh()(gram)

    for kernel, said in (
        (raising, "It raised RuntimeError: no memory"),
        (lambda gram: [], "It returned list, expected a Spectrum."),
        (writing, "It wrote to what it was given."),
    ):
        report = testing.check_kernel(kernel, max_examples=5)
        assert report.failures and all(failure.reason == said for failure in report.failures)
    assert testing.check_metric(lambda spectrum: 1.0, max_examples=5).failures[0].reason.startswith("It returned float")


@pytest.mark.parametrize("kind", ["kernel", "metric", "loss", "rows", "rule", "operator"])
def test_a_counterexample_can_be_pasted_and_breaks_the_law_again(kind):
    mutant = next(m for m in testing.mutants if m.applies_to == kind)
    failure = next(f for f in mutant.report().failures if f.law.name == mutant.killed_by)
    namespace = {"torch": torch, "ff": ff, **vars(testing), "Spectrum": ff.Spectrum}
    exec(failure.code, namespace)
    again = testing.law.as_code(namespace["example"])
    assert "example = " + again == failure.code
    if kind in ("metric", "operator", "rule"):
        assert failure.law.check(mutant.part, examples=st.just(namespace["example"])) is not None


def test_counterexamples_are_small():
    """The shortest gradients that a kernel with N dropped gets wrong: two rows of one entry."""
    (failure,) = [f for f in testing.mutants[0].report().failures if f.law.name == "known"]
    rows, eigenvalues = failure.example
    assert rows.shape == (2, 1) and len(eigenvalues) == 1


def test_the_checks_need_no_pytest():
    code = (
        "import sys; sys.modules['pytest'] = None; import fisherfunc as ff; from fisherfunc import testing; "
        "print(testing.check_partition(ff.by_layer).failures)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "()\n", found.stderr
