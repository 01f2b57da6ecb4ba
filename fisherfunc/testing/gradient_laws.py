"""Laws of losses, of rows (gradients per token), and of rules that put parameters into blocks.

The oracle of rows is a plain loop: a forward pass of the whole batch, and a backward pass of one token's loss a time.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fisherfunc.gradients.losses.asked import AnyLoss, token_loss_of
from fisherfunc.gradients.losses.infer import infer
from fisherfunc.testing.gradients import PARAMETER_NAMES
from fisherfunc.testing.law import BrokenPartError, Report, check_laws, laws_for, relative
from fisherfunc.testing.matrices import gaussian, generator
from fisherfunc.testing.models import TinyModel, tiny_models, token_batch

ROUND_OFF = 1e-12
"""Of float64 relative to the largest loss: sums of some ten terms."""
GRADIENT_ROUND_OFF = 1e-10
"""Of float64 relative to the largest entry of all rows: tiny models have some hundred operations, of condition 1e3."""

Example = tuple[Tensor, Any]


def check_loss(
    loss: AnyLoss,
    *,
    examples: st.SearchStrategy[Example] | None = None,
    waive: Mapping[str, str] | None = None,
    max_examples: int = 100,
) -> Report:
    """Try the laws of token losses on a loss.

    Args:
        loss: One of `ff.losses`, a loss of torch, or a function (output, batch) → losses.
        examples: Pairs (output, batch) that fit it: `class_outputs()` where None, `token_outputs()`, `value_outputs()`.
        waive: {law: why it need not hold}.
        max_examples: How many examples a law is tried on.
    """

    def losses(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        token_loss = token_loss_of(loss, batch)
        values, valid = token_loss.values(output, batch), token_loss.valid(batch)
        return values, torch.ones_like(values, dtype=torch.bool) if valid is None else valid

    examples = class_outputs() if examples is None else examples
    return check_laws(LOSS_LAWS, losses, examples=examples, waive=waive, max_examples=max_examples)


def check_representation(
    rows: Callable[[TinyModel], Mapping[str, Tensor]],
    *,
    examples: st.SearchStrategy[TinyModel] | None = None,
    waive: Mapping[str, str] | None = None,
    max_examples: int = 30,
) -> Report:
    """Try the laws of gradients per token on whatever makes them.

    Args:
        rows: A model with its batch → {name: (N, *shape)}, the valid tokens in the order of sequence and position.
        examples: Other models than `tiny_models()`.
        waive: {law: why it need not hold}.
        max_examples: How many models a law is tried on.
    """
    return check_laws(ROW_LAWS, rows, examples=examples, waive=waive, max_examples=max_examples)


def check_partition(
    rule: Callable[[str], str], *, waive: Mapping[str, str] | None = None, max_examples: int = 100
) -> Report:
    """Try the laws of rules on a function from a parameter's name to the label of its block.

    Args:
        rule: The rule.
        waive: {law: why it need not hold}.
        max_examples: How many lists of names a law is tried on.
    """
    return check_laws(RULE_LAWS, rule, waive=waive, max_examples=max_examples)


def class_outputs() -> st.SearchStrategy[Example]:
    """Logits `(b, v)` with a batch (inputs, classes)."""

    @st.composite
    def pairs(draw: st.DrawFn) -> Example:
        size, classes = draw(st.integers(2, 4)), draw(st.integers(2, 3))
        targets = torch.randint(classes, (size,), generator=generator(draw))
        return gaussian(draw, size, classes), (torch.zeros(size, 1, dtype=torch.float64), targets)

    return pairs()


def value_outputs() -> st.SearchStrategy[Example]:
    """Outputs `(b, v)` with a batch (inputs, real targets)."""

    @st.composite
    def pairs(draw: st.DrawFn) -> Example:
        size, outputs = draw(st.integers(2, 4)), draw(st.integers(1, 3))
        return gaussian(draw, size, outputs), (gaussian(draw, size, 1), gaussian(draw, size, outputs))

    return pairs()


def token_outputs() -> st.SearchStrategy[Example]:
    """Logits `(b, s, v)` with ids, a mask with padding, and labels with holes."""

    @st.composite
    def pairs(draw: st.DrawFn) -> Example:
        vocabulary = draw(st.integers(2, 4))
        lengths = [draw(st.integers(3, 4)), *draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))]
        batch = token_batch(draw, lengths, vocabulary)
        ids = batch["input_ids"]
        full = {"attention_mask": torch.ones_like(ids), "labels": ids, **batch}
        return gaussian(draw, ids.numel(), vocabulary).reshape(*ids.shape, vocabulary), full

    return pairs()


def loop_of_backward_passes(model: TinyModel) -> dict[str, Tensor]:
    """Gradients per token {name: (N, *shape)}: one backward pass of one loss after the other, of one forward pass.

    Args:
        model: A module with its batch and loss.
    """
    module, batch = model.module, model.batch
    token_loss = infer(module, batch) if model.loss is None else token_loss_of(model.loss, batch)
    if isinstance(batch, Mapping):
        output = module(**{key: entry for key, entry in batch.items() if key != "labels"})
    else:
        output = module(*batch[:-1])
    values, valid = token_loss.values(output, batch), token_loss.valid(batch)
    chosen = values.flatten() if valid is None else values[valid]
    names, parameters = zip(*module.named_parameters(), strict=True)
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    gradients = [torch.autograd.grad(value, parameters, **options) for value in chosen]
    return {name: torch.stack(column) for name, column in zip(names, zip(*gradients, strict=True), strict=True)}


def _part_of(batch: Any, index: Tensor) -> Any:
    if isinstance(batch, Mapping):
        return {key: entry[index] for key, entry in batch.items()}
    return tuple(entry[index] for entry in batch)


def _kept(losses: Callable[..., tuple[Tensor, Tensor]], output: Tensor, batch: Any) -> Tensor:
    """Losses with zero at tokens that do not count."""
    values, valid = losses(output, batch)
    if values.shape != valid.shape or values.shape[:1] != output.shape[:1]:
        raise BrokenPartError(f"It returned shape {tuple(values.shape)} of {len(output)} samples.")
    return torch.where(valid, values, 0.0)


def _alone(losses: Callable[..., tuple[Tensor, Tensor]], example: Example) -> float:
    output, batch = example
    parts = (torch.tensor([row]) for row in range(len(output)))
    alone = [_kept(losses, output[index], _part_of(batch, index)) for index in parts]
    return relative(_kept(losses, output, batch), torch.cat(alone))


def _permuted(losses: Callable[..., tuple[Tensor, Tensor]], example: Example) -> float:
    output, batch = example
    order = torch.arange(len(output)).flip(0)
    return relative(_kept(losses, output[order], _part_of(batch, order)), _kept(losses, output, batch)[order])


def _sensitivity(losses: Callable[..., tuple[Tensor, Tensor]], example: Example) -> Tensor:
    output = example[0].clone().requires_grad_()
    total = _kept(losses, output, example[1]).sum()
    if not total.requires_grad:
        raise BrokenPartError("It returned losses that do not depend on the output.")
    return torch.autograd.grad(total, output, materialize_grads=True)[0]


def _differentiable(losses: Callable[..., tuple[Tensor, Tensor]], example: Example) -> float:
    return float((~_sensitivity(losses, example).isfinite()).sum())


def _masked(losses: Callable[..., tuple[Tensor, Tensor]], example: Example) -> float:
    batch = example[1]
    if not isinstance(batch, Mapping):
        return 0.0
    return float(_sensitivity(losses, example)[batch["attention_mask"] == 0].abs().sum())


LOSS_LAWS = tuple(
    laws_for("loss", examples)(name, statement, tolerance, deviation)
    for name, statement, tolerance, examples, deviation in (
        ("alone", "The loss of a sample in a batch is that of the sample alone.", ROUND_OFF, class_outputs, _alone),
        ("order", "Samples in another order have their losses in that order.", ROUND_OFF, class_outputs, _permuted),
        ("differentiable", "It has a finite gradient by the output.", 0.0, class_outputs, _differentiable),
        ("masked", "What stands at padding does not matter.", 0.0, token_outputs, _masked),
    )
)


def _against_loop(rows: Callable[[TinyModel], Mapping[str, Tensor]], model: TinyModel, *, summed: bool) -> float:
    found, wanted = rows(model), loop_of_backward_passes(model)
    if set(found) != set(wanted):
        raise BrokenPartError(f"It has rows of {sorted(found)}, expected {sorted(wanted)}.")
    if summed:
        found, wanted = ({name: entry.sum(dim=0) for name, entry in each.items()} for each in (found, wanted))
    largest = max(float(entry.abs().max()) for entry in wanted.values())
    return max(relative(found[name], wanted[name], to=largest) for name in wanted)


ROW_LAWS = tuple(
    laws_for("rows", tiny_models)(name, statement, GRADIENT_ROUND_OFF, partial(_against_loop, summed=summed))
    for name, statement, summed in (
        ("loop", "Row n is what a backward pass of the loss of token n alone gives.", False),
        ("sum", "The rows sum to the gradient of the summed loss.", True),
    )
)


def parameter_names() -> st.SearchStrategy[list[str]]:
    """Lists of parameter names, those of architectures and any dotted ones, each once."""
    part = st.from_regex(r"[a-z_]\w{0,5}|\d", fullmatch=True)
    dotted = st.lists(part, min_size=1, max_size=4).map(".".join)
    return st.lists(st.sampled_from(PARAMETER_NAMES) | dotted, min_size=1, max_size=4, unique=True)


def _without_label(rule: Callable[[str], str], names: list[str]) -> float:
    labels = [rule(name) for name in names]
    return float(sum(not isinstance(label, str) or not label for label in labels))


def _moved(rule: Callable[[str], str], names: list[str]) -> float:
    forth, back = [rule(name) for name in names], [rule(name) for name in reversed(names)]
    return float(sum(one != other for one, other in zip(forth, reversed(back), strict=True)))


RULE_LAWS = tuple(
    laws_for("rule", parameter_names)(name, statement, 0.0, deviation)
    for name, statement, deviation in (
        ("labelled", "Every name has a label, which is text and not empty.", _without_label),
        ("repeatable", "The label is a function of the name alone.", _moved),
    )
)
