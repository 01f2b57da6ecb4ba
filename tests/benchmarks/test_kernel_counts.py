"""Kernels are counted alike on every machine, views are none, and a run of small work keeps within its bound."""

import pytest
import torch
from tasks import LANGUAGE, samples

from benchmarks.kernels import GRAINS, PARTS, Kernels, by_part, counted, divided_as, table
from benchmarks.sections import BEFORE, CHECK, CONTRACTION
from benchmarks.tasks import gpt2
from fisherfunc.runtime.grain import grain_of

MOST = {"before the pass": 500, "pass": 160, "contraction": 30, "check": 400, "rest": 40}
"""Of a network of two linear maps on a few samples, whose forward and backward pass are some twenty kernels: a quarter
more than there are, for other versions of torch. Lower them when there are fewer."""


def test_views_are_no_kernels_and_reads_are_told():
    x = torch.ones(3, 4)
    with Kernels() as kernels:
        bool((x.T + 1).any())  # a sum, any, and a read; the transpose is a view
    assert (kernels.launched, kernels.read) == (3, 1)


def test_what_no_section_has_is_the_rest():
    found = by_part({BEFORE[0]: 1, BEFORE[1]: 2, CONTRACTION: 4, CHECK: 8, "backward passes": 16}, 100)
    assert found == {"before the pass": 3, "pass": 16, "contraction": 4, "check": 8, "rest": 69}


def test_sizes_are_those_of_the_device_again_after_counting():
    with divided_as(GRAINS["GPU"]):
        assert grain_of(torch.device("cpu")) is GRAINS["GPU"]
    assert grain_of(torch.device("cpu")) is GRAINS["CPU"]


@pytest.mark.parametrize("division", GRAINS)
def test_a_run_of_small_work_dispatches_few_kernels(division):
    found = counted(samples("classification", 5), GRAINS[division])["kernels"]
    assert list(found) == list(PARTS)
    assert {part: count for part, count in found.items() if not 0 < count <= MOST[part]} == {}


def test_counting_again_gives_the_same():
    task = gpt2(sequences=2, positions=5, **LANGUAGE)
    first, again = (counted(task, GRAINS["GPU"]) for _ in range(2))
    assert first == again
    shown = table({"language": {"GPU": first}, "other": {"CPU": {"reason": "it died"}}})
    assert f"| {sum(first['kernels'].values()):,} |" in shown and "| other | CPU | it died |" in shown
