"""The command line where all goes well: the main job end to end, and what its options do."""

import json
import os
import re
from pathlib import Path

import hf_folders
import pytest
import torch
from click.testing import CliRunner
from commands import FILES, run, tiny
from commands import process as start

import fisherfunc as ff
from fisherfunc.assets import CHECKPOINTS
from fisherfunc.models.huggingface import load, text_batches, text_windows
from fisherfunc.surface.cli import cli
from fisherfunc.surface.commands.sizes import parse_bytes
from fisherfunc.surface.files import read_spectrum
from fisherfunc.surface.jobs import job

ORDER = [
    "spectrum.json",
    "eigenvalues.csv",
    "run.toml",
    "spectrum.png",
    "spectrum.svg",
    "couplings.png",
    "couplings.svg",
]


def test_without_arguments_the_embedded_model_runs_end_to_end(here, tmp_path):
    process = start("spectrum", cwd=here, tmp_path=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert [path.name for path in here.iterdir()] == ["sotu-llama-final"]
    folder = here / "sotu-llama-final"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    result = read_spectrum(folder)
    for label in (*result.blocks, "block-diagonal", "full matrix"):
        assert re.search(rf"^{re.escape(label)} +512 +[\d,]+( +≥?[\d.]+e[+-]\d\d){{4}}", out, re.MULTILINE)
    assert "into sotu-llama-final" in out
    assert result.metadata["num_tokens"] == 512
    assert result.metadata["model_id"] == "sotu-llama/final"
    assert result.metadata["mean_loss"] < 5.0  # a uniform guess over 1,024 tokens has 6.93: this model is trained
    assert str(Path(ff.__file__).parent) not in (folder / "spectrum.json").read_text()


@pytest.mark.parametrize("kind", hf_folders.TASKS)
def test_the_command_computes_what_the_library_computes(hub, here, kind):
    options = ["--tokens", 20, "--context", 12, "--seed", 3, "--blocks", "module", "--dtype", "float64"]
    ran = run(*tiny(hub, kind), *options, "--format", "json")
    assert (ran.exit_code, ran.stderr) == (0, f"wrote {', '.join(ORDER)} into {kind}\n")
    loaded = load(hub / kind, dtype=torch.float64)
    batches = text_batches(
        loaded.tokenizer,
        (hub / "text.txt").read_text(),
        task=hf_folders.TASKS[kind],
        context=12,
        num_tokens=20,
        seed=3,
    )
    want = ff.fisher_spectrum(loaded.model, batches, blocks=ff.by_module, num_tokens=20, seed=3)
    got = read_spectrum(here / kind)
    assert list(got.blocks) == list(want.blocks)
    assert torch.equal(got.full.eigenvalues, want.full.eigenvalues)
    assert torch.equal(got.block_diagonal.eigenvalues, want.block_diagonal.eigenvalues)
    assert json.loads(ran.stdout) == got.to_dict()
    assert got.metadata["loss"] == hf_folders.TASKS[kind]
    assert got.metadata["num_tokens"] == 20


def test_the_options_reach_the_computation(hub, here):
    def full(*options):
        assert run(*tiny(hub), "--tokens", 30, "--context", 8, "--out", "o", "--quiet", *options).exit_code == 0
        return read_spectrum("o")

    plain, again = full(), full()
    assert torch.equal(plain.full.eigenvalues, again.full.eigenvalues)
    assert not torch.equal(full("--seed", "1").full.eigenvalues, plain.full.eigenvalues)
    other = full("--center", "--unit", "sequence", "--blocks", "whole", "--dtype", "bfloat16")
    assert other.metadata["centered"]
    assert (other.full.num_tokens, len(other.blocks)) == (5, 1)  # 30 tokens of windows with 7
    assert other.metadata["dtype"] == "bfloat16"
    small = full("--memory", "200MB", "--blocks", "parameter")
    assert len(small.blocks) > len(plain.blocks)
    torch.testing.assert_close(small.full.eigenvalues, plain.full.eigenvalues, rtol=1e-4, atol=1e-6)


def test_the_table_is_printed_and_the_word_fisher_never_stands_alone(hub, here):
    ran = run(*tiny(hub), "--tokens", 20, "--out", "results/of this run")
    assert ran.exit_code == 0
    assert not re.search(r"(?i)(?<!empirical )fisher", ran.stdout)
    assert "block-diagonal" in ran.stdout
    assert "into results/of this run" in ran.stdout
    assert sorted(os.listdir("results/of this run")) == FILES
    assert "isher" not in run(*tiny(hub), "--tokens", 20, "--center").stdout


def test_quiet_prints_nothing(hub, here):
    for form in ("table", "json"):
        ran = run(*tiny(hub), "--tokens", 9, "--quiet", "--format", form)
        assert (ran.exit_code, ran.output) == (0, "")
    assert sorted(os.listdir("gpt2")) == FILES


def test_a_dash_reads_standard_input_from_its_beginning(hub, here):
    """Of a stream the first windows are taken: of a file that ends there, the same; of a longer one, others."""
    text = (hub / "text.txt").read_text()
    beginning = here / "beginning.txt"
    beginning.write_text(" ".join(text.split()[:36]))
    options = ["--tokens", 21, "--context", 8]
    pipe = run("--model", hub / "gpt2", "--text", "-", *options, "--out", "pipe", input=text)
    whole = run(*tiny(hub), *options, "--out", "whole")
    assert run("--model", hub / "gpt2", "--text", beginning, *options, "--out", "file", "--quiet").exit_code == 0
    assert ", the first of a stream" in pipe.stdout and ", spread evenly over the 25 of the text" in whole.stdout
    found = {name: read_spectrum(name) for name in ("pipe", "whole", "file")}
    assert (found["whole"].metadata["text"], found["pipe"].metadata["text"]) == (str(hub / "text.txt"), "-")
    assert not torch.equal(found["whole"].full.eigenvalues, found["pipe"].full.eigenvalues)
    first = text_batches(load(hub / "gpt2").tokenizer, beginning.read_text(), task="causal_lm", context=8)
    want = ff.fisher_spectrum(load(hub / "gpt2").model, {k: v[:3] for k, v in first[0].items()}, num_tokens=21)
    assert torch.equal(found["pipe"].full.eigenvalues, want.full.eigenvalues)


def test_documents_of_json_lines_are_clusters(hub, here):
    """What is said of the population is that of the library with the document of each window for a cluster."""
    words = (hub / "text.txt").read_text().split()
    documents = [" ".join(words[i * 20 : i * 20 + 20]) for i in range(4)]
    lines = [json.dumps(text if i % 2 else {"text": text, "id": i}) for i, text in enumerate(documents)]
    (here / "text.jsonl").write_text("\n".join(lines) + "\n")
    ran = run("--model", hub / "gpt2", "--text", "text.jsonl", "--context", 8, "--dtype", "float64")
    assert "12 windows of 8 positions without a start token, all of the text, from 4 documents" in ran.stdout
    assert "Of the population that these 4 documents were drawn from" in ran.stdout
    loaded = load(hub / "gpt2", dtype=torch.float64)
    windows = text_windows(loaded.tokenizer, documents, task="causal_lm", context=8)
    want = ff.fisher_spectrum(loaded.model, windows.batches, clusters=windows.documents).population
    assert read_spectrum("gpt2").population == want and want.num_clusters == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 of text.jsonl is not JSON"), ('{"body": 1}', r'"text" is one, got dict with the keys .*body')],
)
def test_a_line_that_is_no_document_is_named(hub, here, line, message):
    (here / "text.jsonl").write_text('"one two"\n' + line)
    ran = run("--model", hub / "gpt2", "--text", "text.jsonl")
    assert ran.exit_code == 1 and re.search(message, ran.stderr)


def test_fewer_tokens_than_the_default_are_all_taken(hub, here):
    assert run(*tiny(hub), "--quiet").exit_code == 0
    result = read_spectrum("gpt2")
    assert result.metadata["num_tokens"] == 193  # 200 words in windows of 32, the model's limit
    assert result.metadata["context"] == hf_folders.CONTEXT


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("gpt2", "gpt2-spectrum"),  # a folder gpt2 here would hide the hub's gpt2 from the next run
        ("owner/some-model", "some-model"),
        ("models/tiny", "tiny"),
        ("./tiny", "tiny-spectrum"),
        ("../elsewhere/tiny model!/", "tiny-model"),
        (".", "here-spectrum"),
    ],
)
def test_results_go_beside_the_model_never_into_it(here, model, folder):
    chosen = job.Job(model=model).folder
    assert str(chosen) == folder or model == "."
    assert chosen.resolve() != Path(model).resolve()


def test_checkpoints_have_folders_of_their_own():
    folders = [str(job.Job(checkpoint=name).folder) for name in CHECKPOINTS]
    assert folders == [f"sotu-llama-{name}" for name in CHECKPOINTS]


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("4096", 4096), ("10b", 10)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1GB", "0", "1e9", "0.1b"])
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_bytes(text)


def test_the_help_names_every_option_and_column():
    text = run("--help").stdout
    command = cli.commands["spectrum"]
    for option in command.params:
        assert option.opts[0] in text
    for word in ("λ_max", "gap", "condition number", "eff. rank", "trace", "Examples:", "default"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


def test_version_and_no_command():
    runner = CliRunner()
    assert re.fullmatch(r"fisherfunc \d+\.\d+\.\d+\n", runner.invoke(cli, ["--version"]).stdout)
    nothing = runner.invoke(cli, [])
    assert nothing.exit_code == 0
    assert "spectrum" in nothing.stdout
    unknown = runner.invoke(cli, ["spectra"], prog_name="fisherfunc")
    assert unknown.exit_code == 2
    assert re.fullmatch(r"fisherfunc: error: No such command 'spectra'.*; see fisherfunc --help\n", unknown.stderr)


def test_json_is_short_for_format_json(tmp_path):
    """Before or after other options, also beside --format, and standard output holds nothing else."""
    found = []
    for name, form in (("a", ["--json"]), ("b", ["--format", "json"])):
        output = run("--tokens", "12", *form, "--out", tmp_path / name).stdout
        found.append(json.loads(output)["full"])
    assert found[0] == found[1]
    for words in (["compare", "--json", tmp_path / "a", tmp_path / "b"], ["plan", "--json", "--format", "table"]):
        result = CliRunner().invoke(cli, [str(word) for word in words], prog_name="fisherfunc")
        assert isinstance(json.loads(result.stdout), dict)
