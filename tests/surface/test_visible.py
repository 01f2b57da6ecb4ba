"""What of a text would steer a terminal never reaches it, and nothing else of the text is changed."""

import json
import unicodedata

import hf_folders
import pytest
from click.testing import CliRunner
from commands import run
from hypothesis import given
from hypothesis import strategies as st

from fisherfunc.surface.cli import cli
from fisherfunc.surface.visible import escaped_json, visible

BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def steers(character):
    """Whether Unicode calls it a control, a separator of lines, a directional control, or half a character."""
    marks = "\u200e\u200f\u061c"  # left-to-right, right-to-left and Arabic letter mark
    kind = unicodedata.category(character)
    return kind in ("Cc", "Zl", "Zp", "Cs") or unicodedata.bidirectional(character) in BIDI or character in marks


@given(st.text(st.characters()))
def test_what_steers_a_terminal_is_shown_and_the_rest_is_as_it_was(text):
    found = visible(text)
    assert not any(map(steers, found))
    assert visible(found) == found
    assert found.isascii() or not text.isascii() or any(map(steers, text))


def test_every_character_that_steers_is_known():
    assert [hex(code) for code in range(0x110000) if steers(chr(code)) and visible(chr(code)) == chr(code)] == []
    assert visible("naïve 文 👩‍🚀 λ_max می‌خواهم") == "naïve 文 👩‍🚀 λ_max می‌خواهم"


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_json_means_the_same_without_them(value):
    escaped = escaped_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(escaped) == value
    assert not any(steers(character) for character in escaped if character != "\n")


@pytest.mark.parametrize("form", ["table", "json"])
def test_tokens_of_any_text_do_not_steer_the_terminal(here, form):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    import transformers as hf

    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=256, n_embd=8, n_layer=1, n_head=1, n_positions=hf_folders.CONTEXT)
    )
    model.save_pretrained("m")
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained("m")
    (here / "e.txt").write_text("a \x1b[31mb\x1b[0m \x07\u202ec\x9b \r\t\x7f" * 5)
    arguments = ["tokens", "--model", "m", "--text", "e.txt", "--tokens", "40", "--vectors", "1", "--top", "40"]
    ran = CliRunner().invoke(cli, [*arguments, "--format", form])
    assert ran.exit_code == 0, ran.output
    assert not any(steers(character) for character in ran.stdout if character != "\n")
    if form == "table":
        assert all(sign in ran.stdout for sign in ("␛", "␇", "␉", "␡", "<U+202E>", "⏎"))
    else:
        assert any("\x1b" in row["text"] for row in json.loads(ran.stdout)["tokens"])


def test_names_of_files_do_not_steer_the_terminal(hub, here):
    folder = hf_folders.copy(hub / "gpt2", here / "m\x1b[31m\u202e[bold]")
    ran = run("--model", folder, "--text", hub / "text.txt", "--tokens", 9, "--out", "o\x1b[31m")
    assert ran.exit_code == 0, ran.stderr
    assert not any(steers(character) for character in ran.stdout if character != "\n")
    assert "m␛[31m<U+202E>[bold]" in ran.stdout.replace("\n", "") and "into o␛[31m" in ran.stdout
    failed = run("--model", "./none\x1b[31m", "--text", hub / "text.txt")
    assert "none␛[31m" in failed.stderr or "none\\x1b[31m" in failed.stderr
    assert "\x1b" not in failed.stderr
