"""Messages between the steps of a job: the work that a step is given, and what it reports.

They are small: rows lie in files, which messages name. Beam pickles them; reports are also kept as JSON, for the steps after.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter

from features.schema.schema import Split
from pipeline.dataset.manifest import Shard
from pipeline.ingest.files import Unit


class Report:
    """What a step reports of one piece of work; `step` names it."""

    step: ClassVar[str]


R = TypeVar("R", bound=Report)


@dataclass(frozen=True)
class Failure:
    """Reported in place of a step's own report: the one line for the user."""

    error: str


@dataclass(frozen=True)
class DeadLetters:
    """Bad rows of a unit or part, spilled to a file.

    Attributes:
        path: None where there are none.
        reasons: rows by reason.
        line, reason: of the first one; the line is counted within its unit.
    """

    path: str | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    line: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ReadWork:
    """A unit to read.

    Attributes:
        number: of the unit within the job.
        stream: impressions, or the name of an outcome.
        names: of the file's columns, None where rows have keys of their own.
    """

    number: int
    stream: str
    unit: Unit
    names: list[str] | None


@dataclass(frozen=True)
class TypedPart:
    """A block of typed impressions that waits for what is joined to it.

    Attributes:
        unit: number of its unit.
        row_id: added to the index of a row in its file.
        path: of the rows.
        keys: path of their keys, scattered to buckets; None without outcomes.
    """

    unit: int
    rows: int
    row_id: int
    path: str
    keys: str | None


@dataclass(frozen=True)
class LabelledPart:
    """A block of impressions with features, labels and split.

    Attributes:
        unit: number of its unit.
        features: path of the rows.
        rows: by split.
        left_out: rows by the rule that left them out.
        statistics: path of the counts.
        times: for rows in order of time, event times of each split at evenly spaced ranks.
        span: the first and the last event time; empty without rows.
    """

    unit: int
    features: str
    rows: dict[Split, int]
    left_out: dict[str, int]
    statistics: str
    times: dict[Split, list[int]]
    span: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ReadReport(Report):
    """The rows of a unit: impressions in parts, typed or (without joins) labelled already, or outcomes scattered to buckets.

    Attributes:
        file: path of its file.
        lines: of a text file; its lines in the next unit have numbers that are higher by as many.
        read: rows, bad ones among them.
        typed, labelled, outcomes: parts of impressions, and paths of outcomes; all but one are empty.
        latest: time of the last impression, None where no step needs it.
        absent, keys: see pipeline.ingest.absent_columns.Completion.
    """

    step: ClassVar[str] = "read"
    stream: str
    file: str
    lines: int
    read: int
    typed: list[TypedPart]
    labelled: list[LabelledPart]
    outcomes: list[str]
    latest: int | None
    dead_letters: DeadLetters
    absent: dict[str, int] = field(default_factory=dict)
    keys: list[str] | None = None


@dataclass(frozen=True)
class JoinWork:
    """A bucket of keys."""

    bucket: int


@dataclass(frozen=True)
class JoinReport(Report):
    """Columns that outcomes add to the impressions of a bucket.

    Attributes:
        path: of the columns, a batch for each part.
        join_statuses: number of outcomes by status, by outcome.
        latest: time of the last outcome that was joined, by outcome.
    """

    step: ClassVar[str] = "join"
    path: str
    join_statuses: dict[str, dict[str, int]]
    latest: dict[str, int | None]


@dataclass(frozen=True)
class PartWork:
    """A typed part and its index among those of the impressions."""

    index: int
    part: TypedPart


@dataclass(frozen=True)
class ScatterHistoryReport(Report):
    """Paths of a part's users, items and times, scattered to buckets, by history."""

    step: ClassVar[str] = "scatter_history"
    paths: dict[str, str]


@dataclass(frozen=True)
class GatherHistoryWork:
    """A bucket of one history's users."""

    history: str
    bucket: int


@dataclass(frozen=True)
class GatherHistoryReport(Report):
    """Path of the lists of a history, a batch for each part."""

    step: ClassVar[str] = "gather_history"
    history: str
    path: str


@dataclass(frozen=True)
class LabelWork(PartWork):
    """A part that can be labelled.

    Attributes:
        as_of: seconds since 1970 until when each outcome with a window is complete.
    """

    as_of: dict[str, int]


@dataclass(frozen=True)
class LabelReport(Report):
    """A labelled part, and its bad rows."""

    step: ClassVar[str] = "label"
    part: LabelledPart
    dead_letters: DeadLetters


@dataclass(frozen=True)
class MergeWork:
    """Paths of counts, in the order in which they are merged: the last digits of sums depend on it."""

    paths: list[str]


@dataclass(frozen=True)
class MergeReport(Report):
    """Path of merged counts."""

    step: ClassVar[str] = "merge"
    path: str


@dataclass(frozen=True)
class EncodeWork:
    """A labelled part to encode.

    Attributes:
        path: of its features.
        slices: of shards, by split.
        bounds: for rows in order of time, event times at which the slices after the first begin, by split.
    """

    path: str
    slices: dict[Split, int]
    bounds: dict[Split, list[int]]


@dataclass(frozen=True)
class EncodedBatch:
    """Rows of a part that belong to one slice of a split."""

    split: Split
    slice: int
    rows: int


@dataclass(frozen=True)
class EncodeReport(Report):
    """Path of encoded rows, and the rows of each of its batches."""

    step: ClassVar[str] = "encode"
    path: str
    batches: list[EncodedBatch]


@dataclass(frozen=True)
class Piece:
    """Rows for a shard.

    Attributes:
        start: batch of an encoded file; where rows stay in the order of the input, the first row of a labelled part.
    """

    path: str
    start: int
    rows: int


@dataclass(frozen=True)
class WriteWork:
    """A shard to write: its slices in order, each in pieces."""

    split: Split
    slices: list[list[Piece]]


@dataclass(frozen=True)
class WriteReport(Report):
    """A shard that was written under a temporary name."""

    step: ClassVar[str] = "write"
    shard: Shard


Work = ReadWork | JoinWork | PartWork | GatherHistoryWork | MergeWork | EncodeWork | WriteWork


def to_json(reports: Sequence[Report]) -> list[Any]:
    """Reports of one step as plain data for a JSON file."""
    adapter: TypeAdapter[Any] = TypeAdapter(type(reports[0]))
    return [adapter.dump_python(report) for report in reports]


def from_json(kind: type[R], content: list[Any]) -> list[R]:
    """Reports from plain data. Raises pydantic.ValidationError for data of another kind."""
    adapter: TypeAdapter[R] = TypeAdapter(kind)
    return [adapter.validate_python(report) for report in content]
