"""Grams of a batch by the door of every run, and the workload that the passes below it take."""

from oracle import gradient_rows, gram_errors
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.gradients.survey.survey import survey


def workload(model: nn.Module, batch, kind: str | ff.losses.TokenLoss) -> Workload:
    fn, sequences = ff.functionalize(model), split(batch)
    loss = getattr(ff.losses, kind)() if isinstance(kind, str) else kind
    found = survey(fn, fn.params, sequences, loss)
    return Workload(fn=fn, params=fn.params, sequences=sequences, loss=loss, tokens=found.tokens, nature=found.nature)


def grams(model: nn.Module, batch, kind: str | ff.losses.TokenLoss, **options) -> ff.TokenGrams:
    work = workload(model, batch, kind)
    return ff.token_grams(work.fn, work.params, batch, work.loss, **options)


def off(result: ff.TokenGrams, model: nn.Module, batch, kind: str = "classification") -> float:
    """By how much the Grams are off those of a loop of backward passes, where most."""
    return max(gram_errors(result.grams, gradient_rows(model, kind, batch), floor=1e-16).values())
