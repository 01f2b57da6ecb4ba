"""Results that are called after a number are compared in its order, whatever order a shell has for them."""

import itertools
import json

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from spectra import spectrum

from fisherfunc.surface.cli import cli
from fisherfunc.surface.files import to_json, write_files
from fisherfunc.surface.jobs import compare_job
from fisherfunc.surface.plots.axis import varying_number


def compared(here, monkeypatch, names):
    monkeypatch.setattr(compare_job, "plot_comparison", lambda *_, **__: Figure(figsize=(1, 1)))
    for seed, name in enumerate(names):
        found = spectrum(("a", "b"), scale=1.0 + seed, tokens="0123", model_id=name)
        write_files(here / name, {"spectrum.json": to_json(found)})
    ran = CliRunner().invoke(cli, ["compare", *names, "--format", "json"])
    assert ran.exit_code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert [facts["model_id"].split("/")[-1] for facts in found["results"].values()] == list(found["results"])
    return list(found["results"])


@pytest.mark.parametrize("names", list(itertools.permutations(["checkpoint-50", "checkpoint-100", "checkpoint-1000"])))
def test_checkpoints_are_in_the_order_of_training(here, monkeypatch, names):
    assert compared(here, monkeypatch, names) == ["checkpoint-50", "checkpoint-100", "checkpoint-1000"]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("run/step-20", "run/step-3"), ("step-3", "step-20")),
        (("lr-0.5", "lr-0.25", "lr-1e-3"), ("lr-1e-3", "lr-0.25", "lr-0.5")),
        (("final", "step-10", "step-9"), ("final", "step-10", "step-9")),
        (("b", "a"), ("b", "a")),
        (("a2-b1", "a1-b2"), ("a2-b1", "a1-b2")),  # they differ in two numbers
        (("step-050", "step-50"), ("step-050", "step-50")),  # in none
    ],
)
def test_the_order_of_names(here, monkeypatch, names, order):
    assert compared(here, monkeypatch, names) == list(order)


def test_a_number_is_found_wherever_it_stands():
    assert varying_number(["7b-5-x", "7b-12-x"]) == [5, 12]
    assert varying_number(["5", "12"]) == [5, 12]
    assert varying_number(["a", "a1"]) == []
