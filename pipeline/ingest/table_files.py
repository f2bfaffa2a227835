"""The files of side tables: as they are, or of tables written as whole snapshots by day, those that rows may see."""

import datetime
from collections.abc import Mapping

from features.errors import UserError
from features.schema.schema import Schema
from pipeline.ingest.absent_days import day_of
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.files import RawFile, find


def table_files(config: PreprocessConfig, schema: Schema, name: str) -> list[RawFile]:
    """The files of a side table; with `date` those of its newest snapshot up to that day, never of a later one.

    Raises:
        UserError: there are none, or a file's name has no day.
    """
    pattern = schema.source.tables[name].files
    found = find(config.input, pattern, None, config.max_unpack_ratio, f"source.tables.{name}.files")
    if "{date}" not in pattern or config.date is None:
        return found
    days = days_of(pattern, found)
    known = [day for day in days.values() if day <= config.date]
    if not known:
        raise UserError(
            f"date={config.date}: the first snapshot of side table {name} is of {min(days.values())}, which is later. "
            "Add an earlier file, or preprocess later days."
        )
    return [file for file in found if days[file.path] == max(known)]


def days_of(pattern: str, files: list[RawFile]) -> dict[str, datetime.date]:
    """The day in each file's name, by path. Raises UserError for a file without one."""
    found = {}
    for file in files:
        day = day_of(file.path, pattern)
        if day is None:
            raise UserError(
                f"{file.path}: no day such as 2026-11-21 stands in place of {{date}} of {pattern}. Rename it."
            )
        found[file.path] = day
    return found


def snapshots(
    config: PreprocessConfig, schema: Schema, streams: Mapping[str, list[RawFile]]
) -> dict[str, dict[str, int]]:
    """Of side tables of which several snapshots are read: when each file's rows become valid, by path.

    That is midnight before its day, in the time zone of the table, in seconds since 1970.
    """
    found = {}
    for name, table in schema.source.tables.items():
        if table.in_snapshots and config.date is None:
            zone = schema.source.format_of(name).zone
            days = days_of(table.files, streams[name])
            found[name] = {
                path: int(datetime.datetime.combine(day, datetime.time(), zone).timestamp())
                for path, day in days.items()
            }
    return found


def check_snapshots(config: PreprocessConfig, schema: Schema) -> None:
    """Raises UserError for snapshots that no time of the impressions can choose among, or that rows' own times would."""
    for name, table in schema.source.tables.items():
        if not table.in_snapshots or config.date is not None:
            continue
        if table.valid_from:
            raise UserError(
                f"source.tables.{name}: its files have {{date}}, each is the whole table from that day on; by valid_from its "
                "rows would reach impressions of days before. Set date=, remove valid_from, or write * in place of {date}."
            )
        if not schema.event_time:
            raise UserError(
                f"source.tables.{name}: its files have {{date}}, of which an impression sees those of its time: give the "
                "schema event_time, or set date="
            )
