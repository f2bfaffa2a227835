"""The job: from raw files to a committed dataset, in steps that exchange small messages, never rows.

Blocks of rows stay inside one step, as Arrow columns from the reader to the writer (see pipeline.ingest.steps).
"""

import datetime
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from features.errors import UserError, join_faults
from features.fit import reuse
from features.fit.encoders import Encoders
from features.schema.schema import RowIndexSplit, Schema
from features.schema.unlabelled import check_past, without_labels
from features.source import Outcome
from pipeline.dataset.card.card import read_card
from pipeline.dataset.dataset import Dataset, commit
from pipeline.dataset.days import days_in, folder_of_day
from pipeline.dataset.manifest import Manifest
from pipeline.ingest import files as raw_files
from pipeline.ingest import schedule, totals
from pipeline.ingest.absent_columns import stream_columns
from pipeline.ingest.absent_days import absent_days, days_after
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.formats import raw_format, units
from pipeline.ingest.messages import ReadWork, WriteReport
from pipeline.ingest.past_end import state_of, warn_of_stale_days
from pipeline.ingest.past_start import Start, copy_encoders, copy_state, start_of
from pipeline.ingest.progress import Progress
from pipeline.ingest.runners.hosts import addresses, must_see, workers_of
from pipeline.ingest.schedule import Limits
from pipeline.ingest.staging import fetch, folders_of
from pipeline.ingest.state import IMPRESSIONS, AbsentDays, Job
from pipeline.ingest.steps import run_step
from pipeline.ingest.steps.look_up import table_types
from pipeline.ingest.table_files import check_snapshots, snapshots, table_files
from pipeline.storage.staging import recover
from pipeline.storage.store_path import on_store

logger = logging.getLogger(__name__)

UNPACKED = 5  # estimated size of a compressed file's content over its own
EVENT_BYTES = 64  # estimated size in memory of an event of a history or counter


def preprocess(config: PreprocessConfig, schema: Schema) -> Manifest:
    """Reads, joins, fits and encodes, and commits the dataset.

    Raises:
        UserError: bad input or settings; nothing half-written is left, and an earlier dataset at `out` stays (but see
            pipeline.storage.staging.recover).
    """
    try:
        return _preprocess(config, schema)
    except OSError as error:
        if silent := raw_files.no_answer(error):
            raise silent from None
        raise


def _preprocess(config: PreprocessConfig, schema: Schema) -> Manifest:
    out = config.out.resolve()
    out = folder_of_day(out, config.date.isoformat()) if config.date else out
    recover(out)
    if out.exists() and not config.overwrite:
        raise UserError(_exists(out))
    if out.exists() and not (out / "manifest.json").is_file():
        raise UserError(
            f"{out} is no dataset, and overwrite=true replaces only datasets. Remove it, or choose another out=."
        )
    read = without_labels(schema) if config.labels == "none" else schema
    check_settings(config, read)
    plan = plan_of(config, schema, read, _find(config, read))
    _warn_of(plan.absent, read)
    with folders_of(out, config.scratch) as (staging, scratch):
        # Where workers of other machines see the files between steps but not the dataset's folder, they make it with these.
        made = scratch / "dataset" if on_store(scratch) and not on_store(staging) else staging
        job, limits = job_of(config, plan, made, scratch), limits_of(config, plan)
        try:
            copy_past(plan, job, schema)
            run_steps(config, job, limits, plan.work)
            manifest = commit_job(config, job, limits, schema, out, staging)
        except OSError as error:
            if raw_files.no_answer(error):
                raise
            raise UserError(f"{out} cannot be written: {error}. Nothing of it is left.") from None
    if config.date and schema.past:
        warn_of_stale_days(out.parent, config.date)
    return manifest


@dataclass(frozen=True)
class Plan:
    """What is known of a job before the first row is read.

    Attributes:
        schema: of what is read.
        streams: the files of each.
        valid_from: see pipeline.ingest.table_files.snapshots.
        work: the units of all streams.
        reference, fits: see Limits.
        start: see Job.
    """

    schema: Schema
    streams: dict[str, list[raw_files.RawFile]]
    valid_from: dict[str, dict[str, int]]
    work: list[ReadWork]
    reference: Path | None
    fits: bool
    start: Start | None
    absent: AbsentDays


def plan_of(
    config: PreprocessConfig, schema: Schema, read: Schema, streams: dict[str, list[raw_files.RawFile]]
) -> Plan:
    """Plans a job. Raises UserError for files, encoders or a state that it cannot go on from.

    Args:
        schema: of the dataset. read: of what is read, which is without labels where `labels` is none.
    """
    valid_from = snapshots(config, read, streams)
    work = _read_work(config, read, streams, valid_from)
    reference, fits = _reference(config, schema)
    start = start_of(schema, config.out, config.date, config.missing_days, config.state.from_, config.encoders.from_)
    if config.labels == "none" and start is None:
        check_past(schema)
    absent = absent_days(read, streams, config.as_of)
    return Plan(read, streams, valid_from, work, reference, fits, start, absent)


def job_of(config: PreprocessConfig, plan: Plan, staging: Path, scratch: Path | None = None) -> Job:
    """The job as its steps see it, with the folders of Job."""
    streams, start = plan.streams, plan.start
    size = sum(_unpacked(file) for found in streams.values() for file in found)
    size += EVENT_BYTES * max(sum(file.row_groups) for file in start.state.files) if start else 0
    return Job(
        plan.schema, staging, 1 + size // config.bucket_bytes, config.order, config.seed,
        config.rows_per_row_group, counts_all=not plan.fits, broadcast=_broadcast(config, plan.schema, streams),
        snapshots={name: sorted(set(times.values())) for name, times in plan.valid_from.items()},
        start=start, horizon=_end(config, plan.schema), reads_labels=config.labels != "none", absent=plan.absent,
        max_bad_fraction=config.max_bad_fraction,
        stream_bytes={stream: sum(file.size for file in found) for stream, found in streams.items()},
        apart=scratch,
    )  # fmt: skip


def limits_of(config: PreprocessConfig, plan: Plan) -> Limits:
    """When the job stops, and how large its shards are."""
    reference = plan.reference
    return Limits(
        config.max_bad_fraction, config.rows_per_shard, reference is None and config.date is None,
        _as_of(config, plan.schema), str(reference) if reference else None, plan.fits,
        min_joined=config.min_joined, whole_log=reference is None and config.date is None,
    )  # fmt: skip


def copy_past(plan: Plan, job: Job, schema: Schema) -> None:
    """Copies what the job goes on from: the encoders of another dataset, and a state. Raises UserError, OSError."""
    if plan.reference and not plan.fits:
        copy_encoders(plan.reference, job.staging, schema)
    if plan.start:
        copy_state(plan.start, schema, job.begun)


def _exists(out: Path) -> str:
    return f"{out} exists. Choose another out=, or set overwrite=true to replace it."


def _warn_of(absent: AbsentDays, schema: Schema) -> None:
    """Names days without files before the log is read."""
    for stream, days in absent.days.items():
        found = schema.source.outcomes.get(stream)
        advice = ""
        if stream in absent.undecided and found and not found.window:
            advice = f". It has no window, so all impressions before may need it: set source.outcomes.{stream}.window"
        logger.warning("%s: no file of %s%s", stream, join_faults(days, 5), advice)


def check_settings(config: PreprocessConfig, schema: Schema) -> None:
    """Raises UserError for settings that do not fit the schema, or each other."""
    if config.runner == "hosts" and not (config.options or config.master):  # what follows imports Beam, for seconds
        addresses(config.hosts)
    elif config.runner != "direct" or config.options or config.master or config.hosts:
        from pipeline.ingest.runners.reachable import check_reachable
        from pipeline.ingest.runners.registry import check_runner

        check_runner(config.runner)
        check_reachable(config)
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
        streams[name] = raw_files.find(config.input, outcome.files, days, ratio, f"source.outcomes.{name}.files")
    for name in schema.source.tables:
        streams[name] = table_files(config, schema, name)
    return streams


def _broadcast(config: PreprocessConfig, schema: Schema, streams: dict[str, list[raw_files.RawFile]]) -> frozenset[str]:
    """The side tables that are small enough for every worker to hold."""
    sizes = {name: sum(map(_unpacked, streams[name])) for name in schema.source.tables}
    return frozenset(name for name, size in sizes.items() if size <= config.broadcast_bytes)


def _days(day: datetime.date, outcome: Outcome) -> list[datetime.date]:
    """The days on which outcomes of a day's impressions may happen."""
    return [day + datetime.timedelta(days=after) for after in range(1 + days_after(outcome))]


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


def _end(config: PreprocessConfig, schema: Schema) -> int | None:
    """Seconds since 1970 at which the day ends, in the zone of times that name none; None without `date`."""
    if config.date is None:
        return None
    midnight = datetime.datetime.combine(config.date + datetime.timedelta(days=1), datetime.time(), schema.source.zone)
    return int(midnight.timestamp())


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
        of_log = schema.raw_columns if is_log else []
        wanted = [outcome.key, *outcome.types] if outcome else of_log or [*table_types(schema, stream)]
        names = stream_columns(files, options, wanted, schema.source.format_key(name), added if is_log else ())
        for path, columns in names.items():
            if is_log and (both := added & set(columns or ())):
                raise UserError(
                    f"{path}: column {min(both)} is also what the schema adds: rename the outcome, side table, counter or "
                    "derived column"
                )
        # Of modulo 1 all rows are in one split, whatever their index.
        whole = is_log and isinstance(schema.split, RowIndexSplit) and schema.split.modulo > 1
        for unit in units(files, options, config.unit_bytes, whole):
            snapshot = valid_from.get(stream, {}).get(unit.file.path)
            found.append(ReadWork(len(found), stream, unit, names[unit.file.path], snapshot))
    return found


def _reference(config: PreprocessConfig, schema: Schema) -> tuple[Path | None, bool]:
    """The dataset whose encoders are used, and whether any are fitted, as there are for features that it has not.

    Raises:
        UserError: the dataset is damaged, or has none of the schema's features; new encoders would be without labels.
    """
    sibling = _other_day(config)
    reference = config.encoders.from_ or sibling
    if reference is None and config.labels == "none":
        raise UserError(
            "labels=none: rows without labels train nothing. Set encoders.from=DATASET, whose encoders are used."
        )
    if reference is None:
        return None, True
    reference = reference.resolve()
    known = Dataset(reference)
    read_card(reference, known.schema)
    if sibling and not _same_features(schema, Dataset(sibling).schema):
        raise UserError(
            f"{sibling.name} in {config.out} was made with other features. Choose another out= for days of this schema, with "
            f"encoders.from={sibling.resolve()} to keep the encoders of features that are unchanged."
        )
    unchanged = reuse.unchanged(schema, known.schema)
    other = [n for n, t in schema.tasks.items() if t.kind == "regression" and n not in unchanged.labels]
    if _same_features(schema, known.schema) and (not other or config.labels == "none"):
        Encoders.load(reference / "encoders", schema)
        return reference, False
    kept = unchanged.features
    if not kept:
        raise UserError(f"encoders.from: {reference} has none of this schema's features. Fit new encoders, without it.")
    Encoders.load(reference / "encoders", known.schema)  # checked before the first minute of work
    fitted = [name for name in schema.features if name not in kept]
    if config.labels == "none":
        raise UserError(
            f"labels=none: rows without labels train nothing, and {reference} has no encoders of {', '.join(fitted)}."
        )
    logger.info(
        f"encoders: {len(kept)} features as in {reference}; fitted on the train rows of this log: "
        f"{', '.join([*fitted, *(f'the scale of task {name}' for name in other)]) or 'none'}"
    )
    return reference, True


def _other_day(config: PreprocessConfig) -> Path | None:
    """The first other day in the folder of days that the job writes to."""
    if config.date is None:
        return None
    day = next((day for day in days_in(config.out) if day != config.date), None)
    return folder_of_day(config.out, day.isoformat()) if day else None


def _same_features(schema: Schema, known: Schema) -> bool:
    """Whether all features of one schema mean the same in the other, which has no others.

    Equal fingerprints alone would not show that a side table is looked up by another column, or an outcome's other window.
    """
    kept = reuse.unchanged(schema, known).features
    return known.inputs_fingerprint == schema.inputs_fingerprint and kept == schema.features.keys()


def run_steps(config: PreprocessConfig, job: Job, limits: Limits, work: list[ReadWork]) -> None:
    """Runs all steps. Raises UserError for the first failure."""
    total = sum(each.unit.file.size for each in work if not each.unit.start)
    with workers_of(config, partial(run_step, job), "read", work, must_see(job, work)):
        from pipeline.ingest.runners.pipelines import run_pipeline

        with Progress(job.progress, schedule.steps_of(job), total):
            run_pipeline(config, job, limits, work)
    raise_failure(job)


def raise_failure(job: Job) -> None:
    """Raises UserError where a step has failed, or not even that could be written."""
    with suppress(FileNotFoundError):
        raise UserError(json.loads((job.scratch / "error.json").read_bytes()))
    if not (job.scratch / f"{schedule.steps_of(job)[-1]}.json").exists():
        raise UserError(f"{job.scratch}: the report of a step could not be written. Run again once it can.")


def commit_job(
    config: PreprocessConfig, job: Job, limits: Limits, schema: Schema, out: Path, staging: Path | None = None
) -> Manifest:
    """Writes dead letters and totals, and moves the dataset into place.

    Args:
        staging: beside `out`, where the dataset was made elsewhere; None: where it was made.
    Raises:
        UserError: another job has made `out` meanwhile, and it is not to be replaced.
    """
    counts = totals.of_job(job, limits) | {"state": state_of(job, config.state.from_ is not None)}
    totals.add_splits(job)
    if staging is not None and staging != job.staging:
        fetch(job.staging, staging)
    if not config.overwrite and (out / "manifest.json" if on_store(out) else out).exists():
        raise UserError(_exists(out))
    return commit(staging or job.staging, out, schema, [report.shard for report in job.found(WriteReport)], counts)
