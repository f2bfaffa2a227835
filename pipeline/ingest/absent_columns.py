"""Columns that some files lack: which of them may, what stands in their place, and which no row of the job has."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.source import Format, RawType
from pipeline.ingest.files import RawFile
from pipeline.ingest.formats import MissingColumnError, check_columns, raw_format
from pipeline.ingest.messages import ReadReport
from pipeline.ingest.state import Job


def stream_columns(
    files: Sequence[RawFile], options: Format, wanted: Sequence[str], key: str, added: Iterable[str] = ()
) -> dict[str, list[str] | None]:
    """The names of the columns of each file of a stream, by its path; None where rows have keys of their own.

    Args:
        wanted: columns.
        key: where the schema has `options`.
        added: see check_columns.

    Raises:
        UserError: a file cannot be opened, has a wanted column twice, or lacks all of them or one that is not optional; where
            others have that it is a fault of the file, and else of the schema.
    """
    required = [column for column in wanted if column not in options.optional]
    try:
        columns = {file.path: check_columns(file, options, required, added) for file in files}
    except MissingColumnError as error:
        found = {file.path: raw_format(options).column_names(file) or () for file in files}
        lacking = [path for path, names in found.items() if error.column not in names]
        if len(lacking) == len(files):
            raise
        lack = f"and {len(lacking) - 1} more lack" if len(lacking) > 1 else "lacks"
        shown = ", ".join(found[lacking[0]])[:1000]
        others = len(files) - len(lacking)
        have = "other file of the stream has" if others == 1 else f"other {others} files of the stream have"
        raise UserError(
            f"{lacking[0]} {lack} column {error.column} (found: {shown}), which the {have}: fix or remove the file, or list "
            f"{error.column} in {key}.optional with its default"
        ) from None
    for path, names in columns.items():
        if wanted and names is not None and not set(wanted) & set(names):
            raise UserError(f"{path}: has none of the columns {', '.join(wanted)[:1000]}: remove it, or fix the schema")
    return columns


@dataclass
class Completion:
    """Fills optional columns in the blocks of a unit, and counts the rows that lack them.

    Attributes:
        types: of the wanted columns.
        names: of the file's columns; None where every row has keys of its own, of which null ones count as absent.
        lists: see Wanted.
        absent: rows that lack an optional column, by column.
        keys: where rows have keys of their own, the columns that any row has; None as long as there was no row.
    """

    types: Mapping[str, RawType]
    names: Sequence[str] | None
    options: Format
    lists: Mapping[str, str]
    absent: dict[str, int] = field(default_factory=dict)
    keys: list[str] | None = None

    @property
    def present(self) -> dict[str, RawType]:
        """The columns that can be read."""
        return {c: kind for c, kind in self.types.items() if self.names is None or c in self.names}

    def complete(self, columns: pa.Table) -> pa.Table:
        """A block with all columns."""
        if self.names is None and columns.num_rows:
            any_value = {c for c in self.types if columns[c].null_count < columns.num_rows}
            self.keys = [c for c in self.types if c in any_value or c in (self.keys or ())]
        for column in (c for c in self.options.optional if c in self.types):
            columns = self._filled(columns, column)
        return columns

    def _filled(self, columns: pa.Table, column: str) -> pa.Table:
        default = self.options.optional[column]
        text = None if default is None else str(default)
        if column not in columns.column_names:
            values = pa.repeat(pa.scalar(text, pa.string()), columns.num_rows)
            self.absent[column] = self.absent.get(column, 0) + columns.num_rows
            return columns.append_column(column, values)
        if self.names is not None or not (nulls := columns[column].null_count):
            return columns
        self.absent[column] = self.absent.get(column, 0) + nulls
        if text is None:
            return columns
        kind = columns[column].type
        value = text.split(self.lists[column]) if pa.types.is_list(kind) else text
        place = columns.column_names.index(column)
        return columns.set_column(place, column, pc.fill_null(columns[column], pa.scalar(value, kind)))


def check_keys(job: Job) -> None:
    """Raises UserError where no row of a stream has a key that the schema reads, as after a typing error."""
    for stream in dict.fromkeys(report.stream for report in job.found(ReadReport)):
        reports = [report for report in job.found(ReadReport) if report.stream == stream and report.keys is not None]
        keys = {key for report in reports for key in report.keys or ()}
        source = job.schema.source
        other = source.outcomes.get(stream) or source.tables.get(stream)
        name = stream if other else None
        options = source.format_of(name)
        wanted = [other.key, *other.types] if other else job.schema.raw_columns
        if reports and (missing := [c for c in wanted if c not in keys and c not in options.optional]):
            files = other.files if other else source.files
            raise UserError(
                f"{files}: no row of {stream} has a value under the key {missing[0]}, which the schema reads. Fix the name in "
                f"the schema, or list {missing[0]} in {source.format_key(name)}.optional with its default."
            )


def absent_rows(reads: Sequence[ReadReport]) -> dict[str, dict[str, int]]:
    """By stream the rows that lack an optional column, by column."""
    total: dict[str, dict[str, int]] = {}
    for report in reads:
        for column, rows in report.absent.items():
            counts = total.setdefault(report.stream, {})
            counts[column] = counts.get(column, 0) + rows
    return total
