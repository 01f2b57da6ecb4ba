"""Result files: exact and strict, whole or not at all."""

import csv
import json
import os

import pytest
import torch
from spectra import spectrum

from fisherfunc.surface.files import check_writable, read_spectrum, to_csv, to_json, write_files

LABELS = ("plain", 'comma, "quote"', "línea\nbreak")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results"


def _no_constants(text):
    raise AssertionError(f"{text} is not strict JSON")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": LABELS},
        {"num_tokens": 1},
        {"num_params": 1, "num_tokens": 1},
        {"scale": 0.0},
        {"dtype": torch.float32},
    ],
    ids=str,
)
def test_reading_is_the_inverse_of_writing_to_the_last_bit(folder, options):
    result = spectrum(**options)
    write_files(folder, {"spectrum.json": to_json(result)})
    again = read_spectrum(folder)
    assert list(again.blocks) == list(result.blocks)
    for got, want in zip(_spectra(again), _spectra(result), strict=True):
        assert got.eigenvalues.dtype == want.eigenvalues.dtype
        assert torch.equal(got.eigenvalues, want.eigenvalues)
        assert torch.equal(got.resolution, want.resolution)
        assert torch.equal(got.negative_part, want.negative_part)
        facts = ("num_tokens", "num_params", "solver", "fallback", "exact")
        assert [getattr(got, name) for name in facts] == [getattr(want, name) for name in facts]
    assert again.to_dict() == result.to_dict()
    assert to_json(read_spectrum(folder / "spectrum.json")) == to_json(result)


def _spectra(result):
    return [*result.blocks.values(), result.block_diagonal, result.full]


def test_the_json_is_strict_where_metrics_do_not_exist():
    content = json.loads(to_json(spectrum(scale=0.0)), parse_constant=_no_constants)
    assert content["full"]["condition_number"] is None


def test_a_nan_in_the_metadata_is_an_error_not_a_token():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(spectrum(mean_loss=float("nan")))


def test_the_csv_holds_every_eigenvalue_exactly():
    result = spectrum(labels=LABELS)
    rows = list(csv.reader(to_csv(result).splitlines(keepends=True)))
    assert rows[0] == ["block", "index", "eigenvalue"]
    named = {**result.blocks, "block_diagonal": result.block_diagonal, "full": result.full}
    want = [
        [label, str(index), value]
        for label, part in named.items()
        for index, value in enumerate(part.eigenvalues.tolist())
    ]
    assert [[label, index, float(value)] for label, index, value in rows[1:]] == want


def test_files_are_replaced_all_or_none(folder):
    write_files(folder, {"a": "old a", "b": b"old b"})
    with pytest.raises(OSError):
        write_files(folder, {"a": "new a", "b": "new b", "no-such-folder/c": "new c"})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "old a", "b": "old b"}
    write_files(folder, {"a": "new λ", "b": b"new b"})
    assert {path.name: path.read_text("utf-8") for path in folder.iterdir()} == {"a": "new λ", "b": "new b"}


def test_an_interrupt_while_writing_leaves_nothing(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.write_bytes", stop)
        write_files(folder / "below", {"a": "a", "b": "b"})
    assert not folder.exists()


def test_the_check_leaves_the_folder_as_it_was(folder):
    check_writable(folder / "deep" / "er")
    assert not folder.exists()
    folder.mkdir()
    (folder / "kept").write_text("kept")
    check_writable(folder)
    assert [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, below):
    """Permissions do not stop root; a path below a regular file stops anyone."""
    (tmp_path / "file").write_text("kept")
    target = tmp_path / "file" / below
    with pytest.raises(OSError, match=r"cannot write into the output folder .*; choose another one") as caught:
        check_writable(target)
    assert str(target) in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"
    assert os.listdir(tmp_path) == ["file"]


BROKEN = {
    "no JSON": ("{", "is not valid JSON"),
    "another file": ('{"format": "fisherfunc.spectrum.9"}', "has format 'fisherfunc.spectrum.9', expected"),
    "a list": ("[]", "has format None"),
    "nothing inside": ('{"format": "fisherfunc.spectrum.1"}', "is damaged .*eigenvalues"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_result_is_an_error(tmp_path, what):
    content, message = BROKEN[what]
    (tmp_path / "spectrum.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_spectrum(tmp_path)
    assert "spectrum.json" in str(caught.value)


def test_a_damaged_result_is_an_error(tmp_path):
    content = json.loads(to_json(spectrum()))
    del content["per_block"]["layer.0"]["solver"]
    (tmp_path / "spectrum.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is damaged .*solver"):
        read_spectrum(tmp_path)


def test_an_absent_result_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_spectrum(tmp_path / "none.json")
