"""docs/composing.md does what it says: its Python runs, and each cell of its table is what a transform does."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import grams_of
from folders import PYTHONPATH, REPOSITORY
from torch.func import jacrev, vmap
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import fisherfunc as ff
from fisherfunc.records.provenance import Provenance

PAGE = REPOSITORY / "docs" / "composing.md"
TEXT = PAGE.read_text(encoding="utf-8")
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(
    r"^\| (`(?:gram|kernels|metrics|TokenGrams|spectrum_of\w+|token_grams)\b.*?) \| (\w+) \| (.*) \|$", re.M
)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROWS = gaussian(6, 9)
GRAM = ff.gram.of_rows(ROWS)
TOKENS = grams_of({"a": ROWS[:, :5], "b": ROWS[:, 5:]}, sequence=torch.tensor([0, 0, 1, 1, 2, 2]))
EIGH = ff.kernels.gram_eigh()
FN = ff.functionalize(torch.nn.Linear(4, 3).double())
BATCH = (gaussian(5, 4), torch.tensor([0, 1, 2, 0, 1]))
GIVEN = {"Gram": GRAM, "rows": ROWS, "Spectrum": EIGH(GRAM), "TokenGrams": TOKENS, "parameters": dict(FN.params)}
FUNCTIONS = {
    "gram.centred": ff.gram.centred,
    "gram.selected": lambda gram: ff.gram.selected(gram, torch.tensor([0, 2, 3])),
    "gram.summed": lambda gram: ff.gram.summed([gram, gram]),
    "gram.weighted": lambda gram: ff.gram.weighted(gram, torch.arange(6).double()),
    "gram.regrouped": lambda gram: ff.gram.regrouped(gram, torch.tensor([0, 0, 1, 1, 2, 2]), 3),
    "kernels.gram_eigh": EIGH,
    "kernels.gram_svd": ff.kernels.gram_svd(),
    "kernels.jittered": ff.kernels.jittered(EIGH),
    "kernels.centred": ff.kernels.centred(EIGH),
    "kernels.robust_eigh": ff.kernels.robust_eigh(),
    "kernels.checked": ff.kernels.checked(EIGH),
    "kernels.of_rows": ff.kernels.of_rows(EIGH),
    "kernels.covariance_eigh": ff.kernels.covariance_eigh(),
    "kernels.svd": ff.kernels.svd(),
    "kernels.cheapest": ff.kernels.cheapest(),
    "kernels.svd_lowrank": ff.kernels.svd_lowrank(rank=2, oversampling=1),
    "metrics.numerical_rank": ff.metrics.numerical_rank,
    "TokenGrams.summed": lambda grams: grams.summed(),
    "TokenGrams.center": lambda grams: grams.center()["a"],
    "TokenGrams.by_sequence": lambda grams: grams.by_sequence()["a"],
    "spectrum_of_grams": lambda grams: ff.spectrum_of_grams(grams).full,
    "spectrum_of_gradients": lambda rows: ff.spectrum_of_gradients({"w": rows}).full,
    "token_grams": lambda params: ff.token_grams(FN, params, BATCH, ff.losses.classification()).summed(),
    "per_token_gradients": lambda params: ff.per_token_gradients(FN, params, BATCH, ff.losses.classification()),
}
FUNCTIONS |= {f"metrics.{name}": getattr(ff.metrics, name) for name in ff.metrics.SUMMARY}


def cells() -> list[tuple[str, str, str, str]]:
    """(function, what it is of, transform, what the table says)."""
    found = []
    for names, of, said in ROW.findall(TEXT):
        listed = re.findall(r"`([\w.*]+)`", names)
        if listed == ["metrics.*"]:
            listed = sorted(f"metrics.{name}" for name in ff.metrics.SUMMARY if name != "numerical_rank")
        for name in listed:
            said_of = zip(("vmap", "jacrev", "compile"), said.split(" | "), strict=True)
            found += [(name, of, transform, cell) for transform, cell in said_of]
    return found


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for match in FENCE.finditer(TEXT):
        lines = "\n" * TEXT.count("\n", 0, match.start(1))  # so that a traceback names the line of the page
        exec(compile(lines + match[1], str(PAGE), "exec"), namespace)
    assert len(FENCE.findall(TEXT)) >= 4


def test_the_table_has_every_function():
    assert {name for name, *_ in cells()} == set(FUNCTIONS)


def stacked(*values):
    return pytree.tree_map(lambda *tensors: torch.stack(tensors), *values)


def assert_alike(got, want, tolerance=1e-11):
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("name", "of", "cell"), [(n, of, cell) for n, of, how, cell in cells() if how == "vmap"])
def test_what_survives_vmap_is_the_stack_of_what_a_loop_gives(name, of, cell):
    function, one = FUNCTIONS[name], GIVEN[of]
    other = pytree.tree_map(lambda t: 2 * t if t.is_floating_point() else t, one)
    if cell == "–":
        with pytest.raises(RuntimeError, match=r"(looks at values.*vmap|transform of torch\.func); (map|sum|loop)"):
            vmap(function)(stacked(one, other))
        return
    assert cell in ("yes", "yes, unchecked", 'with `randomness="same"`')
    randomness = "same" if "randomness" in cell else "error"
    got = vmap(function, randomness=randomness)(stacked(one, other))
    assert_alike(got, stacked(function(one), function(other)))


@pytest.mark.parametrize(("name", "of", "cell"), [(n, of, cell) for n, of, how, cell in cells() if how == "jacrev"])
def test_what_survives_jacrev_has_the_derivative_of_a_difference(name, of, cell):
    function, one = FUNCTIONS[name], GIVEN[of]
    if cell == "–":
        with pytest.raises(RuntimeError, match=r"transform of torch\.func|floating|gradient"):
            jacrev(function)(one)
        return
    assert cell == "yes"

    def values(given):
        found = function(given)  # not resolutions and negative parts, which go by what is left of round-off
        return getattr(found, {ff.Spectrum: "eigenvalues", ff.Gram: "matrix"}.get(type(found), "real"))

    leaves, spec = pytree.tree_flatten(one)
    direction = gaussian(*leaves[0].shape, seed=1)
    direction = direction + direction.mT if of == "Gram" else direction
    step = 1e-5

    def at(t):
        return values(pytree.tree_unflatten([leaves[0] + t * direction, *leaves[1:]], spec))

    derivative = jacrev(lambda leaf: values(pytree.tree_unflatten([leaf, *leaves[1:]], spec)))(leaves[0])
    along = (derivative * direction).flatten(derivative.ndim - direction.ndim).sum(dim=-1)
    # A central difference is off by step² f'''/6 and by eps |f| / step: some 1e-9 of the derivative here.
    assert_close(along, (at(step) - at(-step)) / (2 * step), atol=1e-6, rtol=1e-6)


def compiled_cells() -> dict[str, str]:
    """{function: "" where it gives the same compiled, else how it failed}; in a process without checks of types."""
    found = {}
    for name, of, how, cell in cells():
        if how == "compile" and cell != "–":
            torch._dynamo.reset()
            compiled = torch.compile(FUNCTIONS[name], backend="eager", fullgraph=cell == "whole")
            try:
                assert_alike(compiled(GIVEN[of]), FUNCTIONS[name](GIVEN[of]))
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
            else:
                found[name] = ""
    return found


@pytest.fixture(scope="module")
def compiled():
    code = "import json, sys, test_composing; json.dump(test_composing.compiled_cells(), sys.stdout)"
    path = os.pathsep.join([str(Path(__file__).parent), PYTHONPATH])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "cell"), [(n, cell) for n, _, how, cell in cells() if how == "compile"])
def test_what_survives_compile_gives_the_same(compiled, name, cell):
    assert cell in ("whole", "in parts", "–")
    assert compiled.get(name, "") == ""


def test_tokens_with_and_without_columns_go_through_vmap():
    tokens = TOKENS.tokens
    drawn = replace(tokens, draw=torch.zeros(6, dtype=torch.long), target=torch.arange(6))
    for one in (tokens, drawn):
        later = vmap(lambda t: replace(t, position=t.position + t.sequence))(stacked(one, one))
        assert torch.equal(later.position[1], one.position + one.sequence)
        assert (later.draw is None, later.target is None) == (one.draw is None, one.target is None)
    assert pytree.tree_structure(tokens) != pytree.tree_structure(drawn)


def test_runs_that_differ_in_provenance_stack_and_runs_of_other_blocks_do_not():
    doubled = {name: 2 * k for name, k in TOKENS.grams.items()}
    other = replace(TOKENS, provenance=Provenance(loss="another"), grams=doubled)
    stack = stacked(TOKENS, other)
    assert stack.provenance is TOKENS.provenance and stack["a"].matrix.shape == (2, 6, 6) and stack.num_units == 6
    with pytest.raises(ValueError, match="mismatch"):
        stacked(TOKENS, replace(TOKENS, num_params={"a": 1, "b": 4}))


def test_measured_errors_are_mapped_with_their_grams():
    measured = [replace(TOKENS, errors={"a": torch.tensor(e), "b": torch.tensor(0.25)}) for e in (0.5, 0.75)]
    errors = vmap(lambda grams: grams.summed().error)(stacked(*measured))
    assert errors.tolist() == [0.75, 1.0]
