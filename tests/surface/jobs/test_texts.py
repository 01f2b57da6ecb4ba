"""The text of a run: what is read from a file or from standard input, and what is refused."""

import io
import sys
from types import SimpleNamespace

import pytest
from commands import run, tiny
from hypothesis import given
from hypothesis import strategies as st

from fisherfunc.surface.jobs.texts import read_text

TEXT = "Der Wal, 鯨, und das Meer.\nJa.\n"
MARK = b"\xef\xbb\xbf"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Bytes → the text, from a file and from standard input, which have to agree."""

    def both(content):
        (tmp_path / "t.txt").write_bytes(content)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        from_file, from_input = read_text(str(tmp_path / "t.txt")), read_text("-")
        assert from_file == from_input
        return from_file

    return both


@pytest.mark.parametrize("content", [MARK + TEXT.encode(), MARK + MARK + TEXT.encode()])
def test_a_mark_is_no_text(read, content):
    assert read(content) == read(TEXT.encode()) == TEXT


def test_the_mark_of_a_file_that_was_appended_is_no_text(read):
    assert read(2 * (MARK + TEXT.encode())) == 2 * TEXT
    assert read("a \ufeff b".encode()) == "a \ufeff b"  # not at the beginning of a line: a character of the text


def test_ends_of_lines_are_those_of_unix_wherever_the_text_comes_from(read):
    assert read(TEXT.replace("\n", "\r\n").encode()) == TEXT


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("text", ["the whale and the sea", "кит и море"])
def test_other_encodings_are_refused_with_or_without_a_mark(read, encoding, text):
    with pytest.raises(ValueError, match=r"t\.txt (is UTF-\d\d text|is not UTF-8|holds NUL characters).*convert it"):
        read(text.encode(encoding))


@given(before=st.text("ab ", max_size=5), after=st.text("ab ", max_size=5))
def test_nul_is_refused_where_it_stands(tmp_path_factory, before, after):
    path = tmp_path_factory.mktemp("nul") / "t.txt"
    path.write_text(f"{before}\0{after}")
    with pytest.raises(
        ValueError, match=rf"holds NUL characters, 1 of {len(before) + len(after) + 1} .*{len(before)}\)"
    ):
        read_text(str(path))


def test_a_closed_standard_input_is_one_line(hub, here, monkeypatch):
    monkeypatch.setattr("fisherfunc.surface.jobs.texts.sys", SimpleNamespace(stdin=None))
    ran = run("--model", hub / "gpt2", "--text", "-")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert (
        ran.stderr
        == "fisherfunc: error: standard input is closed, and --text - reads it; give a file, or its text by a pipe\n"
    )


def test_the_mark_changes_no_result(hub, here):
    (here / "marked.txt").write_bytes(MARK + (hub / "text.txt").read_bytes())
    plain = run(*tiny(hub), "--tokens", 9, "--format", "json", "--out", "a")
    marked = run("--model", hub / "gpt2", "--text", "marked.txt", "--tokens", 9, "--format", "json", "--out", "b")
    assert plain.stdout.split('"metadata"')[0] == marked.stdout.split('"metadata"')[0] != ""
