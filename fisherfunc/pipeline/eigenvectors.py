"""`fisher_eigenvectors`: a model and a batch in, the leading directions of its empirical Fisher out.

Of a block, only its own parameters are passed over. Axis order: vectors {name: (k, *shape)}.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.directions import Eigenpairs, Eigenvectors, eigenpairs, eigenvectors
from fisherfunc.gradients.directions.matching import names_of_block, restricted
from fisherfunc.gradients.grams import token_grams
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.models.functionalize import Selection, functionalize
from fisherfunc.partitioning import by_layer, whole
from fisherfunc.pipeline.fisher import token_loss
from fisherfunc.pipeline.inputs import inputs_of
from fisherfunc.records.axes import Batch
from fisherfunc.runtime.precision import full_precision

Loss = TokenLoss | Callable[[Any, Batch], Tensor] | None


@full_precision()
@torch.inference_mode(mode=False)
def fisher_eigenvectors(
    model: nn.Module,
    batch: Batch,
    *,
    num: int = 1,
    block: str | None = None,
    blocks: Callable[[str], str] = by_layer,
    loss: Loss = None,
    parameters: Selection = "trainable",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Eigenvectors:
    """The leading eigenvectors of F, or of one of its blocks, in parameter space (see `ff.directions.eigenvectors`).

    Cost: that of the Grams of the block, of an eigensolve, and of a few passes a vector.

    Args:
        model: Any module; it is left as it was. Evaluated in evaluation mode.
        batch: Keyword arguments of the model with `labels`, or a tuple (*inputs, targets), or a list of these, or a
            DataLoader that does not shuffle, a Hugging Face data set, or any iterable of batches that begins anew each
            time. Lists and arrays with an entry a sequence are divided as tensors are, packed rows into documents.
        num: How many vectors.
        block: The label of a block; the full matrix where None.
        blocks: Parameter name → block label.
        loss: A token loss, or a function (output, batch) → losses not reduced over tokens; inferred where None.
        parameters: "trainable", "all", names or glob patterns, or a predicate (see `functionalize`).
        dtype: What the passes run in; that of the model where None.
        device: Where they run; where the model lies if None.
        **options: `center`, or of `token_grams`: `unit`, `num_tokens`, `seed`, `memory_limit`, `progress` ….

    Raises:
        ValueError: If there is no such block, fewer eigenvalues are above the resolution, or an option or the batch is
            unusable; it says what and where.

    Example:
        >>> found = fisher_eigenvectors(nn.Linear(2, 3), (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])))
        >>> {name: tuple(vectors.shape) for name, vectors in found.vectors.items()}
        {'weight': (1, 3, 2), 'bias': (1, 3)}
    """
    fn = functionalize(model, parameters=parameters).to(dtype=dtype, device=device)
    batch = _inputs(fn, model, batch, loss, options)
    own = _passed(fn, batch, token_loss(loss, model, batch), block, blocks, **options)
    return eigenvectors(fn, own.params, own.batch, own.loss, own.grams, num=num, block=block, blocks=blocks)


@full_precision()
@torch.inference_mode(mode=False)
def fisher_eigenpairs(
    model: nn.Module,
    batch: Batch,
    *,
    num: int = 1,
    block: str | None = None,
    blocks: Callable[[str], str] = by_layer,
    loss: Loss = None,
    **options: Any,
) -> Eigenpairs:
    """The same without the vectors: eigenvalues, and what each token contributes. No pass beyond that of the Grams.

    Args:
        model: Any module; it is left as it was.
        batch: See `fisher_eigenvectors`.
        num: How many.
        block: The label of a block; the full matrix where None.
        blocks: Parameter name → block label.
        loss: The loss; inferred where None.
        **options: `center`, or of `token_grams`.

    Raises:
        ValueError: As `fisher_eigenvectors`.
    """
    fn = functionalize(model)
    batch = _inputs(fn, model, batch, loss, options)
    own = _passed(fn, batch, token_loss(loss, model, batch), block, blocks, **options)
    return eigenpairs(own.grams, num=num, block=block, blocks=blocks)


def _inputs(fn: ModelFunction, model: nn.Module, batch: Batch, loss: Loss, options: Mapping[str, Any]) -> Batch:
    return inputs_of(fn, batch, options.get("num_tokens"), lambda first: token_loss(loss, model, first)).batches


@dataclass(frozen=True, kw_only=True)
class _Passed:
    params: dict[str, Tensor]
    batch: Batch
    loss: TokenLoss
    grams: TokenGrams


def _passed(
    fn: ModelFunction,
    batch: Batch,
    loss: TokenLoss,
    block: str | None,
    blocks: Callable[[str], str],
    *,
    center: bool = False,
    **options: Any,
) -> _Passed:
    """One Gram: of a block, or of all parameters."""
    params = restricted(fn.params, names_of_block(fn.params, block, blocks))
    grams = token_grams(fn, params, batch, loss, blocks=whole if block is None else blocks, **options)
    return _Passed(params=params, batch=batch, loss=loss, grams=grams.center() if center else grams)
