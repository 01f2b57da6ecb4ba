"""Sequences that run together: what passes between some of them is found, in values and in gradients."""

from collections.abc import Callable

import pytest
import torch
from odd_modules import COUNT
from odd_modules import rare_samples as samples
from passes import grams, off
from plain_modules import VOCAB
from torch import Tensor, nn
from torch.nn import functional

import fisherfunc as ff
from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.gradients.survey import survey as surveys
from fisherfunc.gradients.survey.survey import survey


class Net(nn.Module):
    """Three layers; `mix` is what a test does to the first one's output, given which samples are rare."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor] = lambda h, rare: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head, self.mix = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3), mix
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(torch.tanh(self.a(x)), x[:, :1] > 1.5)
        return self.head(torch.tanh(self.b(hidden)))


def straight_through(other: Tensor) -> Tensor:
    """Nothing in value, all in gradient."""
    return other - other.detach()


def second_half(h: Tensor, rare: Tensor) -> Tensor:
    half = len(h) // 2
    return torch.cat([h[:half], h[half:] + h[:half].mean(0).detach()]) if half else h


def swapped(h: Tensor, rare: Tensor) -> Tensor:
    """For the rare samples what another rare one has, where there is one."""
    index, other = rare.squeeze(-1).nonzero().squeeze(-1), torch.zeros_like(h)
    other[index] = h[index.flip(0)] if len(index) == 2 else 0
    return other


MIXING = {
    "mean": lambda h, rare: h - h.mean(0) if len(h) > 1 else h,
    "second half": second_half,
    "rare, detached": lambda h, rare: h + rare * h.mean(0).detach() if len(h) > 1 else h,
    "rare": lambda h, rare: h + rare * h.mean(0) if len(h) > 1 else h,
    "pair, detached": lambda h, rare: h + swapped(h, rare).detach(),
    "pair": lambda h, rare: h + swapped(h, rare),
    "pair, gradient only": lambda h, rare: h + straight_through(swapped(h, rare)),
    "mean, gradient only": lambda h, rare: functional.layer_norm(h + straight_through(h.mean(0)), (6,)),
    "sorted": lambda h, rare: h.sort(0).values,
    "size": lambda h, rare: h * len(h),
    "large only": lambda h, rare: h - h.mean(0) if len(h) > 8 else h,
    "statistics": lambda h, rare: nn.BatchNorm1d(6, track_running_stats=False).double()(h) if len(h) > 1 else h,
}


@pytest.mark.parametrize("mix", MIXING)
def test_samples_that_reach_each_other_do_not_run_together(mix):
    model = Net(MIXING[mix])
    alone = Net(lambda h, rare: torch.cat([MIXING[mix](row[None], r[None]) for row, r in zip(h, rare, strict=True)]))
    loss = ff.losses.each_alone(ff.losses.classification())
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, samples(), loss)
    assert result.metadata["stack_width"] == 1 and result.metadata["each_alone"]
    assert off(result, alone, samples()) < 1e-10
    assert ff.plan(model, samples(), loss=loss).num_units == COUNT


@pytest.mark.parametrize("mix", ["second half", "rare, detached", "pair, gradient only"])
def test_nor_do_they_where_nobody_checks_the_grams(mix):
    model = Net(MIXING[mix])
    alone = Net(lambda h, rare: torch.cat([MIXING[mix](row[None], r[None]) for row, r in zip(h, rare, strict=True)]))
    loss = ff.losses.each_alone(ff.losses.classification())
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, samples(), loss, self_check=False)
    assert result.metadata["stack_width"] == 1 and result.metadata["self_check"] is None
    assert off(result, alone, samples()) < 1e-10


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("mix", MIXING)
def test_samples_that_reach_each_other_are_refused_where_nothing_says_that_each_alone_is_meant(mix, route):
    with pytest.raises(ValueError, match=r"samples of a batch depend on each other.*ff\.losses\.each_alone\(loss\)"):
        grams(Net(MIXING[mix]), samples(), "classification", route=route)


@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize(
    "counts",
    [
        lambda y: y == y.max(),
        lambda y: torch.arange(len(y)) < (y[-1] == 2),
        lambda y: torch.tensor([not bool((y[:i] == one).any()) for i, one in enumerate(y)]),
    ],
)
def test_which_samples_count_may_not_depend_on_the_others_either(counts, self_check):
    loss = ff.losses.custom(
        lambda output, batch: functional.cross_entropy(output, batch[-1], reduction="none"),
        valid=lambda batch: counts(batch[-1]),
    )
    fn = ff.functionalize(Net())
    with pytest.raises(ValueError, match=r"tokens count in the batch and|samples of a batch depend on each other"):
        ff.token_grams(fn, fn.params, samples(), loss, self_check=self_check)


class Mates(Net):
    """Samples whose first input is the same number get the mean of theirs, in values alone."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x[:, 1:]))
        alike = (x[:, :1] == x[:, 0]).to(h.dtype)
        return self.head(torch.tanh(self.b(h + (alike @ h / alike.sum(1, keepdim=True) - h).detach())))


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9, 16])
def test_two_samples_that_meet_in_values_alone_are_seen_wherever_they_are(count, route):
    """The pass, the survey and the check each have a company of their own."""
    y = torch.arange(count) % 3
    for first in range(count):
        for second in range(first + 1, count, max(1, count // 4)):
            x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            x[:, 0] = torch.arange(count)
            x[second, 0] = first
            with pytest.raises(ValueError, match="samples of a batch depend on each other"):
                grams(Mates(), (x, y), "classification", route=route, self_check=True)


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 15])
def test_a_sample_that_is_another_in_any_company_is_seen_among_few(count, route):
    """A sum over the batch decides, which is positive wherever the last sample is not alone."""

    class Decides(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + (x.sum() > 0))

    x = 2 + torch.rand(count, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[-1] = -1
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        grams(Decides(), (x, torch.arange(count) % 3), "classification", route=route, self_check=True)


@pytest.mark.parametrize("drop_nonfinite", [True, False])
def test_a_loss_that_is_not_finite_beside_others_alone_is_theirs(drop_nonfinite):
    class Spreads(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * x.mean()

    first, second = samples(), samples()
    first, second = (first[0][:3], first[1][:3]), (second[0][3:8], second[1][3:8])
    second[0][2] = torch.inf
    fn = ff.functionalize(Spreads())
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        ff.token_grams(fn, fn.params, [first, second], ff.losses.classification(), drop_nonfinite=drop_nonfinite)


class Towers(nn.Module):
    """Samples of three numbers go through one layer, those of four through another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(3, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh((self.a if x.shape[1] == 3 else self.b)(x)))


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("self_check", [True, False])
def test_parameters_that_one_group_of_samples_does_not_use_have_zeros_there(self_check, route):
    generator, model = torch.Generator().manual_seed(0), Towers()
    y = torch.tensor([0, 2, 1])
    batches = [(torch.randn(3, size, generator=generator, dtype=torch.float64), y) for size in (3, 4)]
    fn = ff.functionalize(model)
    params = {name: p for name, p in fn.params.items() if name.startswith("b")}
    got = ff.token_grams(fn, params, batches, ff.losses.classification(), route=route, self_check=self_check)
    losses = [functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for x, y in batches for n in range(len(x))]
    for name in params:
        weight = model.get_parameter(name)
        each = [torch.autograd.grad(one, weight, retain_graph=True, allow_unused=True)[0] for one in losses]
        rows = torch.stack([torch.zeros_like(weight) if g is None else g for g in each]).flatten(1)
        torch.testing.assert_close(got.grams[name], rows @ rows.mT, atol=1e-12, rtol=0)
        assert not got.grams[name][:3].any()


@pytest.mark.parametrize("mix", ["pair, gradient only", "mean, gradient only"])
def test_gradients_of_samples_that_reach_each_other_are_refused_as_their_grams_are(mix):
    fn, loss = ff.functionalize(Net(MIXING[mix])), ff.losses.classification()
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        ff.per_token_gradients(fn, fn.params, samples(), loss)
    rows = ff.per_token_gradients(fn, fn.params, samples(), loss, self_check=False)
    alone = ff.per_token_gradients(fn, fn.params, samples(), ff.losses.each_alone(loss))
    assert all(torch.equal(rows[name], alone[name]) for name in alone)


@pytest.mark.parametrize("mix", ["mean, gradient only", "statistics"])
def test_one_token_of_samples_that_reach_each_other_is_refused_as_all_are(mix):
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        grams(Net(MIXING[mix]), samples(), "classification", num_tokens=1, seed=3)


@pytest.mark.parametrize(("sizes", "width"), [((2,), COUNT), ((5,), COUNT), ((COUNT,), 1), ((2, 3, COUNT), 1)])
def test_a_model_may_refuse_some_numbers_of_samples(sizes, width):
    def refuses(h: Tensor, rare: Tensor) -> Tensor:
        if len(h) in sizes:
            raise ValueError(f"not {len(h)}")
        return h

    result = grams(Net(refuses), samples(), "classification")
    assert (result.metadata["route"], result.metadata["stack_width"]) == ("factored", width)
    assert off(result, Net(), samples()) < 1e-10
    assert ff.plan(Net(refuses), samples()).stack_width == width


@pytest.mark.parametrize("rule", [True, False])
def test_samples_that_do_not_run_together(rule, monkeypatch):
    if not rule:
        monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    result = grams(Net(), samples(), "classification")
    assert result.metadata["stack_width"] == COUNT
    assert off(result, Net(), samples()) < 1e-10


def test_the_losses_of_samples_that_reach_each_other_are_those_of_each_alone():
    model, (x, y) = Net(MIXING["pair"]), samples()
    fn = ff.functionalize(model)
    tokens = survey(fn, fn.params, split((x, y)), ff.losses.each_alone(ff.losses.classification())).tokens
    logits = torch.cat([model(row[None]) for row in x]).detach()
    torch.testing.assert_close(tokens.loss, functional.cross_entropy(logits, y, reduction="none"))


@pytest.mark.parametrize("parameters", ["all", "head.*"])
def test_samples_of_large_activations_are_surveyed_few_at_a_time(parameters, monkeypatch):
    """Also where only the last layer is differentiated by, so that nothing else is saved."""
    widths = []
    model = Net(lambda h, rare: (widths.append(len(h)), h)[1])
    fn = ff.functionalize(model, parameters=parameters)
    sequences, loss = split(samples()), ff.losses.classification()
    saved = surveys._looked_at(fn, fn.params, sequences, loss)[1].saved_bytes
    assert saved > 3 * 6 * 8  # of the hidden values, whatever is differentiated by
    found = {}
    for most in (COUNT, 18):
        widths.clear()
        monkeypatch.setattr(surveys, "BYTES_TOGETHER", most * saved)
        found[most] = survey(fn, fn.params, sequences, loss).tokens
        assert max(widths) == most
    torch.testing.assert_close(found[COUNT].loss, found[18].loss)


class Tempered(Net):
    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        return super().forward(x) * temperature


def test_batches_with_numbers_of_their_own_do_not_share_them():
    model, (x, y) = Tempered(), samples()
    fn = ff.functionalize(model)
    scales = [1.0] * 10 + [5.0] + [1.0] * 10
    batches = [(x[i : i + 1], torch.tensor(t).double(), y[i : i + 1]) for i, t in enumerate(scales)]
    loss = ff.losses.classification()
    factored, dense = (ff.token_grams(fn, fn.params, batches, loss, route=route) for route in ("factored", "dense"))
    torch.testing.assert_close(factored.tokens.loss, dense.tokens.loss)
    for name, gram in dense.grams.items():
        torch.testing.assert_close(factored.grams[name], gram)


class Squeezed(Net):
    """Takes one sample, as a vector."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x.squeeze(0)))).reshape(-1, 3)


def test_a_model_of_vectors_is_taken():
    assert off(grams(Squeezed(), samples(), "classification"), Squeezed(), samples()) < 1e-10


class Sequences(nn.Module):
    """A language model of which each part is used; padding ids have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(VOCAB, 6, padding_idx=0), nn.Embedding(8, 6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, VOCAB)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device)[None])
        return self.head(self.down(functional.gelu(self.up(x.cumsum(1)))))


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("rule", [True, False])
def test_sequences_with_few_tokens_or_none_run_with_others(rule, chunk_size, monkeypatch):
    if not rule:
        monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (20, 6), generator=generator)
    ids[4], ids[11, 2:] = 0, 0
    labels = ids.masked_fill(torch.rand(20, 6, generator=generator) < 0.5, -100)
    labels[[3, 9]] = -100
    batch = {"input_ids": ids, "labels": labels}
    result = grams(Sequences(), batch, "causal_lm", chunk_size=chunk_size)
    assert result.metadata["stack_width"] > 1
    assert off(result, Sequences(), batch, "causal_lm") < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [5, COUNT])
def test_losses_that_are_all_but_zero_are_no_sign_of_samples_that_meet(count, dtype):
    x, model = samples()[0][:count].to(dtype), Net().to(dtype)
    with torch.no_grad():
        model.head.weight.mul_(200)
        y = model(x).argmax(1)
    kept = functional.cross_entropy(model(x), y, reduction="none") < 1e-4
    assert int(kept.sum()) > 1
    fn = ff.functionalize(model)
    for route in ("factored", "dense"):
        found = ff.token_grams(fn, fn.params, (x[kept], y[kept]), ff.losses.classification(), route=route)
        assert found.metadata["self_check"]["held"]
