"""What a sink of figures is given: events of one job, a training or the evaluation of a split."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from pipeline.run.run import Run

TRAIN = "train"  # the series of a training
Record: TypeAlias = Mapping[str, Any]
State: TypeAlias = Literal["finished", "preempted", "failed"]


@dataclass(frozen=True)
class Job:
    """Whose figures a sink is opened for.

    Attributes:
        run: the run directory.
        series: TRAIN, or a name of the split and dataset that is evaluated (`series_of` of pipeline.evaluation.tracked).
        split: that is evaluated; empty for a training.
        step: that a training resumes after.
        history: records of the series up to now: lines of train.jsonl, or the latest of each step in eval.jsonl.
    """

    run: Run
    series: str
    split: str = ""
    step: int = 0
    history: Sequence[Record] = ()


class TrainRecord(NamedTuple):
    """A record of train.jsonl."""

    record: Record


class EvalRecord(NamedTuple):
    """A record of eval.jsonl, with `bounds` {task: {metric: [low, high]}} where it has intervals."""

    record: Record


class Recorded(NamedTuple):
    """Evaluators of the series may have added records, this one or others: `read` has the latest of each step by now."""

    read: Callable[[], Iterable[Record]]


class Committed(NamedTuple):
    """A checkpoint on disk, since `time` (s since 1970)."""

    step: int
    time: float


class RolledBack(NamedTuple):
    """The steps after this one are trained anew."""

    step: int


class Published(NamedTuple):
    """A page for people."""

    file: Path


Event: TypeAlias = TrainRecord | EvalRecord | Recorded | Committed | RolledBack | Published


class Sink(Protocol):
    """Where figures go. May raise whatever it likes: `opened` in registry.py keeps that from the job."""

    def handle(self, event: Event) -> None:
        """Takes one event; events that a sink has no place for are left out."""

    def close(self, state: State) -> None:
        """Ends the sink. state: how the job ended."""
