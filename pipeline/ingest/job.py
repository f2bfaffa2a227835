"""The Beam job: from raw files to a committed dataset, in steps whose elements are files and reports, never rows.

Blocks of rows live and die inside one step, as Arrow columns from the reader to the writer (see pipeline.ingest.steps).
"""

import datetime
import fcntl
import glob
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import create_runner
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from features.encoders import Encoders
from features.errors import UserError
from features.schema import RowIndexSplit, Schema, utc
from pipeline.dataset import Dataset, Letters, Manifest, Shard, commit
from pipeline.ingest import files as raw_files
from pipeline.ingest import plan, writer
from pipeline.ingest.plan import BALLAST, IMPRESSIONS, Limits
from pipeline.ingest.progress import Progress
from pipeline.ingest.steps import STEPS, Job, Work
from pipeline.memory import give_memory_back, keep_memory

RUNNERS = {"portable": "PortableRunner", "flink": "FlinkRunner", "spark": "SparkRunner", "dataflow": "DataflowRunner"}
UNPACKED = 5  # times as large a compressed file is taken to be


class EncodersFrom(BaseModel):
    """Whose encoders are used: those of the dataset `from`, or new ones."""

    model_config = ConfigDict(extra="forbid")
    from_: Path | None = Field(None, alias="from")


class PreprocessConfig(BaseModel):
    """Settings of jobs.preprocess.

    Attributes:
        input: folder below which the schema's files are, on any file system that fsspec knows.
        out: the dataset to write.
        date: one day: files whose pattern has {date} are those of that day, and the dataset is out/DATE.
        encoders: from=DATASET uses its fitted encoders, None fits new ones (or takes those of the first day in `out`).
        as_of: until when outcomes are complete; None: the latest time in the log.
        order: of the rows: shuffled by a hash, by time, or as they were read.
        seed: of the shuffle.
        runner: direct (on this machine), or the name of another Beam runner with its flags in `options`.
        workers: processes of the direct runner.
        options: flags for Beam, as its command line takes them.
        rows_per_row_group, rows_per_shard: sizes of what is written; shuffled shards hold about as many rows.
        unit_bytes: how much of the raw files a worker reads at a time.
        bucket_bytes: about how much of the raw files goes into one bucket of a join.
        max_bad_fraction: the job stops when a larger share of the rows is bad.
        overwrite: replace a dataset that stands at `out`.
    """

    model_config = ConfigDict(extra="forbid")
    input: str
    out: Path
    date: datetime.date | None = None
    encoders: EncodersFrom = EncodersFrom()
    as_of: Annotated[AwareDatetime | None, BeforeValidator(utc)] = None
    order: writer.Order = "shuffled"
    seed: int = 0
    runner: str = "direct"
    workers: int = Field(1, ge=1)
    options: list[str] = []
    rows_per_row_group: int = Field(8192, ge=1)
    rows_per_shard: int = Field(1 << 20, ge=1)
    unit_bytes: int = Field(32 << 20, ge=1)
    bucket_bytes: int = Field(128 << 20, ge=1)
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the dataset comes to lie."""
        return self.out / self.date.isoformat() if self.date else self.out


def preprocess(config: PreprocessConfig, schema: Schema) -> Manifest:
    """Reads, joins, fits and encodes, and commits the dataset.

    Raises:
        UserError: bad input or settings; nothing half-written is left, and a dataset that stood at `out` still stands.
    """
    out = config.folder
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists. Choose another out=, or set overwrite=true to replace it.")
    if out.exists() and not (out / "manifest.json").is_file():
        raise UserError(f"{out} is no dataset, so overwrite=true leaves it alone. Remove it, or choose another out=.")
    _check_runner(config.runner)
    streams = _find(config, schema)
    units = list(_units(config, schema, streams))
    reference = _reference(config, schema)
    with _staging(out) as staging:
        if reference:
            shutil.copytree(reference / "encoders", staging / "encoders")
        size = {stream: sum(_unpacked(file) for file in found) for stream, found in streams.items()}
        joined = sum(size.values()) if schema.source.outcomes or schema.histories else 0
        job = Job(
            schema, staging, 1 + joined // config.bucket_bytes, config.order, config.seed,
            config.rows_per_row_group, counts_all=reference is not None,
        )  # fmt: skip
        limits = Limits(
            config.max_bad_fraction, config.rows_per_shard, reference is None and config.date is None,
            int(config.as_of.timestamp()) if config.as_of else None, str(reference) if reference else None,
        )  # fmt: skip
        try:
            _run(config, job, limits, units)
            return _commit(job, out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}. Nothing of it is left.") from None


def _find(config: PreprocessConfig, schema: Schema) -> dict[str, list[raw_files.RawFile]]:
    """The files of each stream. Raises UserError where there are none, or a day is asked for and the schema has no days."""
    source, dates = schema.source, [config.date] if config.date else None
    if config.date and "{date}" not in source.files:
        raise UserError(
            f"date={config.date}: source.files is {source.files}, which does not say where a {{date}} stands"
        )
    streams = {IMPRESSIONS: raw_files.find(config.input, source.files, dates)}
    for name, outcome in source.outcomes.items():
        days = None
        if config.date and "{date}" in outcome.files:
            if outcome.window is None:
                raise UserError(
                    f"date={config.date}: outcome {name} has no window, so its days have no end. Give it one."
                )
            days = [config.date + datetime.timedelta(days=day) for day in range(2 + (outcome.window - 1) // 86_400)]
        streams[name] = raw_files.find(config.input, outcome.files, days)
    return streams


def _unpacked(file: raw_files.RawFile) -> int:
    return file.size * (UNPACKED if file.path.endswith((".gz", ".bz2", ".zst")) else 1)


def _units(config: PreprocessConfig, schema: Schema, streams: dict[str, list[raw_files.RawFile]]) -> Iterator[Work]:
    """What is read at a time. Raises UserError for a file that cannot be opened, or lacks a column."""
    for stream, found in streams.items():
        outcome = schema.source.outcomes.get(stream)
        form = schema.source.format_of(stream if outcome else None)
        wanted = [outcome.key, *outcome.types] if outcome else schema.raw_columns
        names = {file.path: raw_files.check_columns(file, form, wanted) for file in found}
        whole = outcome is None and isinstance(schema.split, RowIndexSplit)
        for unit in raw_files.units(found, form, config.unit_bytes, whole):
            yield {"stream": stream, "unit": asdict(unit), "names": names[unit.file.path]}


def _reference(config: PreprocessConfig, schema: Schema) -> Path | None:
    """The dataset whose encoders are used. Raises UserError where they do not fit."""
    reference = config.encoders.from_
    if reference is None and config.date and config.out.is_dir():
        days = [
            p.parent for p in sorted(config.out.glob("*/manifest.json")) if p.parent.name != config.date.isoformat()
        ]
        reference = days[0] if days else None
    if reference is not None:
        Encoders.load(reference / "encoders", schema)
        Dataset(reference)
    return reference


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone in the end; those of jobs that were killed are removed."""
    out = out.absolute()
    for left in out.parent.glob(f"{glob.escape(out.name)}.staging-*"):
        with suppress(OSError), _locked(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    staging = out.with_name(f"{out.name}.staging-{uuid.uuid4().hex[:8]}")
    try:
        _begin(staging, out)
        with _locked(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _begin(staging: Path, out: Path) -> None:
    """Makes the folder. Raises UserError where that cannot be done."""
    try:
        (staging / "scratch" / "notes").mkdir(parents=True)
        (staging / "scratch" / BALLAST).write_bytes(bytes(1 << 16))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}. Choose another out=.") from None


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder itself, since no file in it is there from beginning to end; whether nobody else had done so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except OSError:  # another job's, or a file system without such locks
            ours = False
        yield ours
    finally:
        os.close(descriptor)


class StepFn(beam.DoFn):
    """(number, work) of a step to its report, which says what failed where that is the user's to mend."""

    def __init__(self, job: Job, step: str) -> None:
        self.job, self.step = job, step

    def setup(self) -> None:
        """Once a worker and step."""
        give_memory_back()
        keep_memory()

    def process(self, element: tuple[int, Work]) -> Iterator[Work]:
        """Yields one report."""
        order, work = element
        try:
            report = STEPS[self.step](self.job, {"number": order, **work})
            (self.job.staging / "scratch" / "notes" / f"{self.step}-{order:06d}").touch()
        except UserError as error:
            report = {"error": str(error)}
        except OSError as error:
            report = {"error": f"{self.job.staging.parent}: {raw_files.one_line(error)}. No dataset was written."}
        yield {"order": order, **report}


def _run(config: PreprocessConfig, job: Job, limits: Limits, units: list[Work]) -> None:
    """All steps in one pipeline. Raises UserError for the first thing that failed."""
    steps, scratch = plan.steps_of(job), job.staging / "scratch"
    total = sum(unit["unit"]["file"]["size"] for unit in units if not unit["unit"]["start"])
    with Progress(scratch / "notes", steps, total), _pipeline(config) as pipeline:
        work = pipeline | beam.Create(list(enumerate(units)))
        for step in steps:
            reports = work | f"spread {step}" >> beam.Reshuffle() | step >> beam.ParDo(StepFn(job, step))
            listed = reports | f"all of {step}" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
            work = listed | f"after {step}" >> beam.FlatMap(plan.after, job, limits, step)
    if (scratch / "error.json").exists():
        raise UserError(json.loads((scratch / "error.json").read_text()))


def _check_runner(name: str) -> None:
    """Raises UserError for a runner that does not exist, or is known to lose rows."""
    if name.lower().startswith("dask"):
        raise UserError(
            "runner=dask: Beam's Dask runner mixes tagged outputs up and loses others without an error. Use direct."
        )
    try:
        create_runner(RUNNERS.get(name, "DirectRunner" if name == "direct" else name))
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"runner={name}: {raw_files.one_line(error)}. Use direct, or {', '.join(RUNNERS)}.") from None


def _pipeline(config: PreprocessConfig) -> beam.Pipeline:
    if config.runner != "direct":
        return beam.Pipeline(RUNNERS.get(config.runner, config.runner), options=PipelineOptions(config.options))
    # By name: the default runner first tries to fetch another one from the network.
    many = [
        "--direct_running_mode=multi_processing", f"--direct_num_workers={config.workers}",
        "--default_sdk_harness_log_level=ERROR",
    ]  # fmt: skip
    return beam.Pipeline(FnApiRunner(), options=PipelineOptions(config.options + (many if config.workers > 1 else [])))


def _commit(job: Job, out: Path) -> Manifest:
    """Puts the parts together and moves the dataset into place."""
    reads = plan.found(job, "read")
    before, parts = plan.lines_before(reads), plan.labelled(job)
    by_file: dict[tuple[str, str], list[tuple[str, int]]] = {}
    reasons: Counter[str] = Counter()
    for unit, report in plan.dead_letters(job):
        by_file.setdefault((reads[unit]["stream"], reads[unit]["file"]), []).append((report["letters"], before[unit]))
        reasons.update(report["reasons"])
    letters: list[Letters] = [
        writer.write_letters(job.staging, f"{stream}-{index:05d}", stream, file, found)
        for index, ((stream, file), found) in enumerate(by_file.items())
    ]
    fates = {name: Counter[str]() for name in job.schema.source.outcomes}
    for report in plan.found(job, "join"):
        for name, found in report["fates"].items():
            fates[name].update(found)
    read: Counter[str] = Counter()
    for report in reads:
        read[report["stream"]] += report["read"]
    left_out: Counter[str] = sum((Counter(part["left_out"]) for part in parts), Counter())
    counts: dict[str, Any] = {
        "read": dict(read), "left_out": dict(left_out), "outcomes": {n: dict(f) for n, f in fates.items()},
        "dead_letters": dict(reasons), "letters": letters,
    }  # fmt: skip
    shards = [Shard(**report["described"]) for report in plan.found(job, "write")]
    return commit(job.staging, out, job.schema, shards, counts)
