"""`runner=hosts`: the pieces of a step's work go to worker pools on other hosts (see pool.py), through a queue.

The pipeline is Beam's, in the job's process, as on the direct runner; only the steps' work leaves it. Beam's own way of
having workers elsewhere splits the work evenly before a step begins, so that a slow piece holds up what stands behind it,
and one worker that ends, ends the job. Here a worker takes the next piece when it is done with one; a piece whose worker
ended goes back to the front of the queue.
"""

import logging
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Protocol

from features.errors import UserError, join_faults, one_line
from pipeline.ingest import workers
from pipeline.ingest.messages import Failure, ReadWork, Report
from pipeline.ingest.runners import handshake
from pipeline.ingest.runners.pool import is_loopback
from pipeline.ingest.state import Job
from pipeline.storage.store_path import on_store

logger = logging.getLogger(__name__)

CONNECT_S = 8.0  # until a pool must have answered
RETURN_S = 10.0  # a pool that has ended may be started again within
MOST_ENDS = 3  # of workers that have the same piece of work: it is what ends them


@dataclass(frozen=True)
class Address:
    """Of a pool."""

    host: str
    port: int
    text: str


def addresses(hosts: Sequence[str]) -> list[Address]:
    """The pools of `hosts`.

    Raises:
        UserError: there are none, or one is malformed, there twice, or on another machine while this job has no secret: it
            would unpickle what anyone who listens at that address sends.
    """
    if not hosts:
        raise UserError("runner=hosts: set hosts=[HOST:50000,…], of worker pools (pipeline/ingest/runners/README.md)")
    found = [address(text, "hosts") for text in hosts]
    for each in found:
        if found.count(each) > 1:
            raise UserError(f"hosts: {each.text} is there twice. Set workers= for more processes on each host.")
    far = [each.text for each in found if not is_loopback(each.host)]
    if far and not handshake.key_of_environment():
        raise UserError(
            f"hosts: {', '.join(far)} without {handshake.KEY_VARIABLE}: whoever listens there could run code here. Set it to "
            "the secret of the pools."
        )
    return found


def address(text: str, setting: str) -> Address:
    """HOST:PORT, or [IPV6]:PORT. Raises UserError."""
    host, _, port = text.rpartition(":")
    name = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not name or (":" in name and host == name) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{setting}: {text!r} is not HOST:PORT")
    return Address(name, int(port), text)


class Worker:
    """A worker process on another host, at the end of a connection. Raises OSError where there is none."""

    def __init__(
        self, address: Address, own: dict[str, str], files: Sequence[tuple[str, int | None]], do: workers.Do
    ) -> None:
        self.connection = socket.create_connection((address.host, address.port), CONNECT_S)
        try:
            handshake.notice_silence(self.connection)
            handshake.greet_pool(self.connection, handshake.key_of_environment(), own, files, CONNECT_S)
            self.file = self.connection.makefile("rwb")
        except BaseException:
            self.connection.close()
            raise
        self.do: workers.Do | None = do  # sent before the first piece of work

    def have_done(self, step: str, number: int, work: object) -> Report | Failure | Exception:
        """What it reports. Raises OSError, EOFError where it has ended."""
        if self.do is not None:
            pickle.dump(self.do, self.file)
            self.do = None
        pickle.dump((step, number, work), self.file)
        self.file.flush()
        try:
            return pickle.load(self.file)
        except (EOFError, OSError):
            raise
        except Exception as error:  # the beginning of a report
            raise EOFError("sent no report") from error

    def close(self) -> None:
        """Ends it, whatever it is doing, and whoever waits for its report."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self.file.close()
        self.connection.close()


@dataclass
class Piece:
    """Of a step's work.

    Attributes:
        ended: pools whose workers ended with it.
    """

    step: str
    number: int
    work: object
    report: Future[Report | Failure] = field(default_factory=Future)
    ended: list[str] = field(default_factory=list)


class Pools:
    """Workers on other hosts, a thread for each, and the queue that they take their work from.

    Args:
        hosts: of the pools. count: workers of each.
        do: what they do, pickled once a worker.
        files: that all hosts must see, and the sizes of files.

    Raises:
        UserError: a pool cannot be used; all that cannot are named.
    """

    def __init__(
        self, hosts: list[Address], count: int, do: workers.Do, files: Sequence[tuple[str, int | None]]
    ) -> None:
        self.do, self.files, self.versions = do, files, handshake.versions()
        self.queue: deque[Piece] = deque()
        self.changed = threading.Condition()
        self.begun: dict[tuple[str, int], Piece] = {}
        self.lost: dict[str, str] = {}  # pools that are gone, and why
        self.closed = False
        slots = [each for each in hosts for _ in range(count)]
        with ThreadPoolExecutor(len(slots)) as connecting:
            found = list(connecting.map(self._connected, slots))
        self.workers = {index: worker for index, worker in enumerate(found) if isinstance(worker, Worker)}
        if faults := list(dict.fromkeys(fault for fault in found if isinstance(fault, str))):
            self.close()
            raise UserError(f"hosts: {join_faults(faults)}. Nothing was written.")
        self.threads = [
            threading.Thread(target=self._serve, args=(index, each), daemon=True) for index, each in enumerate(slots)
        ]
        self.serving = len(self.threads)
        for thread in self.threads:
            thread.start()

    def submit(self, step: str, number: int, work: object) -> Future[Report | Failure]:
        """Queues a piece of a step's work, unless it was before."""
        with self.changed:
            if (step, number) not in self.begun:
                piece = self.begun[step, number] = Piece(step, number, work)
                self.queue.append(piece)
                if not self.serving:
                    self._fail_all()
                self.changed.notify()
            return self.begun[step, number].report

    def close(self) -> None:
        """Ends the workers."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            for worker in self.workers.values():
                worker.close()

    def _connected(self, address: Address) -> "Worker | str":
        """A new worker, or what is wrong with its pool."""
        try:
            return Worker(address, self.versions, self.files, self.do)
        except handshake.HandshakeError as error:
            return f"{address.text} {error}"
        except socket.gaierror:
            return f"{address.text}: no such host"
        except ConnectionRefusedError:
            return f"{address.text}: nothing listens there; start python -m pipeline.ingest.runners.pool"
        except TimeoutError:
            return f"{address.text} does not answer within {CONNECT_S:.0f} s"
        except OSError as error:
            return f"{address.text}: {one_line(error)}"

    def _serve(self, index: int, address: Address) -> None:
        """Has one worker do piece after piece; another one of the same pool takes its place when it ends."""
        while (piece := self._next()) is not None:
            try:
                report = self.workers[index].have_done(piece.step, piece.number, piece.work)
            except (OSError, EOFError) as error:
                if self.closed:
                    return
                self._take_back(piece, address, error)
                if not self._replaced(index, address):
                    return
            except Exception as error:  # work that cannot be pickled: a defect
                piece.report.set_exception(error)
            else:
                if isinstance(report, Exception):
                    piece.report.set_exception(report)
                else:
                    piece.report.set_result(report)

    def _next(self) -> Piece | None:
        """The next piece, once there is one; None where the job has ended."""
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.closed)
            return None if self.closed else self.queue.popleft()

    def _take_back(self, piece: Piece, address: Address, error: Exception) -> None:
        piece.ended.append(address.text)
        logger.warning(
            "%s: a worker ended in step %s (%s): its work is done again", address.text, piece.step, one_line(error)
        )
        with self.changed:
            if len(piece.ended) < MOST_ENDS:
                self.queue.appendleft(piece)
                self.changed.notify()
                return
        piece.report.set_result(
            Failure(
                f"{MOST_ENDS} workers ended with the same piece of step {piece.step} (on {', '.join(piece.ended)}). Nothing "
                "was written: run again, with fewer workers or smaller unit_bytes and bucket_bytes if memory was short."
            )
        )

    def _replaced(self, index: int, address: Address) -> bool:
        """Whether there is a worker again; after RETURN_S without one the pool is lost to this thread."""
        self.workers[index].close()
        deadline = time.monotonic() + RETURN_S
        while not self.closed:
            found = self._connected(address)
            with self.changed:
                if isinstance(found, Worker):
                    self.workers[index] = found
                    if self.closed:
                        found.close()
                    return not self.closed
                if time.monotonic() > deadline:
                    self._lose(address, found)
                    return False
            time.sleep(0.5)
        return False

    def _lose(self, address: Address, why: str) -> None:
        self.serving -= 1
        if address.text not in self.lost:
            self.lost[address.text] = why
            logger.warning("%s; its work goes to the other hosts", why)
        if not self.serving:
            self._fail_all()

    def _fail_all(self) -> None:
        """Ends what is queued: no worker is left to do it."""
        why = join_faults(list(self.lost.values()))
        while self.queue:
            piece = self.queue.popleft()
            piece.report.set_result(
                Failure(f"hosts: no worker pool is left in step {piece.step}: {why}. Nothing was written: run again.")
            )


class Settings(Protocol):
    """Of a job, as jobs.preprocess and jobs.predict have them."""

    runner: str
    workers: int
    hosts: list[str]


def workers_of(
    config: Settings, do: workers.Do, step: str, first: Sequence[object], seen: Sequence[tuple[str, int | None]]
) -> AbstractContextManager[None]:
    """The processes that do the steps' work, here or on other hosts, where Beam's own do not. See `connected`."""
    if config.runner == "hosts":
        return connected(config.hosts, config.workers, do, step, first, seen)
    several = config.runner == "direct" and config.workers > 1
    return workers.started(config.workers, do, step, first) if several else nullcontext()


def must_see(job: Job, work: Sequence[ReadWork]) -> list[tuple[str, int | None]]:
    """What of a job all hosts must see: its folders, and a file of each stream, but for those on stores."""
    first = {each.stream: each.unit.file for each in reversed(work)}
    folders = [folder for folder in (job.staging, job.scratch) if not on_store(folder)]
    files = [(file.path, file.size) for file in first.values() if "://" not in file.path]
    return [*((str(folder), None) for folder in folders), *files]


@contextmanager
def connected(
    hosts: Sequence[str],
    count: int,
    do: workers.Do,
    step: str,
    first: Sequence[object],
    files: Sequence[tuple[str, int | None]] = (),
) -> Iterator[None]:
    """Workers of pools, which pipeline.ingest.workers.RUNNING has meanwhile.

    Args:
        hosts: HOST:PORT of the pools. count: workers of each.
        do: what they do.
        step, first: they begin with the work of the first step, before Beam asks for it.
        files: paths on mounted file systems that all hosts must see, and the sizes of files.

    Raises:
        UserError: a pool cannot be used.
    """
    pools = Pools(addresses(hosts), count, do, files)
    workers.RUNNING.append(pools)
    try:
        for number, work in enumerate(first):
            pools.submit(step, number, work)
        yield
    finally:
        workers.RUNNING.remove(pools)
        pools.close()
