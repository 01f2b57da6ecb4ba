"""What a plan was made for: it can be run on another batch where all of this is the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.losses.identity import loss_id
from fisherfunc.gradients.rows.subsample import Coordinates
from fisherfunc.gradients.rows.workload import PassOptions
from fisherfunc.gradients.survey.prepare import Prepared, Seen
from fisherfunc.linalg.grams.tokens import Tokens
from fisherfunc.records.axes import Params
from fisherfunc.records.containers import flattened
from fisherfunc.records.hashing import short_hash
from fisherfunc.records.plain import dtype_name

MOST_NAMED = 4
"""Differences that an error names."""


class PlanMismatchError(ValueError):
    """A run is not what a plan was made for."""


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """What a plan was made for, and what was seen of the model on the way.

    Attributes:
        facts: {what: as it was}: shapes of the model and the batch, and all options that the pass depends on.
        seen: What need not be looked at again.
        loss: The token loss.
        num_tokens: How many tokens there were: the plan has room for no more.
        most_tokens: How many the sequence of most had.
    """

    facts: Mapping[str, str]
    seen: Seen
    loss: TokenLoss
    num_tokens: int
    most_tokens: int

    def check(self, facts: Mapping[str, str]) -> None:
        """Raise where a run is of other shapes, options or another model.

        Raises:
            PlanMismatchError: If so; it names what differs.
        """
        differing = [name for name in dict.fromkeys([*self.facts, *facts]) if self.facts.get(name) != facts.get(name)]
        if differing:
            named = [f"{n} ({self.facts.get(n, 'none')} in the plan, {facts.get(n, 'none')} here)" for n in differing]
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            raise PlanMismatchError(
                f"the plan was made for something else: {', '.join(named[:MOST_NAMED])}{more}; give both the same "
                "arguments, or make another plan with ff.plan and those of this run"
            )

    def check_tokens(self, tokens: Tokens) -> None:
        """Raise where there are more tokens than the plan has room for.

        Raises:
            PlanMismatchError: If so.
        """
        counts = {"tokens": len(tokens.sequence), "tokens of one sequence": _most(tokens)}
        for what, planned in {"tokens": self.num_tokens, "tokens of one sequence": self.most_tokens}.items():
            if counts[what] > planned:
                raise PlanMismatchError(
                    f"the plan was made for {planned} {what}, and this batch has {counts[what]}: its memory would not "
                    "do; make the plan with the batch that has most"
                )


def made_for(facts: Mapping[str, str], ready: Prepared) -> MadeFor:
    """Return what a plan of these tokens is for.

    Args:
        facts: From `facts_of`.
        ready: The tokens, and what was seen of the model.
    """
    tokens = ready.work.tokens
    return MadeFor(
        facts=facts,
        seen=ready.seen,
        loss=ready.work.loss,
        num_tokens=len(tokens.sequence),
        most_tokens=_most(tokens),
    )


def facts_of(
    fn: ModelFunction,
    params: Params,
    sequences: Sequences,
    loss: TokenLoss,
    options: PassOptions,
    coordinates: Coordinates,
    **how: Any,
) -> dict[str, str]:
    """Return what a plan depends on, in words, {what: as it is}.

    Args:
        fn: The model.
        params: What is differentiated by.
        sequences: The batch.
        loss: The token loss.
        options: Of the pass.
        coordinates: The columns that are kept.
        **how: Other options.
    """
    others = {name: t for name, t in (fn.params | fn.frozen | fn.buffers).items() if name not in params}
    labels = options.labels
    return {
        "model": fn.name,
        **{f"parameter {name!r}": _kind(p) for name, p in params.items()},
        **{f"tensor {name!r}": _kind(t) for name, t in others.items()},
        **{
            f"batch {number}{path}": _kind(leaf)
            for number, part in enumerate(sequences.parts)
            for path, leaf in flattened(part.batch, lambda path, node: isinstance(node, Tensor))
        },
        "sequences": str([part.count for part in sequences.parts]),
        "loss": f"{loss.name}, shift {loss.shift}, {loss_id(loss)}",
        "device": str(next(iter(params.values())).device),
        "chunk_size": str(options.chunk_size),
        "memory_limit": str(options.memory_limit),
        "gram_dtype": dtype_name(options.gram_dtype),
        "blocks": "each parameter" if labels is None else f"{len({*labels.values()})}: {short_hash(dict(labels))}",
        "self_check": str(options.checked),
        "max_coordinates": short_hash([dict(coordinates.index)]) if coordinates.index else "none",
        **{name: str(value) for name, value in how.items()},
    }


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)} {dtype_name(value.dtype)}" if isinstance(value, Tensor) else type(value).__name__


def _most(tokens: Tokens) -> int:
    return int(torch.bincount(tokens.sequence).max())
