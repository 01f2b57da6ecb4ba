"""What can be seen of a model's arithmetic in a forward pass: its coarsest dtype, and whether it draws at random.

And that arithmetic in float64, whatever a model casts on its way.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, kw_only=True)
class Nature:
    """What a forward pass showed.

    Attributes:
        precision: The coarsest floating-point dtype that something was computed in, also where weights are finer.
        draws: Whether random numbers were drawn: what a sample draws then depends on those that run beside it.
        saved_bytes: What it saves for its backward pass, of the largest sequence.
    """

    precision: torch.dtype
    draws: bool = False
    saved_bytes: int = 0


class Observed(TorchDispatchMode):
    """See every operation inside the context.

    Args:
        precision: That of the parameters.
    """

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self._precision, self._draws = precision, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and look at what it is and returns."""
        result = func(*args, **(kwargs or {}))
        self._draws = self._draws or torch.Tag.nondeterministic_seeded in func.tags
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != self._precision:
                self._precision = coarsest(leaf.dtype, self._precision)
        return result

    @property
    def nature(self) -> Nature:
        """What was seen."""
        return Nature(precision=self._precision, draws=self._draws)


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The floating-point dtype of the largest eps."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


class InFloat64(TorchDispatchMode):
    """Run everything inside in float64, also what a model casts to a coarser dtype on its way, as norms and softmax do.

    Attributes:
        rounded: Whether something was rounded all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` with float64 for each coarser dtype that it is given."""
        if func is torch.ops.aten.view.dtype:  # reads bits: another dtype is another number
            return func(*args, **(kwargs or {}))
        args = tuple(map(_widest, args))
        kwargs = {name: _widest(value) for name, value in (kwargs or {}).items()}
        result = func(*args, **kwargs)
        if not self.rounded and any(map(_is_coarse, pytree.tree_leaves(result))):
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.rounded = any(leaf.dtype == torch.float64 for leaf in given)
        return result


def _widest(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def _is_coarse(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
