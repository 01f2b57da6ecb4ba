"""The true Fisher by other means: loops of backward passes on the user's own module, and the rows of a pass."""

import torch
from oracle import forward, terms

import fisherfunc as ff
from fisherfunc.gradients.autodiff.pullback import leaves_of
from fisherfunc.gradients.rows.gradient_rows import losses_of
from fisherfunc.gradients.rows.summed import summed
from fisherfunc.gradients.rows.workload import PassOptions
from fisherfunc.gradients.survey.prepare import prepared


def grams_of(model, batch, loss, **options):
    fn = ff.functionalize(model)
    return ff.token_grams(fn, fn.params, batch, loss, **options)


def _at(model, kind, batch, term):
    predictions = forward(model, kind, batch, term.sequence)
    return predictions.flatten() if kind == "regression" or predictions.ndim == 1 else predictions[term.position]


def exact_rows(model, kind, batch):
    """{name: (N V, P)}: √p_c ∇ −log p_c of every class, or ∇f_c of every output, by single backward passes."""
    model.eval()
    parameters = dict(model.named_parameters())
    rows = {name: [] for name in parameters}
    for term in terms(kind, batch):
        values = _at(model, kind, batch, term)
        if kind != "regression":
            probabilities = values.detach().softmax(0)
            values = -values.log_softmax(0) * probabilities.sqrt()
        for value in values:
            _append(rows, parameters, value)
    return {name: torch.stack(r) for name, r in rows.items()}


def drawn_rows(model, kind, batch, target, num_draws):
    """{name: (N D, P)}: ∇ −log p(y_d) / √D at the targets recorded, by single backward passes."""
    model.eval()
    parameters = dict(model.named_parameters())
    rows = {name: [] for name in parameters}
    for n, term in enumerate(terms(kind, batch)):
        values = _at(model, kind, batch, term)
        for y in target[n * num_draws : (n + 1) * num_draws]:
            loss = (values - y).square().sum() / 2 if kind == "regression" else -values.log_softmax(0)[y]
            _append(rows, parameters, loss / num_draws**0.5)
    return {name: torch.stack(r) for name, r in rows.items()}


def _append(rows, parameters, value):
    found = torch.autograd.grad(value, parameters.values(), retain_graph=True, allow_unused=True)
    for name, gradient in zip(parameters, found, strict=True):
        rows[name].append(torch.zeros_like(parameters[name]).flatten() if gradient is None else gradient.flatten())


def pass_rows(model, batch, loss, targets, *, unit="token"):
    """(the workload of a pass, its rows `(n, P)` with all parameters side by side)."""
    fn = ff.functionalize(model)
    options = PassOptions(memory_limit=10**9)
    work = targets.rows(prepared(fn, fn.params, batch, loss).work, options)
    work = summed(work) if unit == "sequence" else work
    losses, leaves = losses_of(work.fn, work.params, work.sequences, work.loss), leaves_of(work.params)
    found = []
    with torch.enable_grad():
        for number in work.tokens.sequence.unique().tolist():
            here = losses(number)(leaves)[work.tokens.entry[work.tokens.sequence == number]]
            pulled = torch.autograd.grad(here, leaves.values(), torch.eye(len(here)).to(here), is_grads_batched=True)
            found.append(torch.cat([g.flatten(1) for g in pulled], dim=1))
    return work, torch.cat(found)


def by_draw(rows, num_draws, count):
    """The Fisher matrices of single draws, `(D, P, P)`: each divides by the number of units, `count`."""
    each = rows.reshape(count, num_draws, -1).transpose(0, 1) * num_draws**0.5
    return each.mT @ each / count


def assert_unbiased(estimates, truth, errors=5.0):
    """The mean of independent estimates is the truth, within some standard errors of each entry."""
    mean, error = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
    assert ((mean - truth).abs() <= errors * error + 1e-9 * truth.abs().max()).all()
    assert float(error.norm() / truth.norm()) < 0.1  # or it would say nothing
