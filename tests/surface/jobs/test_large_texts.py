"""Texts that are not read whole: windows from their places in a file, and the beginning of a stream."""

import io
import json
import re
import sys
from types import SimpleNamespace

import hf_folders
import pytest
import torch
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherfunc as ff
from fisherfunc.models.huggingface import load, num_valid_tokens, text_windows
from fisherfunc.models.sampled_windows import sampled_windows
from fisherfunc.surface.files import read_spectrum
from fisherfunc.surface.jobs.large_texts import BEGINNING, WHOLE, beginnings, excerpts_of, size_if_large

TOKENIZERS = {}


def cut(path, *, num_tokens, kind="gpt2", context=10):
    tokenizer = TOKENIZERS.setdefault(kind, hf_folders.tokenizer(kind))
    options = {"task": hf_folders.TASKS[kind], "context": context, "num_tokens": num_tokens}
    return sampled_windows(tokenizer, excerpts_of(str(path)), **options)


def rows(found):
    return [row for batch in found.batches for row in batch["input_ids"].tolist()]


def words_of(ids):
    return TOKENIZERS["gpt2"].convert_ids_to_tokens(ids)


@pytest.fixture
def numbered():
    """A tokenizer to which each word is its number, so that a window says where it is from."""

    class Numbers:
        bos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": [int(word[1:]) for word in re.findall(r"w\d+", text)]}

    return Numbers()


@pytest.mark.parametrize("per_line", [7, 100_000])
def test_windows_are_consecutive_words_from_evenly_spread_places(tmp_path, numbered, per_line):
    """Of k windows the i-th begins within a line, or a word, of i/k of the text."""
    words = [f"w{number:06d}" for number in range(60_000)]
    lines = [" ".join(words[at : at + per_line]) for at in range(0, len(words), per_line)]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    options = {"task": "causal_lm", "context": 16, "bos": "never", "num_tokens": 150}
    found = sampled_windows(numbered, excerpts_of(str(tmp_path / "t.txt")), **options)
    begins = [row[0] for row in rows(found)]
    assert len(begins) == 10 and num_valid_tokens(found.batches) == 150 and found.num_windows is None
    assert rows(found) == [list(range(begin, begin + 16)) for begin in begins]
    for number, begin in enumerate(begins):
        assert number * 6_000 <= begin <= number * 6_000 + (per_line if per_line < 100 else 1)
        assert per_line > 100 or begin % per_line == 0


@pytest.mark.parametrize("wanted", [15, 60, 240, 285, 300])
def test_windows_never_overlap_however_many_are_wanted(tmp_path, numbered, wanted):
    (tmp_path / "t.txt").write_text("\n".join(f"w{number:06d}" for number in range(300)))
    options = {"task": "causal_lm", "context": 16, "bos": "never", "num_tokens": wanted}
    found = sampled_windows(numbered, excerpts_of(str(tmp_path / "t.txt")), **options)
    assert found is not None or wanted > 100
    taken = [token for row in (rows(found) if found else []) for token in row]
    assert len(taken) == len(set(taken))


def test_only_the_windows_are_read(tmp_path, numbered):
    (tmp_path / "t.txt").write_text(" ".join(f"w{number:06d}" for number in range(60_000)))
    held, excerpts = [], excerpts_of(str(tmp_path / "t.txt"))

    def counted(*place):
        excerpt = excerpts(*place)
        held.append(len(excerpt.text))
        return excerpt

    sampled_windows(numbered, counted, task="causal_lm", context=16, bos="never", num_tokens=150)
    assert sum(held) < 8_000  # of 480,000


@given(
    lengths=st.lists(st.integers(0, 60), min_size=3, max_size=30),
    wanted=st.integers(1, 25),
    ends=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=60)
def test_windows_of_documents_are_of_one_each_and_never_overlap(tmp_path_factory, lengths, wanted, ends):
    """Every window is consecutive words of the document that it names; where few are wanted, there are enough."""
    path = tmp_path_factory.mktemp("documents") / "t.jsonl"
    texts = [" ".join(f"w{(number + 3 * k) % hf_folders.WORDS}" for k in range(n)) for number, n in enumerate(lengths)]
    lines = [json.dumps({"id": number, "text": text} if number % 2 else text) for number, text in enumerate(texts)]
    path.write_bytes("".join(line + ends for line in lines).encode())
    found = cut(path, num_tokens=wanted)
    if found is None:
        return
    assert num_valid_tokens(found.batches) >= wanted
    named = dict.fromkeys(found.documents)
    assert sorted(named) == list(range(len(named)))
    seen = {}
    for document, row in zip(found.documents, rows(found), strict=True):
        text = " ".join(words_of(row))
        homes = {number for number, whole in enumerate(texts) if f" {text} " in f" {whole} "}
        seen[document] = seen.get(document, homes) & homes
    assert all(seen.values())
    assert len(found.documents) == len({(d, tuple(row)) for d, row in zip(found.documents, rows(found), strict=True)})


def test_long_documents_have_as_many_windows_as_their_share_of_the_file(tmp_path):
    """Two documents, one three times as long: it has three times as many windows."""
    texts = [" ".join([word] * count) for word, count in (("w1", 3000), ("w2", 9000))]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, texts)))
    found = cut(tmp_path / "t.jsonl", num_tokens=360)
    assert abs(4 * found.documents.count(0) - len(found.documents)) <= 4


@pytest.mark.parametrize("kind", hf_folders.TASKS)
def test_every_task_takes_as_many_windows_as_it_needs(tmp_path, kind):
    (tmp_path / "t.txt").write_text(hf_folders.sentence(5_000))
    found = cut(tmp_path / "t.txt", num_tokens=100, kind=kind)
    assert 100 <= num_valid_tokens(found.batches) < 110


@pytest.mark.parametrize("text", ["", " \n" * 500, "w1", "w1 w2\n" * 3])
def test_too_small_a_text_has_no_such_windows(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    assert cut(tmp_path / "t.txt", num_tokens=50) is None


def test_characters_of_several_bytes_are_never_cut(tmp_path):
    """Text without spaces, of three bytes a character, read from any byte."""
    (tmp_path / "t.txt").write_text("鯨" * 3_000, encoding="utf-8")
    excerpt = excerpts_of(str(tmp_path / "t.txt"))
    for place in range(200):
        found = excerpt(place / 200, 10, 40)
        assert found.text == "鯨" * min(40, 3_000 - found.begin // 3) and found.begin % 3 == 0
        assert found.end == found.begin + 3 * len(found.text) and 0 <= found.begin - 45 * place <= 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"w1 " * 5_000 + b"\xff" + b" w1" * 5_000, r"not UTF-8 text \(see byte 15000\)"),
        (b"w1 " * 5_000 + b"\0" + b" w1" * 5_000, "holds NUL characters"),
        ("w1 ".encode("utf-16") * 5_000, "is UTF-16 text"),
    ],
)
def test_what_is_read_and_no_text_is_refused(tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cut(tmp_path / "t.txt", num_tokens=15_000)


def test_a_line_that_is_no_document_is_named_by_its_place(tmp_path):
    (tmp_path / "t.jsonl").write_text('"w1 w2 w3"\n' * 100 + "{\n" + '"w1 w2 w3"\n' * 100)
    with pytest.raises(ValueError, match=r"the line at byte 1,100 of .*t\.jsonl is not JSON"):
        excerpts_of(str(tmp_path / "t.jsonl"))(0.5, 10, 40)


def test_which_texts_are_large(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"w1 " * (WHOLE // 3 + 1))
    assert size_if_large(str(tmp_path / "t.txt"), 512) == WHOLE + 2
    assert size_if_large(str(tmp_path / "t.txt"), WHOLE // 64 + 1) is None
    assert size_if_large(None, 1) is size_if_large("-", 1) is None


@pytest.mark.parametrize("name", ["large.txt", "large.jsonl"])
def test_the_command_reads_windows_of_a_large_file_and_says_so(hub, here, monkeypatch, name):
    """The spectrum is that of the windows which `sampled_windows` takes, and the file is not read whole."""
    line = hf_folders.sentence(500)
    (here / name).write_text(f"{json.dumps(line) if name.endswith('jsonl') else line}\n" * (WHOLE // len(line) + 1))
    monkeypatch.setattr("fisherfunc.surface.jobs.job.read_documents", None)
    ran = run("--model", hub / "gpt2", "--text", name, "--tokens", 40, "--context", 8, "--out", "o")
    assert ran.exit_code == 0, ran.stderr
    assert "6 windows of 8 positions without a start token, spread evenly over the 4 MB of the text" in ran.stdout
    loaded = load(hub / "gpt2")
    windows = sampled_windows(loaded.tokenizer, excerpts_of(name), task="causal_lm", context=8, num_tokens=40)
    want = ff.fisher_spectrum(loaded.model, windows.batches, num_tokens=40)
    found = read_spectrum("o")
    assert torch.equal(found.full.eigenvalues, want.full.eigenvalues)
    assert found.metadata["num_documents"] == (6 if name.endswith("jsonl") else None)


@given(content=st.text("ab 鯨\n", max_size=80).map(str.encode), most=st.integers(1, 30))
def test_beginnings_of_a_stream_grow_to_all_of_it_and_cut_no_word(content, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        found = list(beginnings("-", most=most))
    whole = content.decode()
    assert [ends for _, ends in found] == [False] * (len(found) - 1) + [True] and found[-1][0] == [whole]
    for (text,), _ in found[:-1]:
        assert whole.startswith(text)
        assert text[-1:] in ("", " ", "\n") or not set(text) & {" ", "\n"}


class Endless(io.RawIOBase):
    def __init__(self):
        self.given = 0

    def read(self, size=-1):
        assert size > 0, "an endless stream was read to its end"
        self.given += size
        return (b"w1 w2 w3 w4 w5 w6 w7\n" * (size // 21 + 1))[:size]


def test_of_an_endless_stream_no_more_is_read_than_is_needed(hub, here, monkeypatch):
    from fisherfunc.surface.jobs import job

    stream = Endless()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    task = job.Job(model=str(hub / "gpt2"), text="-", num_tokens=20, context=8)
    _, batches, _, facts = job.loaded_model(task)
    assert stream.given == BEGINNING + 1 and num_valid_tokens(batches) >= 20
    assert facts.windows_of_text is None and facts.bytes_of_text is None


def test_windows_of_a_stream_are_those_of_the_whole_of_it(hub, here, monkeypatch):
    """More tokens than a first beginning holds: the windows are the first ones of the text, none is cut short."""
    from fisherfunc.surface.jobs import job

    text = hf_folders.sentence(BEGINNING // 3)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    words = text[:BEGINNING].count(" ")
    assert words % 32 > 2  # the last window of the first beginning is cut short, and holds the token that is lacking
    wanted = words // 32 * 31 + 1
    _, batches, _, _ = job.loaded_model(job.Job(model=str(hub / "gpt2"), text="-", num_tokens=wanted, context=32))
    tokenizer = load(hub / "gpt2").tokenizer
    whole = text_windows(tokenizer, [text], task="causal_lm", context=32, num_tokens=wanted, spread=False)
    assert all(
        torch.equal(batch["input_ids"], one["input_ids"]) for batch, one in zip(batches, whole.batches, strict=True)
    )
