"""Several processes that train one model together, on one machine or on many: the ranks of MPI (mpi-forum.org).

A launcher such as mpiexec or srun starts the processes. Each holds all weights and computes a part of every step. `Ranks` is
the interface, and the only rank of a run without a launcher. `MpiRanks` needs mpi4py, which is imported only under a launcher.
What the ranks compute is not known here.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterable
from traceback import print_exception
from typing import Any, TypeVar

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.kernels.reference import Array
from npgpt.parallel.limits import available_cores
from npgpt.parallel.nccl import NcclSum
from npgpt.parallel.workers import Mapper, Workers, even_slices

Item = TypeVar("Item")
Result = TypeVar("Result")

# What a launcher tells the processes it starts: MPICH, Intel MPI and srun with PMI-2; Open MPI; srun with PMIx.
LAUNCHERS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # how many it has started, where it says so
DEFAULT_TIMEOUT = 600  # seconds
SECONDS_TO_ANSWER = 3.0  # a rank that waits, too, answers in this time
SECONDS_TO_PASS_ON = 0.5  # launchers drop what they have not passed on when they end the ranks
SPINNING = 0.002  # seconds of waiting for other ranks without a pause
SENDING = 1.0  # the same for a large array, which moves only while MPI is asked
PAUSE = 0.0002  # seconds between two looks after that
YIELD = getattr(os, "sched_yield", lambda: time.sleep(0))  # lets another rank have this core; sleep(0) takes 80 us on Linux
ASK, HERE = 1, 2  # tags of messages between ranks that wait


class OtherRankError(Exception):
    """Another rank has failed, and says why. This rank ends without a message."""


class RankError(RuntimeError):
    """What failed on a rank that is not the first one."""


class Ranks:
    """The ranks of a run, seen from one of them. This class is for a run with one process. MpiRanks is for several."""

    size, rank = 1, 0
    on_this_machine = 1  # ranks that share this machine

    @property
    def description(self) -> str:
        """How many ranks there are, and where; empty for one."""
        return ""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files and the messages of the run."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def add_up(self, array: Array) -> None:
        """array (n,) becomes the sum of those of all ranks, in the order of their numbers. On a GPU, the order is NCCL's."""

    def gather(self, value: Item) -> list[Item]:
        """The values of all ranks, on each of them. A value is a small object that can be pickled."""
        return [value]

    def broadcast(self, value: Item) -> Item:
        """The value of the first rank, on all ranks. It can be large."""
        return value

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns. If it raises an exception on any rank, no rank goes on: the others raise OtherRankError."""
        return work()

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns on the first rank, on all ranks. It runs there alone."""
        return work()

    def end_all(self, error: BaseException, message: str) -> None:
        """End all ranks with this message, unless all know of the error already."""

    def mapper(self, workers: Workers) -> Mapper:
        """Spreads items over the ranks, and those of a rank over its workers. All ranks get all results."""
        return workers


ONE_RANK = Ranks()


class MpiRanks(Ranks):
    """The ranks of MPI. Every method must be called by all ranks, in the same order.

    Sums have a fixed order, so the same number of ranks gives the same bytes with any MPI: each rank adds up one part of the
    array, and the parts are then gathered. This moves as many bytes as other algorithms for large arrays do. It needs memory
    for one more array.

    A rank that does not come within `timeout` seconds ends the run on all ranks, with one line that names it and its host.
    """

    def __init__(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._timeout = MPI, MPI.COMM_WORLD, timeout
        self.size, self.rank = self._comm.size, self._comm.rank
        self._parts = np.empty(0, dtype=np.float32)
        self._nothing = [np.empty(0, dtype=np.uint8), MPI.BYTE]  # a message without content
        self._nccl: NcclSum | None = None
        self._known: Exception | None = None  # the error that ends all ranks in good order
        self._asking: set[int] = set()  # ranks that have asked who is missing
        self._hosts = ["an unknown host"] * self.size
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        own = (socket.gethostname(), cores)
        places = self.gather(own)
        self._hosts = [host for host, _ in places]
        self.on_this_machine = self._hosts.count(own[0])
        # Ranks that may use the same cores share them. A launcher may also have given each rank cores of its own.
        sharing = places.count(own)
        if "OMP_NUM_THREADS" not in os.environ and sharing > 1:
            os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // sharing))
        self._choose_gpu(self._hosts[: self.rank].count(own[0]))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and error is not self._known:  # the others wait for this rank, and nothing else would end them
            print_exception(kind, error, trace, file=sys.__stderr__)
            self._abort(f"{self._name(self.rank)}: {type(error).__name__}: {error}")

    def _choose_gpu(self, number: int) -> None:
        """Let this rank see one GPU: the one with its number among the ranks of this machine."""
        if self.on_this_machine > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            if visible is None:
                os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
            elif "," in visible:  # otherwise a launcher has chosen one already, or the user wants none
                several = visible.split(",")
                os.environ["CUDA_VISIBLE_DEVICES"] = several[number % len(several)]

    @property
    def description(self) -> str:
        machines = len(set(self._hosts))
        return f"{self.size} ranks on {f'{machines} machines' if machines > 1 else self._hosts[0]}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _abort(self, message: str) -> None:
        """Print a message and end all ranks at once."""
        print(f"npgpt: {message}", file=sys.__stderr__, flush=True)
        time.sleep(SECONDS_TO_PASS_ON)
        self._comm.Abort(1)

    def _wait(self, request: Any, spinning: float = SPINNING) -> None:
        """Wait for an operation of all ranks. Meanwhile, answer ranks that ask who else is waiting."""
        started = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - started
            if waited > spinning:
                time.sleep(PAUSE)
                self._answer()
            else:
                YIELD()
            if waited > self._timeout:
                self._find_missing()

    def _answer(self) -> None:
        status = self._mpi.Status()
        while self._comm.Iprobe(self._mpi.ANY_SOURCE, ASK, status):
            self._comm.Recv(self._nothing, status.source, ASK)
            self._comm.Isend(self._nothing, status.source, HERE).Free()
            self._asking.add(status.source)

    def _find_missing(self) -> None:
        """Ask all ranks whether they wait, too. End the run, and name those that do not answer."""
        missing = set(range(self.size)) - {self.rank}
        for rank in missing:
            self._comm.Isend(self._nothing, rank, ASK).Free()
        asked, status = time.monotonic(), self._mpi.Status()
        # One line is enough. The lowest of the ranks that ask writes it, and ends the others.
        while time.monotonic() < asked + SECONDS_TO_ANSWER * (3 if any(rank < self.rank for rank in self._asking) else 1):
            self._answer()
            while self._comm.Iprobe(self._mpi.ANY_SOURCE, HERE, status):
                self._comm.Recv(self._nothing, status.source, HERE)
                missing.discard(status.source)
            time.sleep(PAUSE)
        names = " and ".join(self._name(rank) for rank in sorted(missing)) or "one of the ranks"
        self._abort(f"no answer from {names} for {self._timeout:g} seconds (--rank-timeout), so the run ends")

    # ---------------------------------------------------------------- operations of all ranks

    def add_up(self, array: Array) -> None:
        if not isinstance(array, np.ndarray):
            self._gpu(array).add_up(array)
            return
        own = even_slices(array.size, self.size)
        counts, starts = [at.stop - at.start for at in own], [at.start for at in own]
        mine = counts[self.rank]
        if self._parts.dtype != array.dtype or self._parts.size < self.size * mine:
            self._parts = np.empty(self.size * mine, dtype=array.dtype)
        parts = self._parts[: self.size * mine].reshape(self.size, mine)
        sent = [array, (counts, starts)]
        received = [parts, ([mine] * self.size, [mine * rank for rank in range(self.size)])]
        self._wait(self._comm.Ialltoallv(sent, received), SENDING)
        total = parts[0]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for a gradient that is not finite
            for part in parts[1:]:
                total += part
        self._wait(self._comm.Iallgatherv([total, mine], sent), SENDING)

    def _gpu(self, array: Array) -> NcclSum:
        """What adds up arrays of GPUs. All ranks have come when this returns, because NCCL itself waits without end."""
        cupy = sys.modules[type(array).__module__.split(".")[0]]
        if self._nccl is None:
            unique_id = self.on_first(lambda: NcclSum.unique_id(cupy))
            self._nccl = NcclSum(cupy, unique_id, self.size, self.rank)
        else:
            self.gather(None)
        return self._nccl

    def gather(self, value: Item) -> list[Item]:
        return self._exchange("gather", value)

    def _exchange(self, kind: str, value: Any, failed: bool = False) -> list[Any]:
        """The values of all ranks. Raises OtherRankError if another rank has failed, and this one does not know it yet.

        kind: what this rank does. If another rank does something else, all raise an error.
        """
        message = pickle.dumps((kind, failed, value))
        lengths = np.empty(self.size, dtype=np.int64)
        self._wait(self._comm.Iallgather(np.array([len(message)], dtype=np.int64), lengths))
        starts = np.cumsum(lengths) - lengths
        everything = bytearray(int(lengths.sum()))
        self._wait(self._comm.Iallgatherv(message, [everything, (lengths.tolist(), starts.tolist()), self._mpi.BYTE]))
        found = [pickle.loads(everything[start : start + n]) for start, n in zip(starts, lengths, strict=True)]
        failures = [rank for rank, (_, has_failed, _) in enumerate(found) if has_failed]
        if failures and self.rank != failures[0]:
            self._known = OtherRankError()
            raise self._known
        if not failures and len({kind for kind, _, _ in found}) > 1:
            self._known = (
                OtherRankError() if self.rank else RequestError("the ranks do different things; give all the same flags")
            )
            raise self._known
        return [value for _, _, value in found]

    def broadcast(self, value: Item) -> Item:
        packed = self.together(lambda: pickle.dumps(value, protocol=5) if self.is_first else None)
        n = self.gather(len(packed or b""))[0]
        array = self.together(lambda: np.empty(n, dtype=np.uint8) if packed is None else np.frombuffer(packed, dtype=np.uint8))
        piece = 1 << 30  # MPI counts bytes with 32 bits
        for start in range(0, array.size, piece):
            self._wait(self._comm.Ibcast(array[start : start + piece], root=0), SENDING)
        return value if self.is_first else pickle.loads(array.data)

    def together(self, work: Callable[[], Result]) -> Result:
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must know; it is raised again
            if error is self._known:
                raise
            self._exchange("together", None, failed=True)
            known = error if self.is_first else RankError(f"{self._name(self.rank)}: {str(error) or type(error).__name__}")
            self._known = known
            raise known from (None if known is error else error)
        self._exchange("together", None)
        return result

    def end_all(self, error: BaseException, message: str) -> None:
        if error is not self._known:
            self._abort(message)

    def on_first(self, work: Callable[[], Result]) -> Result:
        result = self.together(lambda: work() if self.is_first else None)
        return self.broadcast(result)  # type: ignore[return-value]

    def mapper(self, workers: Workers) -> Mapper:
        return _Spread(workers, self)


class _Spread:
    """See `Ranks.mapper`."""

    def __init__(self, workers: Workers, ranks: Ranks) -> None:
        self._workers, self._ranks = workers, ranks

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        size, everything = self._ranks.size, list(items)
        own = self._ranks.together(lambda: self._workers.map(function, everything[self._ranks.rank :: size]))
        of_each = self._ranks.gather(own)
        return [of_each[i % size][i // size] for i in range(len(everything))]


def speaks() -> bool:
    """Whether this process is the first of those that a launcher has started, or has no launcher. MPI is not asked."""
    return all(os.environ.get(name, "0") == "0" for name in LAUNCHERS)


def open_ranks(mode: str = "auto", timeout: float = DEFAULT_TIMEOUT) -> Ranks:
    """The ranks that a launcher has started; one rank if there is no launcher, or with mode "none".

    Raises RequestError if there is a launcher and mpi4py is missing or does not work with it.
    """
    variable = next((name for name in LAUNCHERS if name in os.environ), None)
    if mode == "none" or variable is None:
        return ONE_RANK
    size = next((os.environ[name] for name in SIZES if name in os.environ), "several")
    if size == "1":
        return ONE_RANK
    problem = None
    try:
        from mpi4py import MPI

        if MPI.COMM_WORLD.size > 1:
            return MpiRanks(timeout)
        if size == "several":
            return ONE_RANK
        problem = f"mpi4py uses another MPI than the launcher, which has started {size}"
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        problem = f"mpi4py cannot be used ({error})"
    if not speaks():
        raise OtherRankError
    raise RequestError(
        f"a launcher has started this process ({variable}={os.environ[variable]}), but {problem}; "
        f"install it with: {sys.executable} -m pip install 'npgpt[mpi]', or use --ranks none"
    )
