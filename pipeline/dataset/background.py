"""Batches made in a thread ahead of their use, in page-locked memory where they go to a GPU."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch

from features.batch import Batch
from features.errors import UserError


def pinned(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches in page-locked memory, from which a GPU copies while it computes; as they are for a CPU.

    Called in the thread that makes them: a copy on the host does not hold up the steps.
    """
    if device.type == "cpu":
        yield from batches
        return
    torch.cuda.set_device(device)  # a thread begins with GPU 0, and every rank would take memory there
    for batch in batches:
        yield batch.pin_memory()


def in_background(items: Iterator[Batch], ahead: int) -> Iterator[Batch]:
    """The items, made in a thread up to `ahead` of their use; an error there is raised here."""
    made: queue.Queue[Batch | BaseException | None] = queue.Queue(max(ahead, 1))
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # a thread's error would go unseen
            put(error)

    thread = threading.Thread(target=make, daemon=True, name="loader")
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def delayed(items: Iterator[Batch], count: int, on_error: Callable[[UserError], None]) -> Iterator[Batch]:
    """The items, each once `count` later ones are there: `on_error` is given an error as many items before it is raised."""
    waiting: deque[Batch] = deque()
    failed = None
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > count:
                yield waiting.popleft()
    except UserError as error:
        on_error(failed := error)
    while waiting:
        yield waiting.popleft()
    if failed:
        raise failed
