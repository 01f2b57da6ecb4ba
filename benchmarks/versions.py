"""The tests on several versions of Python and of PyTorch, each pair in an environment of its own.

    python -m benchmarks.versions
    python -m benchmarks.versions --python 3.11 --torch 2.6.0 --tests tests/pipeline/test_fisher.py

Of each pair: a virtual environment in `--work`, this PyTorch, all else of constraints.txt, the package, the tests. A
pair that could not be run, for want of an interpreter or of a wheel, is a row that says so, and the exit code is 1, as
where a test fails.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
NEWEST = "2.15.0"
"""The newest PyTorch that the tests were run on. It needs the libraries of CUDA to be imported, also on a CPU."""
OWN_OF_TORCH = ("torch", "torchvision", "sympy", "triton")
"""What constraints.txt pins for one version of PyTorch."""
SMALL: tuple[str, ...] = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools")
"""What PyTorch needs beside the libraries of CUDA."""
TESTS = tuple(
    f"tests/{name}.py"
    for name in (
        *("laws/test_oracle", "laws/test_torch_func_inside", "linalg/test_gram", "linalg/test_kernels"),
        *("gradients/factored/test_misleading_models", "gradients/rows/test_stacks"),
        "gradients/checks/test_certificate",
        *("pipeline/test_fisher", "operators/test_fisher", "population/test_second_moments"),
        *("models/test_quantised", "models/test_huggingface", "models/calls/test_recomputation", "surface/test_cli"),
    )
)
"""Each layer, both routes, and what reaches into PyTorch's insides."""


def torches() -> tuple[str, ...]:
    """The oldest PyTorch of pyproject.toml, the one of constraints.txt, and the newest that was tried."""
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert oldest and pinned
    return f"{oldest[1]}.0" if oldest[1].count(".") == 1 else oldest[1], pinned[1], NEWEST


def interpreter(version: str) -> str | None:
    """The path of a Python that runs and is of this version: on the path, or one of pyenv's."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python"))
    for path in (shutil.which(f"python{version}"), *map(str, pyenv)):
        if path is None:
            continue
        said = subprocess.run([path, "--version"], capture_output=True, text=True)  # one of pyenv's shims may be empty
        if said.returncode == 0 and f"{said.stdout.split()[-1]}.".startswith(f"{version}."):
            return path
    return None


def pinned(folder: Path) -> Path:
    """constraints.txt without what belongs to one version of PyTorch."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = folder / "constraints.txt"
    path.write_text("\n".join(line for line in lines if line.split("==")[0] not in OWN_OF_TORCH))
    return path


def installing(python: str, torch: str, place: Path, *, small: bool) -> Iterator[list[str]]:
    """The commands that make an environment."""
    pip = [str(place / "bin" / "pip"), "install", "--quiet", "--no-compile"]
    yield [python, "-m", "venv", "--clear", str(place)]
    yield [*pip, "--no-deps", f"torch=={torch}"] if small else [*pip, f"torch=={torch}"]
    if small:
        yield [*pip, *SMALL]
    yield [*pip, "hatchling", "editables"]  # constraints.txt is of what runs, without what builds
    yield [*pip, "--no-deps", "-r", str(pinned(place.parent))]
    yield [*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)]


def row(python: str, torch: str, work: Path, tests: list[str], *, small: bool) -> tuple[str, bool]:
    """What became of a pair, and whether all of its tests passed."""
    path = interpreter(python)
    if path is None:
        return f"| {python} | {torch} | not run: no interpreter of Python {python} on this machine | |", False
    place = work / f"python-{python}-torch-{torch}"
    for command in installing(path, torch, place, small=small):
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            lines = made.stderr.strip().splitlines() or [f"{command[0]} ended with {made.returncode}"]
            said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            return f"| {python} | {torch} | not run: {said} | |", False
    begin = time.monotonic()
    log = work / f"{place.name}.log"
    with log.open("w") as file:  # written as it goes, so that a run that is stopped says how far it came
        ran = subprocess.run(
            [str(place / "bin" / "python"), "-m", "pytest", "-n0", "-v", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    lines = [line for line in log.read_text().splitlines() if re.search(r"^=+ .*\d+ (passed|failed|error)", line)]
    summary = re.sub(r" in .*", "", lines[-1]).strip("= ") if lines else f"no tests ran (exit {ran.returncode})"
    return f"| {python} | {torch} | {summary} | {time.monotonic() - begin:.0f} |", ran.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--torch", nargs="+", default=torches(), metavar="VERSION")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="'tests' runs all")
    parser.add_argument("--work", type=Path, help="where environments and logs go, and stay; else a temporary folder")
    parser.add_argument(
        "--small", action="store_true", help="install PyTorch without the libraries of CUDA, where pip gets a CPU build"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        print("| Python | PyTorch | tests | seconds |\n| --- | --- | --- | ---: |", flush=True)
        passed = True
        for python in args.python:
            for torch in args.torch:
                line, well = row(python, torch, work, list(args.tests), small=args.small)
                print(line, flush=True)
                passed = passed and well
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
