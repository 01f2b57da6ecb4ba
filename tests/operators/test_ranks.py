"""Two gloo ranks, each with sequences of its own, have the products and eigenvalues of one process."""

import os
import subprocess
import sys

import pytest
import torch
from folders import PYTHONPATH, SUPPORT
from operator_rank import COUNTS, found_of, operator_of, setting

import fisherfunc as ff

WATCHDOG_S = 240


def ran(kind, folder):
    """What each of two ranks found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(SUPPORT / "operator_rank.py"), str(folder), kind],
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    # sums of ten rows in another order; of a difference, its step is another on each rank
    [("plain", torch.float64, 1e-12), ("float32", torch.float32, 1e-5), ("central difference", torch.float64, 1e-6)],
)
def test_two_ranks_equal_one(kind, dtype, tolerance, tmp_path):
    model, batch = setting(dtype)
    derivative = "central difference" if kind == "central difference" else "auto"
    want = found_of(operator_of(model, batch, derivative=derivative))
    first, second = ran(kind, tmp_path)
    for name, value in want.items():
        if name == "bounds":
            continue
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)  # every rank has the same bits
        torch.testing.assert_close(first[name], value, rtol=tolerance, atol=tolerance)
    off = (first["eigenvalues"] - want["eigenvalues"]).abs()
    assert bool((off <= first["bounds"] + want["bounds"]).all())
    assert first["num_tokens"] == sum(COUNTS)


def test_ranks_of_other_parameters_are_one_error_on_both(tmp_path):
    found = ran("other parameters", tmp_path)
    assert [each["error"].split(";")[0] for each in found] == ["rank 1 and rank 0 differ in parameters"] * 2


def test_without_a_group_the_error_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_process_group; under torchrun, call that first"):
        ff.operators.over_ranks(operator_of(*setting()))
