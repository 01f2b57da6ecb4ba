"""A Gram too large for the memory, in a file: its lower triangle by tiles of rows, and products that stream over them.

A tile holds K[start:stop, :stop], so that each number off the diagonal blocks is stored once and used twice,

    (K u)[start:stop] += tile u[:stop],      (K u)[:start] += tile[:, :start]ᵀ u[start:stop].

In float32 the file has 2 N² bytes, 3.2 GB for 40,000 rows, and each number is off by at most 2⁻²⁴ of itself or 2⁻¹⁵⁰,
so that by Weyl no eigenvalue is off by more than 2⁻²⁴ ‖K‖_F + 2⁻¹⁵⁰ n, which certificates have added to them. Trace and
Frobenius norm are those of the numbers before they were rounded. Each tile has a checksum, which is compared when it is
read. Axis order: rows n, vectors k.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.krylov.token_operator import TokenOperator
from fisherfunc.records.plain import dtype_name
from fisherfunc.records.storage import read_pieces, write_pieces
from fisherfunc.records.tensor_files import DamagedError, bytes_of, read_tensors, write_tensors

ENTRIES = 2**24
"""Of a tile: 134 MB in float64, in which it is multiplied."""
TILE = 1024
"""The most rows of a tile."""

Rows = Callable[[int, int], Float[Tensor, "_m _n"]]
"""(start, stop) → K[start:stop, :stop]."""


@dataclass(frozen=True, kw_only=True)
class StoredGram:
    """A Gram in a file, made by `stored_gram` or opened by `load`.

    Attributes:
        path: The file of its tiles; a file of plain values lies beside it, and is written last.
        num_rows: n.
        num_tokens: N, what K is divided by.
        num_params: P, where it is known.
        dtype: What numbers are stored in.
        tile: How many rows a tile has.
        trace: tr K.
        squared_norm: ‖K‖_F².
        checksums: Of each tile.
    """

    path: Path
    num_rows: int
    num_tokens: int
    num_params: int | None
    dtype: torch.dtype
    tile: int
    trace: float
    squared_norm: float
    checksums: tuple[int, ...]

    def matmul(self, vectors: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return K times some vectors in float64, on the CPU; the file is read once. Cost 2 N² k operations.

        Raises:
            DamagedError: If the file is not what was written.
        """
        vectors = vectors.to("cpu", torch.float64)
        found = torch.zeros_like(vectors, dtype=torch.float64)
        for start, stop, tile in self.tiles():
            whole = tile.double()
            found[start:stop] += whole @ vectors[:stop]
            found[:start] += whole[:, :start].mT @ vectors[start:stop]
        return found

    def tiles(self) -> Iterator[tuple[int, int, Float[Tensor, "_m _n"]]]:
        """Yield start, stop and K[start:stop, :stop]; a tile is overwritten by the next.

        Raises:
            DamagedError: If the file is not what was written.
        """
        bounds = list(_bounds(self.num_rows, self.tile))
        room = torch.empty(max((stop - start) * stop for start, stop in bounds), dtype=self.dtype, device="cpu")
        tiles = [room[: (stop - start) * stop] for start, stop in bounds]
        full = read_pieces(self.path, map(bytes_of, tiles))
        damaged = DamagedError(f"{self.path} is not the file that was written; write it again by stored_gram")
        for (start, stop), tile, checksum in zip(bounds, tiles, self.checksums, strict=True):
            try:
                next(full)
            except EOFError as error:
                raise damaged from error
            if zlib.crc32(bytes_of(tile)) != checksum:
                raise damaged
            yield start, stop, tile.view(stop - start, stop)

    def operator(self, reference: TokenOperator | None = None) -> TokenOperator:
        """Return the operator of it, for `ff.kernels.lanczos` and `lanczos_quadrature`.

        Args:
            reference: `ff.operators.fisher` of the same tokens: then bounds hold for F by its most precise products,
                one of which measures what the numbers in the file are off by; else for the matrix that was given.

        Raises:
            ValueError: If that has other rows, or another number of tokens.
        """

        def block_product(vectors: Tensor) -> Tensor:
            return self.matmul(vectors) / self.num_tokens

        def product(u: Tensor) -> Tensor:
            return block_product(u[:, None])[:, 0]

        exact = product
        if reference is not None:
            mine, other = (self.num_rows, self.num_tokens), (reference.num_rows, reference.num_tokens)
            if mine != other:
                raise ValueError(
                    f"reference expected an operator of {mine[0]} rows and {mine[1]} tokens, as the file has, got "
                    f"{other[0]} and {other[1]}; give ff.operators.fisher the same batches and options"
                )
            most_precise, device = reference.reference_product or reference.token_product, reference.device

            def exact(u: Tensor) -> Tensor:
                return most_precise(u.to(device)).cpu()

        return TokenOperator(
            token_product=product,
            reference_product=exact,
            num_rows=self.num_rows,
            num_tokens=self.num_tokens,
            num_params=self.num_params,
            device=torch.device("cpu"),
            trace=self.trace / self.num_tokens,
            squared_norm=self.squared_norm / self.num_tokens**2,
            inexact=_rounding(self.dtype, self.squared_norm**0.5, self.num_rows) / self.num_tokens,
            name=f"Gram in {self.path.name}",
            block_product=block_product,
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "StoredGram":
        """Open a Gram that `stored_gram` has written.

        Raises:
            FileNotFoundError: If there is none, or it was not finished.
            DamagedError: If its file has another size than it was written with.
        """
        file = Path(path)
        if not (file.exists() and _beside(file).exists()):
            raise FileNotFoundError(f"{file}, or the file beside it, is missing: write it by stored_gram")
        _, facts = read_tensors(_beside(file))
        own = {"dtype": getattr(torch, facts["dtype"]), "checksums": tuple(facts["checksums"])}
        found = StoredGram(path=file, **{**facts, **own})
        expected = sum((stop - start) * stop for start, stop in _bounds(found.num_rows, found.tile))
        size, expected = file.stat().st_size, expected * found.dtype.itemsize
        if size != expected:
            raise DamagedError(f"{file} has {size} bytes, expected {expected}; write it again by stored_gram")
        return found


def stored_gram(
    path: str | os.PathLike[str],
    rows: Rows,
    *,
    num_rows: int,
    num_tokens: int | None = None,
    num_params: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> StoredGram:
    """Write a Gram to a file, by tiles of rows, of which one is in memory at a time.

    Args:
        path: The file, of 2 N² bytes in float32; it is overwritten.
        rows: (start, stop) → K[start:stop, :stop], unnormalised, called from the first rows to the last.
        num_rows: n.
        num_tokens: N, what K is divided by; the number of rows where None.
        num_params: P, where it is known.
        dtype: What numbers are stored in, float32 or float64.

    Raises:
        ValueError: If a tile has another shape, or holds a number that is not finite in this dtype.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> factors = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gram = stored_gram(Path(folder, "gram"), lambda a, b: factors[a:b] @ factors[:b].mT, num_rows=3)
        ...     gram.trace, gram.matmul(torch.ones(3, 1, dtype=torch.float64)).flatten().tolist()
        (7.0, [6.0, 2.0, 5.0])
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype expected torch.float32 or torch.float64, got {dtype}")
    for name, count in (("num_rows", num_rows), ("num_tokens", num_rows if num_tokens is None else num_tokens)):
        if count < 1:
            raise ValueError(f"{name} expected at least 1, got {name}={count}")
    file = Path(path)
    tile_rows = max(1, min(TILE, ENTRIES // num_rows))
    trace = squared_norm = 0.0
    checksums: list[int] = []

    def pieces() -> Iterator[memoryview]:
        nonlocal trace, squared_norm
        for start, stop in _bounds(num_rows, tile_rows):
            tile = rows(start, stop).to("cpu", torch.float64)
            rounded = tile.to(dtype)
            if tile.shape != (stop - start, stop) or not bool(rounded.isfinite().all()):
                raise ValueError(
                    f"rows({start}, {stop}) expected finite numbers of shape {(stop - start, stop)}, got shape "
                    f"{tuple(tile.shape)}; give K[start:stop, :stop], in {dtype_name(dtype)} without overflow"
                )
            trace += float(tile[:, start:].diagonal().sum())
            squared_norm += float(tile[:, start:].square().sum() + 2 * tile[:, :start].square().sum())
            checksums.append(zlib.crc32(bytes_of(rounded)))
            yield bytes_of(rounded)

    _beside(file).unlink(missing_ok=True)
    write_pieces(file, pieces())
    facts: dict[str, Any] = {
        "num_rows": num_rows,
        "num_tokens": num_rows if num_tokens is None else num_tokens,
        "num_params": num_params,
        "dtype": dtype_name(dtype),
        "tile": tile_rows,
        "trace": trace,
        "squared_norm": squared_norm,
        "checksums": checksums,
    }
    write_tensors(_beside(file), {}, facts)
    return StoredGram.load(file)


def _rounding(dtype: torch.dtype, norm: float, num_rows: int) -> float:
    """How far the stored matrix may be from K: each number by half a unit in its last place, and of the smallest."""
    if dtype == torch.float64:
        return 0.0
    finfo = torch.finfo(dtype)
    return finfo.eps / 2 * norm + num_rows * finfo.tiny * finfo.eps / 2


def _bounds(num_rows: int, tile: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + tile, num_rows)) for start in range(0, num_rows, tile))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.safetensors")
