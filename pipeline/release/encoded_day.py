"""The judged day as a dataset, with the encoders of a model and the histories and counters of the newest day before it."""

# Shapes: N rows.

import logging
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from features.errors import UserError
from features.hashing import hash_integers
from features.regular_files import refuse_link
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.days import chosen_days, day_of, days_in, folder_of_day
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.past_state import state_id, state_lines
from pipeline.evaluation.predictions import shard_columns
from pipeline.ingest.config import EncodersFrom, PreprocessConfig, StateFrom
from pipeline.ingest.job import preprocess
from pipeline.ingest.past_start import newest_dataset
from pipeline.release.config import NightlyConfig
from pipeline.run.run import Run
from pipeline.storage.files import sha256
from pipeline.storage.store_path import place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a day is encoded with.

    Attributes:
        dataset: whose encoders. state: the dataset whose histories and counters the day goes on from; None: it has none.
        ids: identifies both: ids mean the same in days where it is the same.
    """

    dataset: Dataset
    state: Path | None
    ids: str

    @property
    def key(self) -> str:
        """Identifies the encoded day: models of the same encoders, state and schema share it."""
        return f"{self.ids}-{self.dataset.manifest.fingerprint}"


def origin_of(config: NightlyConfig, run: Run) -> Origin:
    """What the day is encoded with for a run: the encoders that it was trained with. Raises UserError."""
    content = run.config()
    path, days = place(content["dataset"]), content.get("days")
    if days:  # all have the same encoders
        days = chosen_days(path, days, content.get("missing_days", "refuse"))[0]
    return _origin(config, path, open_dataset(path, days))


def origin_of_days(config: NightlyConfig) -> Origin:
    """What the day is encoded with for a model that is trained on the folder `days`. Raises UserError."""
    assert config.days is not None
    return _origin(config, config.days, Dataset(folder_of_day(config.days, earlier_days(config)[0].isoformat())))


def _origin(config: NightlyConfig, path: Path, dataset: Dataset) -> Origin:
    state, ids = None, dataset.encoders_id
    if dataset.schema.past:
        state = newest_dataset(path, day_of(config.date), config.missing_days)
        known = read_manifest(state).state
        ids += f"-{state_id(known)}" if known else ""
    return Origin(dataset, state, ids)


def earlier_days(config: NightlyConfig) -> list[date]:
    """The days before the judged one in the folder `days`, in order. Raises UserError where there is none."""
    assert config.days is not None
    judged = day_of(config.date)
    found = [day for day in days_in(config.days) if judged and day < judged]
    if not found:
        raise UserError(
            f"days={config.days}: no day before {config.date}, whose encoders the day would have. Run jobs.preprocess with "
            "date= of an earlier day first."
        )
    return found


def encode(config: NightlyConfig, origin: Origin) -> Path:
    """The folder of the encoded day: in `days` where that has its encoders, else in the night's own.

    Raises:
        UserError: bad input.
    """
    if config.days and (shared := _in_days(config, config.days, origin)):
        return shared
    settings = PreprocessConfig(
        input=str(config.input),
        out=refuse_link(config.folder / f"day-{origin.key}"),
        date=day_of(config.date) if config.days else None,  # input then has the files of other days, too
        encoders=EncodersFrom.model_validate({"from": origin.dataset.encoded_by}),
        state=StateFrom.model_validate({"from": origin.state and str(origin.state)}),
        max_bad_fraction=config.max_bad_fraction,
        overwrite=True,
    )
    _preprocess(settings, origin)
    return settings.folder


def _in_days(config: NightlyConfig, days: Path, origin: Origin) -> Path | None:
    """The day's dataset in `days`, made where it is missing; None where that folder has other encoders."""
    first = Dataset(folder_of_day(days, earlier_days(config)[0].isoformat()))
    if (first.encoders_id, first.manifest.fingerprint) != (
        origin.dataset.encoders_id,
        origin.dataset.manifest.fingerprint,
    ):
        return None
    day = folder_of_day(days, config.date)
    if not (day / "manifest.json").exists():
        settings = PreprocessConfig(
            input=str(config.input), out=days, date=day_of(config.date), missing_days=config.missing_days,
            max_bad_fraction=config.max_bad_fraction,
        )  # fmt: skip
        _preprocess(settings, origin)
    if (found := Dataset(day)).encoders_id != first.encoders_id:
        raise UserError(
            f"{day} was encoded with {found.encoders_id}, {first.path} with {first.encoders_id}. Run jobs.preprocess again "
            f"with date={config.date} overwrite=true."
        )
    return day


def _preprocess(settings: PreprocessConfig, origin: Origin) -> None:
    manifest = preprocess(settings, origin.dataset.schema)
    for line in state_lines(manifest.state) if manifest.state else ():
        logger.info(line)
    if not sum(manifest.rows.values()):
        raise UserError(f"{settings.input}: no rows. Check input= and the day's logs.")


def identity(dataset: Path) -> str:
    """Checksum of a dataset's manifest, which has those of its shards; empty where there is none."""
    try:
        return sha256(dataset / "manifest.json")
    except (OSError, UserError):
        return ""


def rows_id(day: Dataset) -> str:
    """Identifies the rows of a day by their ids, whatever their order and encoders: models on the same ones are paired."""
    count, total = 0, 0
    for shard in day.manifest.shards:
        id_N = shard_columns(day, shard, ["row_id"])["row_id"].to_numpy()
        count += len(id_N)
        total += int(hash_integers(id_N).sum(dtype=np.uint64))
    return f"{count:,} rows {total % (1 << 64):016x}"
