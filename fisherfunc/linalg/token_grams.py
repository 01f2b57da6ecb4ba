"""The sufficient statistic: one Gram K_p = G_p G_pᵀ per parameter tensor, and which token each row is.

Grams add over parameters, and every unit, selection and centring is algebra on them (gram.py). They are
unnormalised: the spectral kernels divide by N. Axis order `(n, m)`, rows in the order of `tokens`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisherfunc.linalg import gram as algebra
from fisherfunc.linalg.tokens import Tokens, check_whole, summed_tokens
from fisherfunc.linalg.which_fisher import EMPIRICAL, check_center, check_sums
from fisherfunc.linalg.which_tokens import which_tokens
from fisherfunc.records.dtypes import dtype_name
from fisherfunc.records.hashing import short_hash
from fisherfunc.records.record import record
from fisherfunc.records.sheet import Sheet, as_html, as_text, figure, number_of
from fisherfunc.records.storage import replacing
from fisherfunc.records.tensor_files import apart

FORMAT = "fisherfunc.token_grams.1"


@record(static=("num_params", "unit", "centered", "precision", "metadata", "labels", "errors"))
class TokenGrams:
    """Unnormalised Grams {name: (n, n)} of the gradients of N units, of T rows each: n = N T, and T = 1 as a rule.

    Attributes:
        grams: K_p for each parameter tensor p, or K_b for each label b.
        tokens: Which unit each row is.
        scale: The norm of K_p before a cancellation (centring, summing over tokens); empty where none was.
        num_params: {name: P_p}, for the names of `grams`.
        unit: What a row is: "token" or "sequence".
        centered: Whether the mean row was subtracted.
        precision: The coarsest dtype in which something of the gradients was computed.
        metadata: How they came about; plain Python values.
        labels: {parameter: the label that its Gram was added under}; None where each has a Gram of its own.
        errors: {name: an upper estimate of ‖K̂ − K‖ for K̂ as computed}, for the names of `grams`; None where it was not
            measured (see gradients/round_off.py).
    """

    grams: dict[str, Float[Tensor, "n n"]]
    tokens: Tokens
    scale: dict[str, Float[Tensor, ""]]
    num_params: Mapping[str, int]
    unit: str
    centered: bool
    precision: torch.dtype
    metadata: Mapping[str, Any]
    labels: Mapping[str, str] | None = None
    errors: Mapping[str, float] | None = None

    def __repr__(self) -> str:
        """Show it on one screen: a row per Gram."""
        return as_text(_sheet(self))

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        return as_html(_sheet(self))

    @property
    def num_rows(self) -> int:
        """The number of rows: N, or N T where each unit has T targets."""
        return self.tokens.sequence.shape[0]

    @property
    def num_units(self) -> int:
        """N: the number of tokens or sequences, by which F divides."""
        return self.num_rows // self.tokens.num_targets

    @property
    def fisher(self) -> str:
        """Which Fisher the rows make: "empirical", "true (exact)" or "true (Monte-Carlo, …)"."""
        return str(self.metadata.get("fisher", EMPIRICAL))

    @property
    def fingerprint(self) -> str | None:
        """Which tokens the rows are, in any order: a hash of the batch, and of the sequence and position of each.

        None where the metadata name no batch. A row of unit "sequence" is known by the tokens that it sums as well.
        """
        facts = self.metadata
        known = which_tokens(self.tokens.sequence, self.tokens.position, num_units=self.num_units)
        return short_hash([facts["batch"], facts.get("summed_tokens"), known]) if "batch" in facts else None

    def block(self, names: Iterable[str] | None = None) -> Float[Tensor, "n n"]:
        """K_b = Σ_{p∈b} K_p, the Gram of a block of parameters; of all of them where `names` is None.

        Raises:
            KeyError: If a name has no Gram.
            ValueError: If there are no names.
        """
        chosen = self._known(names)
        total = self.grams[chosen[0]].clone()
        for name in chosen[1:]:
            total += self.grams[name]
        return total

    def block_scale(self, names: Iterable[str] | None = None) -> Float[Tensor, ""] | None:
        """The scale of a block's round-off, Σ_p scale_p; None where nothing cancelled."""
        if not self.scale:
            return None
        return sum((self.scale[name] for name in self._known(names)), start=torch.tensor(0.0, device="cpu"))

    def block_error(self, names: Iterable[str] | None = None) -> float | None:
        """The error of a block's Gram, at most Σ_p error_p; None where it was not measured."""
        return None if self.errors is None else sum(self.errors[name] for name in self._known(names))

    def center(self) -> "TokenGrams":
        """Subtract the mean row: H K H, the Gram behind the gradient covariance.

        Raises:
            ValueError: If targets are not the observed ones: the expected row is zero exactly then.
        """
        check_center(self.fisher)
        return replace(
            self,
            grams={name: algebra.centred(k) for name, k in self.grams.items()},
            scale=self.scale or {name: torch.linalg.matrix_norm(k) for name, k in self.grams.items()},
            centered=True,
        )

    def select(self, index: Tensor | Iterable[int]) -> "TokenGrams":
        """The Grams of chosen rows (an index, or a mask of all rows): a submatrix; N becomes the number of their units.

        Raises:
            ValueError: If no row is chosen, a mask has the wrong length, some rows of a token are chosen and others
                not, or the rows are centred (a selection has another mean).
            IndexError: If an index is out of range.
        """
        index = self._as_index(index)
        check_whole(self.tokens, index)
        return replace(
            self,
            grams={name: algebra.selected(k, index) for name, k in self.grams.items()},
            tokens=self.tokens.select(index),
        )

    def by_sequence(self) -> "TokenGrams":
        """Sum the rows of each sequence: M K Mᵀ. The unit becomes the sequence.

        Draw d of a sequence is the sum of the draws d of its tokens: they are independent, so that the expectation of
        its outer product is the sum of the true Fishers of its tokens.

        Raises:
            ValueError: If the rows are sequences already, or centred (sum first, then centre), or of all classes.
        """
        check_sums(self.fisher)
        if self.unit != "token" or self.centered:
            raise ValueError(
                f"by_sequence expected uncentred rows of unit 'token', got unit={self.unit!r}, "
                f"centered={self.centered}; call by_sequence before center, once"
            )
        summed, group = summed_tokens(self.tokens)
        count = len(summed.sequence)
        longest = torch.bincount(group).max()  # ‖M K Mᵀ‖ is at most so many times ‖K‖
        errors = self.errors and {name: int(longest) * error for name, error in self.errors.items()}
        return replace(
            self,
            grams={name: algebra.regrouped(k, group, count) for name, k in self.grams.items()},
            scale={name: longest * torch.linalg.matrix_norm(k) for name, k in self.grams.items()},
            errors=errors,
            tokens=summed,
            unit="sequence",
            metadata={
                **self.metadata,
                "num_summed_tokens": self.num_units,
                "summed_tokens": which_tokens(self.tokens.sequence, self.tokens.position, num_units=self.num_units),
            },
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
            "metadata": dict(self.metadata),
            "labels": None if self.labels is None else dict(self.labels),
            "errors": None if self.errors is None else dict(self.errors),
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
        return TokenGrams(
            grams={name: tensors[f"gram/{name}"] for name in header["num_params"]},
            scale={name: tensors[f"scale/{name}"] for name in header["num_params"] if f"scale/{name}" in tensors},
            tokens=Tokens(**columns, num_targets=header.pop("num_targets", 1)),
            precision=getattr(torch, header.pop("precision")),
            **header,
        )

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
