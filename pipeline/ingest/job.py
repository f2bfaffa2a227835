"""The job: from raw files to a committed dataset, in steps that exchange small messages, never rows.

Blocks of rows stay inside one step, as Arrow columns from the reader to the writer (see pipeline.ingest.steps).
"""

import datetime
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.fitted_files import encoder_files
from features.regular_files import open_regular
from features.schema.schema import RowIndexSplit, Schema
from features.schema.unlabelled import check_histories, without_labels
from features.source import Outcome
from pipeline.dataset.card.card import read_card
from pipeline.dataset.dataset import Dataset, commit, require_file
from pipeline.dataset.days import folder_of_day
from pipeline.dataset.manifest import DeadLetterFile, Manifest, sum_types
from pipeline.ingest import files as raw_files
from pipeline.ingest import schedule
from pipeline.ingest.absent_columns import absent_rows, stream_columns
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.formats import raw_format, units
from pipeline.ingest.messages import JoinReport, ReadReport, ReadWork, WriteReport
from pipeline.ingest.progress import Progress
from pipeline.ingest.runners import check_runner, run_pipeline
from pipeline.ingest.schedule import Limits
from pipeline.ingest.staging import staging_of
from pipeline.ingest.state import IMPRESSIONS, Job
from pipeline.ingest.steps import dead_letters
from pipeline.ingest.steps.look_up import side_table_counts, table_types
from pipeline.ingest.table_files import check_snapshots, snapshots, table_files

UNPACKED = 5  # estimated size of a compressed file's content over its own


def preprocess(config: PreprocessConfig, schema: Schema) -> Manifest:
    """Reads, joins, fits and encodes, and commits the dataset.

    Raises:
        UserError: bad input or settings; nothing half-written is left, and an earlier dataset at `out` stays.
    """
    out = config.out.resolve()
    out = folder_of_day(out, config.date.isoformat()) if config.date else out
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists. Choose another out=, or set overwrite=true to replace it.")
    if out.exists() and not (out / "manifest.json").is_file():
        raise UserError(
            f"{out} is no dataset, and overwrite=true replaces only datasets. Remove it, or choose another out=."
        )
    read = schema
    if config.labels == "none":
        check_histories(schema)
        read = without_labels(schema)
    _check(config, read)
    streams = _find(config, read)
    valid_from = snapshots(config, read, streams)
    work = _read_work(config, read, streams, valid_from)
    reference = _reference(config, schema)
    with staging_of(out) as staging:
        size = sum(_unpacked(file) for found in streams.values() for file in found)
        job = Job(
            read, staging, 1 + size // config.bucket_bytes, config.order, config.seed,
            config.rows_per_row_group, counts_all=reference is not None, broadcast=_broadcast(config, read, streams),
            snapshots={name: sorted(set(times.values())) for name, times in valid_from.items()},
        )  # fmt: skip
        limits = Limits(
            config.max_bad_fraction, config.rows_per_shard, reference is None and config.date is None,
            _as_of(config, read), str(reference) if reference else None,
        )  # fmt: skip
        try:
            if reference:
                _copy_encoders(reference, staging, schema)
            run_steps(config, job, limits, work)
            return _commit(job, limits, schema, out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}. Nothing of it is left.") from None


def _check(config: PreprocessConfig, schema: Schema) -> None:
    """Raises UserError for settings that do not fit the schema, or each other."""
    check_runner(config.runner)
    raw_format(schema.source)
    for name in schema.source.outcomes:
        raw_format(schema.source.format_of(name), f"source.outcomes.{name}.read")
    for name in schema.source.tables:
        raw_format(schema.source.format_of(name), f"source.tables.{name}.read")
    check_snapshots(config, schema)
    if config.order == "time" and not schema.event_time:
        raise UserError("order=time: the schema has no event_time. Give it one, or choose another order.")
    if config.date is None:
        return
    where = f"date={config.date}"
    if (config.out / "manifest.json").exists():
        raise UserError(f"{where}: {config.out} is a dataset itself. Choose a folder of its own for days, with out=.")
    if "{date}" not in schema.source.files:
        raise UserError(f"{where}: source.files is {schema.source.files}: put {{date}} where file names have the day")
    if schema.past:
        kind = (
            f"bag {next(iter(schema.histories))} is a history"
            if schema.histories
            else "source.counters are of earlier rows"
        )
        raise UserError(f"{where}: {kind}, which one day does not have. Remove it, or date=.")
    for name, outcome in schema.source.outcomes.items():
        if "{date}" not in outcome.files and outcome.window and outcome.open_window != "keep" and config.as_of is None:
            raise UserError(
                f"{where}: the files of outcome {name} have no {{date}}. Set as_of= to the time until which they are complete."
            )
        if "{date}" in outcome.files and (outcome.window is None or outcome.late == "keep"):
            raise UserError(
                f"{where}: outcome {name} may be in any later day's files. Give it a window, with late: drop."
            )


def _find(config: PreprocessConfig, schema: Schema) -> dict[str, list[raw_files.RawFile]]:
    """The files of each stream; with `date` those of the day, and of its outcomes' windows. Raises UserError for none."""
    ratio, day = config.max_unpack_ratio, [config.date] if config.date else None
    streams = {IMPRESSIONS: raw_files.find(config.input, schema.source.files, day, ratio)}
    for name, outcome in schema.source.outcomes.items():
        days = _days(config.date, outcome) if config.date and "{date}" in outcome.files else None
        streams[name] = raw_files.find(config.input, outcome.files, days, ratio)
    for name in schema.source.tables:
        streams[name] = table_files(config, schema, name)
    return streams


def _broadcast(config: PreprocessConfig, schema: Schema, streams: dict[str, list[raw_files.RawFile]]) -> frozenset[str]:
    """The side tables that are small enough for every worker to hold."""
    sizes = {name: sum(map(_unpacked, streams[name])) for name in schema.source.tables}
    return frozenset(name for name, size in sizes.items() if size <= config.broadcast_bytes)


def _days(day: datetime.date, outcome: Outcome) -> list[datetime.date]:
    """The days on which outcomes of a day's impressions may happen."""
    return [day + datetime.timedelta(days=after) for after in range(2 + (int(outcome.window or 0) - 1) // 86_400)]


def _as_of(config: PreprocessConfig, schema: Schema) -> dict[str, int]:
    """For each outcome the time until which it is complete, where that is known before anything is read.

    With `date` it is the end of the last day before the first gap in the files: outcomes of the later days mostly belong
    to other impressions, which are not read.
    """
    known = {}
    for name, outcome in schema.source.outcomes.items():
        if config.as_of:
            known[name] = int(config.as_of.timestamp())
        elif config.date and "{date}" in outcome.files:
            found = raw_files.files_by_date(config.input, outcome.files, _days(config.date, outcome))
            last = next((day for day, files in found.items() if not files), max(found) + datetime.timedelta(days=1))
            midnight = datetime.datetime.combine(last, datetime.time(), schema.source.format_of(name).zone)
            known[name] = int(midnight.timestamp())
    return known


def _unpacked(file: raw_files.RawFile) -> int:
    return file.size * (UNPACKED if file.path.endswith((".gz", ".bz2", ".zst")) else 1)


def _read_work(
    config: PreprocessConfig,
    schema: Schema,
    streams: dict[str, list[raw_files.RawFile]],
    valid_from: dict[str, dict[str, int]],
) -> list[ReadWork]:
    """The units of all streams. Raises UserError for an unreadable file, a missing column, or one that the schema adds."""
    added = schema.added_columns.keys() | schema.table_columns.keys() | schema.source.derived.keys()
    found: list[ReadWork] = []
    for stream, files in streams.items():
        is_log, outcome = stream == IMPRESSIONS, schema.source.outcomes.get(stream)
        name = None if is_log else stream
        options = schema.source.format_of(name)
        wanted = (
            [outcome.key, *outcome.types]
            if outcome
            else schema.raw_columns
            if is_log
            else [*table_types(schema, stream)]
        )
        names = stream_columns(files, options, wanted, schema.source.format_key(name))
        for path, columns in names.items():
            if is_log and (both := added & set(columns or ())):
                raise UserError(
                    f"{path}: column {min(both)} is also what the schema adds: rename the outcome, side table, counter or "
                    "derived column"
                )
        whole = is_log and isinstance(schema.split, RowIndexSplit)
        for unit in units(files, options, config.unit_bytes, whole):
            snapshot = valid_from.get(stream, {}).get(unit.file.path)
            found.append(ReadWork(len(found), stream, unit, names[unit.file.path], snapshot))
    return found


def _reference(config: PreprocessConfig, schema: Schema) -> Path | None:
    """The dataset whose encoders are used. Raises UserError where they do not fit, or new ones would be without labels."""
    reference = config.encoders.from_
    if reference is None and config.date and config.out.is_dir():
        days = sorted(path.parent for path in config.out.glob("????-??-??/manifest.json"))
        reference = next((day for day in days if day.name != config.date.isoformat()), None)
        reference = reference and folder_of_day(config.out, reference.name)
    if reference is not None:
        reference = reference.resolve()
        known = Dataset(reference)
        Encoders.load(reference / "encoders", schema)
        read_card(reference, known.schema)
    elif config.labels == "none":
        raise UserError(
            "labels=none: rows without labels train nothing. Set encoders.from=DATASET, whose encoders are used."
        )
    return reference


def _copy_encoders(reference: Path, staging: Path, schema: Schema) -> None:
    """Copies the files of the encoders, and nothing that only looks like one. Raises UserError, OSError."""
    (staging / "encoders" / "vocabularies").mkdir(parents=True)
    for name in encoder_files(schema):
        with (
            open_regular(require_file(reference, f"encoders/{name}")) as source,
            (staging / "encoders" / name).open("xb") as copy,
        ):
            shutil.copyfileobj(source, copy)


def run_steps(config: PreprocessConfig, job: Job, limits: Limits, work: list[ReadWork]) -> None:
    """Runs all steps. Raises UserError for the first failure."""
    total = sum(each.unit.file.size for each in work if not each.unit.start)
    with Progress(job.progress, schedule.steps_of(job), total):
        run_pipeline(config, job, limits, work)
    if (job.scratch / "error.json").exists():
        raise UserError(json.loads((job.scratch / "error.json").read_text()))


def _commit(job: Job, limits: Limits, schema: Schema, out: Path) -> Manifest:
    """Writes the dead letters, adds the counts up and moves the dataset, of this schema, into place."""
    reads, parts = job.found(ReadReport), job.labelled()
    join_statuses = {name: Counter[str]() for name in job.schema.source.outcomes}
    for joined in job.found(JoinReport):
        for name, found in joined.join_statuses.items():
            join_statuses[name].update(found)
    read: Counter[str] = Counter()
    for report in reads:
        read[report.stream] += report.read
    left_out: Counter[str] = sum((Counter(part.left_out) for part in parts), Counter())
    reasons: Counter[str] = Counter()
    for _, spilled in schedule.dead_letters_of(job):
        reasons.update(spilled.reasons)
    counts: dict[str, Any] = {
        "read": dict(read), "left_out": dict(left_out), "outcomes": {n: dict(f) for n, f in join_statuses.items()},
        "dead_letters": dict(reasons), "dead_letter_files": _write_dead_letters(job, reads),
        "complete_until": schedule.complete_until(job, limits), "absent_columns": absent_rows(reads),
        "types": sum_types({report.stream: report.types} for report in reads), "side_tables": side_table_counts(job),
    }  # fmt: skip
    return commit(job.staging, out, schema, [report.shard for report in job.found(WriteReport)], counts)


def _write_dead_letters(job: Job, reads: list[ReadReport]) -> list[DeadLetterFile]:
    """A file for each raw file that has dead letters."""
    before = schedule.lines_before(reads)
    by_file: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for unit, spilled in schedule.dead_letters_of(job):
        by_file.setdefault((reads[unit].stream, reads[unit].file), []).append((str(spilled.path), before[unit]))
    return [
        dead_letters.write_file(job.staging, f"{stream}-{index:05d}", stream, file, found)
        for index, ((stream, file), found) in enumerate(by_file.items())
    ]
