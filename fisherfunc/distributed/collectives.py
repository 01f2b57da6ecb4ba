"""Everything that ranks say to each other: each exchange has a name and a timeout, and its failure names a rank.

Small values go through the store of the process group (a `TCPStore`, as a rule), which every rank looks into while it
waits; tensors go from rank to rank, or are summed over all. A rank that fails leaves the reason in the store, so that
the others need not wait for their timeout; one that is killed is missed there, as each gives a sign of life every
second. So nothing waits longer than `Ranks.timeout` seconds, and nothing that hangs is waited for: what torch does runs
in a thread of its own, which is let go.
"""

import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from time import monotonic, sleep
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from fisherfunc.distributed.packing import Room, flat, num_bytes, parted

T = TypeVar("T")

LOST_S = 30.0
"""Whoever gave no sign of life for so long, or for half the timeout, is gone: one is due every second."""
LOOK_S = 0.25
"""How often a rank that waits looks for the failure of another."""
PARTING_S = 5.0
"""How long a rank whose connection broke waits for the other's reason."""
PIECE = 4 << 20
"""In bytes: what goes to the store at once. A `TCPStore` of libuv refuses more than twice as many."""


class RanksError(ConnectionError):
    """Another rank failed, is gone or came to nothing within the timeout; the message says which, and why.

    Attributes:
        rank: Which.
        itself: Whether it has said so, and so lived to say it.
    """

    def __init__(self, message: str, rank: int, *, itself: bool = False) -> None:
        super().__init__(message)
        self.rank, self.itself = rank, itself


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that work on one result, from `ff.distributed.ranks`.

    Attributes:
        rank: The number of this one.
        size: How many there are.
        group: Their `torch.distributed` group; None where there is this process alone.
        timeout: In seconds: how long one waits for another, and so longer than any needs between two exchanges.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False)
    timeout: float = 1800.0


def ranks(*, group: Any = None, timeout: float = 1800.0) -> Ranks:
    """Return the ranks that this process is one of: those of `torchrun`, or of a group that was initialised.

    Under `torchrun` it initialises the default group where nobody has: nccl for a machine with GPUs, of which each
    process takes the one of its `LOCAL_RANK`, gloo for others. A process that nobody started with others is one rank.

    Args:
        group: A `torch.distributed` group; the default one where None.
        timeout: In seconds, how long a rank waits for another one that does not fail. Longer than a rank computes on
            its own: reading a model, say, or a group of parameters.

    Raises:
        RanksError: If a rank does not come within the timeout; it names which.
        ValueError: If the timeout is not positive, or this process is not in the group.

    Example:
        >>> ranks().size
        1
    """
    if not timeout > 0:
        raise ValueError(f"timeout expected seconds above 0, got timeout={timeout!r}")
    if not dist.is_available():
        return Ranks(timeout=timeout)
    if not dist.is_initialized():
        if group is not None:
            raise ValueError("group= expected that of an initialised torch.distributed; leave it out under torchrun")
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return Ranks(timeout=timeout)
        _initialise(timeout)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("this process is not in the group; call with a group on its members alone")
    return Ranks(rank=rank, size=size, group=group or dist.group.WORLD, timeout=timeout)


def _initialise(timeout: float) -> None:
    """Meet at the store first: a backend that connects to a process that is gone may hang (pytorch/gloo#520)."""
    limit, size, rank = timedelta(seconds=timeout), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    store: Any = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agent_keeps_store(),
        timeout=limit,
        wait_for_workers=False,
        multi_tenant=True,
    )
    store = dist.PrefixStore(f"fisherfunc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    here = Everyone(
        ranks=Ranks(rank=rank, size=size, timeout=timeout), store=dist.PrefixStore("start", store), broken=store
    )
    here.gathered("the start", None)
    backend = "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    found = dist.PrefixStore("torch", store)

    def connect() -> None:
        dist.init_process_group(backend, store=found, rank=rank, world_size=size, timeout=limit)

    here.waited("connecting", connect, others=range(size))


def agent_keeps_store() -> bool:
    """Whether the agent of torchrun does, else rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@dataclass(kw_only=True)
class Everyone:
    """What a rank asks of all; every rank calls the same methods in the same order.

    Attributes:
        ranks: Which ranks.
        store: Where they leave small values; None for one rank.
        broken: Where they leave that torch still waits for another rank, so that the group is of no more use.
        bytes_sent: How many bytes of tensors this one has sent.
    """

    ranks: Ranks
    store: Any = None
    broken: Any = None
    bytes_sent: int = 0
    _numbers: Iterator[int] = field(default_factory=count)  # of what is gathered
    _read: list[str] = field(default_factory=list)  # the keys of what was gathered last

    @property
    def rank(self) -> int:
        """The number of this one."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.ranks.size

    def gathered(self, name: str, value: T) -> list[T]:
        """Return the values of all ranks, in their order; they are on the CPU, and not many megabytes."""
        if self.size == 1:
            return [value]
        number = next(self._numbers)
        keys = [f"value/{number}/{rank}" for rank in range(self.size)]
        before, self._read = self._read, self._put(keys[self.rank], pickle.dumps((name, value)))
        missing = set(range(self.size)) - {self.rank}

        def there() -> bool:
            missing.difference_update([rank for rank in missing if self._ask("check", [keys[rank]])])
            return not missing

        self._wait(name, there, missing)
        found = [(name, value) if rank == self.rank else pickle.loads(self._got(key)) for rank, key in enumerate(keys)]
        for rank, (other, _) in enumerate(found):
            if other != found[0][0]:
                self._raise_because(
                    rank,
                    f"came to {other!r} when rank 0 came to {found[0][0]!r}; have all ranks make the same calls in the "
                    "same order",
                )
        for key in before if self.rank == 0 else ():  # all that came here have read those
            self._ask("delete_key", key)
        return [theirs for _, theirs in found]

    def _put(self, key: str, data: bytes) -> list[str]:
        """Leave bytes in the store, the piece that says how many there are at last; return the keys."""
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
        keys = [key, *(f"{key}/{number}" for number in range(1, len(pieces)))]
        for further, piece in zip(keys[1:], pieces[1:], strict=True):
            self._ask("set", further, piece)
        self._ask("set", key, len(pieces).to_bytes(8, "big") + pieces[0])
        return keys

    def _got(self, key: str) -> bytes:
        """What `_put` has left."""
        first = self._ask("get", key)
        keys = [f"{key}/{number}" for number in range(1, int.from_bytes(first[:8], "big"))]
        self._read += [key, *keys]
        return b"".join([first[8:], *(self._ask("get", key) for key in keys)])

    def _ask(self, method: str, *given: Any) -> Any:
        """What a method of the store returns."""
        return asked(self.store, method, *given)

    def check_alike(self, marks: Mapping[str, Any], remedy: str) -> None:
        """Raise, on every rank, where what ranks must have in common differs.

        Args:
            marks: {what: as it is here}, of plain values.
            remedy: What to do then.

        Raises:
            ValueError: If so; it names two ranks, and what differs.
        """
        first, *others = self.gathered("what all must have in common", dict(marks))
        for rank, other in enumerate(others, start=1):
            differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            if differing:
                named = [_compared(name, other.get(name), first.get(name)) for name in differing]
                raise ValueError(f"rank {rank} and rank 0 differ in {', '.join(named)}; {remedy}")

    def from_first(self, name: str, make: Callable[[], T]) -> T:
        """Return what rank 0 makes."""
        return self.gathered(name, make() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def summed(self, name: str, tensor: Tensor) -> Tensor:
        """Return Σ over ranks of a tensor, the same bits on each; it is written to."""
        if self.size > 1:
            self.bytes_sent += 2 * num_bytes(tensor) * (self.size - 1) // self.size
            self.waited(name, lambda: dist.all_reduce(tensor, group=self.ranks.group), range(self.size))
        return tensor

    def joined(self, name: str, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, one after the other.

        Args:
            name: Of the exchange.
            tensor: This rank's rows.
            counts: How many each has.
        """
        if self.size == 1:
            return tensor
        longest = max(counts)
        sent = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
        received = [torch.empty_like(sent) for _ in counts]
        self.bytes_sent += num_bytes(sent) * (self.size - 1)
        self.waited(name, lambda: dist.all_gather(received, sent, group=self.ranks.group), range(self.size))
        return torch.cat([values[:count] for values, count in zip(received, counts, strict=True)])

    def exchanged(
        self, name: str, sent: Sequence[Tensor], about: Any, *, to: int, source: int, room: Room | None = None
    ) -> tuple[Any, Any]:
        """Send tensors to one rank while those of another come.

        Args:
            name: Of the exchange.
            sent: The tensors.
            about: A small value that goes with them.
            to: The rank that gets them.
            source: The one whose tensors come.
            room: Where tensors are put, those that came until the next exchange with it; new memory where None.

        Returns:
            The tensors that came, and the value that came with them.
        """
        if to == self.rank:
            return list(sent), about
        like, room = sent[0], room or Room()
        header = pickle.dumps((about, [(t.dtype, tuple(t.shape)) for t in sent]))
        mine = flat(sent, like, room)

        def passed() -> tuple[Any, Tensor]:
            # `like` says on which device: nccl knows no other than that of its GPU.
            lengths = torch.tensor([len(header), len(mine)], dtype=torch.int64, device=like.device)
            there = self._swapped(lengths, torch.empty_like(lengths), to, source).tolist()
            head = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(like.device)
            read = self._swapped(head, head.new_empty(there[0]), to, source)
            body = self._swapped(mine, room.bytes("came", there[1], like), to, source)
            return pickle.loads(read.cpu().numpy().tobytes()), body

        self.bytes_sent += len(header) + len(mine)
        (value, shapes), body = self.waited(name, passed, [source])
        return parted(body, shapes), value

    def _swapped(self, sent: Tensor, received: Tensor, to: int, source: int) -> Tensor:
        group = self.ranks.group
        target, origin = (dist.get_global_rank(group, rank) for rank in (to, source))
        moves = [dist.P2POp(dist.isend, sent, target, group)] if sent.numel() else []
        moves += [dist.P2POp(dist.irecv, received, origin, group)] if received.numel() else []
        for work in dist.batch_isend_irecv(moves) if moves else ():
            work.wait()
        if received.device.type == "cuda":
            torch.cuda.synchronize(received.device)
        return received

    def waited(self, name: str, run: Callable[[], T], others: Sequence[int]) -> T:
        """Return what a call of torch comes to that needs other ranks, or raise as soon as one of them fails.

        Args:
            name: Of the exchange.
            run: The call.
            others: The ranks that it needs.
        """
        done: list[Any] = []
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def body() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                done.append((run(), None))
            except Exception as error:  # raised below, in the thread that asked
                done.append((None, error))

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        needed = set(others) - {self.rank}

        def there() -> bool:
            thread.join(LOOK_S)
            return bool(done)

        try:
            self._wait(name, there, needed)
            value, error = done[0]
            if error is not None:
                self._raise_lost(name, error, needed)
        except RanksError:
            with suppress(RuntimeError):  # who keeps the store is gone, and with it the group
                self.broken.set("broken", name)
            raise
        return value

    def _wait(self, name: str, there: Callable[[], bool], needed: set[int]) -> None:
        """Wait until something is there; raise where a rank that is needed fails, is gone, or does not come in time."""
        if there():
            self._raise_given_up()
            return
        begin = looked = monotonic()
        lost = min(LOST_S, self.ranks.timeout / 2)
        pause, beats = 1e-4, dict[int, tuple[int, float]]()
        self._say(f"waits/{self.rank}", (name, sorted(needed)))
        while not there():
            sleep(pause)
            pause, now = min(2 * pause, LOOK_S / 10), monotonic()
            if now - looked < LOOK_S:
                continue
            looked = now
            self._raise_failed()
            for rank in sorted(needed):
                beat = self._ask("add", f"beat/{rank}", 0)
                if beat != beats.get(rank, (None, now))[0]:
                    beats[rank] = beat, now
                elif beat and now - beats[rank][1] > lost:  # without any beat it has not come here yet
                    self._raise_because(rank, f"gave no sign of life for {lost:g} s; it was killed, or is cut off")
            if now - begin > self.ranks.timeout:
                rank, doing = self._waited_for(sorted(needed))
                self._raise_because(rank, f"did not come to {doing!r} within timeout={self.ranks.timeout:g} s")
        self._say(f"waits/{self.rank}", None)
        self._raise_given_up()

    def _waited_for(self, needed: Sequence[int]) -> tuple[int, str]:
        """The rank at the end of the chain of those that wait for one another, and what it did not come to."""
        waits = {rank: self._said(f"waits/{rank}") for rank in range(self.size)}
        name, seen = waits[self.rank][0], {self.rank}
        while True:
            idle = [rank for rank in needed if waits[rank] is None and rank != self.rank]
            busy = [rank for rank in needed if waits[rank] is not None and rank not in seen]
            if idle or not busy:
                return (idle or list(needed))[0], name
            seen.add(busy[0])
            name, needed = waits[busy[0]]

    def _say(self, key: str, value: Any) -> None:
        self._ask("set", key, pickle.dumps(value))

    def _said(self, key: str) -> Any:
        return pickle.loads(self._ask("get", key)) if self._ask("check", [key]) else None

    def _raise_given_up(self) -> None:
        """Raise where others have given up this rank: what is there may be from before."""
        failure = self._said("failure")
        if failure is not None and failure[0] == self.rank:
            raise RanksError(f"rank {self.rank} {failure[1]}", self.rank)

    def _raise_failed(self) -> None:
        failure = self._said("failure")
        if failure is not None:
            rank, why, by = failure
            raise RanksError(f"rank {rank} {why}", rank, itself=by == rank)

    def _raise_lost(self, name: str, error: Exception, needed: set[int]) -> None:
        """Raise where torch did: for the reason that another rank has left, or else for the connection's own."""
        end = monotonic() + PARTING_S
        while monotonic() < end:
            self._raise_failed()
            sleep(LOOK_S)
        told = str(error).splitlines()[0]
        rank = min(needed)
        self._raise_because(rank, f"was lost at {name!r} ({type(error).__name__}: {told})", error)

    def _raise_because(self, rank: int, why: str, error: Exception | None = None) -> None:
        self.fail(rank, why)
        rank, why, by = self._said("failure") or (rank, why, self.rank)  # what another has said before
        raise RanksError(f"rank {rank} {why}", rank, itself=by == rank) from error

    def fail(self, rank: int, why: str) -> None:
        """Leave the reason for which the ranks stop; the first that is left is what all of them say."""
        with suppress(RuntimeError):  # who keeps the store is gone, and the others see that
            self.store.compare_set("failure", "", pickle.dumps((rank, why, self.rank)))


def asked(store: Any, method: str, *given: Any) -> Any:
    """What a method of a store returns.

    Raises:
        RanksError: If the process that keeps it is gone.
    """
    try:
        return getattr(store, method)(*given)
    except RuntimeError as error:
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise RanksError(f"the ranks' store cannot be reached ({told}): rank 0 is gone", 0) from error


HASH = 64
"""The length of a hash, which says nothing to a reader."""


def _compared(name: str, other: Any, first: Any) -> str:
    return name if HASH in {len(str(other)), len(str(first))} else f"{name} ({other} and {first})"
