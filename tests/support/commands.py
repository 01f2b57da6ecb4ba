"""Running the command line: in this process, or in one of its own; and a folder of tiny models to run it on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import hf_folders
from click.testing import CliRunner

import fisherfunc
from fisherfunc.surface.cli import cli

FILES = [
    "couplings.png",
    "couplings.svg",
    "eigenvalues.csv",
    "run.toml",
    "spectrum.json",
    "spectrum.png",
    "spectrum.svg",
]


def hub_folder(root):
    """Tiny models of every kind, and a text of 200 words."""
    for kind in hf_folders.TASKS:
        hf_folders.write(kind, root / kind)
    (root / "text.txt").write_text(hf_folders.sentence(200))
    return root


def run(*arguments, **settings):
    return CliRunner().invoke(cli, ["spectrum", *map(str, arguments)], prog_name="fisherfunc", **settings)


def tiny(hub, kind="gpt2"):
    return ["--model", hub / kind, "--text", hub / "text.txt"]


def process(*arguments, cwd, tmp_path, **settings):
    """A real process, in which the torchvision of this machine is as absent as in conftest.py."""
    (tmp_path / "sitecustomize.py").write_text('import sys\nsys.modules["torchvision"] = None\n')
    path = os.pathsep.join([str(tmp_path), str(Path(fisherfunc.__file__).parents[1])])
    return subprocess.Popen(
        [sys.executable, "-m", "fisherfunc", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_listen_to_interrupts,
        **settings,
    )


def _listen_to_interrupts():
    """A shell in the background has its children ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
