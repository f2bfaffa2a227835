"""Preprocessing as a transform in a Beam pipeline of a team's own: Arrow batches in, Arrow batches of each split out."""

import hashlib
import json
import pickle
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from features.errors import UserError, fault_text, join_faults
from features.schema.schema import SPLITS, RowIndexSplit, Schema
from features.schema.unlabelled import without_labels
from pipeline.dataset.manifest import Manifest
from pipeline.ingest import files as raw_files
from pipeline.ingest import schedule
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import check_settings, commit_job, copy_past, job_of, limits_of, plan_of
from pipeline.ingest.messages import Failure, Report, Work
from pipeline.ingest.runners.beam_compat import GlobalWindows, beam
from pipeline.ingest.runners.pipelines import Steps
from pipeline.ingest.schedule import Limits
from pipeline.ingest.staging import make_folders
from pipeline.ingest.state import IMPRESSIONS, Job
from pipeline.ingest.steps import run_step
from pipeline.storage.files import make_folder, remove_tree, storage_of
from pipeline.storage.ranges import RangedFile
from pipeline.storage.store_path import on_store, place

GROUP_ROWS = 1 << 17  # of the row groups of a spilled batch, by which it can be cut into units
# What the pipeline around the transform decides, or has no meaning for batches.
OTHERS = {"input", "out", "date", "runner", "workers", "options", "master", "hosts", "scratch", "overwrite"}


class Preprocessed(NamedTuple):
    """What Preprocess gives: PCollections.

    Attributes:
        train, valid, test: encoded rows of the split, a RecordBatch a row group of the dataset.
        dead_letters: bad rows with their reasons, as RecordBatches.
        manifest: one dict, the dataset's manifest.json: rows by split, where the others went, how outcomes joined.
    """

    train: Any
    valid: Any
    test: Any
    dead_letters: Any
    manifest: Any


class Preprocess(beam.PTransform):
    """Raw Arrow batches to encoded ones, by the same steps and with the same result as jobs.preprocess on files of the rows.

    It takes a PCollection of pyarrow Tables or RecordBatches of impressions, or a dict of such by stream where the schema has
    outcomes or side tables, and gives a Preprocessed. Columns may be typed or text; those that the schema does not read
    are ignored. Files, formats and columns without names in the schema's `source` mean nothing here.

        schema = Schema.load(Path("ads.yaml"))  # source.key: id, source.outcomes.click: {key: id}
        with beam.Pipeline(options=options) as pipeline:
            rows = pipeline | ReadFromParquetBatched("gs://logs/2026-11-21/impressions-*")
            clicks = pipeline | "clicks" >> ReadFromParquetBatched("gs://logs/2026-11-21/clicks-*")
            done = {"impressions": rows, "click": clicks} | Preprocess(schema, "gs://scratch/ads/2026-11-21")
            done.train | beam.Map(lambda batch: publish(batch))  # a pyarrow.RecordBatch
            done.manifest | beam.Map(lambda counts: print(counts["rows"], counts["dead_letters"]))

    Encoders, statistics and the rows are the dataset SCRATCH/dataset as well, which jobs.train takes and
    `encoders=SCRATCH/dataset` of a later pipeline.

    Args:
        scratch: folder or URL that all workers see, for this run alone; it is the caller's to delete.
        encoders: a dataset whose encoders are used; None: they are fitted on the train rows.
        order: of rows: shuffled, or by time.
        settings: others of PreprocessConfig, such as seed, rows_per_shard, max_bad_fraction or labels.

    Batches are best of 100,000 rows or more: each is a file and a unit of work. Row ids depend on how rows are cut into
    batches, unless the schema names row_id. PCollections must be bounded; windows are not kept. Of several
    outcomes of an impression without a time, which one comes first is no order of time, but always the same.

    Raises:
        UserError: the schema or a setting does not fit, or SCRATCH/dataset exists. What is wrong with rows stops the
            pipeline, with the message of jobs.preprocess.
    """

    def __init__(
        self,
        schema: Schema,
        scratch: str | Path,
        encoders: str | Path | None = None,
        order: str = "shuffled",
        **settings: Any,
    ) -> None:
        super().__init__()
        if unknown := settings.keys() & OTHERS | settings.keys() - PreprocessConfig.model_fields.keys():
            raise UserError(f"Preprocess: {join_faults(sorted(unknown))}: no setting of the transform")
        folder = _folder(scratch)
        config = _config(folder, settings | {"order": order, "encoders": {"from": encoders}})
        self.run = Run(config, schema, folder, uuid.uuid4().hex)
        _check(self.run)

    def expand(self, inputs: Any) -> Any:
        """See Preprocess."""
        given = inputs if isinstance(inputs, dict) else {IMPRESSIONS: inputs}
        _check_streams(self.run.streams, given)
        spilled = [
            batches | f"{stream}: any window" >> beam.WindowInto(GlobalWindows())
            | f"spill {stream}" >> beam.Map(partial(spill, self.run.folder, stream))
            for stream, batches in given.items()
        ]  # fmt: skip
        listed = spilled | beam.Flatten() | "list" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
        steps = self.run.steps
        manifest = (
            listed
            | "plan" >> beam.FlatMap(partial(begin, self.run))
            | "steps" >> Steps(steps, partial(do, self.run), partial(after, self.run))
        )
        train, valid, test = (
            manifest | split >> _Read(partial(row_groups, self.run.config.out, split)) for split in SPLITS
        )
        bad = manifest | "dead letters" >> _Read(partial(dead_letters, self.run.config.out))
        return Preprocessed(train, valid, test, bad, manifest)


class _Read(beam.PTransform):
    """The parts of files that `find` names."""

    def __init__(self, find: Any) -> None:
        super().__init__()
        self.find = find

    def expand(self, manifest: beam.PCollection) -> beam.PCollection:
        return manifest | "find" >> beam.FlatMap(self.find) | beam.Reshuffle() | "read" >> beam.FlatMap(read_rows)


@dataclass(frozen=True)
class Run:
    """One use of the transform, as all workers know it before any row is read.

    Attributes:
        folder: the caller's scratch folder.
        name: of the run, so that an earlier one that failed in the same folder is in nobody's way.
    """

    config: PreprocessConfig
    schema: Schema
    folder: Path
    name: str

    @property
    def staging(self) -> Path:
        """The folder that becomes the dataset."""
        return self.folder / f"run-{self.name}"

    @property
    def read(self) -> Schema:
        """The schema by which spilled batches are read."""
        return of_batches(without_labels(self.schema) if self.config.labels == "none" else self.schema)

    @property
    def streams(self) -> list[str]:
        """Of the schema."""
        source = self.read.source
        return [IMPRESSIONS, *source.outcomes, *source.tables]

    @property
    def steps(self) -> list[str]:
        """Of the job; they depend on the schema and the settings alone."""
        config = self.config
        job = Job(
            self.read, self.staging, 1, config.order, config.seed, config.rows_per_row_group, counts_all=True,
            reads_labels=config.labels != "none",
        )  # fmt: skip
        return schedule.steps_of(job)


def of_batches(schema: Schema) -> Schema:
    """The same schema for files of spilled batches; it keeps its fingerprints."""
    source = schema.source

    def stream(name: str | None) -> dict[str, Any]:
        return {"files": f"{name or IMPRESSIONS}/*.parquet"}

    def others(streams: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: each.model_copy(
                update=stream(name) | {"read": source.format_of(name).model_copy(update={"format": "parquet"})}
            )
            for name, each in streams.items()
        }

    changes = {"format": "parquet", "outcomes": others(source.outcomes), "tables": others(source.tables)}
    fields = {name: getattr(schema, name) for name in type(schema).model_fields}
    fields["source"] = source.model_copy(update=stream(None) | changes)
    part = type(schema).model_construct(**fields)
    part.__dict__ |= {key: getattr(schema, key) for key in ("fingerprint", "inputs_fingerprint", "kept")}
    return part


def spill(folder: Path, stream: str, batch: pa.Table | pa.RecordBatch) -> tuple[str, str]:
    """Writes a batch to a file named by its content, so that a second attempt writes the same; returns stream and name."""
    if not isinstance(batch, pa.Table | pa.RecordBatch):
        raise UserError(f"Preprocess: {stream} has a {type(batch).__name__}: give pyarrow Tables or RecordBatches")
    table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch.combine_chunks()
    content = BytesIO()
    pq.write_table(table, content, row_group_size=GROUP_ROWS, compression="lz4")
    name = f"{hashlib.sha256(content.getbuffer()).hexdigest()}.parquet"
    path = folder / "batches" / stream / name
    make_folder(path.parent)
    storage_of(path).write(path, content.getvalue())
    return stream, name


def begin(run: Run, spilled: list[tuple[str, str]]) -> Iterator[tuple[int, Work]]:
    """Plans the job on the spilled batches, which are in the order of their names on any runner; yields its units."""
    streams = {}
    for stream in run.streams:
        found = {Path(f.path).name: f for f in raw_files.matching(run.config.input, f"{stream}/*.parquet")}
        streams[stream] = [found[name] for each, name in sorted(spilled) if each == stream]
        if not streams[stream]:
            raise UserError(f"Preprocess: no batches of {stream}. Give at least one, which may be without rows.")
    plan = plan_of(run.config, run.schema, run.read, streams)
    job, limits = job_of(run.config, plan, run.staging), limits_of(run.config, plan)
    make_folders(run.staging)
    copy_past(plan, job, run.schema)  # again where the engine had another attempt at this
    storage_of(run.staging).write(_plan_file(run), pickle.dumps((job, limits)))
    yield from enumerate(plan.work)


def _plan_file(run: Run) -> Path:
    return run.staging / "scratch" / "plan"


@lru_cache(maxsize=8)
def _planned(path: Path) -> tuple[Job, Limits]:
    """What `begin` has planned, read once a worker."""
    return pickle.loads(path.read_bytes())


def do(run: Run, step: str, number: int, work: Any) -> Report | Failure:
    """A piece of a step's work."""
    return run_step(_planned(_plan_file(run))[0], step, number, work)


def after(run: Run, reports: list[tuple[int, Report | Failure]], step: str) -> Iterator[Any]:
    """The work of the next step, or after the last the manifest of the dataset, which is committed.

    Raises:
        UserError: what is wrong, as jobs.preprocess says it.
    """
    last = step == run.steps[-1]
    if last and _is_committed(run):
        yield _manifest(run.config.out)
        return
    job, limits = _planned(_plan_file(run))
    yield from schedule.after(reports, job, limits, step)
    error = job.scratch / "error.json"
    if error.exists():
        message = json.loads(error.read_text())
        error.unlink(missing_ok=True)
        raise UserError(message)
    if not (job.scratch / f"{step}.json").exists():
        raise UserError(f"{job.scratch}: the reports of step {step} could not be written. Run again once they can.")
    if last:
        commit_job(run.config, job, limits, run.schema, run.config.out)
        yield _manifest(run.config.out)


def _is_committed(run: Run) -> bool:
    """Whether an attempt that the engine lost has committed the dataset; what one has begun of that is ended first."""
    staging, out = run.staging, run.config.out
    whole = staging / "manifest.json"  # it is written last
    if not (out / "manifest.json").is_file() and whole.is_file():
        remove_tree(staging / "scratch")
        storage_of(out).commit(staging, out)
    return (out / "manifest.json").is_file()


def _manifest(dataset: Path) -> dict[str, Any]:
    return json.loads((dataset / "manifest.json").read_text())


def row_groups(dataset: Path, split: str, manifest: dict[str, Any]) -> Iterator[tuple[Path, int]]:
    """The row groups of a split."""
    for shard in Manifest.model_validate(manifest).shards:
        if shard.split == split:
            yield from ((dataset / shard.path, index) for index in range(len(shard.row_groups)))


def dead_letters(dataset: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, None]]:
    """The files of dead letters, each to be read whole."""
    for file in Manifest.model_validate(manifest).dead_letter_files:
        yield dataset / file.path, None


def read_rows(part: tuple[Path, int | None]) -> list[pa.RecordBatch]:
    """A row group of a file, or all of it: one batch, or several where a column has more than a batch takes, 2 GiB of text."""
    path, index = part
    with RangedFile(path) if on_store(path) else path.open("rb") as file:
        parquet = pq.ParquetFile(file)
        groups = range(parquet.num_row_groups) if index is None else [index]
        table = parquet.read_row_groups(groups, use_threads=False)
    return table.combine_chunks().to_batches()


def _check(run: Run) -> None:
    """Raises UserError for a schema, settings or a folder that the transform cannot do with."""
    read, out = run.read, run.config.out
    check_settings(run.config, read)
    if run.config.order == "input":
        raise UserError("Preprocess: batches come in no order. Set order to shuffled or time.")
    if isinstance(read.split, RowIndexSplit) and read.split.modulo > 1:
        raise UserError("Preprocess: split by row_index: rows of batches have no index. Split by hash or time.")
    if out.exists():
        raise UserError(f"{out} exists. Remove it, or give Preprocess another scratch folder.")


def _folder(scratch: str | Path) -> Path:
    """Raises UserError for a URL of no storage, or with a password in it."""
    try:
        return place(scratch).resolve()
    except ValueError as error:
        raise UserError(f"Preprocess: scratch: {error}") from None


def _config(folder: Path, settings: dict[str, Any]) -> PreprocessConfig:
    """Raises UserError for values that a setting cannot have, which are not shown: a URL may have a password in it."""
    try:
        return PreprocessConfig.model_validate({"input": str(folder / "batches"), "out": folder / "dataset"} | settings)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}: {fault_text(each)}" for each in error.errors()]
        raise UserError(f"Preprocess: {join_faults(faults)}") from None


def _check_streams(wanted: list[str], given: dict[str, Any]) -> None:
    """Raises UserError for streams that are missing, unknown or unbounded."""
    if set(wanted) != given.keys():
        raise UserError(
            f"Preprocess: got batches of {', '.join(given)}; the schema's streams are {', '.join(wanted)}. Give those."
        )
    for stream, batches in given.items():
        if not getattr(batches, "is_bounded", True):
            raise UserError(f"Preprocess: {stream} is unbounded. Give a bounded PCollection, such as that of a day.")
