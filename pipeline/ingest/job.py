"""The Beam job: fit encoders on the train split, then encode and write every split; a file of the log is a unit of work.

Elements of the collections are files, statistics and reports, never rows: blocks of rows live and die inside one
function, as Arrow columns from the reader to the writer.
"""

import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from pydantic import BaseModel, ConfigDict, Field

from features.encoders import Encoders
from features.errors import UserError
from features.raw import SPLIT, Parsed, parse
from features.schema import SPLITS, Schema
from features.statistics import Statistics
from pipeline.dataset import Manifest, Shard, commit, write_json
from pipeline.ingest import source
from pipeline.ingest.progress import Progress, Share
from pipeline.ingest.writer import LetterWriter, SplitWriters

VALUES = -1  # under which merged statistics hold the values of all files; moments stay under each file's index
ROW_ID_STRIDE = 1 << 40  # row_id = index of the file * stride + row in it, where the schema names no row_id column


class PreprocessConfig(BaseModel):
    """Settings of jobs.preprocess.

    Attributes:
        input: folder below which the schema's files are.
        out: the dataset to write.
        encoders: a dataset whose fitted encoders are used; None fits new ones.
        runner: direct (in this process), or the name of another Beam runner with its flags in `options`.
        workers: processes of the direct runner.
        options: flags for Beam, as its command line takes them.
        rows_per_row_group, rows_per_shard: sizes of what is written.
        max_bad_fraction: the job stops when a larger share of the rows is bad.
        overwrite: replace a dataset that stands at `out`.
    """

    model_config = ConfigDict(extra="forbid")
    input: str
    out: Path
    encoders: Path | None = None
    runner: str = "direct"
    workers: int = Field(1, ge=1)
    options: list[str] = []
    rows_per_row_group: int = Field(8192, ge=1)
    rows_per_shard: int = Field(1 << 20, ge=1)
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    overwrite: bool = False


def preprocess(config: PreprocessConfig, schema: Schema) -> Manifest:
    """Runs both passes and commits the dataset.

    Raises:
        UserError: bad input or settings; nothing half-written is left, and a dataset that stood at `out` still stands.
    """
    if config.out.exists() and not config.overwrite:
        raise UserError(f"{config.out} exists. Choose another out=, or set overwrite=true to replace it.")
    if config.out.exists() and not (config.out / "manifest.json").is_file():
        raise UserError(
            f"{config.out} is no dataset, so overwrite=true leaves it alone. Remove it, or choose another out=."
        )
    files = source.find(config.input, schema.source.files)
    for path in files:
        source.check_columns(path, schema)
    staging = config.out.absolute().with_name(f"{config.out.name}.staging-{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{config.out} cannot be written: {error}. Choose another out=.") from None
    try:
        if config.encoders:
            Encoders.load(config.encoders / "encoders", schema)  # refuses those of other features
            shutil.copytree(config.encoders / "encoders", staging / "encoders")
        scratch = staging / "scratch"
        scratch.mkdir()
        source.save_outcomes(source.load_outcomes(config.input, schema), scratch / "outcomes")
        fitted = _run(config, files, staging, "fit", schema)
        dead_letters = _check(config, schema, fitted)
        reports = _run(config, files, staging, "encode", schema)
        shards = [Shard(**shard) for report in reports for shard in report["shards"]]
        return commit(staging, config.out, schema, shards, dead_letters)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _run(config: PreprocessConfig, files: list[str], staging: Path, name: str, schema: Schema) -> list[dict[str, Any]]:
    """One pass over all files: its reports, in the order of the files. Raises UserError for the first one that failed."""
    (staging / "scratch" / name).mkdir()
    with Progress(name, files, staging / "scratch" / name), _pipeline(config) as pipeline:
        work = pipeline | beam.Create(list(enumerate(files))) | beam.Reshuffle()
        if name == "fit":
            fit = FitFile(schema, staging, fitting=config.encoders is None)
            outputs = work | "fit" >> beam.ParDo(fit).with_outputs("statistics", main="reports")
            fitted = outputs.statistics | "merge" >> beam.CombineGlobally(_merge)
            if config.encoders is None:
                _ = fitted | "save" >> beam.Map(_save_encoders, schema, staging)
            reports = outputs.reports
        else:
            reports = work | "encode" >> beam.ParDo(EncodeFile(schema, staging, config))
        listed = reports | "list" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
        _ = listed | "report" >> beam.Map(_write_reports, staging / "scratch" / f"{name}.json")
    found = sorted(json.loads((staging / "scratch" / f"{name}.json").read_text()), key=lambda report: report["file"])
    if failed := [report["error"] for report in found if "error" in report]:
        raise UserError(failed[0])
    return found


def _pipeline(config: PreprocessConfig) -> beam.Pipeline:
    """A pipeline on the configured runner. Raises UserError for one known to lose rows."""
    if config.runner.lower().startswith("dask"):
        raise UserError(
            "runner=dask: Beam's Dask runner mixes tagged outputs up and loses others without an error. Use direct."
        )
    if config.runner != "direct":
        return beam.Pipeline(config.runner, options=PipelineOptions(config.options))
    # By name: the default runner first tries to fetch another one from the network.
    many = ["--direct_running_mode=multi_processing", f"--direct_num_workers={config.workers}"]
    return beam.Pipeline(FnApiRunner(), options=PipelineOptions(config.options + (many if config.workers > 1 else [])))


def _merge(parts: Iterable[dict[int, Statistics]]) -> dict[int, Statistics]:
    """Adds up counts. Moments wait: the last digit of a sum depends on its order, and workers finish in any."""
    found = [item for part in parts for item in part.items()]
    values = Statistics().merge(*(Statistics(values=s.values, numbers=s.numbers) for _, s in found))
    return {VALUES: values} | {index: Statistics(moments=s.moments) for index, s in found if index != VALUES}


def _save_encoders(parts: dict[int, Statistics], schema: Schema, staging: Path) -> None:
    statistics = Statistics().merge(*(parts[index] for index in sorted(parts)))
    # Nothing was counted where a file failed, or has no rows: the reports say so.
    counted = {name for name, table in schema.all_tables.items() if table.counted}
    binned = {name for name, table in schema.all_tables.items() if table.bins}
    known = statistics.moments.keys(), statistics.values.keys(), statistics.numbers.keys()
    if all(found >= needed for found, needed in zip(known, (schema.dense.keys(), counted, binned), strict=True)):
        aside = staging / "scratch" / uuid.uuid4().hex
        Encoders.fit(schema, statistics).save(aside)
        aside.rename(staging / "encoders")


def _write_reports(reports: list[dict[str, Any]], path: Path) -> None:
    write_json(path, reports)


def _check(config: PreprocessConfig, schema: Schema, reports: list[dict[str, Any]]) -> dict[str, int]:
    """Dead letters by reason. Raises UserError for too many of them, or a split without rows."""
    letters = sum((Counter(report["letters"]) for report in reports), Counter())
    rows = {split: sum(report["rows"][split] for report in reports) for split in SPLITS}
    total = sum(rows.values()) + letters.total()
    if letters.total() > config.max_bad_fraction * total:
        example = next(report["example"] for report in reports if report["example"])
        raise UserError(
            f"{letters.total()} of {total} rows are bad, more than max_bad_fraction={config.max_bad_fraction}; "
            f"the first: {example}. Mend the log or the schema, or raise the limit."
        )
    wanted = schema.used_splits if config.encoders is None else set()
    if empty := [split for split in SPLITS if split in wanted and not rows[split]]:
        raise UserError(f"split {empty[0]} is empty: none of {total} rows falls into it. Change split in the schema.")
    return dict(letters)


class _FileFn(beam.DoFn):
    """What both passes share: a file's blocks, parsed, with its progress noted."""

    def __init__(self, schema: Schema, staging: Path) -> None:
        self.schema, self.staging = schema, staging

    def setup(self) -> None:
        self.outcomes = source.read_outcomes(self.staging / "scratch" / "outcomes")

    def parsed(self, index: int, path: str, malformed: source.Malformed, share: Share) -> Iterator[Parsed]:
        row = 0
        for block in source.blocks(path, self.schema, malformed, share):
            yield parse(self.schema, block, self.outcomes, row, index * ROW_ID_STRIDE + row)
            row += block.height


class FitFile(_FileFn):
    """(index, path) of a file to its statistics, and a report of what is in it."""

    def __init__(self, schema: Schema, staging: Path, fitting: bool) -> None:
        super().__init__(schema, staging)
        self.fitting = fitting

    def process(self, element: tuple[int, str]) -> Iterator[Any]:
        """Yields the file's Statistics under the tag `statistics`, and a report: rows, bad rows, an example."""
        index, path = element
        statistics, malformed = Statistics(), source.Malformed(self.schema.source.header_lines)
        rows, letters, example = Counter[str](), Counter[str](), ""
        try:
            for part in self.parsed(index, path, malformed, Share(self.staging / "scratch" / "fit", index)):
                rows.update({SPLITS[s]: n for s, n in part.rows[SPLIT].value_counts().iter_rows()})
                letters.update(_kind(reason) for reason in part.letters["reason"])
                if not example and part.letters.height:
                    line, reason = part.letters.row(0)[:2]
                    example = f"{path}, line {malformed.line(line)}: {reason}"
                if self.fitting:
                    statistics = statistics.merge(Statistics.of(self.schema, part.rows))
        except UserError as error:
            yield {"file": index, "error": str(error)}
            return
        letters.update(malformed.reasons)
        if malformed.numbers and not example:
            example = f"{path}, line {malformed.numbers[0]}: {malformed.reasons[0]}"
        yield beam.pvalue.TaggedOutput("statistics", {index: statistics})
        yield {"file": index, "rows": {s: rows[s] for s in SPLITS}, "letters": dict(letters), "example": example}


class EncodeFile(_FileFn):
    """(index, path) of a file to shards and dead letters on disk, and a report that names them."""

    def __init__(self, schema: Schema, staging: Path, config: PreprocessConfig) -> None:
        super().__init__(schema, staging)
        self.config = config

    def setup(self) -> None:
        """Loads the encoders once a worker: as a side input they would be copied with every bundle."""
        super().setup()
        self.encoders = Encoders.load(self.staging / "encoders", self.schema)

    def process(self, element: tuple[int, str]) -> Iterator[dict[str, Any]]:
        """Yields one report with the shards written; files of an attempt that failed are named in none."""
        index, path = element
        malformed = source.Malformed(self.schema.source.header_lines)
        attempt = f"{index:05d}-{uuid.uuid4().hex[:8]}"
        try:
            share = Share(self.staging / "scratch" / "encode", index)
            with (
                LetterWriter(self.staging, f"dead_letters/{attempt}.parquet", path) as letters,
                SplitWriters(
                    self.staging, attempt, self.schema, self.config.rows_per_row_group, self.config.rows_per_shard
                ) as out,
            ):
                for part in self.parsed(index, path, malformed, share):
                    letters.write(part.letters, malformed)
                    for code, split in enumerate(SPLITS):
                        rows = part.rows.filter(part.rows[SPLIT] == code)
                        if rows.height:
                            out.write(split, self.encoders.encode(rows))
                letters.write_malformed(malformed)
        except UserError as error:
            yield {"file": index, "error": str(error)}
            return
        yield {"file": index, "shards": [shard.model_dump() for shard in out.shards]}


def _kind(reason: str) -> str:
    """A reason without the value that caused it, so that equal causes are counted together."""
    return reason.split(":")[0] + (": missing" if "missing" in reason else ": wrong value")
