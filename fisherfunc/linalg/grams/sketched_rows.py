"""Projected rows of the gradient matrix, in memory or in a folder of files, and the Grams that they make.

With A and B two independent projections of all gradients, E AAᵀ = E BBᵀ = K, so that ½(AAᵀ + BBᵀ) stands for K, and

    E tr AAᵀ BBᵀ = ‖K‖²,      E tr AAᵀ · tr BBᵀ = (tr K)²,

which the square of one of them is not: its expectation is larger by its own variance. What is computed from A and from
B differs by the error of the sketch. Axis order: two projections, n rows, k columns.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fisherfunc.linalg.grams.sketches import Kronecker
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.grams.tokens import Tokens
from fisherfunc.records.plain import dtype_name
from fisherfunc.records.provenance import Provenance, Traced
from fisherfunc.records.record import record
from fisherfunc.records.tensor_files import DamagedError, write_tensors

TILE = 1024
"""Rows whose products with all others are held at a time."""
_PATTERN = "rows-*.safetensors"


@record(static=("num_params", "unit", "sketch", "precision"), notes=("provenance",))
class SketchedRows(Traced):
    """Two independent projections of the gradient of each unit.

    Attributes:
        shards: Rows that follow each other, `{name: (2, n, k)}` each: one shard, or one a file.
        tokens: Which unit each row is, over all shards.
        num_params: {name: P_p}.
        unit: What a row is: "token" or "sequence".
        sketch: Which projections.
        precision: The coarsest dtype in which something of the gradients was computed.
        provenance: How they came about; `metadata` has it as plain Python values.
    """

    shards: tuple[dict[str, Float[Tensor, "2 _n _k"]], ...]
    tokens: Tokens
    num_params: Mapping[str, int]
    unit: str
    sketch: Kronecker
    precision: torch.dtype
    provenance: Provenance

    @property
    def num_rows(self) -> int:
        """N, or N T where each unit has T targets."""
        return len(self.tokens.sequence)

    @property
    def num_units(self) -> int:
        """N."""
        return self.num_rows // self.tokens.num_targets

    @property
    def rows(self) -> dict[str, Float[Tensor, "2 n _k"]]:
        """The rows of all shards, in memory: {name: (2, N, k)}."""
        return {name: torch.cat([shard[name] for shard in self.shards], dim=1) for name in self.num_params}

    def grams(self) -> TokenGrams:
        """Return ½(AAᵀ + BBᵀ) of each tensor, which goes wherever exact Grams do, marked as an approximation."""
        return self._grams(0, 1)

    def half(self, number: int) -> TokenGrams:
        """Return the Grams of one of the two projections alone.

        Args:
            number: 0 or 1.
        """
        return self._grams(number)

    def squared_norm(self, names: Iterable[str] | None = None) -> float:
        """Return an unbiased estimate of ‖F‖_F² of a block, tr AAᵀBBᵀ/N²; of all parameters where `names` is None.

        No N × N matrix is held. Cost: 4 N² Σ k operations.
        """
        chosen = list(self.num_params if names is None else names)
        total = 0.0
        for some in self._tiles():
            for other in self.shards:
                one, two = reduce(add, (some[name].double() @ other[name].double().mT for name in chosen))
                total += float((one * two).sum())
        return total / self.num_units**2

    def participation_ratio(self, names: Iterable[str] | None = None) -> float:
        """Return (tr F)²/‖F‖_F², numerator and denominator unbiased for these tokens."""
        chosen = list(self.num_params if names is None else names)
        traces = torch.stack(
            [shard[name].double().square().sum(dim=(1, 2)) for shard in self.shards for name in chosen]
        ).sum(dim=0)
        return float(traces.prod()) / self.num_units**2 / self.squared_norm(chosen)

    def append(self, folder: str | os.PathLike[str]) -> Path:
        """Write the rows as one more file of a folder, whole or not at all; `load` joins them.

        Args:
            folder: A folder, made where there is none, for rows of one model, loss, unit and sketch.

        Raises:
            ValueError: If the folder holds rows of something else, or of this very batch.
            OSError: If it cannot be written.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        files = sorted(place.glob(_PATTERN))
        headers = [_opened(file)[1] for file in files]
        header = {
            "sketch": [self.sketch.rank, self.sketch.seed],
            "num_params": dict(self.num_params),
            "unit": self.unit,
            "num_targets": self.tokens.num_targets,
            "precision": dtype_name(self.precision),
            "metadata": self.metadata,
        }
        _check_together([*headers, header], place)
        path = place / f"rows-{1 + int(files[-1].stem.split('-')[1]) if files else 0:06d}.safetensors"
        tensors = {f"rows/{name}": both for name, both in self.rows.items()}
        write_tensors(path, tensors | {f"tokens/{name}": c for name, c in self.tokens.columns.items()}, header)
        return path

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "SketchedRows":
        """Return the rows of a folder, mapped into memory: only what is computed with is read.

        Sequences are numbered on from file to file, in the order in which they were appended.

        Raises:
            FileNotFoundError: If there are none.
            ValueError: If a file is damaged, or files do not belong together.
        """
        files = sorted(Path(folder).glob(_PATTERN))
        if not files:
            raise FileNotFoundError(f"no projected rows in {folder}; give a folder that SketchedRows.append wrote")
        opened = [_opened(file) for file in files]
        first = opened[0][1]
        _check_together([header for _, header in opened], Path(folder))
        columns: list[dict[str, Tensor]] = []
        before = 0
        for tensors, _ in opened:
            mine = {key.removeprefix("tokens/"): t for key, t in tensors.items() if key.startswith("tokens/")}
            columns.append({**mine, "sequence": mine["sequence"] + before})
            before += int(mine["sequence"].max()) + 1
        joined = {name: torch.cat([some[name] for some in columns]) for name in columns[0]}
        each = [Provenance.from_dict(header["metadata"]) for _, header in opened]
        provenance = replace(each[0], data=None)
        if len(opened) > 1:
            batches, counts = [one.batch for one in each], [one.num_valid_tokens or 0 for one in each]
            provenance = replace(provenance, batch=batches, num_valid_tokens=sum(counts))
        return SketchedRows(
            shards=tuple({name: tensors[f"rows/{name}"] for name in first["num_params"]} for tensors, _ in opened),
            tokens=Tokens(**joined, num_targets=first["num_targets"]),
            num_params=first["num_params"],
            unit=first["unit"],
            sketch=Kronecker(rank=first["sketch"][0], seed=first["sketch"][1]),
            precision=getattr(torch, first["precision"]),
            provenance=provenance,
        )

    def _tiles(self) -> Iterator[Mapping[str, Tensor]]:
        for shard in self.shards:
            for first in range(0, next(iter(shard.values())).shape[1], TILE):
                yield {name: both[:, first : first + TILE] for name, both in shard.items()}

    def _grams(self, *halves: int) -> TokenGrams:
        found = {name: self._gram(name, halves) for name in self.num_params}
        projected = sorted(set(self.num_params) - set(self.provenance.exact_parameters or ()))
        which = "two Kronecker sketches" if len(halves) > 1 else "a Kronecker sketch"
        told = f"gradients projected by {which} of rank {self.sketch.rank}, seed {self.sketch.seed}"
        return TokenGrams(
            grams=found,
            tokens=self.tokens,
            scale={},
            num_params=dict(self.num_params),
            unit=self.unit,
            centered=False,
            precision=self.precision,
            provenance=replace(
                self.provenance,
                accumulated="by parameter",
                approximations=[told] if projected else [],
                sampled_parameters=projected,
            ),
        )

    def _gram(self, name: str, halves: Sequence[int]) -> Tensor:
        def block(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
            products = [one[name][half].double() @ other[name][half].double().mT for half in halves]
            return torch.stack(products).mean(dim=0)

        return torch.cat([torch.cat([block(one, other) for other in self.shards], dim=1) for one in self.shards])


def _opened(file: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file, mapped, and its header."""
    try:
        with safe_open(file, framework="pt") as held:
            header = json.loads((held.metadata() or {})["header"])
            return {name: held.get_tensor(name) for name in held.keys()}, header  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError) as error:
        raise DamagedError(f"{file} is damaged, or none that SketchedRows.append wrote ({error})") from error


def _check_together(headers: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Raise where rows are of different things, or the same ones twice."""
    first, each = headers[0], [Provenance.from_dict(header["metadata"]) for header in headers]
    for number, header in enumerate(headers[1:], start=1):
        for key in ("sketch", "num_params", "unit", "num_targets", "precision"):
            if header[key] != first[key]:
                raise ValueError(
                    f"the rows in {folder} are of {key} {first[key]}, and number {number} of {header[key]}; give a "
                    "folder of its own"
                )
        here = _alike(each[number])
        for name, value in _alike(each[0]).items():
            if here[name] != value:
                raise ValueError(
                    f"the rows in {folder} are of {name} {value!r}, and number {number} of {here[name]!r}; give a "
                    "folder of its own"
                )
        earlier = [one.batch for one in each[:number]]
        if each[number].batch in earlier:
            raise ValueError(
                f"the batch of number {number} is in {folder} already, as number {earlier.index(each[number].batch)}; "
                "no token counts twice"
            )


def _alike(one: Provenance) -> dict[str, str | None]:
    """What has to agree for rows to belong together."""
    return {
        "loss": one.loss,
        "what the loss computes": one.loss_id,
        "Fisher": one.fisher,
        "targets": one.targets,
        "parameters": one.parameters,
        "dtype": one.dtype,
    }


def error_lines(sketch: Mapping[str, Any] | None) -> list[str]:
    """Return the lines that have the error of a sketch beside the metrics of each matrix; none where there was none.

    Example:
        >>> errors = {"largest": 0.25, "second": 0.1, "effective_rank": None, "trace": 0.5}
        >>> error_lines({"errors": {"per_block": {"head": errors}, "global": errors, "full": errors}})[0]
        '± of the sketch alone, head: λ_max 0.25, λ_2 0.1, eff. rank –, trace 0.5'
    """
    if not sketch:
        return []
    errors = sketch["errors"]
    named = {**errors["per_block"], "block-diagonal": errors["global"], "full matrix": errors["full"]}
    shown = {"largest": "λ_max", "second": "λ_2", "effective_rank": "eff. rank", "trace": "trace"}

    def told(of: Mapping[str, float | None]) -> str:
        values = {name: of.get(key) for key, name in shown.items()}
        return ", ".join(f"{name} {'–' if value is None else f'{value:.2g}'}" for name, value in values.items())

    return [f"± of the sketch alone, {label}: {told(of)}" for label, of in named.items()]
