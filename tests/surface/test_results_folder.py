"""The folder of a result: results of another model stay, files of an earlier one go, and no result is lost."""

import json
import os
import shutil

import hf_folders
import pytest
from commands import FILES, run, tiny

from fisherfunc.surface.files import read_spectrum
from fisherfunc.surface.jobs import job, results

QUICK = ["--tokens", 9]


@pytest.fixture
def two_runs(hub, here):
    for run_of in ("run1", "run2"):
        hf_folders.copy(hub / "gpt2", here / run_of / "checkpoint-500")
    return [["--model", f"{run_of}/checkpoint-500", "--text", hub / "text.txt", *QUICK] for run_of in ("run1", "run2")]


def test_the_default_folder_of_another_model_is_refused_before_any_work(two_runs, here, monkeypatch):
    first, second = two_runs
    assert run(*first).exit_code == 0
    before = (here / "checkpoint-500" / "spectrum.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(job, "compute", lambda *_, **__: pytest.fail("the computation ran"))
        ran = run(*second)
    assert ran.exit_code == 1 and ran.stderr.count("\n") == 1
    for words in (
        "checkpoint-500 holds the results of another model",
        "run1/checkpoint-500",
        "run2/checkpoint-500",
        "--out",
    ):
        assert words in ran.stderr
    assert (here / "checkpoint-500" / "spectrum.json").read_bytes() == before
    assert run(*second, "--out", "other").exit_code == 0
    assert run(*second, "--out", "checkpoint-500").exit_code == 0  # asked for by name
    assert "run2" in read_spectrum("checkpoint-500").metadata["model_source"]


def test_the_same_model_by_any_path_replaces_its_results(two_runs, here, monkeypatch):
    first, _ = two_runs
    assert run(*first).exit_code == 0
    assert run("--model", here / "run1" / "checkpoint-500", *first[2:]).exit_code == 0
    assert run(*first, "--center").exit_code == 0
    assert read_spectrum("checkpoint-500").metadata["centered"]


def test_of_results_without_a_source_the_name_decides(two_runs, here):
    """As they were written before it was recorded."""
    first, second = two_runs
    assert run(*first).exit_code == 0
    path = here / "checkpoint-500" / "spectrum.json"
    content = json.loads(path.read_text())
    del content["metadata"]["model_source"]
    path.write_text(json.dumps(content))
    assert run(*second).exit_code == 1
    assert run(*first).exit_code == 0


def test_results_that_cannot_be_read_are_not_replaced(two_runs, here):
    (here / "checkpoint-500").mkdir()
    (here / "checkpoint-500" / "spectrum.json").write_text("{")
    ran = run(*two_runs[0])
    assert ran.exit_code == 1 and "whose results checkpoint-500 holds cannot be told" in ran.stderr
    assert os.listdir(here / "checkpoint-500") == ["spectrum.json"]


def test_files_that_a_new_result_has_not_are_gone(hub, here):
    assert run(*tiny(hub), *QUICK).exit_code == 0
    (here / "gpt2" / "notes.md").write_text("mine")
    assert sorted(os.listdir("gpt2")) == sorted([*FILES, "notes.md"])
    assert run(*tiny(hub), *QUICK, "--blocks", "whole").exit_code == 0
    assert sorted(os.listdir("gpt2")) == sorted([*(name for name in FILES if "couplings" not in name), "notes.md"])


@pytest.mark.parametrize("options", [[], ["--format", "json"], ["--quiet"]])
def test_a_disk_that_fills_up_loses_no_result(hub, here, monkeypatch, options):
    def full(folder, contents, **_):
        raise OSError(f"cannot write into the output folder {folder} (No space left on device); choose another one")

    monkeypatch.setattr(results, "write_files", full)
    ran = run(*tiny(hub), *QUICK, "--out", "o", *options)
    assert ran.exit_code == 1
    assert ran.stderr == (
        "fisherfunc: error: cannot write into the output folder o (No space left on device); choose another --out\n"
    )
    if "json" in options:
        assert json.loads(ran.stdout)["full"]["num_tokens"] == 9
    else:
        assert "full matrix" in ran.stdout and "wrote" not in ran.stdout


def test_a_full_disk_is_named_with_its_folder(tmp_path, monkeypatch):
    from fisherfunc.surface.files import write_files

    def full(*_):
        raise OSError(28, "No space left on device")

    shutil.os.makedirs(tmp_path / "o")
    (tmp_path / "o" / "a").write_text("before")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"into the output folder .*/o \(No space left on device\); choose another one"):
        write_files(tmp_path / "o", {"a": "after"}, instead_of=["b"])
    assert (tmp_path / "o" / "a").read_text() == "before" and os.listdir(tmp_path / "o") == ["a"]


def test_a_result_says_what_windows_begin_with(hub, here):
    ran = run(*tiny(hub), *QUICK)
    facts = read_spectrum("gpt2").metadata
    assert (facts["bos"], facts["window_start"]) == ("auto", [])
    assert "windows of 32 positions without a start token, spread evenly over" in ran.stdout
    ran = run(*tiny(hub), *QUICK, "--bos", "always")
    assert ran.exit_code == 1 and "--bos always needs a start token" in ran.stderr
    folder = hf_folders.copy(hub / "gpt2", here / "starts")
    tokenizer = hf_folders.tokenizer("gpt2")
    tokenizer.bos_token = "[CLS]"
    tokenizer.save_pretrained(folder)
    ran = run("--model", folder, "--text", hub / "text.txt", *QUICK, "--bos", "always", "--out", "o")
    assert "windows of 32 positions that begin with [CLS]" in ran.stdout
    assert read_spectrum("o").metadata["window_start"] == ["[CLS]"]
