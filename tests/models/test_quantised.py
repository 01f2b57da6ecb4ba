"""Frozen quantised weights under an adapter, stored in each of the ways that libraries have."""

import threading

import pytest
import torch
from torch import nn

import fisherfunc as ff


class Product(torch.autograd.Function):
    """x Wᵀ of a weight that is unpacked in each of the two passes, and has no gradient."""

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.save_for_backward(codes, scale)
        return x @ (codes.to(x.dtype) * scale.to(x.dtype)).T

    @staticmethod
    def backward(ctx, cotangent):
        codes, scale = ctx.saved_tensors
        return cotangent @ (codes.to(cotangent.dtype) * scale.to(cotangent.dtype)), None, None


def quantised(d_in, d_out):
    weight = torch.randn(d_out, d_in, dtype=torch.float64) / d_in**0.5
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class InBuffers(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        codes, scale = quantised(d_in, d_out)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return Product.apply(x, self.codes, self.scale)


class InParameter(InBuffers):
    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        codes = self.codes
        del self.codes
        self.codes = nn.Parameter(codes, requires_grad=False)


class Codes(nn.Parameter):
    """Integers that carry their scale, as the 8-bit weights of bitsandbytes do."""

    def __new__(cls, codes, scale=None):
        made = torch.Tensor._make_subclass(cls, codes, False)
        made.codes, made.scale = codes, scale
        return made


class State:
    codes = scale = None


class InOwnClass(nn.Module):
    """It takes the scale from the parameter at the first call, and gives the parameter its memory at each."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = Codes(*quantised(d_in, d_out))
        self.state = State()

    def forward(self, x):
        if self.weight.codes is not None:
            self.state.codes, self.state.scale = self.weight.codes, self.weight.scale
            self.weight.codes = self.weight.scale = None
        y = Product.apply(x, self.state.codes, self.state.scale)
        self.weight.data = self.state.codes
        return y


class InFloats(nn.Module):
    """Bits in a parameter of dtype bfloat16, as 4-bit weights are stored for sharding: its values mean nothing."""

    def __init__(self, d_in, d_out):
        super().__init__()
        codes, scale = quantised(d_in, d_out)
        self.shape = codes.shape
        self.weight = Codes(codes.flatten().view(torch.bfloat16))
        self.weight.quant_state = {"scale": scale}

    def forward(self, x):
        return Product.apply(x, self.weight.view(torch.int8).view(self.shape), self.weight.quant_state["scale"])


class Adapted(nn.Module):
    def __init__(self, base, d_in, d_out):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(d_in, 2, bias=False), nn.Linear(2, d_out, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


KINDS = (InBuffers, InParameter, InOwnClass, InFloats)
X, Y = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 4


def adapted(kind):
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(kind(6, 8), 6, 8), nn.Tanh(), Adapted(kind(8, 4), 8, 4))
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.double()  # and no more than these: it would widen the packed floats
    return model.eval()


def gradients_one_by_one(model):
    """G of the adapter's parameters, by autograd alone."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    losses = [nn.functional.cross_entropy(model(x[None]), y[None], reduction="sum") for x, y in zip(X, Y, strict=True)]
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)]) for loss in losses])


@pytest.mark.parametrize("already_run", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["factored", "dense"])
def test_the_grams_of_an_adapter_are_those_of_a_loop_whatever_holds_the_base(kind, route, already_run):
    model = adapted(kind)
    if already_run:
        model(X)
    fn = ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, (X, Y), ff.losses.classification(), route=route)
    rows = gradients_one_by_one(adapted(kind))
    assert grams.metadata["route"] == route
    gram = grams.block(list(grams.grams))
    torch.testing.assert_close(gram, rows @ rows.T, rtol=0, atol=1e-12 * float(rows.square().sum()))


@pytest.mark.parametrize("kind", [InOwnClass, InFloats])
def test_what_packed_weights_carry_stays_with_the_users_module(kind):
    model = adapted(kind)
    before = [(p, p.data_ptr(), dict(vars(p))) for p in model.parameters()]
    ff.fisher_spectrum(model, (X, Y))
    for p, address, attributes in before:
        assert p.data_ptr() == address
        assert vars(p) == attributes


def test_a_cast_leaves_the_bits_of_packed_weights():
    wide = ff.fisher_spectrum(adapted(InFloats), (X, Y), dtype=torch.float64).full.eigenvalues
    rows = gradients_one_by_one(adapted(InFloats))
    want = torch.linalg.eigvalsh(rows @ rows.T / len(X)).flip(-1)
    torch.testing.assert_close(wide, want, rtol=0, atol=1e-12 * float(want.sum()))


@pytest.mark.parametrize(("kind", "name"), [(InParameter, "0.base.codes"), (InOwnClass, "0.base.weight")])
@pytest.mark.parametrize("parameters", ["all", "*base*"])
def test_a_gradient_of_quantised_weights_is_refused_by_name(kind, name, parameters):
    with pytest.raises(ValueError, match=rf"'{name}' is torch.int8 of shape \(8, 6\).*have no gradient.*'trainable'"):
        ff.fisher_spectrum(adapted(kind), (X, Y), parameters=parameters)


def test_bits_in_floats_are_no_parameter_to_differentiate_by():
    with pytest.raises(ValueError, match=r"'0.base.weight' is torch.bfloat16 of shape \(24,\).*have no gradient"):
        ff.fisher_spectrum(adapted(InFloats), (X, Y), parameters="all")


class Outwardly(torch.Tensor):
    """Integers and a scale that are outwardly one tensor of floats, as the weights of torchao and quanto are."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = [arg.codes * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def test_integers_that_are_outwardly_floats_are_no_parameter_to_differentiate_by():
    model = nn.Linear(6, 8, bias=False).double()
    model.weight = nn.Parameter(Outwardly(*quantised(6, 8)), requires_grad=False)
    with pytest.raises(ValueError, match=r"'weight' is torch.float64 of shape \(8, 6\), in a .*have no gradient"):
        ff.functionalize(model, parameters="all")


def test_a_plain_parameter_of_a_class_of_its_own_is_no_packed_weight():
    class Tagged(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    model[0].weight = Tagged(model[0].weight.detach(), requires_grad=False)
    model[0].weight.lock = threading.Lock()  # which nobody can copy
    assert float(ff.fisher_spectrum(model, (X, Y)).full.eigenvalues[0]) > 0


def test_a_write_into_packed_weights_is_refused_by_name():
    class Drifting(InOwnClass):
        def forward(self, x):
            y = super().forward(x)
            self.state.codes.add_(1)
            return y

    model = adapted(Drifting)
    kept = model[0].base.weight.clone()
    with pytest.raises(ValueError, match=r"writes into the quantised weights '0\.base\.weight'"):
        ff.fisher_spectrum(model, (X, Y))
    assert torch.equal(model[0].base.weight, kept)
