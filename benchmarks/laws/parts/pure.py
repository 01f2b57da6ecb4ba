"""Parts that keep nothing and write to nothing: layers, scans, normalisations, weights made of other weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, weight_norm


class Dense(nn.Module):
    """A linear map of activations, made by what a subclass overrides, and a nonlinearity."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d, d)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.layer(h).tanh()


class Wide(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d, bias=False), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.layers(h)


class Attention(nn.Module):
    def __init__(self, d: int, *, causal: bool) -> None:
        super().__init__()
        self.mix, self.out, self.causal = nn.Linear(d, 3 * d), nn.Linear(d, d), causal

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.mix(h).chunk(3, dim=-1)
        s = h.shape[1]
        seen = keep[:, None, :] | torch.eye(s, dtype=torch.bool)
        if self.causal:
            seen = seen & torch.ones(s, s, dtype=torch.bool).tril()
        scores = (q @ k.mT).masked_fill(~seen, float("-inf"))
        return h + self.out(scores.softmax(-1) @ v)


class OtherAttention(Attention):
    """By torch's own function, in two heads where that divides."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        b, s, d = h.shape
        heads = 2 if d % 2 == 0 else 1
        q, k, v = (x.reshape(b, s, heads, -1).transpose(1, 2) for x in self.mix(h).chunk(3, dim=-1))
        seen = keep[:, None, None, :] | torch.eye(s, dtype=torch.bool)
        if self.causal:
            seen = seen & torch.ones(s, s, dtype=torch.bool).tril()
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return h + self.out(y.transpose(1, 2).reshape(b, s, d))


class Scan(Dense):
    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return (h + self.layer(h * keep[..., None]).cumsum(dim=1)).tanh()


class Backwards(Dense):
    """Each position sees those after it."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.layer(h.flip(1).cumsum(1).flip(1)).tanh()


class LooksAheadRarely(Dense):
    """Only samples of one kind look ahead."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        some = (h.detach()[..., 0].sum(1) > 1)[:, None, None]
        return h + self.layer(torch.where(some, h.flip(1), h)).tanh()


class Recurrent(nn.Module):
    def __init__(self, d: int, kind: type) -> None:
        super().__init__()
        self.inner = kind(d, d, batch_first=True)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.inner(h)[0]


class Convolution(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(d, d, 2)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.inner(functional.pad(h.mT, (1, 0))).mT.tanh()


class Normalised(nn.Module):
    """A normalisation over channels of (b, d, s), then a layer."""

    def __init__(self, d: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = norm, nn.Linear(d, d)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.layer(self.norm(h.mT).mT).tanh()


class Scaled(nn.Module):
    """A weight times Python numbers."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, d)), nn.Parameter(torch.randn(d))

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return (0.1 * h + functional.linear(h, self.weight * 0.3, self.bias / 7)).tanh() * 1.1


class Twice(Dense):
    """One weight, used by two names, transposed and through a view."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.again, self.matrix = self.layer, self.layer.weight

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return self.again(self.layer(h).tanh()) + h @ self.matrix + self.matrix[0]


class Listed(Dense):
    """A layer reached through a list, and a parameter that no registry has."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.listed, self.hidden, self.call = [self.layer], [nn.Parameter(torch.randn(d))], self.layer.forward

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return self.listed[0](h).tanh() + self.hidden[0] * self.call(h)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def parametrised(d: int) -> nn.Module:
    part = Dense(d)
    parametrize.register_parametrization(part.layer, "weight", Square())
    return part


class InParametrisationCache(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner = parametrised(d)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        with parametrize.cached():
            return self.inner(self.inner(h, keep), keep)


def with_layer(make: Callable[[nn.Module], nn.Module]) -> Callable[[int], nn.Module]:
    def made(d: int) -> nn.Module:
        part = Dense(d)
        with torch.no_grad():  # what is in a graph cannot be copied, and the loop copies
            make(part.layer)
        return part

    return made


class Branches(Dense):
    """What is done to a sample depends on its values, one after the other."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return torch.stack([self.layer(one).tanh() if one.sum().item() > 0 else 2 * one for one in h])


class ThroughNumpy(Dense):
    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        seen = torch.from_numpy(h.detach().numpy().cumsum(axis=1))
        return self.layer(h).tanh() * seen.cos()


class InPlace(Dense):
    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = self.layer(h)
        y *= 0.5
        y[..., 0] = y[..., 1] * 2
        y[:, -1] += h[:, 0]
        return y.add_(h).relu_() + y


class Dropping(Dense):
    """Nothing in evaluation mode."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.drop = nn.Dropout(0.5)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return self.drop(self.layer(h)).tanh() + (h if not self.training else h.flip(0))


class Draws(Dense):
    """Random numbers in evaluation mode too, the same in every call that begins from one seed."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return functional.dropout(self.layer(h), 0.5, training=True).tanh() + 0.1 * torch.rand(())


class Frozen(Dense):
    """A frozen layer, with a trainable update of low rank."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.layer.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(1, d)), nn.Parameter(torch.randn(d, 1))

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return self.layer(h).tanh() + h @ self.down.T @ self.up.T


class Unused(Dense):
    """A parameter without a use, one without entries, a number."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.unused, self.number = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.zeros(0, 2))

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return self.layer(h).tanh() * self.number + self.empty.sum()


DRAWING = {"draws": Draws}
PURE: dict[str, Callable[[int], nn.Module]] = {
    "dense": Dense,
    "wide": Wide,
    "attention": lambda d: Attention(d, causal=False),
    "causal attention": lambda d: Attention(d, causal=True),
    "causal attention of torch": lambda d: OtherAttention(d, causal=True),
    "scan": Scan,
    "backwards": Backwards,
    "looks ahead rarely": LooksAheadRarely,
    "gru": lambda d: Recurrent(d, nn.GRU),
    "lstm": lambda d: Recurrent(d, nn.LSTM),
    "convolution": Convolution,
    "batch norm": lambda d: Normalised(d, nn.BatchNorm1d(d)),
    "group norm": lambda d: Normalised(d, nn.GroupNorm(1, d)),
    "scaled": Scaled,
    "twice": Twice,
    "listed": Listed,
    "parametrised": parametrised,
    "cached parametrisation": InParametrisationCache,
    "weight norm": with_layer(parametrizations.weight_norm),
    "weight norm of old": with_layer(lambda layer: weight_norm(layer)),
    "spectral norm": with_layer(parametrizations.spectral_norm),
    "branches": Branches,
    "through numpy": ThroughNumpy,
    "in place": InPlace,
    "dropping": Dropping,
    "frozen": Frozen,
    "unused": Unused,
    **DRAWING,
}
