"""The shape of the code, read from its source: imports point down the layers, and effects stay where they belong."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from folders import REPOSITORY
from torch.utils._device import _device_constructors

import fisherfunc as ff

PACKAGE = Path(ff.__file__).parent
LAYERS = (
    "records",
    "runtime",
    "distributed",
    "linalg",
    "partitioning",
    "statistics",
    "population",
    "gradients",
    "operators",
    "models",
    "pipeline",
)
LAYERS += ("surface",)
EXTRAS = ("transformers", "tokenizers", "accelerate", "matplotlib", "click", "rich", "hypothesis", "pandas", "xarray")
WITH_EXTRAS = ("surface", "testing", "assets")
WITH_EFFECTS = ("surface.", "records.storage.", "__main__.")
WITH_EFFECTS += ("records.tensor_files.",)
LINES = 500
FILES = 12
"""Of a folder, its `__init__.py` among them."""
MAKERS = {f"torch.{function.__name__}" for function in _device_constructors()}
SPACES = (
    ff.directions,
    ff.gram,
    ff.kernels,
    ff.losses,
    ff.metrics,
    ff.population,
    ff.statistics,
    ff.targets,
    ff.testing,
)
SPACES += (ff.operators, ff.tokens, ff.distributed, ff.sketches)
CONTRACT = {
    "": "fisher_spectrum plan RunPlan FisherSpectrum Spectrum functionalize ModelFunction per_token_gradients "
    "gradient_norms fisher_eigenvectors token_grams TokenGrams Gram partition by_layer by_module by_parameter whole "
    "deterministic SpectrumRecorder trainer_callback compare Comparison",
    "losses": "causal_lm masked_lm seq2seq_lm classification regression infer",
    "targets": "observed sampled all_classes",
    "gram": "centred selected summed weighted regrouped of_rows",
    "kernels": "gram_eigh covariance_eigh svd svd_lowrank centred checked fallback jittered of_rows robust_eigh "
    "lanczos lanczos_quadrature",
    "operators": "fisher FisherOperator TokenOperator gram_operator over_ranks LeadingEigenvalues SpectralQuadrature "
    "StoredGram stored_gram fisher_gram "
    "Estimate",
    "distributed": "ranks Ranks RanksError",
    "directions": "eigenvectors eigenpairs Eigenvectors Eigenpairs fisher_vector_product damped_inverse project "
    "subspace_overlap leading_tokens LeadingToken",
    "tokens": "by_position by_loss_quantile targets",
    "metrics": "largest second smallest gap relative_gap condition_number trace effective_rank stable_rank "
    "participation_ratio numerical_rank effective_dimension",
    "statistics": "bootstrap jackknife sample_limits split_halves block_coupling block_diagonal_error gradient_norms "
    "mean_gradient_norm gradient_noise_scale effective_dimension_curve spectral_density tail_exponent",
    "population": "squared_norm participation_ratio block_coupling block_diagonal_error Estimate "
    "moments leading_eigenvalue leading_sums effective_dimension effective_rank summary",
    "sketches": "kronecker rows spectrum variance Kronecker SketchedRows",
    "testing": "gradient_matrices partitions tiny_models coverage",
}


@dataclass(frozen=True)
class Source:
    """One file of the package; `name` is that of its module within the package, "" for the package itself."""

    name: str
    tree: ast.Module
    text: str

    @property
    def layer(self) -> str:
        return self.name.split(".")[0]


@cache
def sources(package: Path = PACKAGE) -> dict[str, Source]:
    found = {}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Source(name, ast.parse(text), text)
    return found


def imported(source: Source, modules: dict[str, Source]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it, by their names within the package."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name} has a relative import; write it out"
            both = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("fisherfunc.") in modules else str(node.module) for name in both]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fisherfunc":
                yield name.removeprefix("fisherfunc").removeprefix(".")


def allowed(layer: str) -> set[str]:
    """What files of a layer, or of what stands beside the layers, may import."""
    below_surface = set(LAYERS[:-1])
    special = {
        "": {*LAYERS, "testing"},
        "__main__": {"surface"},
        "testing": {*below_surface, "testing"},
        "assets": {"assets"},
        "surface": {*LAYERS, "assets"},
    }
    return special[layer] if layer in special else set(LAYERS[: LAYERS.index(layer) + 1])


def upward_imports(modules: dict[str, Source]) -> list[str]:
    return [
        f"{source.name or 'fisherfunc'} imports {target or 'fisherfunc'}"
        for source in modules.values()
        for target in imported(source, modules)
        if target.split(".")[0] not in allowed(source.layer)
    ]


def test_imports_point_down_the_layers():
    assert {source.layer for source in sources().values()} == {*LAYERS, "", "__main__", "testing", "assets"}
    assert upward_imports(sources()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("linalg/gram.py", "from fisherfunc.gradients.dense.route import dense_grams"),
        ("records/axes.py", "import fisherfunc.surface.files"),
        ("gradients/dense/route.py", "import fisherfunc"),
        ("pipeline/solve.py", "from fisherfunc import assets"),
        ("testing/models.py", "from fisherfunc.surface import report"),
        ("assets/__init__.py", "from fisherfunc.gradients import losses"),
    ],
)
def test_an_upward_import_is_seen(tmp_path, file, line):
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8") + (f"\n{line}\n" if copy == tmp_path / file else ""))
    assert len(upward_imports(sources(tmp_path))) == 1


def test_no_import_cycles():
    graph = {name: set(imported(source, sources())) for name, source in sources().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def folder_of(module: str) -> str:
    """The layer that a module is of, and the folder or file within it."""
    return ".".join(module.split(".")[:2])


def test_folders_import_one_way():
    graph: dict[str, set[str]] = {}
    for name, source in sources().items():
        below = {folder_of(target) for target in imported(source, sources())}
        graph.setdefault(folder_of(name), set()).update(below - {folder_of(name)})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"folders import each other: {' -> '.join(error.args[1])}")


def test_folders_have_at_most_a_dozen_files():
    counts = {str(path): len(list(path.glob("*.py"))) for path in PACKAGE.rglob("**/")}
    assert {path: count for path, count in counts.items() if count > FILES} == {}


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def test_the_core_needs_no_extra_when_imported():
    for source in sources().values():
        if source.layer in WITH_EXTRAS:
            continue
        nodes = list(at_import(source.tree))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in names} & set(EXTRAS), source.name


def private_at_import(tree: ast.AST) -> list[str]:
    """What is read of torch, when a module is imported, that torch may take away."""
    chains = [ast.unparse(node) for node in at_import(tree) if isinstance(node, ast.Attribute)]
    return [chain for chain in chains if re.match(r"torch\.(\w+\.)*_(?!_)", chain)]


def test_no_private_name_of_torch_is_read_at_import():
    assert {name: found for name, s in sources().items() if (found := private_at_import(s.tree))} == {}
    assert private_at_import(ast.parse("import torch\nX = torch._ops.A\ndef f(): return torch._ops.B")) == [
        "torch._ops.A",
        "torch._ops",
    ]


def test_the_core_works_where_no_extra_is_installed():
    code = f"""
import sys
for name in {EXTRAS!r}: sys.modules[name] = None
import torch, fisherfunc as ff
result = ff.fisher_spectrum(torch.nn.Linear(2, 3), (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])))
print(result.full.num_tokens)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr


def test_scipy_is_imported_where_it_is_used_alone():
    code = """
import sys, torch, fisherfunc as ff
torch.manual_seed(0)
batch = (1 + 0.1 * torch.randn(30, 2), torch.arange(30) % 3)  # no heavy tail, of which no interval is given
loaded = ["scipy" in sys.modules]
for population, intervals in ((False, None), (False, "jackknife"), (True, None)):
    ff.fisher_spectrum(torch.nn.Linear(2, 3), batch, intervals=intervals, population=population)
    loaded += ["scipy.special" in sys.modules, "scipy.stats" in sys.modules]
print(loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("[False, False, False, True, False, True, False]\n", 0), done.stderr


def test_public_names_import_nothing_that_takes_long():
    """Beside torch: these take 0.02 s together, scipy 0.3 s, and extras more."""
    code = """
import sys, torch
before = set(sys.modules)
import fisherfunc as ff
for name in ff.__all__: getattr(ff, name)
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(name for name in new if sys.modules[name].__spec__))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    few = ["einops", "fisherfunc", "jaxtyping", "numpy", "safetensors", "tomli_w"]
    assert (done.stdout, done.returncode) == (f"{few}\n", 0), done.stderr


@pytest.mark.parametrize("folder", ["fisherfunc", "tests", "benchmarks"])
def test_files_are_short(folder):
    lengths = {str(path): path.read_text().count("\n") for path in (REPOSITORY / folder).rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LINES} == {}


def modules_named(path: Path) -> set[str]:
    """What a file imports: the first part of each name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_tests_lie_where_the_code_lies():
    tests, beside = REPOSITORY / "tests", {"laws", "repository", "support", "benchmarks"}
    folders = {path.parent.relative_to(tests) for path in tests.rglob("*.py")}
    assert [str(path) for path in folders if not (PACKAGE / path).is_dir() and path.parts[0] not in beside] == []


def test_no_test_file_imports_another():
    tests = {path.stem for path in (REPOSITORY / "tests").rglob("test_*.py")} | {"tests"}
    shared = {str(path): modules_named(path) & tests for path in (REPOSITORY / "tests").rglob("*.py")}
    assert {path: names for path, names in shared.items() if names} == {}, "what files share is for tests/support/"


def test_no_star_imports_and_no_future_imports():
    for source in sources().values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "__future__", source.name
                assert all(alias.name != "*" for alias in node.names), source.name


def test_only_the_surface_prints_or_writes_files():
    for source in sources().values():
        if f"{source.name}.".startswith(WITH_EFFECTS):
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert called not in ("print", "open", "write_text", "write_bytes"), f"{source.name}:{node.lineno}"


def without_device(package: Path = PACKAGE) -> list[str]:
    """Calls that make a tensor on the default device, which users may have set to any; strategies are tests."""
    found = []
    for source in sources(package).values():
        for call in ast.walk(source.tree) if source.layer not in ("testing", "assets") else ():
            if (
                isinstance(call, ast.Call)
                and ast.unparse(call.func) in MAKERS
                and not any(keyword.arg in ("device", None) for keyword in call.keywords)
            ):
                found.append(f"{source.name}:{call.lineno} {ast.unparse(call)}")
    return found


def test_tensors_are_made_on_a_device_that_is_named(tmp_path):
    assert without_device() == []
    (tmp_path / "one.py").write_text("import torch\n\nx = torch.zeros(2)\ny = torch.ones(2, device='cpu')\n")
    assert without_device(tmp_path) == ["one:3 torch.zeros(2)"]


def test_only_these_intercept_a_model():
    intercepting = re.compile(
        r"Torch(Function|Dispatch)Mode|register_\w*hook|__torch_(function|dispatch)__|_call_impl|\.forward = "
    )
    found = {name for name, source in sources().items() if intercepting.search(source.text)}
    assert found <= {
        "gradients.autodiff.module_calls",
        "gradients.autodiff.nature",
        "gradients.capture.recorder",
        "models.calls.batch_of_one",
        "models.calls.writes",
        "runtime.memory",
    }


@pytest.mark.parametrize("space", CONTRACT)
def test_the_promised_names_exist(space):
    module = getattr(ff, space) if space else ff
    assert [name for name in CONTRACT[space].split() if not callable(getattr(module, name, None))] == []


def public() -> dict[str, Callable]:
    """Everything callable that a user can reach by a documented name."""
    spaces = {"ff": (ff, ff.__all__)}
    spaces |= {f"ff.{m.__name__.split('.')[-1]}": (m, _own(m)) for m in SPACES}
    values = {f"{space}.{name}": getattr(module, name) for space, (module, names) in spaces.items() for name in names}
    return {name: value for name, value in values.items() if callable(value)}


def _own(module: Any) -> list[str]:
    """Its `__all__`, else what it defines itself."""
    defined = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and n[0] != "_"]
    return getattr(module, "__all__", defined)


@pytest.mark.parametrize("name", public())
def test_public_names_are_documented(name):
    """Each of several arguments, or fields of a record, is described; one alone is what the first line is about."""
    value = public()[name]
    text = inspect.getdoc(value) or ""
    assert text and text != inspect.getdoc(object)
    if inspect.isclass(value):
        methods = [method for n, method in inspect.getmembers(value, inspect.isfunction) if n[0] != "_"]
        assert all(inspect.getdoc(method) for method in methods)
        section, names = "Attributes", {field.name for field in fields(value)} if is_dataclass(value) else set()
    else:
        section, names = "Args", set(inspect.signature(value).parameters)
    names -= {"spectrum"} if name.startswith("ff.metrics.") else set()
    assert len(names) <= 1 or names <= described(text, section)


def described(docstring: str, section: str) -> set[str]:
    """The names that a section of a Google-style docstring describes."""
    body = re.search(rf"^{section}:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    return set(re.findall(r"^ {4}\*{0,2}(\w+):", body[1], re.MULTILINE)) if body else set()
