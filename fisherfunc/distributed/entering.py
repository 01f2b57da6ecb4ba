"""Entering a stretch of work that ranks do together, and leaving it: what one of them raises ends it for all."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from time import monotonic, sleep
from typing import Any, ParamSpec, TypeVar

from torch import distributed as dist

from fisherfunc.distributed.collectives import PARTING_S, Everyone, Ranks, RanksError, agent_keeps_store, asked

P = ParamSpec("P")
T = TypeVar("T")

BEAT_S = 1.0
"""How often a rank gives a sign of life."""


def standing(ranks: Ranks) -> Everyone:
    """Return what a rank asks of all for as long as it likes; who is gone is missed after the timeout alone.

    Raises:
        RanksError: If an earlier exchange of the group failed while it went on.
    """
    if ranks.size == 1:
        return Everyone(ranks=ranks)
    store = _store_of(ranks)
    if asked(store, "check", ["broken"]):
        raise RanksError("the group is of no use after the failure of a rank; start all processes again", ranks.rank)
    number = asked(store, "add", f"fisherfunc/entered/{ranks.rank}", 1)
    return Everyone(ranks=ranks, store=dist.PrefixStore(f"fisherfunc/{number}", store), broken=store)


@contextmanager
def together(ranks: Ranks) -> Iterator[Everyone]:
    """Work on something with all ranks, each of which enters as often as the others.

    What a rank raises inside ends the others: each raises a `RanksError` that names it.
    """
    everyone = standing(ranks)
    if ranks.size == 1:
        yield everyone
        return
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(everyone, over), daemon=True)
    beating.start()
    try:
        yield everyone
    except RanksError:
        raise
    except BaseException as error:
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        everyone.fail(ranks.rank, f"failed with {told}")
        raise
    finally:
        over.set()
        with suppress(RuntimeError):  # who keeps the store did not wait any longer, or is gone
            _parted_from(everyone)


def _parted_from(everyone: Everyone) -> None:
    """Where rank 0 keeps the store it leaves last: the others may have something to read there."""
    everyone.store.add("left", 1)
    end, last = monotonic() + PARTING_S, everyone.rank == 0 and not agent_keeps_store()
    while last and everyone.store.add("left", 0) < everyone.size and monotonic() < end:
        sleep(1e-3)


def _beat(everyone: Everyone, over: threading.Event) -> None:
    """Give signs of life."""
    while not over.is_set():
        try:
            everyone.store.add(f"beat/{everyone.rank}", 1)
        except RuntimeError:  # the store is gone, which whoever waits will see
            return
        over.wait(BEAT_S)


def _store_of(ranks: Ranks) -> Any:
    """The store of the default group; torch has no public name for it."""
    store = dist.distributed_c10d._get_default_store()
    members = dist.get_process_group_ranks(ranks.group)
    return dist.PrefixStore("-".join(map(str, members)), store)


def with_ranks(after: Callable[[Any], Any] | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have a function that takes `ranks=` be given `Everyone` for `Ranks`, for as long as it runs.

    Args:
        after: What is then made of what it returns.
    """

    def changed(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def run(*args: P.args, **options: P.kwargs) -> T:
            given: Any = options.get("ranks")
            if given is None or isinstance(given, Everyone):
                return function(*args, **options)
            if not isinstance(given, Ranks):
                raise TypeError(f"ranks expected those of ff.distributed.ranks(), got {given!r}")
            with together(given) as everyone:
                options["ranks"] = everyone
                found = function(*args, **options)
                return found if after is None else after(found)

        return run

    return changed
