"""The sufficient statistic: one Gram K_p = G_p G_pᵀ per parameter tensor, and which token each row is.

Grams add over parameters, and every unit, selection and centring is algebra on them (gram.py), applied to all alike.
They are unnormalised: the spectral kernels divide by N. Axis order `(n, m)`, rows in the order of `tokens`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisherfunc.linalg import gram as algebra
from fisherfunc.linalg.gram import Gram
from fisherfunc.linalg.grams.tokens import Tokens, check_whole, summed_tokens
from fisherfunc.linalg.grams.which_fisher import EMPIRICAL, check_center, check_sums
from fisherfunc.linalg.grams.which_tokens import which_tokens
from fisherfunc.linalg.mapped import check_not_mapped
from fisherfunc.records.hashing import short_hash
from fisherfunc.records.plain import dtype_name
from fisherfunc.records.provenance import Provenance, Traced
from fisherfunc.records.record import record
from fisherfunc.records.sheet import Sheet, as_html, as_text, figure, number_of
from fisherfunc.records.storage import replacing
from fisherfunc.records.tensor_files import apart

FORMAT = "fisherfunc.token_grams.1"


@record(static=("num_params", "unit", "centered", "precision", "labels"), notes=("provenance",))
class TokenGrams(Mapping[str, Gram], Traced):
    """Unnormalised Grams of the gradients of N units, of T rows each: n = N T, and T = 1 as a rule.

    A mapping: `grams[name]` is the `Gram` of a parameter, with all that a kernel needs; `grams.summed(names)` that of
    several. The fields hold them by column.

    Attributes:
        grams: {name: (n, n)}: K_p for each parameter tensor p, or K_b for each label b.
        tokens: Which unit each row is.
        scale: The norm of K_p before a cancellation (centring, summing over tokens); empty where none was.
        num_params: {name: P_p}, for the names of `grams`.
        unit: What a row is: "token" or "sequence".
        centered: Whether the mean row was subtracted.
        precision: The coarsest dtype in which something of the gradients was computed.
        provenance: How they came about; `metadata` has it as plain Python values.
        labels: {parameter: the label that its Gram was added under}; None where each has a Gram of its own.
        errors: {name: an upper estimate of ‖K̂ − K‖ for K̂ as computed}, for the names of `grams`; None where it was not
            measured (see gradients/checks/round_off.py).

    Example:
        >>> import fisherfunc as ff
        >>> fn = ff.functionalize(torch.nn.Linear(2, 3))
        >>> batch = (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> grams = ff.token_grams(fn, fn.params, batch, ff.losses.classification())
        >>> list(grams), grams["bias"].num_units, ff.kernels.gram_eigh()(grams["bias"]).eigenvalues.shape
        (['weight', 'bias'], 5, torch.Size([3]))
    """

    grams: dict[str, Float[Tensor, "*stack n n"]]
    tokens: Tokens
    scale: dict[str, Float[Tensor, "*stack"]]
    num_params: Mapping[str, int]
    unit: str
    centered: bool
    precision: torch.dtype
    provenance: Provenance
    labels: Mapping[str, str] | None = None
    errors: Mapping[str, Float[Tensor, "*stack"]] | None = None

    __eq__ = object.__eq__  # as every record: not by content, as a mapping would
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> Gram:
        return Gram(
            matrix=self.grams[self._known([name])[0]],
            num_units=self.num_units,
            num_params=self.num_params[name],
            precision=self.precision,
            scale=self.scale.get(name),
            error=None if self.errors is None else self.errors[name],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.grams)

    def __len__(self) -> int:
        return len(self.grams)

    def __contains__(self, name: object) -> bool:
        return name in self.grams

    def __repr__(self) -> str:
        """Show it on one screen: a row per Gram."""
        return as_text(_sheet(self))

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        return as_html(_sheet(self))

    @property
    def num_rows(self) -> int:
        """The number of rows: N, or N T where each unit has T targets."""
        return self.tokens.sequence.shape[-1]

    @property
    def num_units(self) -> int:
        """N: the number of tokens or sequences, by which F divides."""
        return self.num_rows // self.tokens.num_targets

    @property
    def fisher(self) -> str:
        """Which Fisher the rows make: "empirical", "true (exact)" or "true (Monte-Carlo, …)"."""
        return self.provenance.fisher or EMPIRICAL

    @property
    def fingerprint(self) -> str | None:
        """Which tokens the rows are, in any order: a hash of the batch, and of the sequence and position of each.

        None where the provenance names no batch. A row of unit "sequence" is known by the tokens that it sums as well.
        """
        batch, summed = self.provenance.batch, self.provenance.summed_tokens
        known = which_tokens(self.tokens.sequence, self.tokens.position, num_units=self.num_units)
        return None if batch is None else short_hash([batch, summed, known])

    def summed(self, names: Iterable[str] | None = None) -> Gram:
        """Return the Gram of a block of parameters, K_b = Σ_{p∈b} K_p; of all of them where `names` is None.

        Raises:
            KeyError: If a name has no Gram.
            ValueError: If there are no names.
        """
        return algebra.summed(self[name] for name in self._known(names))

    def block(self, names: Iterable[str] | None = None) -> Float[Tensor, "*stack n n"]:
        """Return the matrix of `summed(names)`, in memory of its own.

        Raises:
            KeyError: If a name has no Gram.
            ValueError: If there are no names.
        """
        return self.summed(names).matrix

    def block_error(self, names: Iterable[str] | None = None) -> Float[Tensor, "*stack"] | None:
        """Return the error of a block's Gram, at most Σ_p error_p; None where it was not measured."""
        if self.errors is None:
            return None
        return torch.stack([self.errors[name] for name in self._known(names)]).sum(dim=0)  # no matrix is summed

    def center(self) -> "TokenGrams":
        """Subtract the mean row: H K H, the Gram behind the gradient covariance; nothing where that was done.

        Raises:
            ValueError: If targets are not the observed ones: the expected row is zero exactly then.
        """
        check_center(self.fisher)
        return self if self.centered else self._changed(algebra.centred, centered=True)

    def select(self, index: Tensor | Iterable[int]) -> "TokenGrams":
        """The Grams of chosen rows (an index, or a mask of all rows): a submatrix; N becomes the number of their units.

        Raises:
            ValueError: If no row is chosen, a mask has the wrong length, some rows of a token are chosen and others
                not, or the rows are centred (a selection has another mean).
            IndexError: If an index is out of range.
        """
        index = self._as_index(index)
        check_whole(self.tokens, index)
        return self._changed(lambda gram: algebra.selected(gram, index), tokens=self.tokens.select(index))

    def by_sequence(self) -> "TokenGrams":
        """Sum the rows of each sequence: M K Mᵀ. The unit becomes the sequence.

        Draw d of a sequence is the sum of the draws d of its tokens: they are independent, so that the expectation of
        its outer product is the sum of the true Fishers of its tokens.

        Raises:
            ValueError: If the rows are sequences already, or centred (sum first, then centre), or of all classes.
        """
        check_sums(self.fisher)
        check_not_mapped(
            "TokenGrams.by_sequence",
            [self.tokens.sequence],
            instead="sum before you stack, or use ff.gram.regrouped with the groups",
        )
        if self.unit != "token" or self.centered:
            raise ValueError(
                f"by_sequence expected uncentred rows of unit 'token', got unit={self.unit!r}, "
                f"centered={self.centered}; call by_sequence before center, once"
            )
        summed, group = summed_tokens(self.tokens)
        count = len(summed.sequence)
        return self._changed(
            lambda gram: algebra.regrouped(gram, group, count),
            tokens=summed,
            unit="sequence",
            provenance=replace(
                self.provenance,
                unit="sequence",
                num_summed_tokens=self.num_units,
                summed_tokens=which_tokens(self.tokens.sequence, self.tokens.position, num_units=self.num_units),
            ),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all. Tensors are stored as they are; no pickle.

        Raises:
            OSError: If the file cannot be written.
        """
        tensors = {f"gram/{name}": k for name, k in self.grams.items()}
        tensors |= {f"scale/{name}": s for name, s in self.scale.items()}
        tensors |= {f"tokens/{field}": column for field, column in self.tokens.columns.items()}
        header = {
            "num_targets": self.tokens.num_targets,
            "num_params": {name: self.num_params[name] for name in self.grams},
            "unit": self.unit,
            "centered": self.centered,
            "precision": dtype_name(self.precision),
            "metadata": self.metadata,
            "labels": None if self.labels is None else dict(self.labels),
            "errors": None if self.errors is None else {name: float(error) for name, error in self.errors.items()},
        }
        with replacing(path) as temporary:
            save_file(apart(tensors), temporary, metadata={"format": FORMAT, "header": json.dumps(header)})

    @staticmethod
    def load(path: str | os.PathLike[str], *, device: str = "cpu") -> "TokenGrams":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not one that `save` wrote, or is damaged.
        """
        try:
            with safe_open(path, framework="pt", device=device) as file:
                info = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}); save the Grams again") from error
        if info.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {info.get('format')!r}, expected {FORMAT!r}; "
                "TokenGrams.load reads what TokenGrams.save wrote"
            )
        header = json.loads(info["header"])
        columns = {key.removeprefix("tokens/"): t for key, t in tensors.items() if key.startswith("tokens/")}
        grams = {name: tensors[f"gram/{name}"] for name in header["num_params"]}
        errors = header.pop("errors", None)
        return TokenGrams(
            grams=grams,
            errors=None if errors is None else {name: grams[name].new_tensor(error) for name, error in errors.items()},
            scale={name: tensors[f"scale/{name}"] for name in header["num_params"] if f"scale/{name}" in tensors},
            tokens=Tokens(**columns, num_targets=header.pop("num_targets", 1)),
            precision=getattr(torch, header.pop("precision")),
            provenance=Provenance.from_dict(header.pop("metadata")),
            **header,
        )

    def _changed(self, change: Callable[[Gram], Gram], **others: Any) -> "TokenGrams":
        """The same change of every Gram, and of other fields."""
        found = {name: change(self[name]) for name in self}
        scales = {name: gram.scale for name, gram in found.items() if gram.scale is not None}
        errors = {name: gram.error for name, gram in found.items() if gram.error is not None}
        columns: dict[str, Any] = {"grams": {name: gram.matrix for name, gram in found.items()}, "scale": scales}
        return replace(self, **columns, errors=errors if self.errors is not None else None, **others)

    def _known(self, names: Iterable[str] | None) -> list[str]:
        chosen = list(self.grams if names is None else names)
        unknown = [name for name in chosen if name not in self.grams]
        if unknown:
            raise KeyError(f"no Gram for {unknown}; there are Grams for {list(self.grams)}")
        if not chosen:
            raise ValueError("a block needs at least one parameter name, got none")
        return chosen

    def _as_index(self, index: Tensor | Iterable[int]) -> Tensor:
        if self.centered:
            raise ValueError("select expected uncentred rows: a selection has another mean; select first, then center")
        index = torch.as_tensor(index if isinstance(index, Tensor) else list(index), device=self.tokens.sequence.device)
        if index.dtype == torch.bool:
            if index.shape != (self.num_rows,):
                raise ValueError(f"a mask must have shape ({self.num_rows},), got {tuple(index.shape)}")
            index = index.nonzero().squeeze(-1)
        if index.numel() == 0:
            raise ValueError(f"select chose no row of {self.num_rows}; a spectrum needs at least one")
        known = -self.num_rows <= int(index.min()) and int(index.max()) < self.num_rows
        if index.ndim != 1 or index.is_floating_point() or not known:
            raise IndexError(
                f"select expected a flat index of integers into {self.num_rows} rows, got {index.tolist()}"
            )
        return index


def _sheet(grams: TokenGrams) -> Sheet:
    """A row per Gram: its parameters, and tr K/N, which is its share of the trace of F."""
    rows = []
    for name, gram in grams.grams.items():
        trace = number_of(gram.trace()) if isinstance(gram, Tensor) and gram.ndim == 2 else None
        rows.append((name, figure(grams.num_params[name]), figure(trace and trace / grams.num_units)))
    size = sum(gram.numel() * gram.element_size() for gram in grams.grams.values() if isinstance(gram, Tensor))
    centered = ", centred" if grams.centered else ""
    return Sheet(
        title=f"{len(rows)} Grams of {grams.num_rows} rows, {grams.num_units} {grams.unit}s, {grams.fisher}{centered}",
        columns=("Gram", "P", "tr K/N"),
        rows=rows,
        notes=[
            f"K = G Gᵀ, not divided by N; {size / 1e6:.3g} MB; gradients in {dtype_name(grams.precision)}; "
            "ff.spectrum_of_grams(grams) has the spectra",
        ],
    )
