"""The job: raw logs through the readers and encoders of training to a dataset in a scratch folder, which the model scores."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from features.errors import UserError
from features.schema.unlabelled import for_scoring
from pipeline import cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.days import chosen_days
from pipeline.dataset.listing import each_of
from pipeline.dataset.manifest import Manifest
from pipeline.evaluation.weights import ModelWeights, check_encoders
from pipeline.ingest.job import preprocess
from pipeline.ingest.messages import Failure, Report, from_json, to_json
from pipeline.ingest.progress import Progress, record_total
from pipeline.ingest.runners.hosts import workers_of
from pipeline.ingest.staging import folders_of
from pipeline.ingest.state import RESERVE_FILE
from pipeline.release.predict.config import PredictConfig
from pipeline.release.predict.manifest import Model, Predictions, release
from pipeline.release.predict.score import STEP, ScoreReport, Scoring, run_score
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import copy_file, remove_tree, storage_of, write_json
from pipeline.storage.staging import recover
from pipeline.storage.store_path import on_store, place


def predict(config: PredictConfig) -> tuple[Predictions, Manifest]:
    """Encodes and scores a log, and commits the folder of predictions.

    Returns: its manifest, and that of the encoded rows.
    Raises:
        UserError: bad input or settings; nothing half-written is left.
    """
    out = config.out.resolve()
    recover(out)
    _check_new(out)
    run = Run(config.run)
    known = _known(run, config)
    step = checkpoint.chosen(run.checkpoints, config.step)
    path = checkpoint.folder(run.checkpoints, step)
    weights = ModelWeights(run, known.only(run.config().get("tasks")), ["test"], config.batch_size)
    weights.check_fits(step)
    schema = for_scoring(known.schema, config.columns, "columns")
    with checkpoint.reading(path) as found, folders_of(out, config.scratch) as (staging, scratch):
        check_encoders(path, found, weights.dataset)
        model = Model(
            run=str(run.path.absolute()), step=step, checkpoint=found.checksum,
            fingerprint=known.manifest.fingerprint, encoders=known.encoders_id, taskfuse=release(),
        )  # fmt: skip
        encoding = config.encoding(scratch / "dataset", known.encoded_by)
        # As preprocess: workers of other machines may see the files between steps, but not the folder beside `out`.
        made = scratch / "made" if on_store(scratch) and not on_store(staging) else staging
        try:
            encoded = preprocess(encoding, schema)
            scoring = Scoring(
                model, encoding.folder, run.config().get("tasks"), made, len(encoded.shards), scratch,
                config.tables, config.batch_size, _threads(config),
            )  # fmt: skip
            run_scoring(config, scoring, encoded)
            return _commit(scoring, encoded, staging, out), encoded
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}. Nothing of it is left.") from None


def _check_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists. Choose another out=.")


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
    places = [scoring.folder, scoring.made, scoring.dataset, place(scoring.model.run)]
    seen = [(str(path), None) for path in places if not on_store(path)]
    with workers_of(config, do, STEP, shards, seen):
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
    """Brings the files together in `staging`, the manifest last, and commits it. Raises UserError where `out` exists by now."""
    reports = from_json(ScoreReport, json.loads((scoring.folder / "score.json").read_text()))
    named = [report.file.model_copy(update={"path": scoring.name(n)}) for n, report in enumerate(reports)]
    made = [(scoring.made / report.file.path, staging / file.path) for report, file in zip(reports, named, strict=True)]
    if not on_store(scoring.made):
        for source, target in made:
            source.rename(target)
    elif scoring.made != staging:
        each_of(scoring.made, lambda pair: copy_file(*pair), made)
    if encoded.dead_letter_files:
        (staging / "dead_letters").mkdir()
    bad = [(scoring.dataset / file.path, staging / file.path) for file in encoded.dead_letter_files]
    each_of(staging, lambda pair: copy_file(*pair), bad)
    predictions = Predictions(
        model=scoring.model,
        columns=_columns(staging / named[0].path),
        rows=sum(file.rows for file in named),
        read=encoded.read,
        dead_letters=encoded.dead_letters,
        dead_letter_files=encoded.dead_letter_files,
        dead_letter_examples=encoded.dead_letter_examples,
        files=named,
    )
    write_json(staging / "manifest.json", predictions.model_dump())
    remove_tree(staging / "scratch")
    _check_new(out)
    storage_of(out).commit(staging, out)
    return predictions
