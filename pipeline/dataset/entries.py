"""The entries of a manifest: files with sizes and checksums, and counts of what became of raw lines, rows and keys."""

from typing import Annotated

from pydantic import BaseModel, Field, FiniteFloat

from features.plain_json import Count
from features.regular_files import RelativePath
from features.schema.schema import Split

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
Days = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d(\.\.\d{4}-\d\d-\d\d)?$")]


class Shard(BaseModel):
    """One Parquet file.

    Attributes:
        path: relative to the dataset.
        row_groups: rows of each row group, in order.
        sha256, footer_sha256: of the whole file, and of the part that says where columns lie.
        observed, positives: per task, rows with a label and the sum of the labels.
        weights, weighted: the same of a schema with weights, each row times its weight.
    """

    path: RelativePath
    split: Split
    rows: Count
    bytes: Count
    sha256: Digest
    footer_sha256: Digest
    row_groups: list[Count]
    observed: dict[str, Count]
    positives: dict[str, FiniteFloat]
    weights: dict[str, Annotated[FiniteFloat, Field(ge=0)]] = {}
    weighted: dict[str, FiniteFloat] = {}


class DeadLetterFile(BaseModel):
    """One Parquet file of dead letters, rows of a raw file that could not be used: stream, file, line, reason, raw."""

    path: RelativePath
    stream: str
    rows: Count
    bytes: Count
    sha256: Digest


class DeadLetterExample(BaseModel):
    """A bad row: its file, its line in it, and what is wrong."""

    file: str
    line: Count
    reason: str


class Lines(BaseModel):
    """Where the lines of a stream's text files went.

    Attributes:
        physical: counted by their ends alone; the sum of the others.
        header, blank: lines of headers, and those without text between rows.
        rows, dead_letters: lines that rows took, and those that could not be read as rows. A row that was read and is a dead
            letter for its values is among the rows.
    """

    physical: Count
    header: Count
    blank: Count
    rows: Count
    dead_letters: Count


class FittedFile(BaseModel):
    """A file of the encoders, or statistics.json."""

    path: RelativePath
    bytes: Count
    sha256: Digest


class SideTableCounts(BaseModel):
    """Rows of a side table, and what became of the keys of the impressions.

    Attributes:
        rows: kept ones, bad rows not among them; `duplicates` of them are replaced by a later row of their key (and version).
        keys: distinct keys; of several days read as one those of the day with most.
        matched_rows, unmatched_rows, early_rows, missing_key_rows: impressions whose key has a row, has none, has none yet (it
            is before the first version or snapshot), or is missing.
        unmatched_keys: distinct ones, estimated from 64 on; of several days as `keys`.
    """

    rows: Count
    keys: Count
    duplicates: Count
    matched_rows: Count
    unmatched_rows: Count
    early_rows: Count
    missing_key_rows: Count
    unmatched_keys: Count


class StateFile(FittedFile):
    """The events of a history or counter at a dataset's end (see pipeline.dataset.past_state).

    Attributes:
        name: of the history or counter.
        definition: 16 hex digits of what its events depend on.
        row_groups: events of each row group; group i has the keys of the i-th of as many ranges of hashes.
    """

    name: str
    definition: Digest
    row_groups: Annotated[list[Count], Field(min_length=1)]


class StateOrigin(BaseModel):
    """The dataset whose state was there before the first row: the name of a day beside it, or a path; and its state's id."""

    dataset: str
    state: Digest


class State(BaseModel):
    """What later rows need to know of the rows up to a dataset's end: the files of histories and counters.

    Attributes:
        horizon: seconds since 1970; rows from then on find in it what they would find in the log itself.
        began_from: None where the past began empty.
        chosen: whether that was by state.from.
        undecided: events left out by history or counter, since an outcome is not known: its window was still open when the log
            ended, or files of a day that it needs are absent.
        cut_short: impressions before the horizon of the state it began from: some of their past may be missing.
        gap: seconds between that horizon and the first impression.
        ahead: impressions at or after `horizon`: rows of later files before them are not in their past.
    """

    horizon: int
    began_from: StateOrigin | None
    chosen: bool
    undecided: dict[str, Count]
    cut_short: Count
    gap: Count
    files: list[StateFile]
    ahead: Count = 0


Listed = Shard | DeadLetterFile | FittedFile
