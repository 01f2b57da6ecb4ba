"""Exclusive wall-clock seconds by section: while one section is open inside another, time goes to the inner one."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from time import perf_counter


class Stopwatch:
    """Seconds of the sections that are opened in the thread that made it; others run beside it and would count twice.

    Args:
        clock: Gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._clock, self._thread, self._since = clock, get_ident(), 0.0
        self._open: list[tuple[str, bool]] = []

    @contextmanager
    def section(self, title: str, *, opaque: bool = False) -> Iterator[None]:
        """What runs inside counts to this title.

        Args:
            title: Under which seconds are added up.
            opaque: Whether sections that are opened inside count to this one too.
        """
        if get_ident() != self._thread or (self._open and self._open[-1][1]):
            yield
            return
        self._charge()
        self._open.append((title, opaque))
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """What passed since a section was last opened or closed goes to the one that was open meanwhile."""
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1][0]] += now - self._since
        self._since = now
