"""Logs of a workload's pods: those so far, or as they are written until it ends."""

import calendar
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import Full, Queue
from typing import Any

from kubernetes import client, watch
from urllib3.exceptions import HTTPError, ReadTimeoutError

from features.errors import UserError
from features.printable import printable
from pipeline.cluster.kubernetes.api import BUSY, TIMEOUT_S, UNAVAILABLE, Connection, refusals, retried

INDEX = "batch.kubernetes.io/job-completion-index"
WATCH_S = 20  # of one watch of the pods, after which the workload's own state is read
SILENCE_S = 300  # of a log that is followed, after which it is asked for anew from there on
RETRY_S = 2.0  # between two tries to go on with a connection that was lost
LOST = 30  # tries in a row without a line or an event, after which the cluster is out of reach
STARTED = ("Running", "Succeeded", "Failed")


def so_far(to: Connection, selector: str, index: int | None) -> Iterator[str]:
    """Lines of every pod that has started, pod by pod in the order of their names."""
    for name in sorted(_started(to, selector, index)):
        with refusals(to, "pod", name):
            read = partial(to.core.read_namespaced_pod_log, name, to.namespace, _request_timeout=TIMEOUT_S)
            text = str(retried(read, (BUSY, *UNAVAILABLE)))
        yield from (f"{name}: {printable(line)}" for line in text.replace("\t", " ").splitlines())


def _started(to: Connection, selector: str, index: int | None) -> list[str]:
    with refusals(to, "pods of", selector.partition("=")[2]):
        found = to.pods(_narrowed(selector, index))
    return [str(pod.metadata.name) for pod in found.items if pod.metadata and _has_started(pod)]


def _narrowed(selector: str, index: int | None) -> str:
    return selector if index is None else f"{selector},{INDEX}={index}"


def _has_started(pod: client.V1Pod) -> bool:
    return bool(pod.status and pod.status.phase in STARTED)


def followed(to: Connection, selector: str, index: int | None, has_ended: Callable[[], bool]) -> Iterator[str]:
    """Lines of all pods as they are written, those that start later too, until the workload has ended.

    A connection that is lost is made anew, without a line twice.

    Args:
        has_ended: whether no more pods will start.
    Raises:
        UserError: the cluster refuses, or is out of reach for long.
    """
    follower = _Follower(to, _narrowed(selector, index), has_ended)
    threading.Thread(target=follower.watch, daemon=True, name="pods").start()
    try:
        while not isinstance(item := follower.lines.get(), _End):
            yield item
    finally:
        follower.is_left = True
    if item.error:
        raise item.error


class _End:
    """The end of all logs, and the error that it came by."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Follower:
    """A thread that watches pods, and one for each pod that reads its log, into one queue."""

    def __init__(self, to: Connection, selector: str, has_ended: Callable[[], bool]) -> None:
        self.to, self.selector, self.has_ended = to, selector, has_ended
        self.lines: Queue[str | _End] = Queue(maxsize=1000)
        self.readers: dict[str, threading.Thread] = {}
        self.is_left = False

    def put(self, item: "str | _End") -> None:
        """Waits for room, unless nobody reads any more."""
        while not self.is_left:
            with suppress(Full):
                self.lines.put(item, timeout=1)
                return

    def watch(self) -> None:
        """Reads the log of each pod once it has started, until the workload and all its logs have ended."""
        lost = 0
        try:
            while not self.is_left:
                try:
                    ended = self.has_ended()  # before the listing, which then has every pod
                    with refusals(self.to, "pods of", self.selector):
                        version = self._list()
                except UserError as error:
                    lost += 1
                    if lost > LOST or not isinstance(error.__context__, HTTPError):
                        raise
                    time.sleep(RETRY_S)
                    continue
                if ended:
                    break
                lost = 0
                self._watch_once(version)
            for reader in self.readers.values():
                reader.join()
            self.put(_End())
        except BaseException as error:  # to the one who reads
            self.put(_End(error))

    def _list(self) -> str | None:
        found = self.to.pods(self.selector)
        for pod in found.items:
            self._take(pod)
        return found.metadata.resource_version if found.metadata else None

    def _watch_once(self, version: str | None) -> None:
        """Returns after WATCH_S, or sooner: the listing says what was missed, also after 410, that it is too long ago."""
        began = time.monotonic()
        options: dict[str, Any] = {"resource_version": version} if version else {}
        with suppress(client.ApiException, HTTPError, ValueError, KeyError):
            for event in watch.Watch().stream(
                self.to.core.list_namespaced_pod,
                self.to.namespace,
                label_selector=self.selector,
                timeout_seconds=WATCH_S,
                _request_timeout=(TIMEOUT_S, WATCH_S + TIMEOUT_S),
                **options,
            ):
                if not event or event["type"] not in ("ADDED", "MODIFIED"):
                    continue  # half of one, before the connection was lost, or of what is gone
                self._take(event["object"])
                if self.is_left or event["object"].status.phase in STARTED[1:]:
                    break  # the workload may have ended
        time.sleep(max(0.0, RETRY_S - (time.monotonic() - began)))

    def _take(self, pod: client.V1Pod) -> None:
        name = str(pod.metadata.name) if pod.metadata else ""
        if name and name not in self.readers and _has_started(pod):
            self.readers[name] = threading.Thread(target=self._read, args=(name,), daemon=True, name=name)
            self.readers[name].start()

    def _read(self, name: str) -> None:
        try:
            with refusals(self.to, "pod", name):
                self._read_to_its_end(name)
        except BaseException as error:  # to the one who reads
            self.put(_End(error))

    def _read_to_its_end(self, name: str) -> None:
        """Puts the lines of a pod, each once: it is asked for times, and from the last one on after a lost connection."""
        last, tries = ("", ""), 0
        while not self.is_left:
            since = _seconds_since(last)
            try:
                has_ended = self._has_ended(name)
                for line in watch.Watch().stream(
                    self.to.core.read_namespaced_pod_log,
                    name,
                    self.to.namespace,
                    timestamps=True,
                    _request_timeout=(TIMEOUT_S, SILENCE_S),
                    **({"since_seconds": since} if since else {}),
                ):
                    at, text = _parted(line)
                    if at > last:
                        last, tries = at, 0
                        self.put(f"{name}: {printable(text)}")
                if has_ended:
                    return
            except ReadTimeoutError:
                continue  # it was silent
            except (client.ApiException, HTTPError) as error:
                if isinstance(error, client.ApiException) and error.status == 404:
                    return  # deleted
                refused = isinstance(error, client.ApiException) and error.status not in (400, BUSY, *UNAVAILABLE)
                if refused or tries >= LOST:
                    raise
            tries += 1
            if tries > LOST:
                raise UserError(f"pod {name}: its log ends although it runs: read it with kubectl logs {name}")
            time.sleep(RETRY_S)

    def _has_ended(self, name: str) -> bool:
        """Before its log is read, which is then whole."""
        try:
            read = partial(self.to.core.read_namespaced_pod, name, self.to.namespace, _request_timeout=TIMEOUT_S)
            pod = retried(read, (BUSY, *UNAVAILABLE))
        except client.ApiException as error:
            if error.status != 404:
                raise
            return True
        return bool(pod.status and pod.status.phase in STARTED[1:])


def _parted(line: str) -> tuple[tuple[str, str], str]:
    """A line's time, as seconds and the fraction's digits, which compare as times do; and its text."""
    at, _, text = line.partition(" ")
    seconds, _, fraction = at.removesuffix("Z").partition(".")
    return (seconds, fraction), text.replace("\t", " ")


def _seconds_since(last: tuple[str, str]) -> int | None:
    """Seconds from a time, UTC, until now."""
    if not last[0]:
        return None
    began = calendar.timegm(time.strptime(last[0], "%Y-%m-%dT%H:%M:%S"))
    return max(int(time.time() - began) + 60, 1)  # and a minute for clocks that differ
