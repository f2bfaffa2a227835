"""What the steps of a job share: settings, the scratch folder, and the reports of the steps before them."""

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from features.fit.encoders import Encoders
from features.schema.schema import Schema, Split
from pipeline.ingest.messages import LabelledPart, LabelReport, R, ReadReport, TypedPart, from_json
from pipeline.ingest.past_start import Start
from pipeline.storage.store_path import on_store

Order = Literal["shuffled", "time", "input"]
IMPRESSIONS = "impressions"  # the stream that outcomes belong to
RESERVE_FILE = "reserve"  # removed when the disk is full, to make room for the error message


@dataclass(frozen=True)
class AbsentDays:
    """What the dates in file names say (see pipeline.ingest.absent_days); empty where they say nothing.

    Attributes:
        days: absent days by stream, each a day or FIRST..LAST.
        undecided: per outcome, the times [start, stop) of impressions that are undecided: disjoint, in order.
        ends: per outcome, the end of the day of its last file.
    """

    days: dict[str, list[str]] = field(default_factory=dict)
    undecided: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What every step is given.

    Attributes:
        staging: folder in which the dataset's files are made; what lies in its scratch/ is none of them.
        buckets: of joins, histories and counters.
        counts_all: whether statistics are of all rows, or of the train split.
        broadcast: side tables that every worker holds; the others are joined a bucket of keys at a time.
        snapshots: of side tables in snapshots of which several are read, the seconds since 1970 at which these begin.
        start: the state that histories and counters begin from; None: they begin empty.
        horizon: seconds since 1970; what rows from then on need is kept as the dataset's state. None: the last impression's.
        reads_labels: whether outcomes and labels are read.
        cache: what a worker has loaded.
        absent: days without files.
        max_bad_fraction: a larger share of bad rows in a stream stops the job.
        stream_bytes: size of the files of each stream.
        apart: folder of files between steps, where it is not scratch/ in `staging`.
    """

    schema: Schema
    staging: Path
    buckets: int
    order: Order
    seed: int
    rows_per_row_group: int
    counts_all: bool
    broadcast: frozenset[str] = frozenset()
    snapshots: dict[str, list[int]] = field(default_factory=dict)
    start: Start | None = None
    horizon: int | None = None
    reads_labels: bool = True
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    absent: AbsentDays = AbsentDays()
    max_bad_fraction: float = 1.0
    stream_bytes: dict[str, int] = field(default_factory=dict)
    apart: Path | None = None

    @property
    def scratch(self) -> Path:
        """Folder of files between steps."""
        return self.apart or self.staging / "scratch"

    @property
    def begun(self) -> Path:
        """Folder with the job's copy of the state that it begins from."""
        return self.scratch / "begun"

    @property
    def progress(self) -> Path:
        """Folder in which workers record their progress (see pipeline.ingest.progress)."""
        return self.scratch / "progress"

    def temporary_path(self, name: str) -> Path:
        """A new path in the scratch folder: a failed attempt's files are named by no report."""
        return self.scratch / f"{name}-{uuid.uuid4().hex}"

    def unfinished_path(self, name: str, final: str) -> Path:
        """Where a file of the dataset is written.

        On a store that is `final` in the dataset: objects appear whole, and two attempts put the same bytes. Elsewhere it is
        a new path, to be renamed once the file is whole.
        """
        return self.staging / (final if on_store(self.staging) else f"scratch/{name}-{uuid.uuid4().hex}")

    def table_rows(self, name: str) -> list[str]:
        """Paths of a side table's rows, in their order; scattered to buckets unless it is broadcast."""
        return [path for report in self.found(ReadReport) if report.stream == name for path in report.table_rows]

    @property
    def keeps_state(self) -> bool:
        """Whether a later job can go on from this one's histories and counters: those of unlabelled rows lack outcomes."""
        return bool(self.schema.past) and self.reads_labels

    @property
    def joins(self) -> bool:
        """Whether rows wait for outcomes, side tables, histories or counters before they can be labelled."""
        return bool(self.schema.source.outcomes or self.schema.source.tables or self.schema.past)

    def counts_split(self, split: Split) -> bool:
        """Whether the features of a split are counted when they are encoded: where the statistics are not of it alone."""
        return self.counts_all or split != "train"

    @property
    def encoders(self) -> Encoders:
        """Loaded once a worker."""
        if "encoders" not in self.cache:
            self.cache["encoders"] = Encoders.load(self.staging / "encoders", self.schema)
        return self.cache["encoders"]

    def found(self, kind: type[R]) -> list[R]:
        """The reports of a finished step, in the order of its work; empty where the job has no such step."""
        if kind.step not in self.cache:
            try:
                content = (self.scratch / f"{kind.step}.json").read_bytes()
            except FileNotFoundError:
                return []
            self.cache[kind.step] = from_json(kind, json.loads(content))
        return self.cache[kind.step]

    def typed(self) -> list[TypedPart]:
        """The parts that wait to be labelled, in the order of their rows."""
        return [part for report in self.found(ReadReport) for part in report.typed]

    def outcomes(self, stream: str) -> list[str]:
        """Paths of an outcome's scattered rows, in their order."""
        return [path for report in self.found(ReadReport) if report.stream == stream for path in report.outcomes]

    def labelled(self) -> list[LabelledPart]:
        """The labelled parts, whether `label` is a step of its own or part of `read`."""
        if self.joins:
            return [report.part for report in self.found(LabelReport)]
        return [part for report in self.found(ReadReport) for part in report.labelled]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}
