"""Requests that wait are scored together, and each gets its own part of the answer."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from features.errors import UserError
from features.printable import printable
from pipeline.serving.encoded import concatenated
from pipeline.serving.http.body import RETRY, RefusedError
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Loaded


@dataclass(eq=False)
class Work:
    """A request for scores: its rows, what they share, where its answer goes, and what is called once nothing has the rows."""

    rows: Sequence[Mapping[str, Any]]
    user: Mapping[str, Any] | None
    answer: "asyncio.Future[Answer]"
    left: Callable[[], None]
    arrived: float = field(default_factory=time.monotonic)


class Answer(NamedTuple):
    """The predictions of a request, and the package that made them."""

    loaded: Loaded
    scores: dict[str, np.ndarray]


class Batcher:
    """Threads that score what waits.

    A request is encoded by itself, so that another one's values can neither change nor refuse it; the model then takes the
    rows of all.

    Args:
        loaded: the package that serves; asked once a batch, so that all of a request is of one package.
        max_rows: of a batch of several requests. wait_s: that the first of them waits for others.
        max_waiting: requests.
    """

    def __init__(
        self, loaded: Callable[[], Loaded], max_rows: int, wait_s: float, max_waiting: int, threads: int, metrics: Metrics
    ) -> None:  # fmt: skip
        self.loaded, self.max_rows, self.wait_s, self.max_waiting = loaded, max_rows, wait_s, max_waiting
        self.metrics = metrics
        self.queue: deque[Work] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self.threads = [threading.Thread(target=self._run, name=f"score-{n}", daemon=True) for n in range(threads)]
        for thread in self.threads:
            thread.start()

    async def submit(
        self,
        rows: Sequence[Mapping[str, Any]],
        user: Mapping[str, Any] | None,
        timeout_s: float,
        left: Callable[[], None],
    ) -> Answer:
        """Scores of a request.

        Args:
            left: called once, in the event loop, when the rows are neither waiting nor scored any more: of a request that
                timed out while it is scored, after that.
        Raises:
            RefusedError: a value is refused (422), too many wait or the server ends (503), or it took longer than `timeout_s`.
        """
        work = Work(rows, user, self.loop.create_future(), left)
        with self.changed:
            full = len(self.queue) >= self.max_waiting
            if not full and not self.closed:
                self.queue.append(work)
                self.changed.notify()
        if full or self.closed:
            left()
            raise RefusedError(503, "too many requests wait: try again" if full else "the server ends", RETRY)
        try:
            return await asyncio.wait_for(work.answer, timeout_s)
        except asyncio.TimeoutError:
            raise RefusedError(504, "no answer in time (timeout_s)") from None
        finally:
            if work.answer.cancelled():
                self._remove(work)

    def _remove(self, work: Work) -> None:
        """Takes a request for which nobody waits any more out of the queue, if it is still there."""
        with self.changed:
            waits = work in self.queue
            if waits:
                self.queue.remove(work)
        if waits:
            work.left()

    def close(self) -> None:
        """Ends the threads once nothing waits."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def _run(self) -> None:
        while self._score_next():
            pass  # a call a batch, so that nothing of it stays while the thread waits for the next one

    def _score_next(self) -> bool:
        """Scores the requests that wait. Returns whether to go on."""
        if not (batch := self._take()):
            return False
        try:
            answers = answer(self.loaded(), batch, self.metrics)
        except Exception as error:  # a defect of ours: those who wait for this batch get it, the next batch is scored
            answers = [error] * len(batch)
        try:
            self.loop.call_soon_threadsafe(hand_out, batch, answers)
        except RuntimeError:
            return False  # the server has ended, and nobody waits
        return True

    def _take(self) -> list[Work]:
        """The requests to score next, at least one; none once it is closed."""
        with self.changed:
            while True:
                while not self.queue:
                    if self.closed:
                        return []
                    self.changed.wait()
                last = self.queue[0].arrived + self.wait_s
                while (
                    self._waiting_rows() < self.max_rows and (left := last - time.monotonic()) > 0 and not self.closed
                ):
                    self.changed.wait(left)
                batch: list[Work] = []
                rows = 0
                while self.queue and (not batch or rows + len(self.queue[0].rows) <= self.max_rows):
                    batch.append(self.queue.popleft())
                    rows += len(batch[-1].rows)
                if batch:
                    return batch

    def _waiting_rows(self) -> int:
        return sum(len(work.rows) for work in self.queue)


def answer(loaded: Loaded, batch: Sequence[Work], metrics: Metrics) -> list[Answer | Exception]:
    """The answer of each request, or why it has none."""
    scorer = loaded.scorer
    answers: list[Any] = [None] * len(batch)
    encoded = {}
    for place, work in enumerate(batch):
        try:
            encoded[place] = scorer.requests.encode(work.rows, work.user, where="candidates")
        except UserError as error:
            answers[place] = RefusedError(422, printable(str(error)[:1000]))
        except Exception as error:  # a defect of ours, with the values of this request alone
            answers[place] = error
    if encoded:
        try:
            logit_BT = scorer.score_encoded(concatenated(list(encoded.values())))
        except Exception as error:
            return [error if place in encoded else refused for place, refused in enumerate(answers)]
        metrics.rows.inc(len(logit_BT))
        metrics.batch_rows.observe(len(logit_BT))
        metrics.batch_requests.observe(len(encoded))
        first = 0
        for place, rows in encoded.items():
            answers[place] = Answer(loaded, scorer.predictions(logit_BT[first : first + len(rows)]))
            first += len(rows)
    return answers


def hand_out(batch: Sequence[Work], answers: Sequence[Answer | Exception]) -> None:
    """Ends the wait of each request; of one that has timed out meanwhile nobody waits."""
    for work, found in zip(batch, answers, strict=True):
        work.left()
        if work.answer.done():
            continue
        if isinstance(found, Exception):
            work.answer.set_exception(found)
        else:
            work.answer.set_result(found)
