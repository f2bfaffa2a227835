"""The record of a night, OUT/DATE/night.json: its steps, each done once, and its outcome.

The file is written before and after each step. A night that was killed is taken up at the first step that is not done; one
whose inputs are others by now (settings, or results of the steps before it) is done again.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

from features.errors import UserError, one_line
from features.plain_json import Count, read_json, validated
from pipeline.release.verdict import EXIT_CODES, Outcome
from pipeline.run.run import config_hash
from pipeline.storage.files import make_folder, write_json
from pipeline.storage.store_path import checked_place, on_store

FILE = "night.json"
VERSION = 1
MAX_BYTES = 16 << 20
LONGEST = 2000  # characters of a text that a night is recorded with

logger = logging.getLogger(__name__)

Text = Annotated[str, Field(max_length=10 * LONGEST)]
PlaceName = Annotated[str, Field(max_length=10 * LONGEST), AfterValidator(checked_place)]


class Strict(BaseModel):
    """What is read of a file, of exact types and no other keys."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ModelReference(Strict):
    """A checkpoint: its run, its step and its manifest's checksum."""

    run: PlaceName
    step: Count
    checkpoint: Text

    def __str__(self) -> str:
        return f"{self.run} step {self.step}"


class Figure(Strict):
    """A task's headline metric over all rows of the day, and its 95% interval; None: undefined, or without an interval."""

    metric: Text
    value: FiniteFloat | None
    se: FiniteFloat | None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    rows: Count


class Scored(Strict):
    """The summary of a step that scores a checkpoint.

    Attributes:
        day: folder of the encoded day. file: its Evaluated, relative to the night's folder. figures: by task.
        record: as for eval.jsonl (see pipeline.run.records).
    """

    model: ModelReference
    day: Text
    file: Text
    figures: dict[Text, Figure]
    record: dict[str, Any] = {}


class Step(Strict):
    """A step of a night.

    Attributes:
        started: seconds since 1970. seconds: that it took. inputs: identifies what it was done with.
        summary: its result. error: why it failed.
    """

    name: Text
    state: Literal["running", "done", "failed"]
    started: FiniteFloat
    seconds: FiniteFloat | None = None
    inputs: Text
    summary: dict[str, Any] = {}
    error: Text = ""


class Night(Strict):
    """The content of night.json.

    Attributes:
        settings: that the verdict depends on. outcome: None until the night is judged. why: it, in a line.
        judged: when, seconds since 1970.
    """

    version: Literal[1] = 1
    date: Text
    settings: dict[str, Any]
    steps: Annotated[list[Step], Field(max_length=100)] = []
    outcome: Outcome | None = None
    why: Text = ""
    judged: FiniteFloat | None = None

    def find(self, name: str) -> Step | None:
        """The step of a name, done or not."""
        return next((step for step in self.steps if step.name == name), None)

    def summary(self, name: str) -> dict[str, Any] | None:
        """The result of a step that is done."""
        step = self.find(name)
        return step.summary if step and step.state == "done" else None

    def scored(self, role: str) -> Scored | None:
        """What a role's checkpoint (candidate, serving, best) scored; None where it was not."""
        found = self.summary(f"evaluate {role}")
        return validated(Scored, found, f"{self.date}/{FILE}: evaluate {role}") if found else None

    @property
    def exit_code(self) -> int:
        """0 pass, 2 fail, 3 undecided; 1 where it is not judged."""
        return 1 if self.outcome is None else EXIT_CODES[self.outcome]


class Recorder:
    """A night that is worked on, and its file.

    Args:
        folder: of the night. night: as far as it is.
    """

    def __init__(self, folder: Path, night: Night) -> None:
        self.folder, self.night = folder, night
        self._asked: set[str] = set()

    def step(self, name: str, inputs: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` returns, or returned when the step was done with the same inputs.

        Args:
            inputs: all that the result depends on, as plain data.
        """
        self._asked.add(name)
        identity, known = config_hash(inputs), self.night.find(name)
        if known and known.state == "done" and known.inputs == identity:
            return known.summary
        if known and known.inputs != identity:
            logger.warning("%s: %s is done again: its inputs have changed since", self.night.date, name)
        begin = time.time()
        self._put(Step(name=name, state="running", started=begin, inputs=identity))
        logger.info("%s  %s", self.night.date, name)
        try:
            summary = work()
        except BaseException as error:
            if isinstance(error, Exception):
                seconds, text = time.time() - begin, one_line(error)
                self._put(Step(name=name, state="failed", started=begin, seconds=seconds, inputs=identity, error=text))
            raise
        seconds = time.time() - begin
        self._put(Step(name=name, state="done", started=begin, seconds=seconds, inputs=identity, summary=summary))
        return summary

    def forget(self, name: str) -> None:
        """Drops a step whose result is not there any more, so that it is done again."""
        logger.warning("%s: %s is done again: its result is not there any more", self.night.date, name)
        self.night.steps = [step for step in self.night.steps if step.name != name]

    def current(self) -> Night:
        """The night with the steps that were asked for since it was opened: an attempt before may have had others."""
        return self.night.model_copy(update={"steps": [step for step in self.night.steps if step.name in self._asked]})

    def judged(self, outcome: Outcome, why: str) -> None:
        """Records the outcome. Steps that it does not rest on are dropped."""
        self.night.steps = self.current().steps
        self.night.outcome, self.night.why, self.night.judged = outcome, why[:LONGEST], time.time()
        self._write()

    def _put(self, step: Step) -> None:
        """Replaces the step of the same name, in its place, or appends it."""
        names = [known.name for known in self.night.steps]
        place = names.index(step.name) if step.name in names else len(names)
        self.night.steps[place : place + 1] = [step]
        self._write()

    def _write(self) -> None:
        write_json(self.folder / FILE, self.night.model_dump())


def open_night(folder: Path, date: str, settings: dict[str, Any], again: bool) -> Recorder:
    """The night of a date, new or as far as it came.

    A night that is not judged yet takes the settings of now: `Recorder.step` finds out what they change.

    Raises:
        UserError: it was judged with other settings, or its file is damaged.
    """
    make_folder(folder)
    tidy(folder)
    known = None if again else read_night(folder)
    if known is None:
        return Recorder(folder, Night(date=date, settings=settings))
    changed = sorted(
        key for key in settings.keys() | known.settings.keys() if settings.get(key) != known.settings.get(key)
    )
    if known.outcome is not None and changed:
        raise UserError(
            f"{folder / FILE}: {date} was judged with other settings ({', '.join(changed)}). Set again=true to judge it anew, "
            "or choose another date= or out=."
        )
    known.settings = settings
    return Recorder(folder, known)


def read_night(folder: Path) -> Night | None:
    """The record in a night's folder, None where there is none. Raises UserError for a damaged one."""
    try:
        return validated(Night, read_json(folder, FILE, MAX_BYTES), folder / FILE)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}. It is not as jobs.nightly wrote it: restore it, or set again=true.") from None


def nights(out: Path) -> Iterator[Night]:
    """The nights below a folder in order of their dates; a damaged one is left out, with a warning."""
    for file in sorted(out.glob(f"*/{FILE}")):
        try:
            if night := read_night(file.parent):
                yield night
        except UserError as error:
            logger.warning("left out: %s", error)


def tidy(folder: Path) -> None:
    """Removes what killed writers have left. Only for the process that holds the lock."""
    if on_store(folder):  # objects appear whole
        return
    for left in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", left.name):
            with suppress(OSError):
                left.unlink()
