"""`fisherfunc spectrum --resume`: a command that is stopped, and goes on."""

import json
import os
import re
import signal
import time

import pytest
import torch
from commands import FILES, run, tiny
from commands import process as start

from fisherfunc.surface import job
from fisherfunc.surface.files import read_spectrum


def result_of(folder):
    found = json.loads((folder / "spectrum.json").read_text())
    return {key: found[key] for key in ("per_block", "global", "full")}


def interrupted_in_the_pass(monkeypatch, after):
    compute = job.compute

    def stopped(task, *, progress, **options):
        def report(done, total):
            progress(done, total)
            if done >= after:
                raise KeyboardInterrupt

        return compute(task, progress=report, **options)

    monkeypatch.setattr(job, "compute", stopped)


def test_an_interrupted_command_says_how_to_go_on_and_goes_on(hub, here, monkeypatch):
    command = [*tiny(hub), "--tokens", 70, "--context", 8, "--resume", "kept"]
    assert run(*tiny(hub), "--tokens", 70, "--context", 8, "--out", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        interrupted_in_the_pass(patch, 65)
        ran = run(*command)
    assert (ran.exit_code, ran.stdout) == (130, "")
    assert ran.stderr.strip() == "fisherfunc: interrupted; run the same command again to go on from kept"
    assert sorted(os.listdir()) == ["kept", "whole"]
    assert run(*command, "--out", "again").exit_code == 0
    assert sorted(os.listdir("again")) == FILES
    assert result_of(here / "again") == result_of(here / "whole")


def test_another_command_may_not_use_the_folder(hub, here):
    assert run(*tiny(hub), "--tokens", 9, "--resume", "kept").exit_code == 0
    ran = run(*tiny(hub), "--tokens", 10, "--resume", "kept", "--out", "other")
    assert ran.exit_code == 1
    assert re.search(r"the checkpoint in kept is of another run; these differ: .*tokens", ran.stderr)
    assert ran.stderr.count("\n") == 1 and not (here / "other").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_command_that_was_killed_goes_on(hub, here, tmp_path):
    plain = [*tiny(hub), "--tokens", 170, "--context", 8]
    arguments = ["spectrum", *plain, "--resume", "kept"]
    process = start(*arguments, "--out", "a", cwd=here, tmp_path=tmp_path)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(here.glob("kept/*-0*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    again = start(*arguments, "--out", "b", cwd=here, tmp_path=tmp_path)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert run(*plain, "--out", "c").exit_code == 0
    assert result_of(here / "b") == result_of(here / "c")


def test_a_command_goes_on_with_less_memory(hub, here, monkeypatch):
    command = [*tiny(hub), "--tokens", 70, "--context", 8, "--resume", "kept"]
    assert run(*tiny(hub), "--tokens", 70, "--context", 8, "--out", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        interrupted_in_the_pass(patch, 65)
        run(*command)
    ran = run(*command, "--memory", "200MB", "--out", "again")
    assert ran.exit_code == 0, ran.stderr
    assert "resumed under a memory limit of 200000000 bytes, None before: what was kept" in " ".join(ran.stdout.split())
    want, got = (read_spectrum(here / name).full.eigenvalues for name in ("whole", "again"))
    torch.testing.assert_close(got, want, rtol=0, atol=70 * torch.finfo(torch.float32).eps * float(want.amax()))
