"""Several processes for one result, under `torchrun` or any `torch.distributed` group: `ff.distributed`."""

from fisherfunc.distributed.collectives import Ranks, RanksError, ranks

__all__ = ["Ranks", "RanksError", "ranks"]
