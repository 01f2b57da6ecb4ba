"""Result files, `spectrum.json` and `eigenvalues.csv`, and back. Files are written all or none, whole.

`spectrum.json` is `FisherSpectrum.to_dict()` with a format mark and the eigenvalues, every float in the
shortest form that reads back as the same float; it is strict JSON, without NaN or Infinity. `eigenvalues.csv`
has the columns block, index, eigenvalue: first the blocks, then `block_diagonal` and `full`, each from the
largest down.
"""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.result import FisherSpectrum, apart_from
from fisherfunc.population.summary import PopulationSummary
from fisherfunc.records.plain import dtype_name
from fisherfunc.records.provenance import Provenance
from fisherfunc.records.storage import replacing
from fisherfunc.statistics.coupling import BlockCoupling
from fisherfunc.statistics.resampling.interval import Intervals

FORMAT = "fisherfunc.spectrum.1"
LEADING_FORMAT = "fisherfunc.leading.1"
"""Of results by Lanczos (leading.py), which hold no whole spectrum."""
JSON_NAME = "spectrum.json"
CSV_NAME = "eigenvalues.csv"


def to_json(result: FisherSpectrum) -> str:
    """Everything in a result as strict JSON; `read_spectrum` is the inverse.

    Raises:
        ValueError: If the metadata hold a NaN or an infinity.
        TypeError: If the metadata hold something that JSON has no form for.
    """
    spectra = {"per_block": dict(result.blocks), "global": result.block_diagonal, "full": result.full}
    content = {"format": FORMAT, **result.to_dict(), "eigenvalues": _eigenvalues(spectra)}
    content["eigenvalues"]["dtype"] = dtype_name(result.full.eigenvalues.dtype)
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def to_csv(result: FisherSpectrum) -> str:
    """All eigenvalues of a result as comma-separated values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("block", "index", "eigenvalue"))
    whole = {"block_diagonal": result.block_diagonal, "full": result.full}
    named = [*result.blocks.items(), *((apart_from(result.blocks, name), s) for name, s in whole.items())]
    for label, spectrum in named:
        writer.writerows((label, index, repr(v)) for index, v in enumerate(spectrum.eigenvalues.tolist()))
    return text.getvalue()


def write_files(
    folder: str | os.PathLike[str], contents: Mapping[str, bytes | str], *, instead_of: Iterable[str] = ()
) -> list[Path]:
    """Write files into a folder, all of them or none; the folder is made where it is absent.

    Args:
        folder: Where to write. Files of the same names are replaced.
        contents: {file name: content}; text is written as UTF-8.
        instead_of: Names of files of an earlier result, which are deleted where this one has none of that name.

    Returns:
        The paths written.

    Raises:
        OSError: If the folder or a file cannot be written; what was there before is there still.
    """
    target = Path(folder)
    paths = [target / name for name in contents]
    with _naming(target):
        with _made(target), ExitStack() as files:
            for path, content in zip(paths, contents.values(), strict=True):
                temporary = files.enter_context(replacing(path))
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        for name in instead_of:
            if name not in contents:
                (target / name).unlink(missing_ok=True)
    return paths


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Prove that files can be written into a folder, and leave it as it was: not made where it was absent.

    Args:
        folder: The folder to try.

    Raises:
        OSError: If it cannot be made or written; the error names it.
    """
    target = Path(folder)
    with _naming(target), _made(target), tempfile.TemporaryFile(dir=target):
        pass


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Say of which folder an error is, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write into the output folder {folder} ({error.strerror or error}); choose another one"
        ) from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and its absent parents; on leaving, remove those of them that are empty."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in absent:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def read_spectrum(path: str | os.PathLike[str]) -> FisherSpectrum:
    """Read a `spectrum.json`, or the one in a folder of results.

    Args:
        path: The file, or its folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file that `to_json` made, or is damaged.
    """
    file, content, found = _read(path)
    if found == LEADING_FORMAT:
        raise ValueError(
            f"{file} is of --method lanczos, and holds leading eigenvalues alone; give a {JSON_NAME} of --method exact"
        )
    if found != FORMAT:
        raise ValueError(f"{file} has format {found!r}, expected {FORMAT!r}; give a {JSON_NAME} of fisherfunc")
    try:
        return _result(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); run `fisherfunc spectrum` again") from error


def read_provenance(path: str | os.PathLike[str]) -> Provenance:
    """Read the provenance of a `spectrum.json` of any method, or of the one in a folder of results.

    Args:
        path: The file, or its folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file of this package, or is damaged.
    """
    file, content, found = _read(path)
    if found == LEADING_FORMAT and isinstance(content.get("metadata"), dict):
        return Provenance.from_dict(content["metadata"])
    return read_spectrum(file).provenance


def _read(path: str | os.PathLike[str]) -> tuple[Path, Any, Any]:
    """The file, what is in it, and the format that it names."""
    file = Path(path) / JSON_NAME if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); run `fisherfunc spectrum` again") from error
    return file, content, content.get("format") if isinstance(content, dict) else None


def _eigenvalues(spectra: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _eigenvalues(value) if isinstance(value, Mapping) else value.eigenvalues.tolist()
        for name, value in spectra.items()
    }


def _result(content: Mapping[str, Any]) -> FisherSpectrum:
    values = content["eigenvalues"]
    dtype = getattr(torch, values["dtype"])

    def spectrum(eigenvalues: list[float], facts: Mapping[str, Any]) -> Spectrum:
        return Spectrum(
            eigenvalues=torch.tensor(eigenvalues, dtype=dtype, device="cpu"),
            resolution=torch.tensor(facts["resolution"], dtype=dtype, device="cpu"),
            negative_part=torch.tensor(facts["negative_part"], dtype=dtype, device="cpu"),
            num_units=facts["num_tokens"],
            num_params=facts["num_params"],
            solver=facts["solver"],
            fallback=facts["fallback"],
            exact=facts["exact"],
        )

    return FisherSpectrum(
        blocks={label: spectrum(values["per_block"][label], facts) for label, facts in content["per_block"].items()},
        block_diagonal=spectrum(values["global"], content["global"]),
        full=spectrum(values["full"], content["full"]),
        provenance=Provenance.from_dict(content["metadata"]),
        coupling=BlockCoupling.from_dict(content["couplings"]) if content.get("couplings") else None,
        intervals=Intervals.from_dict(content["intervals"]) if content.get("intervals") else None,
        population=PopulationSummary.from_dict(content["population"]) if content.get("population") else None,
    )
