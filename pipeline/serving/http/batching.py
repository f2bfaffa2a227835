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
from pipeline.serving.encoded import concatenated
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Loaded


@dataclass
class Work:
    """A request for scores: its rows, what they share, and where its answer goes."""

    rows: Sequence[Mapping[str, Any]]
    user: Mapping[str, Any] | None
    answer: "asyncio.Future[Answer]"
    arrived: float = field(default_factory=time.monotonic)


class Answer(NamedTuple):
    """The predictions of a request, and the package that made them."""

    loaded: Loaded
    scores: dict[str, np.ndarray]


class FullError(Exception):
    """Too many requests wait already."""


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
        self, rows: Sequence[Mapping[str, Any]], user: Mapping[str, Any] | None, timeout_s: float
    ) -> Answer:
        """Scores of a request.

        Raises:
            UserError: a value is refused. FullError: too many wait. TimeoutError: it took longer than `timeout_s`.
        """
        work = Work(rows, user, self.loop.create_future())
        with self.changed:
            if self.closed or len(self.queue) >= self.max_waiting:
                raise FullError
            self.queue.append(work)
            self.changed.notify()
        try:
            return await asyncio.wait_for(work.answer, timeout_s)
        except asyncio.TimeoutError:
            raise TimeoutError from None

    def close(self) -> None:
        """Ends the threads once nothing waits."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def _run(self) -> None:
        while batch := self._take():
            try:
                answers = answer(self.loaded(), batch, self.metrics)
            except (
                Exception
            ) as error:  # a defect of ours: those who wait for this batch get it, the next batch is scored
                answers = [error] * len(batch)
            try:
                self.loop.call_soon_threadsafe(hand_out, batch, answers)
            except RuntimeError:
                return  # the server has ended, and nobody waits

    def _take(self) -> list[Work]:
        """The requests to score next, at least one; none once it is closed. Those that timed out are left out."""
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
                    work = self.queue.popleft()
                    if not work.answer.done():
                        batch.append(work)
                        rows += len(work.rows)
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
            answers[place] = error
    if encoded:
        logit_BT = scorer.score_encoded(concatenated(list(encoded.values())))
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
        if work.answer.done():
            continue
        if isinstance(found, Exception):
            work.answer.set_exception(found)
        else:
            work.answer.set_result(found)
