"""What is printed says which Fisher it is: tables, captions, plots, plans, files, and the command line."""

import json
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from commands import run, tiny
from consoles import shown
from torch import nn

import fisherfunc as ff
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.cli import cli
from fisherfunc.surface.files import read_spectrum, to_json
from fisherfunc.surface.plots.plots import plot_spectrum
from fisherfunc.surface.reports.plan_report import plan_report
from fisherfunc.surface.reports.report import report

NAMES = {
    "observed": ("empirical", "Empirical Fisher"),
    "sampled": ("true (Monte-Carlo, 3 draws)", "True Fisher (Monte-Carlo, 3 draws)"),
    "all_classes": ("true (exact)", "True Fisher (exact)"),
}
TARGETS = {"observed": None, "sampled": ff.targets.sampled(3, seed=7), "all_classes": ff.targets.all_classes()}
ROWS = {"observed": "4 tokens", "sampled": "4 tokens, 12 rows", "all_classes": "4 tokens, 12 rows"}


def setting():
    torch.manual_seed(0)
    return nn.Linear(2, 3), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("kind", NAMES)
def test_results_and_their_tables_and_plots_say_which_fisher(kind, tmp_path):
    model, batch = setting()
    result = ff.fisher_spectrum(model, batch, targets=TARGETS[kind])
    fisher, title = NAMES[kind]
    assert result.metadata["fisher"] == fisher
    name = {"sampled": "sampled(num_draws=3, seed=7)"}.get(kind, kind)
    assert result.metadata["targets"] == name
    text = shown(report(result))
    assert text.startswith(f"{title} of Linear\n\nOf the population that these 4 sequences were drawn from")
    assert f"{title} per token: " in text and f"({ROWS[kind]})" in text
    axes = plot_spectrum(result).axes[0]
    assert axes.get_title(loc="left") == f"Spectrum of the {title[0].lower() + title[1:]}"
    assert ROWS[kind] in " ".join(part.get_text() for part in axes.texts)
    (tmp_path / "spectrum.json").write_text(to_json(result))
    again = read_spectrum(tmp_path)
    assert again.metadata["fisher"] == fisher and again.full.num_tokens == 4
    assert torch.equal(again.full.eigenvalues, result.full.eigenvalues)


@pytest.mark.parametrize("kind", NAMES)
def test_plans_say_which_fisher_and_count_its_rows(kind):
    model, batch = setting()
    plan = ff.plan(model, batch, targets=TARGETS[kind], calibrate=False)
    result = ff.fisher_spectrum(model, batch, targets=TARGETS[kind])
    assert plan.num_units == result.metadata["num_rows"] == result.metadata["plan"]["num_units"]
    assert plan.operations == pytest.approx(result.metadata["plan"]["operations"])
    text = shown(plan_report(plan, Provenance(fisher=NAMES[kind][0], model="Linear")))
    assert f"Plan for Linear: {NAMES[kind][1][0].lower() + NAMES[kind][1][1:]}" in text
    assert f"{ROWS[kind]} of 4 sequence(s)" in text


def test_the_command_draws_targets(hub, here):
    options = ["--tokens", 6, "--context", 8, "--targets", "sampled", "--draws", 2, "--seed", 3, "--format", "json"]
    ran = run(*tiny(hub), *options)
    assert ran.exit_code == 0
    facts = json.loads(ran.stdout)["metadata"]
    assert facts["targets"] == "sampled(num_draws=2, seed=3)" and (facts["num_tokens"], facts["num_rows"]) == (6, 12)
    ran = CliRunner().invoke(cli, ["plan", *map(str, [*tiny(hub), *options])])
    planned = json.loads(ran.stdout)
    assert planned["num_units"] == 12 and planned["metadata"]["fisher"] == "true (Monte-Carlo, 2 draws)"


def test_the_command_takes_all_classes_and_refuses_what_does_not_fit(hub, here):
    ran = run(*tiny(hub), "--tokens", 2, "--context", 8, "--targets", "all-classes", "--quiet")
    assert (ran.exit_code, read_spectrum(here / "gpt2").metadata["fisher"]) == (0, "true (exact)")
    ran = run(*tiny(hub), "--tokens", 40, "--targets", "all-classes", "--memory", "1MB")
    assert ran.exit_code == 1 and "bytes" in ran.stderr and "take --targets sampled, " in ran.stderr
    ran = run(*tiny(hub), "--draws", 3)
    assert ran.exit_code == 1 and "--draws 3 is of sampled targets, got --targets observed" in ran.stderr


def test_fisher_never_stands_alone_in_what_the_command_says():
    texts = [CliRunner().invoke(cli, [*command, "--help"]).stdout for command in ([], ["spectrum"], ["plan"])]
    for text in texts:
        words = " ".join(text.split()).split("Fisher")
        for before, after in pairwise(words):
            assert before.rstrip().endswith(("empirical", "true")) or "empirical or true" in after[:80]
