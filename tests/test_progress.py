"""The progress bar is seen in a terminal, and only there."""

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
