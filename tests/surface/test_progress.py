"""The progress bar is seen in a terminal, and only there."""

import re

import pytest

from fisherfunc.surface.progress import progress_bar


def shown(capsys, *, quiet: bool = False) -> str:
    with progress_bar(quiet=quiet) as report:
        report(1, 4)
        report(4, 4)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_the_counts_and_what_is_being_done(terminal, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    text = shown(capsys)
    assert ("4/4" in text and "eigenvalues" in text) == terminal
    assert terminal or text == ""


def test_quiet_shows_nothing_in_a_terminal_either(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert "4/4" not in shown(capsys, quiet=True)


def test_what_is_left_is_estimated_from_this_run_and_from_chunks_that_are_minutes_apart(monkeypatch, capsys):
    """An earlier run did 50 of 100; this one does 10 in 100 seconds."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    now = 1000.0
    monkeypatch.setattr("rich.console.monotonic", lambda: now)
    with progress_bar() as report:
        for done in (50, 60, 70):
            report(done, 100)
            now += 100
    assert re.search(r"70/100 0:05:00 0:05:00", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().err))


def test_in_a_notebook_the_bar_is_tqdms_and_counts_what_is_done(capsys):
    with progress_bar(notebook=True, doing="gradients") as report:
        for done in (1, 3, 8):
            report(done, 8)
    shown = capsys.readouterr().err
    assert "gradients" in shown and "3/8" in shown and "eigenvalues" in shown and "8/8" in shown
    with progress_bar(notebook=True, quiet=True) as report:
        report(1, 1)
    assert capsys.readouterr().err == ""
