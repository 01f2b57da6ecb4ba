"""The command line where something is wrong: one readable line, a status, and nothing left behind."""

import os
import re
import signal
import sys

import hf_folders
import pytest
from commands import FILES, run, tiny
from commands import process as start

from fisherfunc.__main__ import main
from fisherfunc.surface.jobs import job, results

PREFIX = "fisherfunc: error: "


def _damage(hub, here):
    folder = hf_folders.copy(hub / "gpt2", here / "damaged")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-500])
    return ["--model", folder, "--text", hub / "text.txt"]


def _other_tokenizer(hub, here):
    folder = hf_folders.copy(hub / "gpt2", here / "other")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 1000}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(folder)
    return ["--model", folder, "--text", _write(here / "ab.txt", "a b a b")]


def _write(path, text):
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


FAILURES = {
    "absent model": (
        lambda hub, here: ["--model", "./none", "--text", hub / "text.txt"],
        1,
        r"no model folder './none'",
    ),
    "corrupt model": (_damage, 1, r"model\.safetensors is corrupt"),
    "another model's tokenizer": (_other_tokenizer, 1, r"gives token 1000, and the model has 46 embeddings"),
    "absent text": (lambda hub, here: ["--text", "none.txt"], 2, r"'none\.txt' does not exist"),
    "a folder as text": (lambda hub, here: ["--text", "."], 2, r"'\.' is a directory"),
    "text not UTF-8": (
        lambda hub, here: ["--model", hub / "gpt2", "--text", _write(here / "x", b"caf\xe9")],
        1,
        r"x is not UTF-8 text \(see byte 3\)",
    ),
    "empty text": (
        lambda hub, here: ["--model", hub / "gpt2", "--text", _write(here / "x", "")],
        1,
        r"the text has 0 token\(s\), and causal_lm needs 2",
    ),
    "text too short": (
        lambda hub, here: ["--model", hub / "gpt2", "--text", _write(here / "x", "w1")],
        1,
        r"the text has 1 token\(s\), and causal_lm needs 2",
    ),
    "fewer tokens than asked for": (
        lambda hub, here: [*tiny(hub), "--tokens", 5000],
        1,
        r"--tokens 5000 asks for more predictions than the text gives, 193; .*--tokens 193",
    ),
    "context beyond the model": (lambda hub, here: [*tiny(hub), "--context", 33], 1, r"--context 33 .*maximum is 32"),
    "context too small": (lambda hub, here: [*tiny(hub), "--context", 1], 1, r"causal_lm needs 2"),
    "memory limit too small": (
        lambda hub, here: [*tiny(hub), "--memory", "1kB"],
        1,
        r"--memory 1000 .*needs.*; raise the limit or lower --tokens",
    ),
    "no memory size": (
        lambda hub, here: ["--memory", "2 cats"],
        2,
        r"2GB, 500MB or 1\.5GiB was expected, got '2 cats'",
    ),
    "no such device": (lambda hub, here: [*tiny(hub), "--device", "cuda:99"], 1, r"device 'cuda:99' cannot be used"),
    "no such blocks": (lambda hub, here: ["--blocks", "heads"], 2, r"'heads' is not one of 'layer', 'module'"),
    "no tokens": (lambda hub, here: ["--tokens", 0], 2, r"0 is not in the range"),
    "no such option": (lambda hub, here: ["--colour"], 2, r"No such option"),
    "checkpoint of another model": (
        lambda hub, here: ["--model", hub / "gpt2", "--checkpoint", "init"],
        2,
        r"--checkpoint is of the embedded model",
    ),
    "output below a file": (
        lambda hub, here: [*tiny(hub), "--out", _write(here / "x", "") / "out"],
        1,
        r"cannot write into the output folder .*x/out",
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_is_one_readable_line_and_nothing_is_left(hub, here, what):
    prepare, status, message = FAILURES[what]
    arguments = prepare(hub, here)
    before = sorted(path for path in here.rglob("*"))
    ran = run(*arguments)
    assert (ran.exit_code, ran.stdout) == (status, "")
    assert ran.stderr.startswith(PREFIX)
    assert ran.stderr.count("\n") == 1
    assert re.search(message, ran.stderr)
    assert ("see fisherfunc spectrum --help" in ran.stderr) == (status == 2)
    assert sorted(path for path in here.rglob("*")) == before


def test_an_unwritable_output_is_found_before_any_work(hub, here, monkeypatch):
    monkeypatch.setattr(job, "compute", lambda *_, **__: pytest.fail("the computation ran"))
    (here / "file").write_text("kept")
    ran = run(*tiny(hub), "--out", "file")
    assert ran.exit_code == 1
    assert "cannot write into the output folder file" in ran.stderr
    assert (here / "file").read_text() == "kept"


def test_debug_shows_the_traceback(hub, here):
    ran = run(*tiny(hub), "--context", 33, "--debug")
    assert ran.exit_code == 1
    assert isinstance(ran.exception, ValueError)
    assert ran.stderr == ""


def test_a_defect_of_the_program_is_not_hidden(hub, here, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(job, "compute", broken)
    assert isinstance(run(*tiny(hub)).exception, ZeroDivisionError)


@pytest.mark.parametrize("stage", ["fisher_spectrum", "load", "write_files"])
def test_an_interrupted_run_leaves_nothing(hub, here, monkeypatch, stage):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(results if stage == "write_files" else job, stage, stop)
    ran = run(*tiny(hub), "--tokens", 9, "--out", "a/b")
    assert (ran.exit_code, ran.stdout) == (130, "")
    assert ran.stderr.strip() == "fisherfunc: interrupted; nothing was written"
    assert list(here.iterdir()) == []


def test_an_interrupt_while_printing_says_that_the_files_are_there(hub, here, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fisherfunc.surface.reports.report.report", stop)
    ran = run(*tiny(hub), "--tokens", 9)
    assert ran.exit_code == 130
    assert ran.stderr.strip() == "fisherfunc: interrupted; the files are in gpt2"
    assert sorted(os.listdir("gpt2")) == FILES


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a FIFO to know when the process has begun")
def test_a_real_interrupt_leaves_nothing(hub, here, tmp_path):
    os.mkfifo(tmp_path / "text")
    arguments = ["spectrum", "--model", hub / "gpt2", "--text", tmp_path / "text", "--out", "a/b"]
    process = start(*arguments, cwd=here, tmp_path=tmp_path)
    with (tmp_path / "text").open("w"):  # opens once the process reads: its output folder has been checked by then
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "fisherfunc: interrupted; nothing was written"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("package", ["click", "rich"])
def test_a_missing_package_is_one_line_that_names_the_extra(hub, here, monkeypatch, capsys, package):
    for name in [
        name for name in sys.modules if re.match(rf"{package}\b|fisherfunc\.surface\.(cli|boundary|progress)$", name)
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["fisherfunc", "spectrum", *map(str, tiny(hub))])
    with pytest.raises(SystemExit) as left:
        main()
    err = capsys.readouterr().err
    assert left.value.code == 1
    assert err.startswith(PREFIX)
    assert err.count("\n") == 1
    assert 'pip install "fisherfunc[cli]"' in err
    assert list(here.iterdir()) == []


def test_a_missing_plot_package_is_found_before_any_work(hub, here, monkeypatch):
    monkeypatch.setattr(job, "compute", lambda *_, **__: pytest.fail("the computation ran"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run(*tiny(hub))
    assert ran.exit_code == 1
    assert 'pip install "fisherfunc[plot]"' in ran.stderr
