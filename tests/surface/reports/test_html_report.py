"""The report: one page that needs nothing else, holds what the result holds, and says how to repeat it."""

import json
import re
import shlex
import sys
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import fisherfunc as ff
from fisherfunc.pipeline.sheets import told
from fisherfunc.records.sheet import figure
from fisherfunc.surface import files
from fisherfunc.surface.cli import cli, spectrum
from fisherfunc.surface.jobs.job import Job
from fisherfunc.surface.reports import html_report

EMPTY = {"meta", "br", "hr", "img", "link", "input"}
NASTY = '<script>alert(1)</script>&"\x1b\u202e'


class Reader(HTMLParser):
    """The text of a page; every tag that is opened is closed, in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return ff.fisher_spectrum(model, (torch.randn(12, 4), torch.randint(3, (12,))))


def cells(page):
    return [text.strip() for text in Reader(page).text if text.strip()]


def test_the_page_needs_nothing_else(result):
    page = html_report.page({"": result})
    reader = Reader(page)
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint({tag for tag, _ in reader.tags})
    assert all({"src", "href", "srcset", "data"}.isdisjoint(attributes) for _, attributes in reader.tags)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in reader.tags]
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_page_holds_what_the_result_holds(result):
    found = cells(html_report.page({"": result}))
    for label, found_of in result.matrices.items():
        assert label in found
        for metric in (ff.metrics.largest, ff.metrics.trace, ff.metrics.effective_rank):
            assert figure(metric(found_of).item()) in found
    trace = result.population.trace.full
    assert told(trace) in found
    assert figure(result.coupling.block_diagonal_error) in found
    assert f"{result.coupling.alignment[0][1]:.2f}" in found
    assert f"{result.full.num_params:,} parameters, all of the model" in found
    assert any(torch.__version__ in text for text in found)
    assert [warning for warning in html_report.limits_of(result, result.full).warnings if warning not in found] == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 3, "num_tokens": 7, "blocks": ff.by_parameter, "center": True},
        {"unit": "sequence", "blocks": ff.whole},
        {"targets": ff.targets.sampled(num_draws=2, seed=5)},
        {"targets": ff.targets.all_classes()},
    ],
    ids=["plain", "picked and centred", "sequences", "sampled", "all classes"],
)
def test_the_python_of_the_page_gives_the_same_numbers(options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    batch = (torch.randn(12, 4), torch.randint(3, (12,)))
    result = ff.fisher_spectrum(model, batch, **options)
    namespace = {"model": model, "batch": batch}
    exec(html_report._python(result.provenance), namespace)
    again = namespace["result"]
    assert list(again.blocks) == list(result.blocks)
    assert torch.equal(again.full.eigenvalues, result.full.eigenvalues)


JOBS = st.builds(
    Job,
    model=st.none() | st.sampled_from(["org/name", "a folder"]),
    text=st.just("-"),
    blocks=st.sampled_from(["layer", "module", "whole"]),
    num_tokens=st.none() | st.integers(1, 9),
    context=st.none() | st.integers(1, 9),
    seed=st.integers(0, 3),
    center=st.booleans(),
    unit=st.sampled_from(["token", "sequence"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    memory_limit=st.none() | st.integers(1, 2**40),
    intervals=st.sampled_from([None, "jackknife"]),
    targets=st.just("sampled"),
    num_draws=st.none() | st.integers(1, 3),
    bos=st.sampled_from(["auto", "never"]),
)


OF_LANCZOS = ("method", "leading", "tolerance", "probes", "trace")


@given(JOBS)
def test_the_command_of_a_job_is_read_back_as_the_job(job):
    words = shlex.split(job.command)
    assert words[:2] == ["fisherfunc", "spectrum"]
    options = dict(spectrum.make_context("spectrum", words[2:]).params)
    for other in ("form", "quiet", "out", "resume", "debug", *OF_LANCZOS):
        del options[other]
    checkpoint = options.pop("checkpoint") or "final"
    assert Job(checkpoint=checkpoint, **options) == job


def test_names_and_tokens_are_shown_and_not_run():
    gradients = {NASTY: torch.eye(3, dtype=torch.float64), "b": torch.eye(3, dtype=torch.float64)}
    result = ff.spectrum_of_gradients(gradients, blocks=ff.by_parameter)
    token = {"vector": 0, "share": 0.5, "loss": 1.0, "text": NASTY, "before": NASTY, "after": NASTY}
    page = html_report.page({NASTY: result}, tokens={NASTY: {"metadata": {"block": NASTY}, "tokens": [token]}})
    reader = Reader(page)
    assert "script" not in {tag for tag, _ in reader.tags} and not any(sign in page for sign in "\x1b\u202e")
    assert sum("<script>alert(1)</script>" in text for text in reader.text) >= 5


def test_save_html_writes_the_page(result, tmp_path):
    result.save_html(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == html_report.page({"": result})


def test_the_command_writes_into_the_folder_or_here_or_where_it_is_told(result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        files.write_files(name, {files.JSON_NAME: files.to_json(result)})
    row = {"vector": 0, "share": 0.5, "loss": 1.0, "text": "word", "before": "a ", "after": " b"}
    (tmp_path / "one" / "tokens.json").write_text(json.dumps({"metadata": {"block": "full matrix"}, "tokens": [row]}))

    def run(*words):
        return CliRunner().invoke(cli, ["report", *words], prog_name="fisherfunc")

    assert run("one").stdout == "wrote one/report.html\n"
    assert "word" in cells((tmp_path / "one" / "report.html").read_text(encoding="utf-8"))
    assert run("one", "two").exit_code == 0 and run("one", "two", "--out", "other.html").exit_code == 0
    both = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert both == (tmp_path / "other.html").read_text(encoding="utf-8")
    assert {"one", "two"} <= set(cells(both)) and both.count("<section>") == 2
    (tmp_path / "one" / "tokens.json").write_text("[1]")
    damaged, missing = run("one"), run("absent")
    assert damaged.exit_code == missing.exit_code == 1
    assert "tokens.json is not what `fisherfunc tokens --json` writes" in damaged.stderr and "absent" in missing.stderr


def test_without_jinja_the_error_says_what_to_install(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "fisherfunc\[report\]"'):
        html_report.page({"": result})
