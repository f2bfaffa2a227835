"""What a job goes on from: the state of the day before or another dataset for histories and counters, and its encoders."""

import datetime
import hashlib
from dataclasses import dataclass
from pathlib import Path

from features.errors import UserError
from features.fit.fitted_files import encoder_files
from features.printable import printable
from features.regular_files import open_regular
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset, require_file
from pipeline.dataset.days import MissingDays, day_of, days_in, folder_of_day, ranges_of
from pipeline.dataset.entries import State, StateFile, StateOrigin
from pipeline.dataset.past_state import meaning, state_id
from pipeline.storage.files import copy_file
from pipeline.storage.store_path import place
from pipeline.storage.uploading import uploading

EMPTY = "empty"  # state.from=empty: histories and counters begin without any rows


@dataclass(frozen=True)
class Start:
    """A state that a job begins from.

    Attributes:
        folder: its dataset.
        dataset: its name in the manifest: a day's where it lies beside the job's own, else its path.
    """

    folder: Path
    dataset: str
    state: State

    @property
    def origin(self) -> StateOrigin:
        """For the manifest."""
        return StateOrigin(dataset=self.dataset, state=state_id(self.state))

    @property
    def is_day_before(self) -> bool:
        """Whether it is an earlier day of the same folder: then rows before its horizon are late ones, not the same ones."""
        return day_of(self.dataset) is not None

    def file(self, name: str) -> StateFile:
        """The events of a history or counter, which it has."""
        return next(file for file in self.state.files if file.name == name)


def start_of(
    schema: Schema,
    out: Path,
    date: datetime.date | None,
    missing_days: MissingDays,
    named: str | None,
    encoders: Path | None,
) -> Start | None:
    """Where the past of a job begins; None: empty, as for a log that is read whole, or the first day in `out`.

    Args:
        out, date, missing_days: see PreprocessConfig.
        named: state.from.
        encoders: encoders.from, the dataset whose encoders are used.
    Raises:
        UserError: the state of a dataset or day is needed and missing, or is one of another definition.
    """
    if not schema.past:
        if named is not None:
            raise UserError("state.from: the schema has no history and no counter to begin from a state. Remove it.")
        return None
    if named == EMPTY:
        return None
    if named is not None:
        folder = _place(named).resolve()
        if not folder.is_dir():
            raise UserError(
                f"state.from={printable(named)}: no such folder. Name a dataset, a folder of days, or empty."
            )
        if not (folder / "manifest.json").exists():  # a folder of days
            folder = newest_dataset(folder, date, missing_days)
        return _start(folder, str(folder), schema)
    if date and (before := day_before(out, date, missing_days)):
        return _start(folder_of_day(out, before), before, schema)
    if encoders is None:
        return None
    folder = newest_dataset(encoders.resolve(), date, missing_days)
    return _start(folder, str(folder), schema)


def newest_dataset(folder: Path, date: datetime.date | None, missing_days: MissingDays) -> Path:
    """The dataset whose state a log goes on from that is read with the encoders of `folder`.

    Args:
        folder: a dataset, which it is then, or one of several days or a folder of these: then the day before `date`.
        date: of the log; None: it is later than all days.
        missing_days: see `day_before`.
    Raises:
        UserError: no dataset, or no earlier day.
    """
    days = folder if not (folder / "manifest.json").exists() else folder.parent
    if days != folder and not day_of(folder.name):
        return folder
    found = days_in(days)
    newest = day_before(days, date, missing_days) if date else found[-1].isoformat() if found else None
    if not found:
        raise UserError(
            f"{days}: no dataset and no days in it. Set state.from to the dataset of earlier rows, or to empty."
        )
    if newest is None:
        raise UserError(
            f"{days}: no day before {date} to go on from, there are {', '.join(ranges_of(found))}. "
            "Set state.from to the dataset of earlier rows, or to empty."
        )
    return folder_of_day(days, newest)


def day_before(folder: Path, date: datetime.date, missing_days: MissingDays) -> str | None:
    """The day among those in a folder with whose state `date` begins: the one before it; None where there is no earlier one.

    Args:
        missing_days: skip takes the newest earlier day where the one before is missing.
    Raises:
        UserError: it is missing, and earlier ones are not.
    """
    earlier = [day for day in days_in(folder) if day < date]
    if not earlier:
        return None
    newest, following = earlier[-1], earlier[-1] + datetime.timedelta(days=1)
    if following != date and missing_days == "refuse":
        raise UserError(
            f"date={date}: {folder} has no {date - datetime.timedelta(days=1)}, with whose histories and counters this day "
            f"begins; the newest before is {newest}. Run jobs.preprocess with date={following} first, or set "
            f"missing_days=skip to begin with those of {newest}."
        )
    return newest.isoformat()


def _start(folder: Path, name: str, schema: Schema) -> Start:
    """The state of a dataset. Raises UserError where it has none, or one of other histories or counters."""
    dataset = Dataset(folder)
    state = dataset.manifest.state
    if state is None:
        raise UserError(
            f"{folder} has no state: {', '.join(map(printable, schema.past))} would begin empty, and be too short for a log "
            "that others came before. Run jobs.preprocess for it again; where no rows came before, jobs.preprocess takes "
            "state.from=empty."
        )
    known = dataset.schema
    for past in schema.past:
        if past not in known.past or meaning(known, past) != meaning(schema, past):
            what = "has another definition" if past in known.past else "is missing"
            raise UserError(
                f"{folder}: {printable(past)} {what} in its state. Make the datasets of earlier rows again with this schema, "
                "in another out= and from the first one on, which takes state.from=empty; or begin without them, with the same."
            )
    return Start(folder, name, state)


def _place(named: str) -> Path:
    try:
        return place(named)
    except ValueError as error:
        raise UserError(f"state.from: {error}") from None


def copy_encoders(reference: Path, staging: Path, schema: Schema) -> None:
    """Copies the files of the encoders, and nothing that only looks like one. Can be repeated. Raises UserError, OSError."""
    for name in encoder_files(schema):
        copied = staging / "encoders" / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        copy_file(require_file(reference, f"encoders/{name}"), copied)


def copy_state(start: Start, schema: Schema, target: Path) -> None:
    """Copies the files of a state into a folder of the job: the dataset may be replaced while the job runs. Can be repeated.

    Raises:
        UserError: a file is missing, or was changed after it was written.
    """
    for past in schema.past:
        file = start.file(past)
        copied = target / file.path
        copied.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with (
            open_regular(require_file(start.folder, file.path)) as source,
            uploading(copied) as copy,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                copy.write(block)
        if digest.hexdigest() != file.sha256:
            raise UserError(
                f"{start.folder / file.path}: its checksum is not the manifest's: the file changed after it was written. "
                "Run jobs.preprocess for its dataset again."
            )
