"""`fisherfunc tokens`: what it prints is what the library computes."""

import json
import os
import re

import pytest
import torch
from click.testing import CliRunner
from commands import tiny

import fisherfunc as ff
from fisherfunc.assets import sample_text
from fisherfunc.models.huggingface import load, text_batches
from fisherfunc.surface.cli import cli


def run(*arguments):
    return CliRunner().invoke(cli, ["tokens", *map(str, arguments)], prog_name="fisherfunc")


def test_the_command_prints_what_the_library_computes(hub, here):
    common = ["--tokens", 20, "--context", 12, "--seed", 3, "--dtype", "float64", "--format", "json"]
    ran = run(*tiny(hub), *common, "--center", "--vectors", 2, "--top", 4)
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert os.listdir() == []  # no file is written
    loaded = load(hub / "gpt2", dtype=torch.float64)
    text = (hub / "text.txt").read_text()
    batches = text_batches(loaded.tokenizer, text, task=loaded.task, context=12, num_tokens=20, seed=3)
    fn, loss = ff.functionalize(loaded.model), ff.losses.causal_lm()
    grams = ff.token_grams(fn, fn.params, batches, loss, num_tokens=20, seed=3)
    found = ff.directions.eigenpairs(grams.center(), num=2)
    printed = json.loads(ran.stdout)
    assert printed["metadata"]["eigenvalues"] == pytest.approx(found.eigenvalues.tolist())
    assert (printed["metadata"]["block"], printed["metadata"]["centered"]) == ("full matrix", True)
    expected = ff.directions.leading_tokens(found, batches, loss, top=4, decode=loaded.tokenizer.decode)
    assert len(printed["tokens"]) == 8
    for row, want in zip(printed["tokens"], expected, strict=True):
        assert row["share"] == pytest.approx(want.share, abs=1e-9)
        assert (row["sequence"], row["position"], row["target"]) == (want.sequence, want.position, want.target)
        assert (row["before"], row["text"], row["after"]) == (want.before, want.text, want.after)
        assert row["text"] in text


def test_without_a_model_it_is_the_embedded_one(here):
    printed = json.loads(run("--checkpoint", "early", "--tokens", 20, "--vectors", 1, "--format", "json").stdout)
    facts, rows = printed["metadata"], printed["tokens"]
    assert (facts["model_id"], facts["text"], facts["num_tokens"]) == ("sotu-llama/early", "embedded sample", 20)
    assert len(rows) == 10 and all(row["before"] + row["text"] in sample_text().read_text() for row in rows)


def test_a_block_is_one_of_the_partition(hub, here):
    common = ["--tokens", 15, "--format", "json", "--vectors", 1]
    printed = json.loads(run(*tiny(hub), *common, "--blocks", "module", "--block", "mlp").stdout)
    loaded = load(hub / "gpt2")
    batches = text_batches(
        loaded.tokenizer, (hub / "text.txt").read_text(), task="causal_lm", context=32, num_tokens=15
    )
    result = ff.fisher_spectrum(loaded.model, batches, blocks=ff.by_module, num_tokens=15)
    assert printed["metadata"]["block"] == "mlp"
    assert printed["metadata"]["num_params"] == result.blocks["mlp"].num_params
    assert printed["metadata"]["eigenvalues"] == pytest.approx([result.blocks["mlp"].eigenvalues[0].item()], rel=1e-4)
    wrong = run(*tiny(hub), *common, "--block", "layer.7")
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith(
        "fisherfunc: error: there is no block 'layer.7'; the blocks are ['embedding', 'layer.0'"
    )


def test_the_table_shows_the_text_and_fits_its_width(hub, here):
    ran = run(*tiny(hub), "--tokens", 15, "--vectors", 1, "--top", 2, "--block", "layer.0")
    assert ran.exit_code == 0
    assert "Leading tokens of the empirical Fisher of" in ran.stdout and "layer.0" in ran.stdout
    assert len(re.findall(r"^.*\d\.\d{3} +[+-]\d\.\d{3} .*«w\d+».*$", ran.stdout, re.MULTILINE)) == 2
    assert not re.search(r"(?i)(?<!empirical )fisher", ran.stdout)
    assert max(map(len, ran.stdout.splitlines())) <= 120


def test_the_table_says_what_of_a_direction_other_sequences_show(hub, here):
    options = ["--tokens", 20, "--context", 6, "--vectors", 2]
    ran = run(*tiny(hub), *options)
    facts = json.loads(run(*tiny(hub), *options, "--format", "json").stdout)["metadata"]
    for value, outside in zip(facts["eigenvalues"], facts["out_of_sample"], strict=True):
        assert f"; of other sequences it holds {100 * outside / value:.2g} %" in ran.stdout
    centred = run(*tiny(hub), *options, "--center")
    assert centred.exit_code == 0 and "of other sequences" not in centred.stdout


def test_more_vectors_than_are_resolved_is_one_line(hub, here):
    ran = run(*tiny(hub), "--tokens", 4, "--vectors", 9)
    assert ran.exit_code == 1
    assert re.fullmatch(r"fisherfunc: error: num=9 eigenvectors asked for, and \d of 4 eigenvalues .*\n", ran.stderr)


def test_the_help_names_every_option():
    text = run("--help").stdout
    assert all(option.opts[0] in text for option in cli.commands["tokens"].params)
    assert "Examples:" in text and max(map(len, text.splitlines())) <= 80
    assert run("--top", 0).exit_code == 2
