"""The command under torchrun: one result, one table, one error, whatever the number of ranks."""

import json
import os
import subprocess
import sys

import pytest
from commands import run

LAUNCHED = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fisherfunc"]
WATCHDOG_S = 240


def launched(folder, *options):
    """What the command prints on two ranks, in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*LAUNCHED, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=WATCHDOG_S
    )
    return done.returncode, done.stdout, done.stderr


def test_two_ranks_print_and_write_what_one_process_does(here):
    task = ("--tokens", "45", "--context", "16", "--dtype", "float64")
    status, table, _ = launched(here, "spectrum", *task, "--out", "two")
    alone = run(*task, "--out", "one")
    assert (status, alone.exit_code) == (0, 0)
    assert table.replace("into two", "into one") == alone.stdout
    two, one = (json.loads((here / name / "spectrum.json").read_text()) for name in ("two", "one"))
    assert two["full"]["trace"] == pytest.approx(one["full"]["trace"], rel=1e-12)
    assert two["metadata"]["num_ranks"] == 2
    assert sum(rank["tokens"] for rank in two["metadata"]["ranks"]) == 45


def test_an_error_is_printed_once(tmp_path):
    status, _, said = launched(tmp_path, "spectrum", "--tokens", "10000000")
    assert status != 0
    assert said.count("fisherfunc: error: --tokens 10000000 asks for more predictions than the text gives") == 1
    assert said.count("fisherfunc: error:") == 1
