"""The Beam job: from raw files to a committed dataset, in steps whose elements are files and reports, never rows.

Blocks of rows live and die inside one step, as Arrow columns from the reader to the writer (see pipeline.ingest.steps).
"""

import datetime
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import apache_beam as beam

from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import RowIndexSplit, Schema
from features.schema.source import Outcome
from pipeline.dataset.card.card import read_card
from pipeline.dataset.dataset import Dataset, commit
from pipeline.dataset.manifest import Manifest, Shard
from pipeline.ingest import files as raw_files
from pipeline.ingest import schedule
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.progress import Progress
from pipeline.ingest.runners import _check_runner, _pipeline
from pipeline.ingest.schedule import Limits
from pipeline.ingest.staging import staging_of
from pipeline.ingest.state import IMPRESSIONS, Job, Work
from pipeline.ingest.steps import write
from pipeline.ingest.steps.steps import STEPS
from pipeline.malloc import release_memory, tune_malloc
from pipeline.terminal import quiet_children

UNPACKED = 5  # times as large a compressed file is taken to be


def preprocess(config: PreprocessConfig, schema: Schema) -> Manifest:
    """Reads, joins, fits and encodes, and commits the dataset.

    Raises:
        UserError: bad input or settings; nothing half-written is left, and a dataset that stood at `out` still stands.
    """
    out = config.folder.resolve()
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists. Choose another out=, or set overwrite=true to replace it.")
    if out.exists() and not (out / "manifest.json").is_file():
        raise UserError(f"{out} is no dataset, so overwrite=true leaves it alone. Remove it, or choose another out=.")
    _check(config, schema)
    streams = _find(config, schema)
    units = list(_units(config, schema, streams))
    reference = _reference(config, schema)
    with staging_of(out) as staging:
        size = sum(_unpacked(file) for found in streams.values() for file in found)
        job = Job(
            schema, staging, 1 + size // config.bucket_bytes, config.order, config.seed,
            config.rows_per_row_group, counts_all=reference is not None,
        )  # fmt: skip
        limits = Limits(
            config.max_bad_fraction, config.rows_per_shard, reference is None and config.date is None,
            _as_of(config, schema), str(reference) if reference else None,
        )  # fmt: skip
        try:
            if reference:
                shutil.copytree(reference / "encoders", staging / "encoders")
            _run(config, job, limits, units)
            return _commit(job, limits, out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}. Nothing of it is left.") from None


def _check(config: PreprocessConfig, schema: Schema) -> None:
    """Raises UserError for settings that do not fit the schema, or each other."""
    _check_runner(config.runner)
    if config.order == "time" and not schema.event_time:
        raise UserError("order=time: the schema has no event_time. Give it one, or choose another order.")
    if config.date is None:
        return
    where = f"date={config.date}"
    if (config.out / "manifest.json").exists():
        raise UserError(f"{where}: {config.out} is a dataset itself. Choose a folder of its own for days, with out=.")
    if "{date}" not in schema.source.files:
        raise UserError(f"{where}: source.files is {schema.source.files}, which does not say where a {{date}} stands")
    if schema.histories:
        raise UserError(f"{where}: bag {next(iter(schema.histories))} is a history, which a day alone does not have")
    for name, outcome in schema.source.outcomes.items():
        if "{date}" not in outcome.files and outcome.window and outcome.open_window != "keep" and config.as_of is None:
            raise UserError(
                f"{where}: the files of outcome {name} have no {{date}}. Say with as_of= until when they are complete."
            )
        if "{date}" in outcome.files and (outcome.window is None or outcome.late == "keep"):
            raise UserError(
                f"{where}: outcome {name} has no window that closes: which days' files are its own? Give it one."
            )


def _find(config: PreprocessConfig, schema: Schema) -> dict[str, list[raw_files.RawFile]]:
    """The files of each stream; of a day, and of its outcomes' windows, if one is asked for. Raises UserError for none."""
    streams = {IMPRESSIONS: raw_files.find(config.input, schema.source.files, [config.date] if config.date else None)}
    for name, outcome in schema.source.outcomes.items():
        days = _days(config.date, outcome) if config.date and "{date}" in outcome.files else None
        streams[name] = raw_files.find(config.input, outcome.files, days)
    return streams


def _days(day: datetime.date, outcome: Outcome) -> list[datetime.date]:
    """The days on which outcomes of a day's impressions may happen."""
    return [day + datetime.timedelta(days=after) for after in range(2 + (int(outcome.window or 0) - 1) // 86_400)]


def _as_of(config: PreprocessConfig, schema: Schema) -> dict[str, int]:
    """For each outcome the time until which it is complete, as far as that is known before anything is read.

    Of a day's impressions it is the end of the last day whose files are there without a gap: that day's outcomes mostly
    belong to other impressions, which are not read.
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


def _units(config: PreprocessConfig, schema: Schema, streams: dict[str, list[raw_files.RawFile]]) -> Iterator[Work]:
    """What is read at a time. Raises UserError for a file that cannot be opened, lacks a column, or has one that joins add."""
    added = schema.outcome_columns.keys() | schema.source.derived.keys()
    for stream, found in streams.items():
        outcome = schema.source.outcomes.get(stream)
        form = schema.source.format_of(stream if outcome else None)
        wanted = [outcome.key, *outcome.types] if outcome else schema.raw_columns
        names = {file.path: raw_files.check_columns(file, form, wanted) for file in found}
        for path, columns in names.items():
            if not outcome and (both := added & set(columns or ())):
                raise UserError(
                    f"{path}: column {min(both)} is also what the schema adds: rename the outcome or derived column"
                )
        whole = outcome is None and isinstance(schema.split, RowIndexSplit)
        for unit in raw_files.units(found, form, config.unit_bytes, whole):
            yield {"stream": stream, "unit": asdict(unit), "names": names[unit.file.path]}


def _reference(config: PreprocessConfig, schema: Schema) -> Path | None:
    """The dataset whose encoders are used. Raises UserError where they do not fit."""
    reference = config.encoders.from_
    if reference is None and config.date and config.out.is_dir():
        days = sorted(path.parent for path in config.out.glob("????-??-??/manifest.json"))
        reference = next((day for day in days if day.name != config.date.isoformat()), None)
    if reference is not None:
        reference = reference.resolve()
        Dataset(reference)
        Encoders.load(reference / "encoders", schema)
        read_card(reference)
    return reference


class StepFn(beam.DoFn):
    """(number, work) of a step to its report, which says what failed where that is the user's to mend."""

    def __init__(self, job: Job, step: str) -> None:
        self.job, self.step = job, step

    def setup(self) -> None:
        """Once a worker and step."""
        release_memory()
        tune_malloc()

    def process(self, element: tuple[int, Work]) -> Iterator[Work]:
        """Yields one report."""
        order, work = element
        try:
            report = STEPS[self.step](self.job, {"number": order, **work})
            (self.job.scratch / "notes" / f"{self.step}-{order:06d}").touch()
        except UserError as error:
            report = {"error": str(error)}
        except OSError as error:
            report = {"error": f"{self.job.staging.parent}: {raw_files.one_line(error)}. No dataset was written."}
        yield {"order": order, **report}


def _run(config: PreprocessConfig, job: Job, limits: Limits, units: list[Work]) -> None:
    """All steps in one pipeline. Raises UserError for the first thing that failed."""
    steps = schedule.steps_of(job)
    total = sum(unit["unit"]["file"]["size"] for unit in units if not unit["unit"]["start"])
    # Beam's worker processes tell every step of their life on stderr; what fails in them is raised here.
    quiet = quiet_children() if config.runner == "direct" and config.workers > 1 else nullcontext()
    with quiet, Progress(job.scratch / "notes", steps, total), _pipeline(config) as pipeline:
        work = pipeline | beam.Create(list(enumerate(units)))
        for step in steps:
            reports = work | f"spread {step}" >> beam.Reshuffle() | step >> beam.ParDo(StepFn(job, step))
            listed = reports | f"all of {step}" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
            work = listed | f"after {step}" >> beam.FlatMap(schedule.after, job, limits, step)
    if (job.scratch / "error.json").exists():
        raise UserError(json.loads((job.scratch / "error.json").read_text()))


def _commit(job: Job, limits: Limits, out: Path) -> Manifest:
    """Puts the parts together and moves the dataset into place."""
    reads = job.found("read")
    before, parts = schedule.lines_before(reads), job.labelled()
    by_file: dict[tuple[str, str], list[tuple[str, int]]] = {}
    reasons: Counter[str] = Counter()
    for unit, report in schedule.dead_letter_reports(job):
        by_file.setdefault((reads[unit]["stream"], reads[unit]["file"]), []).append(
            (report["dead_letters"], before[unit])
        )
        reasons.update(report["reasons"])
    dead_letter_files = [
        write.write_dead_letters(job.staging, f"{stream}-{index:05d}", stream, file, found)
        for index, ((stream, file), found) in enumerate(by_file.items())
    ]
    join_statuses = {name: Counter[str]() for name in job.schema.source.outcomes}
    for report in job.found("join"):
        for name, found in report["join_statuses"].items():
            join_statuses[name].update(found)
    read: Counter[str] = Counter()
    for report in reads:
        read[report["stream"]] += report["read"]
    left_out: Counter[str] = sum((Counter(part["left_out"]) for part in parts), Counter())
    counts: dict[str, Any] = {
        "read": dict(read), "left_out": dict(left_out), "outcomes": {n: dict(f) for n, f in join_statuses.items()},
        "dead_letters": dict(reasons), "dead_letter_files": dead_letter_files,
        "complete_until": schedule.complete_until(job, limits),
    }  # fmt: skip
    shards = [Shard(**report["described"]) for report in job.found("write")]
    return commit(job.staging, out, job.schema, shards, counts)
