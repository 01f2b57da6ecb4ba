"""What isolation costs is measured against calls without its care, which give the same Grams."""

from collections import Counter

import torch
from torch import nn

from benchmarks.isolation import COPIES, WEIGHTS, counting, measured, run, table
from benchmarks.tasks import Task


class WritesToItsWeight(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_calls_without_care_give_the_same_and_a_row_says_what_care_takes():
    found = measured(("mlp", {"samples": 12, "width": 8}, "cpu"), 1)
    assert found["off"] < 1e-5 and 0 < found["share"] < 1
    assert found["counts"][WEIGHTS] == 0 < found["counts"][COPIES]
    assert table({"mlp": found}).splitlines()[-1].startswith(f"| mlp | {found['counts'][COPIES]} |")
    assert "no memory" in table({"mlp": {"reason": "no memory"}})


def test_weights_that_a_model_writes_to_are_copied_and_counted():
    model, counts = WritesToItsWeight(5, 3), Counter()
    task = Task(kind="classification", model=model, inputs=torch.randn(6, 5), targets=torch.arange(6) % 3)
    with counting(counts):
        run(task, isolated=True)
    assert counts[WEIGHTS] >= model.weight.nbytes
