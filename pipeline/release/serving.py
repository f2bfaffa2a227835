"""The pointer to the checkpoint that serves, OUT/serving.json, with those before it: all in one file, so one write moves it.

On S3 it is a put on the condition that the pointer is still what was read: of two movers one wins, whatever became of locks.

The checkpoints that it names are pinned in their runs (pipeline.run.retention): no training prunes them.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from features.errors import UserError
from features.plain_json import read_json, validated
from pipeline.dataset.days import day_of
from pipeline.release.night import FILE as NIGHT
from pipeline.release.night import ModelReference, Night, PlaceName, Strict, Text
from pipeline.release.verdict import Outcome
from pipeline.run import checkpoint
from pipeline.run.retention import pin, unpin
from pipeline.run.run import Run
from pipeline.storage.files import json_text
from pipeline.storage.store_path import place
from pipeline.storage.versions import Version, replace_version, version

FILE = "serving.json"
MAX_BYTES = 1 << 20
MOST_WITHDRAWN = 1000

logger = logging.getLogger(__name__)


class Blessed(Strict):
    """A checkpoint that was released: by which night, with which verdict and when (seconds since 1970)."""

    run: PlaceName
    step: Annotated[int, Field(ge=0)]
    checksum: Text
    night: Text
    verdict: Outcome
    time: FiniteFloat

    @property
    def model(self) -> ModelReference:
        """The checkpoint."""
        return ModelReference(run=self.run, step=self.step, checkpoint=self.checksum)


Entries = Annotated[list[Blessed], Field(default_factory=list, max_length=1000)]


class Serving(Blessed):
    """The content of serving.json: what serves, those before it, the newest first, and what `back` has withdrawn."""

    version: Literal[1] = 1
    earlier: Entries
    withdrawn: Entries

    @property
    def entries(self) -> list[Blessed]:
        """All of them, the newest first."""
        return [_plain(self), *self.earlier]


def read_serving(out: Path) -> Serving | None:
    """The pointer of a folder of nights, None before the first blessing. Raises UserError for a damaged one."""
    try:
        found = read_json(out, FILE, MAX_BYTES)
    except FileNotFoundError:
        return None
    return validated(Serving, found, out / FILE)


def before(pointer: Serving | None, night: str) -> Blessed | None:
    """What served before a night: a night that is taken up after it has moved the pointer is compared with the same model."""
    return next((entry for entry in pointer.entries if entry.night != night), None) if pointer else None


def check_there(entry: Blessed, out: Path) -> None:
    """Raises UserError unless the checkpoint is still the one that was blessed."""
    try:
        _check_unchanged(entry)
    except UserError as error:
        raise UserError(f"{out / FILE}: {error}. Restore it, or name another one: serving=RUN.") from None


def is_withdrawn(pointer: Serving | None, model: ModelReference) -> bool:
    """Whether `back` has withdrawn a checkpoint."""
    return pointer is not None and model.checkpoint in {entry.checksum for entry in pointer.withdrawn}


def bless(out: Path, candidate: ModelReference, night: str, verdict: Outcome, keep: int) -> str:
    """Moves the pointer to a checkpoint. Returns what was done, in a line.

    It stays where it is for a night of an earlier day than the one that moved it last, and for a checkpoint that `back` has
    withdrawn.

    Args:
        keep: entries, the new one included.
    Raises:
        UserError: the checkpoint is not there any more, or another one by now; another mover was faster.
    """
    state, pointer = version(out / FILE), read_serving(out)
    serves = pointer is not None and pointer.model == candidate
    if pointer and not serves and is_withdrawn(pointer, candidate):
        return "not moved: bless=back has withdrawn this checkpoint"
    if pointer and not serves and (ours := day_of(night)) and (theirs := day_of(pointer.night)) and ours < theirs:
        return f"not moved: the checkpoint that serves has passed on the later day {pointer.night}"
    entry = Blessed(
        run=candidate.run,
        step=candidate.step,
        checksum=candidate.checkpoint,
        night=night,
        verdict=verdict,
        time=time.time(),
    )
    known = [] if pointer is None else pointer.entries
    earlier, dropped = known[: keep - 1], known[keep - 1 :]
    pin(Run(place(entry.run)), entry.step, out)
    try:
        _check_unchanged(entry)  # a training may have pruned it between the verdict and the pin
    except UserError as error:
        _release(out, [entry], known)
        raise UserError(
            f"{error}. The pointer is not moved. Restore the checkpoint, or judge another one: step=STEP again=true."
        ) from None
    if serves:
        return "serves already"
    withdrawn = [] if pointer is None else pointer.withdrawn
    # Before the file that names them changes, and those of a `back` that was killed with them: none stays pinned for good.
    _release(out, [*dropped, *withdrawn], [entry, *earlier])
    _write(out, [entry, *earlier], withdrawn, state)
    return f"serves from now on; before it {earlier[0].model if earlier else 'nothing'}"


def back(out: Path, withdraw: str | None = None) -> tuple[Blessed, Blessed, bool]:
    """Moves the pointer one back. Returns what is withdrawn, what serves now, and whether the pointer has moved.

    Args:
        withdraw: the night whose checkpoint is withdrawn, once however often it is called; None: what serves, each time.
    Raises:
        UserError: there is nothing before, or it is no longer the checkpoint that was blessed; `withdraw` has blessed neither
            what serves nor what was withdrawn; another mover was faster.
    """
    state, pointer = version(out / FILE), read_serving(out)
    if pointer and withdraw is not None and (named := _blessed_by(pointer, withdraw, out)) != _plain(pointer):
        _release(out, [named], pointer.entries)  # a call that was killed may have left it pinned
        return named, _plain(pointer), False
    if pointer is None or not pointer.earlier:
        there = "is missing" if pointer is None else "names no earlier checkpoint"
        raise UserError(
            f"{out / FILE} {there}: there is nothing to go back to. Bless another one: serving=null bless=pass."
        )
    last, entries = _plain(pointer), pointer.earlier
    check_there(entries[0], out)
    logger.info("withdraws %s; should this be killed, repeat it with withdraw=%s", last.model, last.night)
    _write(out, entries, [*pointer.withdrawn, last][-MOST_WITHDRAWN:], state)
    _release(out, [last], entries)
    return last, entries[0], True


def is_of_withdrawn(pointer: Serving | None, night: Night) -> bool:
    """Whether `back` has withdrawn the checkpoint that a night has trained."""
    trained = (night.summary("train") or {}).get("model")
    return bool(trained) and is_withdrawn(pointer, validated(ModelReference, trained, f"{night.date}/{NIGHT}: train"))


def _blessed_by(pointer: Serving, night: str, out: Path) -> Blessed:
    """What a night has blessed last, of what serves and what was withdrawn. Raises UserError for none."""
    found = [entry for entry in (_plain(pointer), *pointer.withdrawn) if entry.night == night]
    if not found:
        raise UserError(
            f"{out / FILE}: withdraw={night}, but what serves was blessed by night {pointer.night}. Name it."
        )
    return max(found, key=lambda entry: entry.time)


def _check_unchanged(entry: Blessed) -> None:
    """Raises UserError unless the checkpoint is there and still the one that was judged."""
    found = checkpoint.read(checkpoint.folder(Run(place(entry.run)).checkpoints, entry.step)).checksum
    if found != entry.checksum:
        raise UserError(
            f"step {entry.step} of {entry.run} is not the checkpoint that was judged (its checksum is {found}): it was "
            "trained anew"
        )


def _release(out: Path, dropped: Sequence[Blessed], kept: Sequence[Blessed]) -> None:
    """Unpins checkpoints that the pointer does not name any more."""
    named = {(entry.run, entry.step) for entry in kept}
    for entry in dropped:
        if (entry.run, entry.step) not in named and place(entry.run).is_dir():
            unpin(Run(place(entry.run)), entry.step, out)


def _write(out: Path, entries: Sequence[Blessed], withdrawn: Sequence[Blessed], known: Version | None) -> None:
    """Moves the pointer, if it is still the one that was read. Raises UserError where it is not."""
    content = Serving(**entries[0].model_dump(), earlier=[*entries[1:]], withdrawn=[*withdrawn])
    try:
        replace_version(out / FILE, json_text(content.model_dump(), indent=1).encode(), known)
    except FileExistsError:
        now = read_serving(out)
        _release(out, entries, now.entries if now else [])
        for entry in now.entries if now else []:  # the names that it has now, whatever was unpinned for those of before
            if place(entry.run).is_dir():
                pin(Run(place(entry.run)), entry.step, out)
        raise UserError(
            f"{out / FILE}: another job has moved the pointer meanwhile, and it is not moved again. Run the same command again."
        ) from None


def _plain(entry: Blessed) -> Blessed:
    return Blessed(**{name: getattr(entry, name) for name in Blessed.model_fields})
