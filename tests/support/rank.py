"""One rank of tests/distributed/test_ranks.py: `main(OUT, CASE)`, with the environment that torchrun gives.

Each case is a function of the ranks; what it returns is written to OUT, by rank.
"""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn

import fisherfunc as ff
from fisherfunc.distributed import RanksError

TIMEOUT_S = 10.0
"""How long ranks wait for each other in cases where one hangs."""


class TinyLM(nn.Module):
    """A causal model, whose output layer may be its embedding."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(13, 8), nn.Embedding(16, 8)
        self.mix, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 13, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids):
        x = self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        scores = (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9)
        return self.head(self.norm(x + self.mix(scores.softmax(-1) @ x)))


def language_model(tied=True, lengths=(9, 5, 9, 12, 3, 9, 7)):
    """A model and sequences of uneven lengths, in float64."""
    torch.manual_seed(0)
    model = TinyLM(tied).double()
    ids = [torch.randint(13, (1, length)) for length in lengths]
    return model, [{"input_ids": x, "labels": x} for x in ids], ff.losses.causal_lm()


def classifier(count=11):
    """A model of one position and samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, (torch.randn(count, 4).double(), torch.randint(3, (count,))), ff.losses.classification()


def one_pixel_convolution():
    """A convolution with groups, so that gradients are formed, over images of two sizes."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(6, 3)).double()
    images = [torch.randn(3, 4, size, size).double() for size in (5, 6)]
    return model, [(x, torch.tensor([0, 1, 2])) for x in images], ff.losses.classification()


SAME = {
    "samples": (classifier, {}),
    "tied": (language_model, {"intervals": "jackknife"}),
    "untied, dense": (lambda: language_model(tied=False), {"route": "dense", "blocks": ff.by_parameter}),
    "centred": (language_model, {"center": True}),
    "sequences": (language_model, {"unit": "sequence"}),
    "some tokens, drawn targets": (language_model, {"num_tokens": 20, "targets": ff.targets.sampled(2)}),
    "sampled coordinates": (classifier, {"max_coordinates": 5}),
    "sampled coordinates, fewer sequences than ranks": (
        lambda: language_model(lengths=(6,)),
        {"max_coordinates": 5},
    ),
    "small memory": (lambda: language_model(lengths=(12, 12, 12)), {"memory_limit": 300_000}),
    "fewer sequences than ranks": (lambda: language_model(lengths=(6,)), {}),
    "convolution": (one_pixel_convolution, {}),
}
"""{case: (model, batch and loss; options)} whose result is that of one process."""


def spectrum_of(name, ranks=None):
    """The result of a case."""
    make, options = SAME[name]
    model, batch, loss = make()
    return ff.fisher_spectrum(model, batch, loss=loss, ranks=ranks, **options)


def in_float32(ranks=None):
    """A result whose round-off is measured, from Grams that one rank computes for all."""
    model, (inputs, targets), loss = classifier()
    return ff.fisher_spectrum(model.float(), (inputs.float(), targets), loss=loss, ranks=ranks)


SIZES = (2, 3, 4)


def same(ranks, out):
    """What groups of the first ranks find, by their size."""
    found = {}
    for size in SIZES:
        group = dist.new_group(range(size))
        if ranks.rank < size:
            found[size] = _all_cases(ff.distributed.ranks(group=group, timeout=120.0))
    return found


def _all_cases(ranks):
    """Every case, and whole Grams."""
    found = {name: _kept(spectrum_of(name, ranks)) for name in SAME}
    found["float32"] = _kept(in_float32(ranks))
    model, batch, loss = language_model()
    fn = ff.functionalize(model)
    return found | {"grams": ff.token_grams(fn, fn.params, batch, loss, ranks=ranks).grams}


def _kept(result):
    values = {label: spectrum.eigenvalues for label, spectrum in result.matrices.items()}
    return result.to_dict() | {"values": values}


def told(run):
    """What a call raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "nothing", time.monotonic() - begin


def differ(ranks, out):
    """What ranks may not differ in, one after the other; then one raises, and all go on from its checkpoint."""
    model, batch, loss = classifier()
    other, mine = ranks.rank == 1, {"loss": loss, "ranks": ranks}
    found = {}
    with torch.no_grad():
        model[0].weight[0, 0] += other
    found["parameters"] = told(lambda: ff.fisher_spectrum(model, batch, **mine))
    model, batch, loss = classifier()
    part = tuple(x[ranks.rank :: ranks.size] for x in batch)  # as a DistributedSampler would have it
    found["batch"] = told(lambda: ff.fisher_spectrum(model, part, **mine))
    found["num_tokens"] = told(lambda: ff.fisher_spectrum(model, batch, num_tokens=5 + other, **mine))
    found["seed"] = told(lambda: ff.fisher_spectrum(model, batch, seed=int(other), **mine))
    found["drop_nonfinite"] = told(lambda: ff.fisher_spectrum(model, batch, drop_nonfinite=other, **mine))

    def stop(done, total):
        if 2 * done > total:
            raise ValueError("stopped")

    model, batch, loss = language_model()  # within this memory passed over several times
    options = {"loss": loss, "ranks": ranks, "checkpoint": Path(out) / "checkpoint", "memory_limit": 135_000}
    found["raised"] = told(lambda: ff.fisher_spectrum(model, batch, progress=stop if other else None, **options))
    seen = []
    result = ff.fisher_spectrum(model, batch, progress=lambda done, total: seen.append(done), **options)
    found["resumed"], found["first"] = result.full.eigenvalues, seen[0] / seen[-1]
    found["num_passes"] = result.metadata["plan"]["num_passes"]
    again = []
    result = ff.fisher_spectrum(model, batch, progress=lambda done, total: again.append(done), **options)
    return found | {"again": result.full.eigenvalues, "calls": (len(seen), len(again))}


def lost(ranks, out):
    """Rank 1 hangs; then rank 2 is killed."""
    model, batch, loss = language_model()
    ff.fisher_spectrum(model, batch, loss=loss, ranks=ranks)  # all are awake, and have imported what they need
    mine = {"loss": loss, "ranks": replace(ranks, timeout=TIMEOUT_S)}
    times = iter([2 * TIMEOUT_S])

    def hang(done, total):
        time.sleep(next(times, 0.0))

    awake = Path(out, "awake")

    def die(done, total):
        os.kill(os.getpid(), signal.SIGKILL)

    hung = told(lambda: ff.fisher_spectrum(model, batch, progress=hang if ranks.rank == 1 else None, **mine))
    if ranks.rank == 1:
        awake.touch()
    while not awake.exists():
        time.sleep(0.1)
    killed = told(lambda: ff.fisher_spectrum(model, batch, progress=die if ranks.rank == 2 else None, **mine))
    return {"hung": hung, "killed": killed}


def orphaned(ranks, out):
    """Rank 0, which keeps the store, is killed."""
    model, batch, loss = language_model()

    def die(done, total):
        os.kill(os.getpid(), signal.SIGKILL)

    progress = die if ranks.rank == 0 else None
    found = [told(lambda: ff.fisher_spectrum(model, batch, loss=loss, ranks=ranks, progress=progress))]
    return [*found, told(lambda: ff.fisher_spectrum(model, batch, loss=loss, ranks=ranks))]


def main(out, case):
    """Run a case, and write what it found."""
    try:
        ranks = ff.distributed.ranks(timeout=TIMEOUT_S if case == "start" else 120.0)
        found = globals()[case](ranks, out)
    except RanksError as error:
        found = {"error": str(error)}
    torch.save(found, Path(out) / f"{os.environ['RANK']}.pt")
