"""How the blocks of F hang together: the sizes of all its blocks F_ab, from the blocks' Grams alone.

F_ab = (1/N) G_aᵀ G_b is P_a × P_b and never formed, as ‖F_ab‖_F² = ⟨K_a, K_b⟩/N². Axis order: blocks `(b, c)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from fisherfunc.linalg.grams.divided import rows_here, total
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.statistics.block_grams import BlockRule, gathered

TILE = 256
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class BlockCoupling:
    """The squared Frobenius norms of the blocks of F.

    Attributes:
        labels: Of the blocks, in the order of the rows and columns.
        squared_norms: ‖F_ab‖_F².
        centered: Whether the rows are less their mean: then F is the gradient covariance.
    """

    labels: tuple[str, ...]
    squared_norms: Matrix
    centered: bool

    @property
    def alignment(self) -> Matrix:
        """‖F_ab‖_F²/(‖F_aa‖_F ‖F_bb‖_F), from 0 to 1: the kernel alignment of K_a and K_b; of a zero block, 0.

        Where `centered`, it is the linear CKA of the blocks' gradients.
        Source: Cristianini et al., "On kernel-target alignment", NeurIPS 2001; Kornblith et al., "Similarity of neural
        network representations revisited", ICML 2019.
        """
        own = [sqrt(row[index]) for index, row in enumerate(self.squared_norms)]
        return tuple(
            tuple(value / (a * b) if a * b > 0 else 0.0 for value, b in zip(row, own, strict=True))
            for row, a in zip(self.squared_norms, own, strict=True)
        )

    @property
    def block_diagonal_error(self) -> float:
        """‖F − F_bd‖_F/‖F‖_F, F_bd being F with zeros for the blocks off the diagonal; 0 for a zero F."""
        total = sum(map(sum, self.squared_norms))
        off = sum(v for a, row in enumerate(self.squared_norms) for b, v in enumerate(row) if a != b)
        return sqrt(off / total) if total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON, with the alignment and the error of the block-diagonal matrix."""
        own = {name: _listed(value) for name, value in asdict(self).items()}
        derived = {"alignment": _listed(self.alignment), "block_diagonal_error": self.block_diagonal_error}
        return own | derived

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "BlockCoupling":
        """What `to_dict` was called on."""
        return BlockCoupling(
            labels=tuple(content["labels"]),
            squared_norms=tuple(tuple(row) for row in content["squared_norms"]),
            centered=content["centered"],
        )


def block_coupling(grams: TokenGrams, *, blocks: BlockRule = None, center: bool = False) -> BlockCoupling:
    """‖F_ab‖_F² = ⟨K_a, K_b⟩/N² for all pairs of blocks. Exact. Cost N² B² operations.

    Args:
        grams: The Grams of a pass.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by, or `by_layer`.
        center: Whether to subtract the mean row first; rows that are centred already stay so.

    Example:
        >>> import fisherfunc as ff
        >>> fn = ff.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)))
        >>> batch = (torch.randn(30, 4), torch.arange(30) % 3)
        >>> found = block_coupling(ff.token_grams(fn, fn.params, batch, ff.losses.classification()))
        >>> found.labels, 0 < found.block_diagonal_error < 1
        (('layer.0', 'layer.1'), True)
    """
    grams = grams.center() if center else grams
    labels = gathered(grams, blocks)
    first = next(iter(grams.grams.values()))
    products = torch.zeros(len(labels), len(labels), dtype=torch.float64, device=first.device)
    for start in range(0, len(rows_here(first)[0]), TILE):  # no second copy of all Grams
        tile = torch.stack([_rows(grams, names, slice(start, start + TILE)) for names in labels.values()])
        products += einsum(tile, tile, "b n m, c n m -> b c")
    squares = (total(first, products).cpu() / grams.num_units**2).clamp(min=0)  # not negative but for round-off
    return BlockCoupling(
        labels=tuple(labels), squared_norms=tuple(map(tuple, squares.tolist())), centered=grams.centered
    )


def block_diagonal_error(grams: TokenGrams, *, blocks: BlockRule = None) -> float:
    """‖F − F_bd‖_F/‖F‖_F: what the block-diagonal approximation leaves out. Exact; cost that of `block_coupling`.

    Args:
        grams: The Grams of a pass.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by, or `by_layer`.
    """
    return block_coupling(grams, blocks=blocks).block_diagonal_error


def _rows(grams: TokenGrams, names: Sequence[str], rows: slice) -> Tensor:
    """Some of the rows of K_b that lie here."""
    return torch.stack([rows_here(grams.grams[name])[1][rows].double() for name in names]).sum(dim=0)


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, tuple) else value
