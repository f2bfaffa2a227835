"""Messages between the steps of a job: the work that a step is given, and what it reports.

They are small: rows lie in files, which messages name. Beam pickles them; reports are also kept as JSON, for the steps after.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter

from features.fit.split_counts import FeatureCounts
from features.schema.schema import Split
from pipeline.dataset.entries import Shard, StateFile
from pipeline.ingest.files import Unit
from pipeline.ingest.formats.base import LineCounts


@dataclass(frozen=True)
class Report:
    """What a step reports of one piece of work; `step` names it.

    Attributes:
        seconds: that it took.
    """

    step: ClassVar[str]
    seconds: float = field(default=0.0, kw_only=True, compare=False)


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
        examples: line and reason of the first one of each of `reasons`.
    """

    path: str | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    line: int = 0
    reason: str = ""
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadWork:
    """A unit to read.

    Attributes:
        number: of the unit within the job.
        stream: impressions, or the name of an outcome.
        names: of the file's columns, None where rows have keys of their own.
        snapshot: of a side table in snapshots, seconds since 1970 from which the file's rows are valid.
    """

    number: int
    stream: str
    unit: Unit
    names: list[str] | None
    snapshot: int | None = None


@dataclass(frozen=True)
class TypedPart:
    """A block of typed impressions that waits for what is joined to it.

    Attributes:
        unit: number of its unit.
        row_id: added to the index of a row in its file.
        path: of the rows.
        keys: path of their keys, scattered to buckets; None without outcomes.
        lookups: paths of their lookups in each side table that is not broadcast, scattered to buckets.
    """

    unit: int
    rows: int
    row_id: int
    path: str
    keys: str | None
    lookups: dict[str, str] = field(default_factory=dict)


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
        undecided: rows whose outcome is not decided, by outcome and cause.
    """

    unit: int
    features: str
    rows: dict[Split, int]
    left_out: dict[str, int]
    statistics: str
    times: dict[Split, list[int]]
    span: list[int] = field(default_factory=list)
    undecided: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadReport(Report):
    """The rows of a unit: impressions in parts, typed or (without joins) labelled already, or outcomes scattered to buckets.

    Attributes:
        file: path of its file.
        lines: of a text file; its lines in the next unit have numbers that are higher by as many.
        read: rows, bad ones among them.
        typed, labelled, outcomes: parts of impressions, and paths of outcomes; all but one are empty.
        latest: time of the last impression, None where no step needs it.
        table_rows: paths of a side table's rows, scattered to buckets unless it is broadcast.
        types: rows by the type of the column in its file, by column; empty for text.
        absent, keys: see pipeline.ingest.absent_columns.Completion.
        counts: where the lines of a text file went.
        swallowed: lines that bad rows take beyond their first ones.
        bytes: of the unit.
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
    table_rows: list[str] = field(default_factory=list)
    types: dict[str, dict[str, int]] = field(default_factory=dict)
    absent: dict[str, int] = field(default_factory=dict)
    keys: list[str] | None = None
    counts: LineCounts = field(default_factory=LineCounts)
    swallowed: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class JoinWork:
    """A bucket of keys."""

    bucket: int


@dataclass(frozen=True)
class JoinSide:
    """What one side of a join looks like.

    Attributes:
        keys: some of them; of outcomes some that were not joined.
        first, last: of the times; None without.
    """

    rows: int = 0
    keys: list[str] = field(default_factory=list)
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True)
class JoinReport(Report):
    """Columns that outcomes add to the impressions of a bucket.

    Attributes:
        path: of the columns, a batch for each part.
        join_statuses: number of outcomes by status, by outcome.
        latest: time of the last outcome that was joined, by outcome.
        impressions, outcomes: what the sides look like, the latter by outcome.
    """

    step: ClassVar[str] = "join"
    path: str
    join_statuses: dict[str, dict[str, int]]
    latest: dict[str, int | None]
    impressions: JoinSide = JoinSide()
    outcomes: dict[str, JoinSide] = field(default_factory=dict)


@dataclass(frozen=True)
class LookUpWork:
    """Lookups in a side table: those of a part, by its index, where it is broadcast, else of a bucket."""

    table: str
    index: int


@dataclass(frozen=True)
class LookUpReport(Report):
    """Results of lookups in a side table.

    Attributes:
        path: of the columns, of a part's lookups, or of a bucket's, a batch for each part.
        rows, keys, duplicates: of the table, or the bucket's part of it.
        statuses, sketch: see features.join.side_tables.Found.
    """

    step: ClassVar[str] = "look_up"
    table: str
    path: str
    rows: int
    keys: int
    duplicates: int
    statuses: dict[str, int]
    sketch: list[int]


@dataclass(frozen=True)
class PartWork:
    """A typed part, to label or to scatter as events of histories and counters.

    Attributes:
        index: among the parts of the impressions.
        as_of: seconds since 1970 until when each outcome with a window is complete.
    """

    index: int
    part: TypedPart
    as_of: dict[str, int]


@dataclass(frozen=True)
class ScatterPastReport(Report):
    """A part's keys and events, scattered to buckets.

    Attributes:
        paths: by history or counter.
        undecided: rows left out of it since the log ended before a window that it reads of had closed, by history or counter.
        sums: of each smoothed counter the sum over the part's events in the train split, and their number.
        earliest: time of its first impression, None where there is none.
        late: impressions before the horizon of the state that the job begins from.
        ahead: impressions at or after the end of the job's day.
    """

    step: ClassVar[str] = "scatter_past"
    paths: dict[str, str]
    undecided: dict[str, int]
    sums: dict[str, tuple[float, int]]
    earliest: int | None
    late: int
    ahead: int


@dataclass(frozen=True)
class GatherPastWork:
    """A bucket of keys of one history or counter.

    Attributes:
        mean: towards which the counter is smoothed.
        horizon: seconds since 1970; the events that rows from then on need are kept.
    """

    name: str
    bucket: int
    mean: float | None
    horizon: int


@dataclass(frozen=True)
class GatherPastReport(Report):
    """The lists of a history or numbers of a counter.

    Attributes:
        path: of them, a batch for each part.
        later: of the events of the bucket that a job of later rows needs.
    """

    step: ClassVar[str] = "gather_past"
    name: str
    path: str
    later: str


@dataclass(frozen=True)
class WriteStateWork:
    """A history or counter whose events are kept."""

    name: str


@dataclass(frozen=True)
class WriteStateReport(Report):
    """Its file."""

    step: ClassVar[str] = "write_state"
    file: StateFile


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
    """Path of encoded rows, and the rows of each of its batches.

    Attributes:
        counts: of the features, by split (see Job.counts_split).
    """

    step: ClassVar[str] = "encode"
    path: str
    batches: list[EncodedBatch]
    counts: dict[Split, dict[str, FeatureCounts]] = field(default_factory=dict)


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
    """A shard to write: its slices in order, each in pieces, and its path in the dataset."""

    split: Split
    slices: list[list[Piece]]
    path: str


@dataclass(frozen=True)
class WriteReport(Report):
    """A shard that was written, perhaps under a temporary name.

    Attributes:
        counts: of the features, where its rows were encoded only now.
    """

    step: ClassVar[str] = "write"
    shard: Shard
    counts: dict[str, FeatureCounts] = field(default_factory=dict)


Work = (
    ReadWork | JoinWork | LookUpWork | PartWork | GatherPastWork | WriteStateWork | MergeWork | EncodeWork | WriteWork
)


def to_json(reports: Sequence[Report]) -> list[Any]:
    """Reports of one step as plain data for a JSON file."""
    adapter: TypeAdapter[Any] = TypeAdapter(type(reports[0]))
    return [adapter.dump_python(report) for report in reports]


def from_json(kind: type[R], content: list[Any]) -> list[R]:
    """Reports from plain data. Raises pydantic.ValidationError for data of another kind."""
    adapter: TypeAdapter[R] = TypeAdapter(kind)
    return [adapter.validate_python(report) for report in content]
