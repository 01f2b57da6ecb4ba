"""A command under `torchrun`: every rank computes, and one of them speaks.

That is rank 0; of a failure, the lowest rank that has not failed. The one that has waits for it, as `torchrun` ends the
others with the first process that ends; where nobody speaks, as all are busy, it does so itself.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from types import FrameType
from typing import TypeVar

import click

from fisherfunc.distributed.collectives import Everyone, RanksError, ranks
from fisherfunc.distributed.entering import together
from fisherfunc.surface.boundary import EXPECTED, told
from fisherfunc.surface.visible import visible

T = TypeVar("T")

STATED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` states to each process."""
WAITED_S = 10.0
"""How long a rank that fails waits for another one to say so."""


@contextmanager
def all_ranks() -> Iterator[Everyone | None]:
    """Work with the other ranks where there are any, say what failed once, and leave."""
    if not set(STATED) <= os.environ.keys():
        yield None
        return
    here, everyone, debug = ranks(), None, click.get_current_context().params["debug"]
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with together(here) as everyone:
            yield everyone
    except RanksError as error:
        if debug:
            raise
        speaker = min({*range(here.size)} - ({error.rank} if error.rank or not error.itself else set()))
        if here.rank == speaker:
            _say(str(error), everyone)
        sys.exit(1)
    except EXPECTED as error:
        if debug or here.rank == 0 or everyone is None:
            raise
        if not _was_told(everyone):
            _say(f"rank {here.rank} failed: {told(error)}", None)
        sys.exit(1)
    except KeyboardInterrupt:
        if here.rank != 0:
            sys.exit(130)
        raise


def first_alone(everyone: Everyone | None, name: str, load: Callable[[], T]) -> T:
    """Return what each rank loads, rank 0 before the others: it may have to be fetched, and then is there for them.

    Args:
        everyone: The ranks.
        name: What is loaded.
        load: How.
    """
    if everyone is None:
        return load()
    loaded = load() if everyone.rank == 0 else None
    everyone.gathered(name, None)
    return load() if loaded is None else loaded


def _say(message: str, everyone: Everyone | None) -> None:
    click.echo(f"fisherfunc: error: {visible(' '.join(message.split()))}", err=True)
    if everyone is not None:
        with suppress(RuntimeError):  # who kept the store is gone
            everyone.store.set("told", "")


def _was_told(everyone: Everyone) -> bool:
    end = monotonic() + WAITED_S
    while monotonic() < end:
        try:
            if everyone.store.check(["told"]):
                return True
        except RuntimeError:  # who kept the store is gone, and has spoken
            return True
        sleep(0.1)
    return False


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
