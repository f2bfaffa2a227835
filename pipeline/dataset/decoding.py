"""Decoding processes of a rank: each reads some of its lanes, and hands over their rows of every batch in shared memory.

Lanes do not depend on each other, and each process has some that follow each other. So its part of a batch is what the rank
would have decoded there itself, and the parts, one after the other, are the same batch.

The rank asks each process for a part as long as a slot of its memory is free, and a process makes one part after the other.
What goes through the pipes is where a part's tensors lie. The memory is an anonymous file (memfd): it has no name that could
be left behind, and /dev/shm, which is small in containers, has no part in it. A slot takes as much of it as its largest part.
"""

import ctypes
import mmap
import os
import pickle
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from features.batch import Rows
from features.errors import UserError
from pipeline import cores
from pipeline.malloc import tune_malloc
from pipeline.processes import end_with

SLOT = 1 << 36  # bytes from one slot to the next; only those that are written take memory
ALIGNED = 64  # bytes
MOST_PROCESSES = 8  # processes of a rank, where their number is not set


class Source(Protocol):
    """What a process reads: `pipeline.dataset.loader.Loader`."""

    on_corrupt: Callable[[int, str], None] | None

    def rows_of(self, position: Any, shares: Sequence[Any]) -> Iterator[Rows]:
        """Of each batch from a position on the rows of some shares of lanes."""


class Place(NamedTuple):
    """Where a tensor lies in a slot."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Reply(NamedTuple):
    """A part of a batch: the place of each field of Rows, or the error there is instead.

    Attributes:
        corrupt: row groups that were left out meanwhile, and why.
    """

    part: list[Place] | Exception
    corrupt: list[tuple[int, str]]


class Memory:
    """Slots of a file that two processes map; a slot is mapped anew where it has grown."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.mapped: dict[int, Tensor] = {}

    def view(self, slot: int, place: Place) -> Tensor:
        """A tensor in a slot."""
        mapped = self.mapped.get(slot)
        if mapped is None or len(mapped) < place.end:
            size = -(-(place.end + place.end // 4 + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
            mapped = torch.frombuffer(mmap.mmap(self.file, size, offset=slot * SLOT), dtype=torch.uint8)
            self.mapped[slot] = mapped
        return mapped[place.begin : place.end].view(place.dtype).view(place.shape)

    def write(self, slot: int, rows: Rows) -> list[Place]:
        """Copies rows into a slot; returns the places of their fields."""
        free = 0

        def put(tensor: Tensor) -> Place:
            nonlocal free
            place = Place(free, free + tensor.nbytes, tuple(tensor.shape), tensor.dtype)
            free = -(-place.end // ALIGNED) * ALIGNED
            self.view(slot, place).copy_(tensor)
            return place

        return of_fields(rows, put)

    def read(self, slot: int, places: list[Place]) -> Rows:
        """Rows that another process has written, as views."""
        return Rows(*(self.view(slot, place) for place in places))


def of_fields(rows: Rows, do: Callable[[Tensor], Any]) -> list[Any]:
    """What `do` makes of the tensor of each field."""
    return [do(getattr(rows, f.name)) for f in fields(rows)]


class Decoders:
    """The decoding processes of a rank. They end with it, however it ends.

    Started by a thread that lives as long as they do: they end with that.

    Args:
        source: makes what each of them reads, in that process.
        shares: of each process. slots: parts of each that are made ahead.
    """

    def __init__(self, source: Callable[[], Source], shares: Sequence[Sequence[Any]], slots: int) -> None:
        self.slots, self.turn, self.lock = slots, 0, Lock()
        self.workers = [Worker(source, some, slots, f"{n + 1} of {len(shares)}") for n, some in enumerate(shares)]

    def rows(self, position: Any, count: int, on_corrupt: Callable[[int, str], None]) -> Iterator[Rows]:
        """The rank's rows of `count` batches from a position on, in memory of its own.

        Args:
            on_corrupt: called with each row group that a process has left out, and why.
        Raises:
            UserError: as `Source.rows_of`; a process has ended. RuntimeError: another iterator was begun meanwhile.
        """
        with self.lock:
            self.turn = turn = self.turn + 1
            for worker in self.workers:
                worker.begin(position)
        asked = 0
        for step in range(count):
            with self.lock:
                if self.turn != turn:
                    raise RuntimeError("decoding processes serve one iterator at a time, and another one was begun")
                while asked < min(step + self.slots, count):
                    for worker in self.workers:
                        worker.ask(asked % self.slots)
                    asked += 1
                parts = [worker.part(step % self.slots, on_corrupt) for worker in self.workers]
                rows = Rows.concat(parts) if len(parts) > 1 else Rows(*of_fields(parts[0], Tensor.clone))
            yield rows

    def close(self) -> None:
        """Ends the processes."""
        for worker in self.workers:
            worker.end()


class Worker:
    """A process, its memory and its pipes."""

    def __init__(self, source: Callable[[], Source], shares: Sequence[Any], slots: int, name: str) -> None:
        self.name = name
        self.first: object = (source, shares)  # sent only when the process listens: it may be large
        self.owed = 0  # parts that were asked for and not yet taken
        file = os.memfd_create("decoded rows")
        os.truncate(file, slots * SLOT)
        self.memory = Memory(file)
        # One thread each, as many as there are processes; and none of them takes memory of a GPU.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as decoding; decoding.main()", str(os.getpid()), str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file], env=environment,
        )  # fmt: skip
        self.end = weakref.finalize(self, _end_process, self.process, file)

    def begin(self, position: Any) -> None:
        """Has the process read from a position on."""
        if self.first:
            self._send(self.first)
            self.first = None
        for _ in range(self.owed):
            self._receive()
        self._send(position)

    def ask(self, slot: int) -> None:
        """Asks for the next part, in a slot that is free."""
        self._send(slot)
        self.owed += 1

    def part(self, slot: int, on_corrupt: Callable[[int, str], None]) -> Rows:
        """The part that was asked for the longest time ago, as views of its slot."""
        reply = self._receive()
        for group, why in reply.corrupt:
            on_corrupt(group, why)
        if isinstance(reply.part, Exception):
            raise reply.part
        return self.memory.read(slot, reply.part)

    def _send(self, message: object) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which _receive says
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def _receive(self) -> Reply:
        assert self.process.stdout is not None
        try:
            reply = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise UserError(
                f"decoding process {self.name} ended ({_how(self.process)}). The kernel sends SIGKILL where memory runs "
                "out: lower train.decode_workers, or give the job more. The same command resumes."
            ) from None
        self.owed -= 1
        return reply


def _how(process: "subprocess.Popen[bytes]") -> str:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    process.kill()  # alive, with its pipe closed
    code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end_process(process: "subprocess.Popen[bytes]", file: int) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # what was not sent to a process that is gone
            pipe and pipe.close()
    os.close(file)


def processes_of(setting: int | None, device: torch.device) -> int:
    """Decoding processes of a rank on a device.

    Args:
        setting: train.decode_workers; None: 0 for a CPU, which trains on fewer rows than a thread decodes; for a GPU one for
            each core that the rank has, but for the one that it runs on itself, and MOST_PROCESSES at most.
    """
    if setting is not None or device.type == "cpu":
        return setting or 0
    return max(0, min(MOST_PROCESSES, cores.available() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def split(shares: Sequence[Any], processes: int) -> list[Sequence[Any]]:
    """The shares of each process, which follow each other; as many for each, but for one. No more processes than shares."""
    count = min(processes, len(shares))
    return [shares[len(shares) * n // count : len(shares) * (n + 1) // count] for n in range(count)]


def main() -> None:
    """What a decoding process does: parts of batches as stdin asks for them, replies to what was stdout, until one closes."""
    parent, file = map(int, sys.argv[1:])
    end_with(parent, ctypes.CDLL(None), signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):  # for the rank, which saves its work and needs rows until then
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    tune_malloc()
    torch.set_num_threads(1)
    memory, corrupt = Memory(file), list[tuple[int, str]]()
    parts: Iterator[Rows] = iter(())
    try:
        make, shares = pickle.load(sys.stdin.buffer)
        source: Source = make()
        source.on_corrupt = lambda group, why: corrupt.append((group, why))
        while True:
            message = pickle.load(sys.stdin.buffer)
            if not isinstance(message, int):
                parts = source.rows_of(message, shares)
                continue
            pickle.dump(Reply(made(parts, memory, message), corrupt), replies)
            replies.flush()
            corrupt.clear()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody waits for what is left


def made(parts: Iterator[Rows], memory: Memory, slot: int) -> list[Place] | Exception:
    """The next part's places, once it is in a slot; or the error there is instead."""
    try:
        return memory.write(slot, next(parts))
    except UserError as error:
        return error
    except Exception:  # a defect: raised where the rank is, as text, since not every exception can be pickled
        return RuntimeError(f"in a decoding process: {traceback.format_exc()}")
