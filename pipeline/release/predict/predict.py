"""The job: raw logs through the readers and encoders of training to a dataset in a scratch folder, which the model scores."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from features.errors import UserError
from features.schema.unlabelled import for_scoring
from pipeline import cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.days import chosen_days
from pipeline.dataset.manifest import Manifest
from pipeline.evaluation.weights import ModelWeights, check_encoders
from pipeline.ingest import workers
from pipeline.ingest.job import preprocess
from pipeline.ingest.messages import Failure, Report, from_json, to_json
from pipeline.ingest.progress import Progress, record_total
from pipeline.ingest.staging import staging_of
from pipeline.ingest.state import RESERVE_FILE
from pipeline.release.predict.config import PredictConfig
from pipeline.release.predict.manifest import Model, Predictions, release
from pipeline.release.predict.score import STEP, ScoreReport, Scoring, run_score
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import remove_tree, storage_of, write_json
from pipeline.storage.staging import recover
from pipeline.storage.store_path import place


def predict(config: PredictConfig) -> tuple[Predictions, Manifest]:
    """Encodes and scores a log, and commits the folder of predictions.

    Returns: its manifest, and that of the encoded rows.
    Raises:
        UserError: bad input or settings; nothing half-written is left.
    """
    out = config.out.resolve()
    recover(out)
    if out.exists():
        raise UserError(f"{out} exists. Choose another out=.")
    run = Run(config.run)
    known = _known(run, config)
    step = checkpoint.chosen(run.checkpoints, config.step)
    path = checkpoint.folder(run.checkpoints, step)
    weights = ModelWeights(run, known.only(run.config().get("tasks")), ["test"], config.batch_size)
    weights.check_fits(step)
    schema = for_scoring(known.schema, config.columns, "columns")
    with checkpoint.reading(path) as found, staging_of(out) as staging:
        check_encoders(path, found, weights.dataset)
        model = Model(
            run=str(run.path.absolute()), step=step, checkpoint=found.checksum,
            fingerprint=known.manifest.fingerprint, encoders=known.encoders_id, taskfuse=release(),
        )  # fmt: skip
        scratch = staging / "scratch"
        encoding = config.encoding(scratch / "dataset", known.encoded_by)
        try:
            encoded = preprocess(encoding, schema)
            scoring = Scoring(
                model, encoding.folder, run.config().get("tasks"), scratch, scratch / "progress",
                config.tables, config.batch_size, _threads(config),
            )  # fmt: skip
            run_scoring(config, scoring, encoded)
            return _commit(scoring, encoded, staging, out), encoded
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}. Nothing of it is left.") from None


def _known(run: Run, config: PredictConfig) -> Dataset:
    """The dataset whose encoders are used. Raises UserError where it is not of the run's schema."""
    trained = run.config()
    path = (config.dataset or place(trained["dataset"])).absolute()
    days = None if config.dataset else trained.get("days")
    if days:  # all have the same encoders
        days = chosen_days(path, days, trained.get("missing_days", "refuse"))[0]
    dataset = open_dataset(path, days)
    dataset.check_compatible(run.schema().fingerprint, f"the run {run.path}")
    return dataset


def _threads(config: PredictConfig) -> int:
    if config.threads:
        return config.threads
    # How many workers another runner puts on a machine is not known here.
    return max(1, cores.available() // config.workers) if config.runner == "direct" else 1


def run_scoring(config: PredictConfig, scoring: Scoring, encoded: Manifest) -> None:
    """Scores all shards on the configured runner. Raises UserError for the first failure."""
    do, shards = partial(run_score, scoring), encoded.shards
    record_total(scoring.progress, STEP, len(shards))
    several = config.runner == "direct" and config.workers > 1
    with workers.started(config.workers, do, STEP, shards) if several else nullcontext():
        from pipeline.ingest.runners.pipelines import run_one_step

        with Progress(scoring.progress, [STEP], 0):
            run_one_step(
                config.encoding(scoring.folder, scoring.dataset), do, STEP, shards, partial(collect, scoring.folder)
            )
    check(scoring.folder)


def collect(folder: Path, reports: list[tuple[int, Report | Failure]]) -> Iterator[Any]:
    """Writes the reports of all shards, in their order, or the first failure in their place."""
    done = [report for _, report in sorted(reports, key=lambda numbered: numbered[0])]
    failed = [report.error for report in done if isinstance(report, Failure)]
    (folder / RESERVE_FILE).unlink(missing_ok=True)  # room for it where the disk is full
    if failed:
        write_json(folder / "error.json", failed[0])
    else:
        write_json(folder / "score.json", to_json([report for report in done if isinstance(report, Report)]))
    return iter(())


def check(folder: Path) -> None:
    """Raises UserError where the step has failed."""
    if (folder / "error.json").exists():
        raise UserError(json.loads((folder / "error.json").read_text()))


def _columns(file: Path) -> list[str]:
    with file.open("rb") as opened:
        found: list[str] = pq.read_schema(opened).names
        return found


def _commit(scoring: Scoring, encoded: Manifest, staging: Path, out: Path) -> Predictions:
    """Names the files, writes the manifest last, drops the scratch folder and moves the rest into place in one rename."""
    reports = from_json(ScoreReport, json.loads((scoring.folder / "score.json").read_text()))
    named = []
    for index, report in enumerate(reports):
        name = f"part-{index:05d}-of-{len(reports):05d}.parquet"
        (scoring.folder / report.file.path).rename(staging / name)
        named.append(report.file.model_copy(update={"path": name}))
    if encoded.dead_letter_files:
        (scoring.dataset / "dead_letters").rename(staging / "dead_letters")
    made = Predictions(
        model=scoring.model,
        columns=_columns(staging / named[0].path),
        rows=sum(file.rows for file in named),
        read=encoded.read,
        dead_letters=encoded.dead_letters,
        dead_letter_files=encoded.dead_letter_files,
        dead_letter_examples=encoded.dead_letter_examples,
        files=named,
    )
    write_json(staging / "manifest.json", made.model_dump())
    remove_tree(staging / "scratch")
    storage_of(out).commit(staging, out)
    return made
