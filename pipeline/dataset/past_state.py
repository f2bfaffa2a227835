"""The state of a dataset: what histories and counters of later rows need to know of its rows, a Parquet file each.

A file has the events that `kept` of features.join leaves, in the order in which they count: `key` text and `known` int64
(seconds), then `item` text of a history, `value` and `weight` float64 of a counter. Row group i holds the keys whose hashes are
in the i-th of as many equal ranges, so that a bucket of a later job reads a few row groups. The files may be untrusted.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import UserError, one_line
from features.fit.fitted_files import RESTORE_HINT
from features.hashing import bucket_of
from features.parquet_limits import check_footer
from features.parquet_pages import check_pages, chunk_start
from features.parquet_schema import check_nesting, check_nesting_of
from features.printable import printable
from features.regular_files import local_file, lstat_regular, path_of_copy
from features.schema.origins import origins, reads_of
from features.schema.schema import Schema
from features.source import Counter, History
from features.time_units import as_utc
from pipeline.dataset.days import day_of, days_in
from pipeline.dataset.entries import State, StateFile
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.storage.patience import cure_of
from pipeline.storage.ranges import RangedFile, coalesced, read_ranges
from pipeline.storage.store_path import on_store

FOLDER = "state"
DAY = 86_400  # seconds
MOST_NAMES = 3  # histories and counters in a line


def state_file(name: str) -> str:
    """The path of the events of a history or counter, relative to the dataset."""
    return f"{FOLDER}/{name}.parquet"


def event_columns(past: History | Counter) -> pa.Schema:
    """The columns of a file of events."""
    columns = {"key": pa.large_string(), "known": pa.int64()}
    numbers = {"value": pa.float64(), "weight": pa.float64()}
    return pa.schema(columns | ({"item": pa.large_string()} if isinstance(past, History) else numbers))


def definition(schema: Schema, name: str) -> str:
    """16 hex digits that a manifest has of a history or counter: of its settings and the derived columns and outcomes it reads.

    Side tables and units of time are not in it, so that states keep their ids: `meaning` has all.
    """
    past, source = schema.past[name], schema.source
    columns = reads_of(schema, name)
    roots = schema.roots_of([*columns, str(schema.event_time)])
    added = {schema.added_columns[column] for column in roots & schema.added_columns.keys()}
    content = {
        # Without defaults, so that a release with one more setting still reads yesterday's states.
        "past": past.model_dump(mode="json", exclude_defaults=True),
        "length": schema.bag[name].max_length if isinstance(past, History) else None,
        "time": schema.event_time,
        "derived": {column: source.derived[column] for column in columns if column in source.derived},
        "types": {column: schema.raw_types.get(column, "string") for column in roots - schema.added_columns.keys()},
        "added": {key: _settings(schema, key) for key in added},
        "text": source.model_dump(mode="json", include={"missing", "trim", "timezone"}, exclude_defaults=True),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def meaning(schema: Schema, name: str) -> dict[str, Any]:
    """All that the events of a history or counter depend on: where it is equal, one schema goes on from the other's state."""
    past, source = schema.past[name], schema.source
    found = origins(schema, [*reads_of(schema, name), str(schema.event_time)])
    added = schema.outcome_columns | schema.table_columns
    streams = {added[column] for column in found.keys() & added.keys()}
    text = source.model_dump(mode="json", include={"missing", "trim", "timezone", "times", "optional"})
    # Of columns that are read only: a new one that some files lack, or that has a unit, changes nothing here.
    read = found.keys() | {c for s in streams for c in (source.outcomes.get(s) or source.tables[s]).types}
    for key in ("times", "optional"):
        text[key] = {column: value for column, value in text[key].items() if column in read}
    return {
        "past": past.model_dump(mode="json"),
        "length": schema.bag[name].max_length if isinstance(past, History) else None,
        "time": schema.event_time,
        "origins": found,
        "text": text,
    }


def _settings(schema: Schema, key: str) -> Any:
    """What stands under a key such as source.outcomes.click, but for where its files are and how they are written."""
    section, name = key.removeprefix("source.").split(".", 1)
    return getattr(schema.source, section)[name].model_dump(
        mode="json", exclude_defaults=True, exclude={"files", "read"}
    )


def state_id(state: State) -> str:
    """16 hex digits that identify a state: its horizon, and the checksums of its files."""
    content = [state.horizon, sorted([file.name, file.definition, file.sha256] for file in state.files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def check_listed(manifest: Manifest, schema: Schema, path: Path) -> None:
    """Raises UserError unless the manifest of a dataset lists the state's files of its schema, each once."""
    if manifest.state is None:
        return
    wanted = sorted((name, state_file(name), definition(schema, name)) for name in schema.past)
    if sorted((file.name, file.path, file.definition) for file in manifest.state.files) != wanted:
        raise UserError(f"{path}/manifest.json: state lists other files than those of schema.yaml. {RESTORE_HINT}")
    if manifest.state.undecided.keys() - schema.past.keys():
        raise UserError(f"{path}/manifest.json: state counts events of no history or counter. {RESTORE_HINT}")


def state_lines(state: State) -> list[str]:
    """A state in words, and what later rows would find too short: a line each."""
    before = f"began with the state of {state.began_from.dataset}" if state.began_from else "began empty"
    lines = [f"histories and counters {before}, and end at {as_utc(state.horizon)}"]
    if state.began_from and state.gap >= DAY:
        lines.append(
            f"the first row is {state.gap / DAY:.1f} days after the end of {state.began_from.dataset}: rows of the days "
            "between are in no history or counter"
        )
    undecided = sorted(((-count, name) for name, count in state.undecided.items() if count))
    if undecided:
        most = ", ".join(f"{-count:,} of {name}" for count, name in undecided[:MOST_NAMES])
        rest = f" and those of {len(undecided) - MOST_NAMES} more" if len(undecided) > MOST_NAMES else ""
        lines.append(
            f"events left out of histories and counters: {most}{rest}, since an outcome is not known: its window was still "
            "open, or files of a day are absent. Run jobs.preprocess for this dataset again once all files are there, before "
            "later days."
        )
    if state.cut_short:
        lines.append(
            f"{state.cut_short:,} rows are earlier than the end of {state.began_from and state.began_from.dataset}: what "
            "they could know of it may be missing"
        )
    if state.ahead:
        lines.append(
            f"{state.ahead:,} rows are at or after {as_utc(state.horizon)}, the end of the day: rows of later files before "
            "them are not in their histories and counters"
        )
    return [printable(line) for line in lines]


@contextmanager
def opened(
    folder: Path, file: StateFile, columns: pa.Schema, groups: Sequence[int] | None = None
) -> Iterator[pq.ParquetFile]:
    """A file of events below `folder`, checked by its footer and pages; what the block cannot read is one line, too.

    Args:
        columns: that it must have.
        groups: row groups that will be read; all if None. Of a file on a store nothing else is fetched.
    Raises:
        UserError: it is missing, no regular file, of another size, damaged, or not as its entry says.
    """
    path, status = folder / file.path, lstat_regular(folder, file.path)
    if status is None or status.st_size != file.bytes:
        found = f"has {status.st_size:,} bytes, the manifest says {file.bytes:,}" if status else "is missing"
        raise UserError(f"{path} {found}. {RESTORE_HINT}")
    try:
        with (
            local_file(path) if groups is None or not on_store(path) else _part(path, status.st_size, groups) as local,
            parquet_file(local) as parquet,
        ):
            footer, found_columns = parquet.metadata, parquet.schema_arrow
            if not found_columns.equals(columns):
                raise UserError(f"{path}: its columns are not those of a state ({_words(columns)}). {RESTORE_HINT}")
            check_footer(footer, path, status.st_size)
            if [footer.row_group(number).num_rows for number in range(footer.num_row_groups)] != file.row_groups:
                raise UserError(f"{path}: its row groups are not those of the manifest. {RESTORE_HINT}")
            check_pages(local, footer, groups=groups)
            yield parquet
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}). {cure_of(error, RESTORE_HINT)}") from None


@contextmanager
def _part(path: Path, size: int, groups: Sequence[int]) -> Iterator[Path]:
    """A path on this machine of a file with holes: it has the footer of one on a store, and some of its row groups.

    Raises:
        UserError, OSError, pa.ArrowException: the footer is damaged.
    """
    with RangedFile(path, size) as source, tempfile.TemporaryFile() as copy:
        check_nesting(cast(BinaryIO, source), path)
        with pq.ParquetFile(source) as parquet:
            footer = parquet.metadata
        check_footer(footer, path, size)
        found = [footer.row_group(number) for number in groups if number < footer.num_row_groups]
        chunks = [group.column(index) for group in found for index in range(group.num_columns)]
        starts = [(chunk_start(chunk), chunk.total_compressed_size) for chunk in chunks]
        # The magic number at both ends, and the length of the footer before the last.
        wanted = coalesced([(0, 4), (size - footer.serialized_size - 8, size), *((at, at + n) for at, n in starts)])
        for (start, _), content in zip(wanted, read_ranges(path, wanted), strict=True):
            copy.seek(start)
            copy.write(content)
        with path_of_copy(cast(BinaryIO, copy), path) as local:
            yield local


@contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """An untrusted file of this machine, whose pages are compared with their checksums. Raises UserError for a deep schema."""
    check_nesting_of(path)
    with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
        yield parquet


def read_group(parquet: pq.ParquetFile, number: int, path: Path) -> pa.Table:
    """The events of a row group. Raises UserError for a missing or non-finite value, or the key of another group."""
    events = parquet.read_row_group(number)
    for name, column in zip(events.column_names, events.columns, strict=True):
        finite = not pa.types.is_floating(column.type) or pc.all(pc.is_finite(column), min_count=0).as_py()
        if column.null_count or not finite:
            raise UserError(f"{path}: {name} is missing or not finite in an event. {RESTORE_HINT}")
    if (bucket_of(events["key"].combine_chunks(), parquet.num_row_groups) != number).any():
        raise UserError(f"{path}: row group {number} has other keys. {RESTORE_HINT}")
    return events


def verify_state(folder: Path, state: State, schema: Schema) -> str:
    """Reads all events of a dataset. Returns a line of what was checked. Raises UserError."""
    events = 0
    for file in state.files:
        with opened(folder, file, event_columns(schema.past[file.name])) as parquet:
            for number in range(parquet.num_row_groups):
                events += read_group(parquet, number, folder / file.path).num_rows
    return f"state: {events:,} events of {len(state.files)} histories and counters"


def stale_days(folder: Path, manifests: dict[str, Manifest]) -> list[str]:
    """Days whose state did not begin from what now is the day before, in order.

    The day before was made anew since, or made at all: histories and counters are of another past than that of the days there.

    Args:
        folder: of the datasets of days.
        manifests: of the days in question, by day.
    """
    there = [day.isoformat() for day in days_in(folder)]
    found = []
    for day, manifest in manifests.items():
        state = manifest.state
        origin = state.began_from if state else None
        if state is None or state.chosen or (origin is not None and day_of(origin.dataset) is None):
            continue
        before = max((other for other in there if other < day), default=None)
        try:
            known = None if before is None else manifests.get(before) or read_manifest(folder / before)
        except (UserError, OSError):  # it is not one of those that are read, and may be damaged
            continue
        expected = (before, state_id(known.state)) if known and known.state else None
        if expected != ((origin.dataset, origin.state) if origin else None):
            found.append(day)
    return found


def stale_words(days: list[str]) -> str:
    """What `stale_days` has found, as a line for the user."""
    return (
        f"histories and counters of {', '.join(days[:5])}{' …' if len(days) > 5 else ''} go on from another past than the day "
        f"before now has. Run jobs.preprocess again with date={days[0]} overwrite=true, then for the days after it."
    )


def _words(columns: pa.Schema) -> str:
    return printable(", ".join(f"{field.name}: {field.type}" for field in columns))
