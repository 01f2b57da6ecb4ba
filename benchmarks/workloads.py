"""The workloads: which task at which size, who runs on it and how, and the targets for the measured ratios."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.contenders import TITLES
from benchmarks.contenders.common import Options
from benchmarks.oracle import TOLERANCE

SIZES = ("quick", "full")
OURS = TITLES["ours"]
BFLOAT16 = f"{OURS}, bfloat16 pass"
WHOLE = f"{OURS}, full matrix only"
FASTEST = "the fastest of the others"
GIGABYTE = 10**9


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contender in one workload.

    Attributes:
        name: Of the contender.
        label: What the table calls it.
        options: How it runs.
        tokens: Only gradients of this many rows of the first sequence, quoted a row; None for all rows.
        tolerance: Of the eigenvalue check.
    """

    name: str
    label: str
    options: Options = field(default_factory=Options)
    tokens: int | None = None
    tolerance: float = TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on a measured quantity.

    Attributes:
        ours: Label of the entry that is held to it.
        reference: Label of what it is compared with; None where the bound is absolute.
        quantity: "speed" (reference's seconds a row over ours), "memory" (ours over reference's), "peak" (bytes),
            "floor" (fraction of the floor's rate), "deviation" (of leading eigenvalues and traces, relative).
        bound: At least (speed, floor) or at most (the others) this.
    """

    ours: str
    reference: str | None
    quantity: str
    bound: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A row of the benchmark.

    Attributes:
        name: For `--only`.
        title: For the table.
        task: The builder's name.
        sizes: "quick" and "full" → what the builder takes.
        entries: "quick" and "full" → who runs.
        targets: "quick" and "full" → what must be reached; those of "full" are the real ones.
        sample: "quick" and "full" → on how many rows the oracle is computed; None for all.
    """

    name: str
    title: str
    task: str
    sizes: dict[str, dict[str, Any]]
    entries: dict[str, tuple[Entry, ...]]
    targets: dict[str, tuple[Target, ...]]
    sample: dict[str, int | None]


def _entry(
    name: str, label: str | None = None, *, tokens: int | None = None, tolerance: float = TOLERANCE, **how: Any
) -> Entry:
    return Entry(name=name, label=label or TITLES[name], options=Options(**how), tokens=tokens, tolerance=tolerance)


def _faster(reference: str, bound: float, ours: str = OURS) -> Target:
    return Target(ours=ours, reference=reference, quantity="speed", bound=bound)


def _alike(value: Any) -> dict[str, Any]:
    return dict.fromkeys(SIZES, value)


def _limited(*limits: int) -> tuple[Entry, ...]:
    """One limit with Grams by tensor; others, smaller than these together, with Grams by layer."""
    return tuple(
        _entry(
            "ours",
            f"{OURS}, memory_limit={limit / GIGABYTE:g} GB{', by layer' if number else ''}",
            memory_limit=limit,
            blocks="layer" if number else "tensor",
        )
        for number, limit in enumerate(limits)
    )


def _long_targets(*limits: int) -> tuple[Target, ...]:
    labels = [entry.label for entry in _limited(*limits)]
    floor = Target(ours=labels[0], reference=None, quantity="floor", bound=0.6)
    return (
        floor,
        *(
            Target(ours=label, reference=None, quantity="peak", bound=limit)
            for label, limit in zip(labels, limits, strict=True)
        ),
    )


_SMALL_GPT2 = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 5000, "n_positions": 64}
_TINY_GPT2 = {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 1000, "n_positions": 64}
_QUICK_LIMITS = (GIGABYTE // 2, GIGABYTE // 5)
_LIMITS = (4 * GIGABYTE, GIGABYTE)


def _gradients_alone(tokens: int) -> tuple[Entry, ...]:
    names = ("loop", "vmap")
    return tuple(_entry(name, f"{TITLES[name]}, gradients alone", tokens=tokens) for name in names)


WORKLOADS = (
    Workload(
        name="gpt2-small",
        title="GPT-2 of 4 layers, width 256, vocabulary 5,000; 4 sequences of 64: all Grams and spectra by layer",
        task="gpt2",
        sizes={
            "quick": {**_TINY_GPT2, "sequences": 2, "positions": 32},
            "full": {**_SMALL_GPT2, "sequences": 4, "positions": 64},
        },
        entries=_alike(
            tuple(
                _entry(name, spectra=True) for name in ("loop", "vmap", "curvlinops", "nngeometry", "backpack", "ours")
            )
        ),
        targets=_alike(
            (
                _faster(TITLES["vmap"], 30),
                Target(ours=OURS, reference=TITLES["vmap"], quantity="memory", bound=1 / 8),
                _faster(TITLES["loop"], 20),
                _faster(TITLES["curvlinops"], 30),
            )
        ),
        sample=_alike(None),
    ),
    Workload(
        name="gpt2-124m",
        title="GPT-2 of 124M parameters; 4 sequences of 64: Grams of all tensors and spectra by layer",
        task="gpt2",
        sizes={
            "quick": {**_SMALL_GPT2, "sequences": 2, "positions": 32},
            "full": {"sequences": 4, "positions": 64},
        },
        entries={
            "quick": (*_gradients_alone(8), _entry("ours", spectra=True)),
            "full": (*_gradients_alone(6), _entry("ours", spectra=True)),
        },
        targets=_alike(
            (
                _faster(f"{TITLES['loop']}, gradients alone", 9),
                _faster(f"{TITLES['vmap']}, gradients alone", 18),
            )
        ),
        sample={"quick": 16, "full": 10},
    ),
    Workload(
        name="gpt2-124m-bfloat16",
        title="The same, pass in bfloat16 against the float32 pass",
        task="gpt2",
        sizes={
            "quick": {**_SMALL_GPT2, "sequences": 2, "positions": 32},
            "full": {"sequences": 4, "positions": 64},
        },
        entries=_alike(
            (_entry("ours", spectra=True), _entry("ours", BFLOAT16, spectra=True, dtype="bfloat16", tolerance=0.1))
        ),
        targets=_alike(
            (
                _faster(OURS, 2.5, ours=BFLOAT16),
                Target(ours=BFLOAT16, reference=OURS, quantity="deviation", bound=0.01),
            )
        ),
        sample={"quick": 16, "full": 10},
    ),
    Workload(
        name="gpt2-124m-long",
        title="GPT-2 of 124M parameters; 16 sequences of 64 (1,008 tokens): Grams alone, the floor, limits of memory",
        task="gpt2",
        sizes={
            "quick": {**_SMALL_GPT2, "sequences": 4, "positions": 32},
            "full": {"sequences": 16, "positions": 64},
        },
        entries={
            "quick": _limited(*_QUICK_LIMITS),
            "full": _limited(*_LIMITS),
        },
        targets={"quick": _long_targets(*_QUICK_LIMITS), "full": _long_targets(*_LIMITS)},
        sample={"quick": 16, "full": 10},
    ),
    Workload(
        name="mlp",
        title="Digits, MLP 64-512-512-10, 1,797 samples: Grams alone",
        task="mlp",
        sizes={"quick": {"samples": 300, "width": 128}, "full": {"samples": 1797, "width": 512}},
        entries=_alike(
            (
                *map(_entry, ("loop", "vmap", "neural_tangents", "nngeometry", "backpack", "curvlinops", "ours")),
                _entry("ours", WHOLE, blocks="whole"),
            )
        ),
        targets=_alike(
            (
                _faster(TITLES["vmap"], 60),
                _faster(TITLES["neural_tangents"], 6, ours=WHOLE),  # as these two give it alone
                _faster(TITLES["nngeometry"], 1.5, ours=WHOLE),
            )
        ),
        sample=_alike(None),
    ),
    Workload(
        name="mlp-classes",
        title="The same model, rows of all ten logits of 512 samples (5,120 rows): Grams alone",
        task="mlp",
        sizes={
            "quick": {"samples": 40, "width": 128, "classes": True},
            "full": {"samples": 512, "width": 512, "classes": True},
        },
        entries=_alike(
            (
                *map(_entry, ("vmap", "neural_tangents", "nngeometry", "backpack", "vivit", "ours")),
                _entry("ours", WHOLE, blocks="whole"),
            )
        ),
        targets=_alike((_faster(TITLES["vmap"], 100), _faster(TITLES["neural_tangents"], 2.5, ours=WHOLE))),
        sample={"quick": None, "full": 1000},
    ),
    Workload(
        name="cnn",
        title="Digits, CNN of two 3 × 3 convolutions (32, 64), 1,797 samples: Grams alone",
        task="cnn",
        sizes={"quick": {"samples": 150, "channels": [8, 16]}, "full": {"samples": 1797, "channels": [32, 64]}},
        entries=_alike(
            tuple(map(_entry, ("loop", "vmap", "neural_tangents", "nngeometry", "backpack", "vivit", "ours")))
        ),
        targets=_alike((_faster(FASTEST, 1.0),)),
        sample=_alike(None),
    ),
)
