"""What a pass works on, in a few lines of text: two passes with one fingerprint give the same Grams."""

from collections.abc import Mapping

from fisherfunc.gradients.losses.identity import loss_id
from fisherfunc.gradients.rows.subsample import Coordinates
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.records.hashing import hash_of
from fisherfunc.records.plain import dtype_name
from fisherfunc.runtime.versions import versions

MAY_CHANGE = ("memory_limit",)
"""What decides about the plan alone: a pass that was killed for its memory goes on with less."""


def fingerprint(
    work: Workload, options: PassOptions, route: str, coordinates: Coordinates, targets: str = "observed"
) -> dict[str, str]:
    """SHA-256 of every tensor that the Grams depend on, and the options that decide how they are computed.

    Not in it: the code of the model, which has its class's name only, that of a loss that cannot be identified, and the
    number of threads. Cost: every parameter is read once.
    """
    fn = work.fn
    others = {name: t for name, t in (fn.params | fn.frozen | fn.buffers).items() if name not in work.params}
    return {
        "model": fn.name,
        "parameters": hash_of(dict(work.params)),
        "other tensors of the model": hash_of(others),
        "batch": work.sequences.hash(),
        "tokens": hash_of([work.tokens.sequence, work.tokens.entry]),
        "targets": targets,
        "loss": f"{work.loss.name}, shift {work.loss.shift}",
        "what the loss computes": loss_id(work.loss),
        "route": route,
        "coordinates": hash_of([dict(coordinates.index), dict(coordinates.weight)]),
        "chunk_size": str(options.chunk_size),
        "memory_limit": str(options.memory_limit),
        "gram_dtype": dtype_name(options.gram_dtype),
        "labels": "each parameter" if options.labels is None else hash_of(dict(options.labels)),
        "device": next(iter(work.params.values())).device.type,
        "versions": str({name: version for name, version in versions().items() if name != "python"}),
    }


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What differs between two fingerprints that may not, in words; empty where nothing does."""
    names = [name for name in dict.fromkeys([*here, *there]) if there.get(name) != here.get(name)]
    names = [name for name in names if name not in MAY_CHANGE]
    return ", ".join(_compared(name, there.get(name, "none"), here.get(name, "none")) for name in names)


def _compared(name: str, there: str, here: str) -> str:
    return name if {len(there), len(here)} & {64} else f"{name} ({there} there, {here} here)"
