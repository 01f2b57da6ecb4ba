"""`fisherfunc spectrum --resume`: a command that is stopped, and goes on after its last finished group."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import FILES, run, tiny
from commands import process as start

from fisherfunc.surface.files import read_spectrum
from fisherfunc.surface.jobs import job

TASK = ["--tokens", 70, "--context", 8]
TWO_GROUPS = ["--memory", "2MB"]  # more have room for the Grams of 70 tokens and all factors


def kept():
    """When the Grams of each finished group were written."""
    return {file.stem: file.stat().st_mtime_ns for file in Path("kept").glob("grams-*")}


def result_of(folder):
    found = json.loads((folder / "spectrum.json").read_text())
    return {key: found[key] for key in ("per_block", "global", "full")}


@pytest.fixture
def interrupted(monkeypatch):
    """Run a command that is interrupted in its pass as soon as a group of parameters is finished."""

    def run_until(*command):
        compute = job.compute

        def stopped(task, *, progress, **options):
            def report(done, total):
                progress(done, total)
                if kept():
                    assert done < total
                    raise KeyboardInterrupt

            return compute(task, progress=report, **options)

        with monkeypatch.context() as patch:
            patch.setattr(job, "compute", stopped)
            return run(*command)

    return run_until


def test_an_interrupted_command_says_how_to_go_on_and_goes_on(hub, here, interrupted):
    command = [*tiny(hub), *TASK, *TWO_GROUPS]
    assert run(*command, "--out", "whole").exit_code == 0
    ran = interrupted(*command, "--resume", "kept")
    assert (ran.exit_code, ran.stdout) == (130, "")
    assert ran.stderr.strip() == "fisherfunc: interrupted; run the same command again to go on from kept"
    assert sorted(os.listdir()) == ["kept", "whole"] and [*kept()] == ["grams-0"]
    first = kept()
    assert run(*command, "--resume", "kept", "--out", "again").exit_code == 0
    assert {*kept()} == {"grams-0", "grams-1"} and kept().items() >= first.items()
    assert sorted(os.listdir("again")) == FILES
    assert result_of(here / "again") == result_of(here / "whole")


def test_an_interrupted_command_that_kept_nothing_says_that_it_begins_again(hub, here, monkeypatch):
    compute = job.compute

    def stopped(task, *, progress, **options):
        def report(done, total):
            assert not kept()
            raise KeyboardInterrupt

        return compute(task, progress=report, **options)

    monkeypatch.setattr(job, "compute", stopped)
    ran = run(*tiny(hub), *TASK, "--resume", "kept")
    assert (ran.exit_code, ran.stdout) == (130, "")
    said = "interrupted before anything was finished that kept could keep; the same command begins again"
    assert ran.stderr.strip() == f"fisherfunc: {said}"
    assert (here / "kept").is_dir()


def test_another_command_may_not_use_the_folder(hub, here):
    assert run(*tiny(hub), "--tokens", 9, "--resume", "kept").exit_code == 0
    ran = run(*tiny(hub), "--tokens", 10, "--resume", "kept", "--out", "other")
    assert ran.exit_code == 1
    assert re.search(r"the checkpoint in kept is of another run; these differ: .*tokens", ran.stderr)
    assert ran.stderr.count("\n") == 1 and not (here / "other").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_command_that_was_killed_goes_on(hub, here, tmp_path):
    plain = [*tiny(hub), "--tokens", 170, "--context", 8, "--memory", "5MB"]  # two groups, of some length
    arguments = ["spectrum", *plain, "--resume", "kept"]
    process = start(*arguments, "--out", "a", cwd=here, tmp_path=tmp_path)
    deadline = time.monotonic() + 120
    while process.poll() is None and not kept() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    first = kept()
    assert first
    again = start(*arguments, "--out", "b", cwd=here, tmp_path=tmp_path)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert {*kept()} == {"grams-0", "grams-1"} and kept().items() >= first.items()
    assert run(*plain, "--out", "c").exit_code == 0
    assert result_of(here / "b") == result_of(here / "c")


def test_a_command_goes_on_with_less_memory(hub, here, interrupted):
    command = [*tiny(hub), *TASK, "--resume", "kept"]
    assert run(*tiny(hub), *TASK, "--out", "whole").exit_code == 0
    interrupted(*command, *TWO_GROUPS)
    ran = run(*command, "--memory", "1500kB", "--out", "again")
    assert ran.exit_code == 0, ran.stderr
    note = "resumed under a memory limit of 1500000 bytes, 2000000 before: what was kept was of another plan"
    assert note in " ".join(ran.stdout.split())
    want, got = (read_spectrum(here / name).full.eigenvalues for name in ("whole", "again"))
    torch.testing.assert_close(got, want, rtol=0, atol=70 * torch.finfo(torch.float32).eps * float(want.amax()))
