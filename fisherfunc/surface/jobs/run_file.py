"""Runs as TOML: `run.toml` of each output folder, and files of several runs that a user writes.

Both have one format:

[defaults]                  # options of every run whose command has them
dtype = "float64"

[[run]]
command = "spectrum"        # any command but `run`; the other keys are its options, without --, and arguments
model = "gpt2"
tokens = 512
threads = 2                 # of any command: those of torch

[run.versions]              # what a recorded run was made with; a difference is said
torch = "2.13.0"

[run.made]
sha256 = "…"                # of eigenvalues.csv: whether a repetition is the same, to the bit
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import tomli_w
import torch

from fisherfunc.records.provenance import Provenance
from fisherfunc.runtime.versions import versions

RUN_NAME = "run.toml"
_HEAD = "# `fisherfunc run run.toml` repeats this run, and says whether the eigenvalues are the same.\n"
_BY_PYTHON = "# Made by Python: there is no command that repeats this run. What it was made with:\n"


def run_toml(
    command: str | None, options: Mapping[str, Any], facts: Provenance, *, out: str, eigenvalues: str | None
) -> str:
    """Return the text of a `run.toml`.

    Args:
        command: The command; None of a result that was made in Python.
        options: Of the command, by name (`options_of` in run_command.py).
        facts: The provenance of the result: its device and memory limit are what an automatic choice came to.
        out: The folder of the results.
        eigenvalues: The text of `eigenvalues.csv`, where there is one.
    """
    resolved = {"device": facts.device, "memory": (facts.plan or {}).get("memory_limit")}
    given = {key: str(value) if key == "memory" else value for key, value in resolved.items() if value is not None}
    made = {} if eigenvalues is None else {"made": {"sha256": sha256(eigenvalues)}}
    about = {"threads": torch.get_num_threads(), "versions": facts.versions or versions(), **made}
    if command is None:
        return _BY_PYTHON + tomli_w.dumps({**given, **about})
    return _HEAD + tomli_w.dumps({"run": [{"command": command, "out": out, **options, **given, **about}]})


def sha256(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
