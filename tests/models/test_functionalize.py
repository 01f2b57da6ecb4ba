"""A module as a pure function: it computes what the module computes, and leaves the module as it was."""

import warnings
from typing import ClassVar

import pytest
import torch
from odd_modules import ODD, Body, DataDependent, perceptron, samples
from oracle import gradient_rows, gram_errors
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from watching import changes, snapshot
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.survey.prepare import ROUTES


def grams(model, batch, **options):
    fn, loss = ff.functionalize(model), ff.losses.classification()
    if isinstance(model, DataDependent):  # its branches ask what the whole batch is
        loss = ff.losses.each_alone(loss)
    return ff.token_grams(fn, fn.params, batch, loss, **options)


def odd(name):
    torch.manual_seed(0)
    model = ODD[name]()
    return model, samples()


def dense_rows(model, batch):
    """The loop of backward passes, for gradients of any layout."""
    model.eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    rows = []
    for x, y in zip(*batch, strict=True):
        loss = functional.cross_entropy(model(x[None].clone()), y[None])
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)])
    columns = zip(*rows, strict=True)
    return {name: torch.stack([g.to_dense().flatten() for g in c]) for name, c in zip(named, columns, strict=True)}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [name for name in ODD if name != "recorded"])  # its tensor hook would be the oracle's
def test_grams_of_odd_modules_equal_those_of_a_loop_of_backward_passes(name, route):
    model, batch = odd(name)
    got = grams(model, batch, route=route).grams
    errors = gram_errors(got, dense_rows(model, batch), floor=1e-15)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ODD)
def test_a_call_leaves_module_batch_and_globals_bitwise_as_they_were(name, route):
    model, batch = odd(name)
    before, copies = snapshot(model), [x.clone() for x in batch]
    grams(model, batch, route=route)
    assert changes(before, snapshot(model)) == []
    assert all(map(torch.equal, batch, copies))


@pytest.mark.parametrize("name", ["gpt2", "t5", "mixtral", "lstm", "resnet"])
def test_a_spectrum_leaves_an_architecture_bitwise_as_it_was(name):
    model, batch = build(name)
    model.train()
    kind = {"t5": "seq2seq_lm", "resnet": "classification"}.get(name, "causal_lm")
    before = snapshot(model)
    ff.fisher_spectrum(model, batch, loss=getattr(ff.losses, kind)())
    assert changes(before, snapshot(model)) == []


class FailsForward(Body):
    """Calls are counted where no copy of the module has a counter of its own."""

    calls: ClassVar[list[int]] = []

    def forward(self, x):
        self.calls.append(1)
        if len(self.calls) > 2:
            raise RuntimeError("the forward pass failed")
        return super().forward(x)


class FailsBackward(Body):
    def between(self, x):
        return Failing.apply(x)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        raise RuntimeError("the backward pass failed")


@pytest.mark.parametrize("kind", [FailsForward, FailsBackward])
def test_a_call_that_fails_midway_leaves_the_module_bitwise_as_it_was(kind):
    model, batch = kind().double().train(), samples()
    before = snapshot(model)
    with pytest.raises((RuntimeError, ValueError), match="pass failed"):
        ff.fisher_spectrum(model, batch)
    assert changes(before, snapshot(model)) == []


def test_backward_hooks_are_not_called_and_forward_hooks_are():
    model, called = perceptron(), []
    model[0].register_full_backward_hook(lambda *_: called.append("backward"))
    model[0].register_forward_hook(lambda *_: called.append("forward"))
    grams(model, samples())
    assert set(called) == {"forward"}


def test_no_parameter_is_copied_and_other_tensors_are():
    copied = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.clone:
                copied.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    model.other = [torch.zeros(7)]
    with Watching():
        ff.functionalize(model)
    assert copied == [(7,)]


def test_a_non_leaf_tensor_in_a_container_of_the_module_is_no_obstacle():
    model = Body().double()
    model.kept = {"outputs": [model(samples()[0])]}
    reference = Body().double()
    reference.load_state_dict(model.state_dict())
    batch = samples()
    assert torch.equal(grams(model, batch).block(), grams(reference, batch).block())


def patched() -> nn.Module:
    model = perceptron()
    forward = model.forward
    model.forward = lambda x: forward(x) * 2
    return model


def closure() -> nn.Module:
    model = Body().double()
    model.between = lambda x: model.layer(x)
    return model


def listed_weight() -> nn.Module:
    model = Body().double()
    weights = [model.layer.weight]
    model.weights = weights
    model.between = lambda x: x @ weights[0]
    return model


@pytest.mark.parametrize("make", [patched, closure, listed_weight])
def test_a_parameter_reached_past_the_registry_raises_rather_than_losing_its_gradient(make):
    with pytest.raises(ValueError, match=r"reaches a parameter of shape .*, '.+', past the module's attributes"):
        grams(make(), samples())


def test_a_model_that_draws_at_random_is_a_function_all_the_same():
    class Noisy(Body):
        def between(self, x):
            return functional.dropout(x, 0.5, training=True)

    torch.manual_seed(0)
    model, batch = Noisy().double(), samples()
    fn = ff.functionalize(model)
    before = torch.get_rng_state()
    first = grams(model, batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = grams(model, batch, chunk_size=1)
    torch.testing.assert_close(again.block(), first.block(), rtol=1e-12, atol=1e-14)
    rows = ff.per_token_gradients(fn, fn.params, batch, ff.losses.classification())
    matrix = torch.cat([r.flatten(1) for r in rows.values()], dim=1)
    torch.testing.assert_close(first.block(), matrix @ matrix.T, rtol=1e-12, atol=1e-14)


def test_compiling_a_module_changes_nothing():
    model, batch = perceptron(), samples()
    plain = grams(model, batch).block()
    torch.testing.assert_close(grams(torch.compile(model, backend="eager"), batch).block(), plain, rtol=1e-12, atol=0)
    model.compile(backend="eager")
    torch.testing.assert_close(grams(model, batch).block(), plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_around_the_call_change_nothing(mode):
    model, batch = build("gpt2", dtype=torch.float64)
    plain = ff.fisher_spectrum(model, batch).full.eigenvalues
    with mode():
        inside = ff.fisher_spectrum(model, batch).full.eigenvalues
        made_inside, batch_inside = build("gpt2", dtype=torch.float64)
    assert torch.equal(inside, plain) and not inside.is_inference()
    assert torch.equal(ff.fisher_spectrum(made_inside, batch_inside).full.eigenvalues, plain)


def test_selections_of_parameters():
    model = perceptron()
    model[0].bias.requires_grad_(False)

    def names(parameters):
        return list(ff.functionalize(model, parameters=parameters).params)

    assert names("trainable") == ["0.weight", "2.weight", "2.bias"]
    assert names("all") == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert names("0.*") == names(["0.weight", "0.b*"]) == ["0.weight", "0.bias"]
    assert names(lambda name: name.endswith("bias")) == ["0.bias", "2.bias"]


def test_the_grams_of_a_selection_are_those_of_the_whole():
    model, batch = build("gpt2", dtype=torch.float64)
    fn, part = ff.functionalize(model), ff.functionalize(model, parameters="*.attn.*")
    everything = ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm())
    some = ff.token_grams(part, part.params, batch, ff.losses.causal_lm())
    given = ff.token_grams(fn, part.params, batch, ff.losses.causal_lm())
    assert set(some.grams) == {name for name in fn.params if ".attn." in name}
    for name, gram in some.grams.items():
        torch.testing.assert_close(gram, everything.grams[name], rtol=1e-10, atol=1e-16)
        assert torch.equal(gram, given.grams[name])


def test_a_tied_tensor_is_one_parameter_under_its_first_name():
    fn = ff.functionalize(build("gpt2")[0])
    assert "transformer.wte.weight" in fn.params and "lm_head.weight" not in fn.params


def test_other_parameters_than_the_models_own_are_where_gradients_are_taken():
    model, batch = perceptron(), samples()
    other = perceptron()
    fn = ff.functionalize(model)
    got = ff.token_grams(fn, dict(other.named_parameters()), batch, ff.losses.classification())
    assert not any(gram.requires_grad for gram in got.grams.values())
    errors = gram_errors(got.grams, gradient_rows(other, "classification", batch), floor=1e-15)
    assert max(errors.values()) < 1e-10


def test_targets_are_not_passed_to_the_model_and_inputs_are():
    seen = {}

    class Listening(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, **inputs):
            seen.update(inputs)
            return self.layer(inputs["x"])

    batch = {"x": torch.ones(1, 2), "extra": "text", "labels": torch.tensor([0]), "targets": torch.tensor([0])}
    fn = ff.functionalize(Listening())
    fn.apply(fn.params, batch)
    assert set(seen) == {"x", "extra"}


def scripted(module: nn.Module | None = None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module or perceptron())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (scripted, "RecursiveScriptModule is TorchScript"),
        (lambda: nn.Sequential(nn.Linear(4, 4), scripted()), "RecursiveScriptModule at '1' is TorchScript"),
        (lambda: nn.DataParallel(perceptron()), r"pass its \.module"),
    ],
)
def test_wrappers_that_torch_func_cannot_call_are_a_type_error_with_a_way_out(make, message):
    with pytest.raises(TypeError, match=message):
        ff.functionalize(make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"'0\.weight' holds no values yet"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' holds no values yet"),
        (lambda: nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.cdouble))]), "'0' is torch.complex128"),
    ],
)
def test_parameters_that_cannot_be_differentiated_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        ff.functionalize(make())


@pytest.mark.parametrize("make", [nn.Tanh, lambda: nn.Linear(3, 3), lambda: nn.BatchNorm1d(3)])
def test_a_part_in_torchscript_without_a_parameter_to_train_runs(make):
    part = make()
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    batch = (torch.randn(5, 4), torch.randint(2, (5,)))
    first, last = nn.Linear(4, 3), nn.Linear(3, 2)
    found = []
    for middle in (part, scripted(part)):
        result = ff.fisher_spectrum(nn.Sequential(first, middle, last), batch)
        found.append(result.full.eigenvalues)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev"])
def test_what_differentiates_by_itself_says_so_inside_a_transform(transform):
    model, batch = nn.Linear(4, 3), (torch.randn(5, 4), torch.randint(3, (5,)))
    fn = ff.functionalize(model)
    calls = [
        lambda: ff.fisher_spectrum(model, batch).full.eigenvalues[0],
        lambda: ff.token_grams(fn, fn.params, batch, ff.losses.classification())["bias"].matrix.sum(),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"differentiates by itself, and not inside a transform of torch\.func"):
            getattr(torch.func, transform)(lambda x, call=call: x * call())(
                torch.ones(2)[0 if transform == "grad" else slice(None)]
            )


def test_a_name_that_looks_like_a_pattern_is_that_parameter():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.ParameterDict({key: nn.Parameter(torch.ones(2)) for key in ("a[b]", "ab", "a*", "ac")})

        def forward(self, x):
            return x * sum(self.table.values())

    def chosen(parameters):
        return sorted(ff.functionalize(Named(), parameters=parameters).params)

    assert chosen("table.a[b]") == ["table.a[b]"]
    assert chosen(["table.a*", "table.ab"]) == ["table.a*", "table.ab"]
    assert chosen("table.a[c]") == ["table.ac"]
    model = Named()
    assert list(ff.functionalize(model, parameters=[model.table["a[b]"]]).params) == ["table.a[b]"]
