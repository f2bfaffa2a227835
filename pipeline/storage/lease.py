"""Locks on a store: objects that their owners renew, and that end at most LEASE_S after an owner that does not.

Beside a file NAME lie `.NAME.lease/exclusive` and `.NAME.lease/shared-HEX`, one a reader. Each names its owner and the seconds
that it is good for. Whoever wants the lock puts its own object first and then reads the others', so that of two at most one
gets it. An object that has not changed for its seconds on the clock of who waits, and that was read all the while, belongs to
a dead owner; no two clocks are compared. That of a process of this very machine is known to be dead at once, and is waited for
BUSY_FACTOR times as long else.
"""

import errno
import json
import os
import socket
import threading
import time
import uuid
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.storage.conditional import Changed, age_of, put_new, read_version, remove_version, write_over
from pipeline.storage.store_path import StorePath

LEASE_S = 30.0  # after which an owner that has not renewed its lease is taken to be dead
BUSY_FACTOR = 10  # times as long for a process of this machine that runs: it may be too busy to renew
LONGEST_S = 600.0  # that another's lease may be good for
AGE_FACTOR = 3  # of its seconds, by the store's own clock, after which half of them on ours are enough
RELEASE_S = 5.0  # for which a release waits for a store that does not answer; the lease ends by itself


class Lease:
    """A lease that a thread renews until it is released, this object is dropped, or the process ends.

    Attributes:
        lost: whether somebody else has taken it over, or removed it; whoever commits under it asks first.
    """

    def __init__(self, owned: "_OwnedObject") -> None:
        self.owned = owned
        weakref.finalize(self, owned.drop).atexit = False

    def release(self) -> None:
        """Gives it up."""
        self.owned.release()

    @property
    def lost(self) -> bool:
        """Asks the store where the last renewal is long ago, as after a stop of the whole machine."""
        if not self.owned.lost and self.owned.age() > LEASE_S / 2:
            self.owned.renew()
        return self.owned.lost

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lease(path: StorePath, shared: bool = False, wait: bool = False) -> Lease:
    """A lease on a path, of which nothing need be there.

    Without `wait`, another's lease that is not known to be renewed is watched for its seconds: it may be a dead one's.

    Raises:
        BlockingIOError: another process has it, and `wait` is false.
    """
    folder, watch = folder_of(path), Watch(wait)
    while True:
        owned = (_shared if shared else _exclusive)(folder, watch)
        if owned is not None:
            owned.start()
            found = Lease(owned)
            if not shared:
                _own_leases[path] = found
            return found
        time.sleep(LEASE_S / 60)


def lost_here(path: StorePath) -> bool:
    """Whether this process holds an exclusive lease on a path that another has taken over."""
    return (owned := _own_leases.get(path)) is not None and owned.lost


def folder_of(path: StorePath) -> StorePath:
    """The folder of a path's leases."""
    return path.parent / f".{path.name}.lease"


class _OwnedObject:
    """An object of ours, renewed by a thread. `kind` is `asking` or `held`, see `_exclusive`."""

    def __init__(self, path: StorePath, kind: str) -> None:
        self.path, self.kind, self.owner, self.process = path, kind, uuid.uuid4().hex, os.getpid()
        self.lost, self.count, self.version, self.renewed = False, 0, "", _now()
        self.stop, self.mutex, self.dropped, self.released = threading.Event(), threading.Lock(), False, False

    def content(self) -> bytes:
        self.count += 1
        about = {"owner": self.owner, "kind": self.kind, "count": self.count, "seconds": LEASE_S}
        return json.dumps({**about, **_this_process(self.process)}).encode()

    def start(self) -> None:
        threading.Thread(target=self.renew_always, name="lease", daemon=True).start()
        # At exit finalizers run in the reverse order of their making: this one before that of the store's connections.
        self.at_exit = weakref.finalize(self, self.release)

    def renew_always(self) -> None:
        while not self.stop.wait(LEASE_S / 3) and not self.lost:
            self.renew()
        if self.dropped:
            self.release()
        self.at_exit.detach()

    def renew(self) -> None:
        """Puts it again. A store that does not answer takes nothing away: what counts is whether another has come."""
        with self.mutex, suppress(OSError):
            if self.stop.is_set() or self.lost:
                return
            started = _now()
            try:
                self.version = write_over(self.path, self.content(), self.version, limit=LEASE_S / 3)
                self.renewed = started
            except Changed:
                found = read_version(self.path)
                if found and _parsed(found[0]).get("owner") == self.owner:  # an answer was lost
                    self.version, self.renewed = found[1], started
                else:
                    self.lost = True

    def age(self) -> float:
        return _now() - self.renewed

    def drop(self) -> None:
        """Lets its thread release it: the garbage collector calls this in any thread, also in the one that asks the store."""
        self.dropped = True
        self.stop.set()

    def release(self) -> None:
        """Deletes it, if it still is ours; a process that was forked from the owner leaves it alone."""
        if self.process != os.getpid():
            return
        self.stop.set()
        entered = self.mutex.acquire(timeout=RELEASE_S)  # else a renewal under way would bring it back
        if not self.released:
            self.released = True
            with suppress(OSError):
                remove_version(self.path, self.version, RELEASE_S)
        if entered:
            self.mutex.release()


class Watch:
    """What is seen of others' objects while a lease is waited for.

    Args:
        wait: until they are gone, however long they are renewed.
    """

    def __init__(self, wait: bool) -> None:
        self.wait = wait
        self.seen: dict[StorePath, tuple[str, float, float]] = {}  # version, since when it is unchanged, last read

    def is_dead(self, path: StorePath, content: bytes, version: str) -> bool:
        """Whether an object's owner is dead. Raises BlockingIOError where it is not, and is not waited for."""
        about, now = _parsed(content), _now()
        first, since, last = self.seen.get(path, (version, now, now))
        changed, seconds = first != version, _seconds(about)
        if changed or now - last > seconds / 3:  # where the store did not answer us, it did not answer its owner either
            since = now
        self.seen[path] = version, since, now
        here = _this_process(os.getpid())
        neighbour = "boot" in here and all(about.get(key) == here[key] for key in ("host", "boot", "space"))
        if neighbour and not _runs(about):
            return True
        seconds *= BUSY_FACTOR if neighbour else 1
        if now - since >= seconds:
            return True
        if about.get("kind") == "asking":  # it will be held or gone in a moment
            return False
        if self.wait and now - since < seconds / 2:  # asked again soon enough
            return False
        age = age_of(path)
        if age is not None and age > seconds * AGE_FACTOR and now - since >= seconds / 2:
            return True
        renewed = neighbour if age is None else age < seconds * 2 / 3
        if not self.wait and (changed or renewed):
            raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path))
        return False


def _exclusive(folder: StorePath, watch: Watch) -> _OwnedObject | None:
    """The exclusive lease, or None to try again.

    Without waiting it first only asks, and a reader that comes in between waits for what becomes of it; one that waits, and
    one that is held, lets no new reader in.
    """
    owned = _OwnedObject(folder / "exclusive", "held" if watch.wait else "asking")
    try:
        owned.version = put_new(owned.path, owned.content())
    except FileExistsError:
        found = read_version(owned.path)
        if found is None or not watch.is_dead(owned.path, *found):
            return None
        try:
            owned.version = write_over(owned.path, owned.content(), found[1])
        except Changed:
            return None
    try:
        while not all([_ended(reader, watch) for reader in _readers(folder)]):  # noqa: C419 - each is watched from now on
            time.sleep(LEASE_S / 100)
            if owned.age() > LEASE_S / 3:
                owned.renew()
            if owned.lost:
                return None
        if owned.kind == "asking":
            owned.kind = "held"
            owned.renew()
    except BaseException:
        owned.release()
        raise
    return None if owned.lost else owned


def _shared(folder: StorePath, watch: Watch) -> _OwnedObject | None:
    """A shared lease, or None to try again."""
    if _stands(folder / "exclusive", watch):
        return None
    owned = _OwnedObject(folder / f"shared-{uuid.uuid4().hex}", "held")
    owned.version = put_new(owned.path, owned.content())
    try:
        while kind := _stands(folder / "exclusive", watch):
            if kind != "asking":
                owned.release()
                return None
            time.sleep(LEASE_S / 300)
        if owned.age() > LEASE_S / 3:
            owned.renew()
    except BaseException:
        owned.release()
        raise
    return None if owned.lost else owned


def _stands(exclusive: StorePath, watch: Watch) -> str | None:
    """The kind of the exclusive lease, None where there is none, or it was deleted here since its owner is dead."""
    found = read_version(exclusive)
    if found is None:
        return None
    if not watch.is_dead(exclusive, *found):
        return str(_parsed(found[0]).get("kind"))
    remove_version(exclusive, found[1])
    return None


def _ended(reader: StorePath, watch: Watch) -> bool:
    """Whether a reader's object is gone, or was deleted here since its owner is dead."""
    found = read_version(reader)
    if found is None:
        return True
    if not watch.is_dead(reader, *found):
        return False
    remove_version(reader, found[1])
    return True


def _readers(folder: StorePath) -> list[StorePath]:
    try:
        return [path for path in folder.iterdir() if path.name.startswith("shared-")]
    except FileNotFoundError:
        return []


def _now() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _parsed(content: bytes) -> dict[str, Any]:
    """What an object says of its owner; empty where it is not one of ours."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _seconds(about: dict[str, Any]) -> float:
    found = about.get("seconds")
    return min(max(found, 0.0), LONGEST_S) if isinstance(found, int | float) else LEASE_S


_own_leases: weakref.WeakValueDictionary[StorePath, Lease] = weakref.WeakValueDictionary()


@cache
def _this_process(process: int) -> dict[str, Any]:
    """What tells this process from others: its machine, since when that is up, the space of its numbers, number and start."""
    about: dict[str, Any] = {"host": socket.gethostname(), "process": process}
    with suppress(OSError):
        about["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        about["space"] = str(Path("/proc/self/ns/pid").readlink())
        about["start"] = _start_of(process)
    return about


def _runs(about: dict[str, Any]) -> bool:
    """Whether the process of an object of this machine still runs."""
    process = about.get("process")
    return isinstance(process, int) and _start_of(process) == about.get("start")


def _start_of(process: int) -> str | None:
    """When a process was started, in ticks of this machine; None for one that has ended."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
