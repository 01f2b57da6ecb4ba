"""torch's own losses, taken token by token: each against that loss itself, of one sample alone."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.gradients.losses import IGNORED
from fisherfunc.pipeline.fisher import token_loss

N, D = 4, 3
ANY = nn.Linear(1, 1)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape, count=D, seed=1):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


BITS = classes(N, D, count=2).double()
SIGNS = 2 * BITS - 1
POSITIVE = numbers(N, D, seed=2).abs()
WEIGHT = torch.tensor([0.5, 1.0, 3.0])

OF_SAMPLES = {
    "mse": (nn.MSELoss(), numbers(N, D, seed=3)),
    "mse, the sum": (nn.MSELoss(reduction="sum"), numbers(N, D, seed=3)),
    "mse function": (F.mse_loss, numbers(N, D, seed=3)),
    "mse of integers": (nn.MSELoss(), classes(N, D, count=9)),
    "mse of images": (nn.MSELoss(), numbers(N, D, 2, 2)),
    "one output": (nn.MSELoss(reduction="none"), numbers(N, 1)),
    "l1": (nn.L1Loss(), numbers(N, D, seed=3)),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), numbers(N, D, seed=3)),
    "huber": (partial(F.huber_loss, delta=0.3, reduction="sum"), numbers(N, D, seed=3)),
    "partial of a partial": (partial(partial(F.huber_loss, delta=0.1), delta=0.3), numbers(N, D, seed=3)),
    "bce with logits": (nn.BCEWithLogitsLoss(), BITS),
    "bce with logits of integers": (nn.BCEWithLogitsLoss(), BITS.long()),
    "bce with logits, weighted": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT.flip(0)), BITS),
    "bce with logits, soft": (nn.BCEWithLogitsLoss(reduction="sum"), numbers(N, D).sigmoid()),
    "bce with logits, soft, one": (F.binary_cross_entropy_with_logits, numbers(N, 1).sigmoid()),
    "poisson": (nn.PoissonNLLLoss(full=True), POSITIVE.round()),
    "kl": (nn.KLDivLoss(reduction="batchmean"), POSITIVE / POSITIVE.sum(1, keepdim=True)),
    "kl of logs": (nn.KLDivLoss(reduction="sum", log_target=True), numbers(N, D).log_softmax(1)),
    "soft margin": (nn.SoftMarginLoss(), SIGNS),
    "hinge embedding": (nn.HingeEmbeddingLoss(margin=0.7), SIGNS),
    "labels by number": (nn.MultiLabelMarginLoss(), torch.tensor([[2, 0, -1]] * N)),
    "multi-label soft margin": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), BITS),
}


def alone(loss, o, y):
    """torch's own loss of each sample, as a batch of one."""
    y = y if y.is_floating_point() or isinstance(loss, nn.MultiLabelMarginLoss) else y.double()
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    return torch.stack([loss(o[i : i + 1], y[i : i + 1]).reshape(()) for i in range(len(o))])


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_a_sample_has_the_loss_that_torch_gives_it_alone(name):
    loss, y = OF_SAMPLES[name]
    o = numbers(*y.shape, seed=5)
    o = o.log_softmax(1) if name.startswith("kl") else o
    got = token_loss(loss, ANY, (None, y)).values(o, (None, y))
    assert got.shape == (N, 1)
    assert_close(got[:, 0], alone(loss, o, y), rtol=1e-12, atol=1e-14)


def test_binary_cross_entropy_of_probabilities():
    o, loss = numbers(N, D).sigmoid(), nn.BCELoss()
    assert_close(token_loss(loss, ANY, (None, BITS)).values(o, (None, BITS))[:, 0], alone(loss, o, BITS))


OF_CLASSES = {
    "plain": nn.CrossEntropyLoss(),
    "function": F.cross_entropy,
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHT.double()),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "all of it": partial(F.cross_entropy, label_smoothing=0.2, weight=WEIGHT.double(), ignore_index=1),
    "another number ignored": nn.CrossEntropyLoss(ignore_index=1),
    "log-probabilities": nn.NLLLoss(),
    "log-probabilities, weighted": nn.NLLLoss(weight=WEIGHT.double(), ignore_index=0),
}


def options_of(loss):
    names = ("weight", "ignore_index", "label_smoothing")
    given = loss.keywords if isinstance(loss, partial) else vars(loss) | dict(getattr(loss, "_buffers", {}))
    return {name: given[name] for name in names if given.get(name) is not None}


@pytest.mark.parametrize("shape", [(N,), (N, 5), (N, D), (2, D, D)], ids=str)
@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_target_has_the_loss_that_torch_gives_it_unreduced_with_classes_on_axis_1(name, shape):
    loss, o, y = OF_CLASSES[name], numbers(shape[0], D, *shape[1:]), classes(*shape)
    o = o.log_softmax(1) if name.startswith("log") else o
    options = options_of(loss)
    ignored = options.get("ignore_index", IGNORED)
    y.view(-1)[::4] = ignored
    want = (F.nll_loss if name.startswith("log") else F.cross_entropy)(o, y, reduction="none", **options)
    found = token_loss(loss, ANY, (None, y))
    valid = found.valid((None, y))
    assert torch.equal(valid, (y != ignored).reshape(shape[0], -1))
    assert_close(found.values(o, (None, y))[valid], want.reshape(valid.shape)[valid], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(N, D), (N, D, 5)], ids=str)
def test_cross_entropy_of_probabilities_is_taken_as_torch_takes_it(shape):
    loss, o, y = (
        nn.CrossEntropyLoss(weight=WEIGHT.double(), label_smoothing=0.1),
        numbers(*shape),
        numbers(*shape, seed=2),
    )
    y = y.softmax(1)
    want = F.cross_entropy(o, y, weight=loss.weight, label_smoothing=0.1, reduction="none")
    assert_close(token_loss(loss, ANY, (None, y)).values(o, (None, y)), want.reshape(N, -1), rtol=1e-12, atol=1e-14)


def test_the_multi_margin_loss_is_of_a_target():
    loss, o, y = nn.MultiMarginLoss(p=2, margin=0.5, weight=WEIGHT.double()), numbers(N, D), classes(N)
    want = F.multi_margin_loss(o, y, p=2, margin=0.5, weight=loss.weight, reduction="none")
    assert_close(token_loss(loss, ANY, (None, y)).values(o, (None, y))[:, 0], want, rtol=1e-12, atol=1e-14)


def loop(model, x, of_sample):
    """Eigenvalues of F, one term a sample, by an ordinary backward pass each."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(of_sample(model(x[i : i + 1]), i), model.parameters())
        rows.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(rows)
    return torch.linalg.eigvalsh(rows @ rows.mT / len(x)).flip(0)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (nn.CrossEntropyLoss(), classes(N)),
        (nn.CrossEntropyLoss(weight=WEIGHT), classes(N)),  # of another dtype than the model
        (nn.MSELoss(), numbers(N, D)),
        (nn.BCEWithLogitsLoss(), BITS),
        (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), BITS),
    ],
    ids=["ce", "ce weighted", "mse", "bce", "bce weighted"],
)
@pytest.mark.parametrize("route", ["factored", "dense"])
def test_the_spectrum_is_that_of_a_loop_over_samples(loss, y, route):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, D)).double(), numbers(N, 5, seed=4)
    options = {"reduction": "none"} if isinstance(loss, nn.CrossEntropyLoss) else {}
    weights = {k: getattr(loss, k).double() for k in ("weight", "pos_weight") if getattr(loss, k, None) is not None}
    function = {nn.CrossEntropyLoss: F.cross_entropy, nn.MSELoss: F.mse_loss}.get(
        type(loss), F.binary_cross_entropy_with_logits
    )
    want = loop(model, x, lambda o, i: function(o, y[i : i + 1], **weights, **options).sum())
    got = ff.fisher_spectrum(model, (x, y), loss=loss, route=route).full.eigenvalues
    assert_close(got, want[: len(got)], rtol=1e-9, atol=1e-12 * float(want[0]))


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), lambda out, batch: F.cross_entropy(out, batch[1], reduction="none")]
)
def test_grams_gradients_and_products_take_the_losses_that_a_spectrum_takes(loss):
    model, batch = nn.Linear(5, D).double(), (numbers(N, 5, seed=4), classes(N))
    fn = ff.functionalize(model)
    rows = ff.per_token_gradients(fn, fn.params, batch, loss)
    want = loop(model, batch[0], lambda o, i: F.cross_entropy(o, batch[1][i : i + 1], reduction="sum"))
    grams = ff.token_grams(fn, fn.params, batch, loss)
    K = sum(g.flatten(1) @ g.flatten(1).T for g in rows.values())
    assert_close(sum(grams.grams.values()), K)
    assert_close(torch.linalg.eigvalsh(K).flip(0) / N, want[:N])
    x = {name: torch.ones_like(p) for name, p in fn.params.items()}
    product = ff.directions.fisher_vector_product(fn, fn.params, batch, loss)(x)
    Gx = sum(g.flatten(1).sum(1) for g in rows.values())
    assert_close(product["bias"], rows["bias"].T @ Gx / N)


@pytest.mark.parametrize(
    ("loss", "words"), [(ff.losses.causal_lm, "call it"), (None, r"ff\.losses\.infer"), ("mse", "'mse'")]
)
def test_what_is_no_loss_is_refused_by_every_function(loss, words):
    fn, batch = ff.functionalize(nn.Linear(5, D)), (numbers(N, 5).float(), classes(N))
    for function in (ff.token_grams, ff.per_token_gradients, ff.directions.fisher_vector_product):
        with pytest.raises(TypeError, match=words):
            function(fn, fn.params, batch, loss)


def test_plain_cross_entropy_is_our_own_and_has_its_true_fisher():
    torch.manual_seed(0)
    model, batch = nn.Linear(5, D).double(), (numbers(N, 5), classes(N))
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(reduction="sum")):
        got = ff.fisher_spectrum(model, batch, loss=loss, targets=ff.targets.all_classes())
        want = ff.fisher_spectrum(model, batch, targets=ff.targets.all_classes())
        assert got.metadata["loss"] == want.metadata["loss"] == "classification"
        assert torch.equal(got.full.eigenvalues, want.full.eigenvalues)
    with_softmax = nn.Sequential(model, nn.LogSoftmax(dim=1))
    got = ff.fisher_spectrum(with_softmax, batch, loss=nn.NLLLoss(), targets=ff.targets.all_classes())
    assert_close(got.full.eigenvalues, want.full.eigenvalues, rtol=1e-9, atol=1e-12)


def test_log_probabilities_that_are_none_have_no_true_fisher():
    with pytest.raises(ValueError, match="minus its log-likelihood"):
        batch = (numbers(N, 5), classes(N))
        ff.fisher_spectrum(nn.Linear(5, D).double(), batch, loss=nn.NLLLoss(), targets=ff.targets.all_classes())


def test_binary_cross_entropy_is_ours_where_it_is_a_likelihood():
    def name(loss, y):
        return token_loss(loss, ANY, (None, y)).name

    assert name(nn.BCEWithLogitsLoss(), BITS[:, :1]) == "binary_classification"
    assert name(nn.BCEWithLogitsLoss(), BITS[:, 0]) == "binary_classification"
    assert name(nn.BCEWithLogitsLoss(reduction="sum"), BITS) == "binary_classification"
    assert name(nn.BCEWithLogitsLoss(), BITS) == "binary_cross_entropy_with_logits(reduction='mean')"
    assert "pos_weight=[2.0]" in name(nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])), BITS[:, :1])


def test_names_tell_losses_apart():
    losses = [
        nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.HuberLoss(), nn.HuberLoss(delta=2.0), nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.ones(2)), nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.CrossEntropyLoss(weight=torch.ones(20)), nn.CrossEntropyLoss(weight=torch.full((20,), 2.0)),
        nn.CrossEntropyLoss(ignore_index=0), nn.CrossEntropyLoss(label_smoothing=0.1), nn.NLLLoss(),
    ]  # fmt: skip
    names = [token_loss(loss, ANY, (None, classes(N))).name for loss in losses]
    assert len(set(names)) == len(losses)


class Focal(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return (1 - input.softmax(1).gather(1, target[:, None])[:, 0]) ** 2 * super().forward(input, target)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (nn.GaussianNLLLoss(), TypeError, "GaussianNLLLoss.*token by token.*custom"),
        (nn.CTCLoss(), TypeError, "CTCLoss.*custom"),
        (F.triplet_margin_loss, TypeError, "triplet_margin_loss.*custom"),
        (F.softmax, TypeError, "softmax.*custom"),
        (partial(F.cosine_embedding_loss, margin=0.1), TypeError, "cosine_embedding_loss.*custom"),
        (partial(F.mse_loss, weight=WEIGHT), TypeError, r"\['weight'\].*custom"),
        (partial(F.mse_loss, reduce=False), TypeError, r"\['reduce'\]"),
        (partial(F.cross_entropy, WEIGHT), TypeError, "positional"),
        (Focal(), TypeError, "Focal.*custom"),
        (nn.CrossEntropyLoss, TypeError, r"is a class; call it: loss=CrossEntropyLoss\(\)"),
        (ff.losses.binary_classification, TypeError, r"call it: loss=ff.losses.binary_classification\(\)"),
    ],
)
def test_what_is_no_loss_of_a_token_is_refused_with_what_to_do(loss, error, words):
    with pytest.raises(error, match=words):
        ff.fisher_spectrum(nn.Linear(5, D), (numbers(N, 5).float(), classes(N)), loss=loss)


def spectrum(loss, out, y):
    return ff.fisher_spectrum(nn.Linear(5, out), (numbers(N, 5).float(), y), loss=loss)


@pytest.mark.parametrize(
    ("loss", "out", "y", "words"),
    [
        (nn.MSELoss(), 1, numbers(N).float(), r"\(1, 1\), targets \(1,\).*pair each with each"),
        (nn.MSELoss(reduction="none"), D, numbers(N, D).float(), "leaves 3 losses a sample.*'mean' or 'sum'"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(N, D)), D, BITS.float(), "an entry a sample"),
        (nn.CrossEntropyLoss(weight=WEIGHT), D, classes(N) + 1, "target 3 is out of range: expected 0 to 2"),
        (nn.CrossEntropyLoss(weight=WEIGHT[:2]), D, classes(N), r"torch's cross_entropy failed.*weight"),
        (nn.CrossEntropyLoss(), D, numbers(N).float(), "the logits' shape.*class numbers are integers"),
        (nn.CrossEntropyLoss(), 1, BITS[:, 0].long(), r"binary_classification\(\)"),
        (nn.BCELoss(), D, BITS.float(), "between 0 and 1"),
    ],
    ids=["broadcast", "none", "weights of samples", "range", "short weight", "floats", "one class", "no probabilities"],
)
def test_what_torch_would_misread_or_refuse_is_named(loss, out, y, words):
    with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
        spectrum(loss, out, y)


def test_logits_with_classes_last_are_named_with_the_loss_that_fits():
    model, batch = nn.Linear(5, D), (numbers(N, 7, 5).float(), classes(N, 7))
    with pytest.raises(ValueError, match=r"classification\(class_axis=-1\) fits"):
        ff.fisher_spectrum(model, batch, loss=nn.CrossEntropyLoss())
