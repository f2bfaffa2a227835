"""The checkpoints of a run that await evaluation. Evaluators of one run share them by its records and by a lock a checkpoint.

What is evaluated is read from eval.jsonl and the files beside it, never remembered from a process that may be killed: locks
end with their process, and a checkpoint without a record is taken by the next evaluator that looks for work.
"""

import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError

from features.errors import UserError
from features.plain_json import first_fault
from features.schema.schema import Split
from pipeline.evaluation import predictions
from pipeline.evaluation.lag import commit_time
from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.metrics.evaluated import Provenance
from pipeline.run import checkpoint, records
from pipeline.run.run import Run
from pipeline.storage.base import Lock
from pipeline.storage.local import remove_leftovers
from pipeline.storage.store_path import on_store
from pipeline.storage.versions import Version, version, versions_below

RETRY_AFTER = 60.0  # seconds until a checkpoint that could not be evaluated is tried again, unless its manifest changes
ABANDONED_AFTER = 3600.0  # seconds without a change of a temporary file

Order = Literal["oldest", "newest"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """A checkpoint that this process alone may evaluate on this split: a context manager that ends the claim.

    Attributes:
        file: which `lock` is on. version: of the checkpoint's manifest.
        committed: when it was, in seconds since 1970; None where it is gone again.
    """

    step: int
    file: Path
    lock: Lock
    version: Version | None
    committed: float | None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not on_store(self.file):  # one that does not answer would be waited for once more
            self.file.unlink(missing_ok=True)  # while it is locked: Run.try_lock checks that a file is still there
        self.lock.release()


@dataclass(frozen=True)
class _Failure:
    version: Version | None
    error: str
    retry: float  # by time.monotonic()


class _Spacing(BaseModel):
    """What is read of the training settings of a run, which may be untrusted: steps between checkpoints, None: an epoch."""

    checkpoint_every: Annotated[int, Field(ge=1)] | None = None


class Pending:
    """Checkpoints without a record of one evaluation: a split of a dataset, or a share of it.

    Args:
        dataset: its name, see Dataset.name. own_dataset: whether it is the one that the run trains on.
        measure: see Scorer.measured. A checkpoint whose record has another one awaits evaluation, once in each process: two
            evaluators that differ must not go on by turns.
        every: take the checkpoints at multiples of so many times `train.checkpoint_every` steps; of a run that writes one an
            epoch those of every so many epochs. It depends on the step alone, so that several evaluators, restarts, rollbacks
            and deleted checkpoints do not change the choice.
        order: whether the oldest or the newest is next.
        with_predictions: a checkpoint without a file of predictions awaits evaluation, too.
    Raises:
        UserError: `train.checkpoint_every` of the run is no number of steps.
    """

    def __init__(
        self, run: Run, split: Split | Literal["all"], dataset: str, share: float, measure: str,
        *, own_dataset: bool = True, every: int = 1, order: Order = "oldest", with_predictions: bool = False,
    ) -> None:  # fmt: skip
        self.run, self.split, self.dataset, self.own_dataset = run, split, dataset, own_dataset
        self.share, self.measure = share, measure
        self.every, self.order, self.with_predictions = every, order, with_predictions
        self.spacing = _spacing(run) if every > 1 else None
        self._known: dict[int, dict[str, Any]] = {}
        self._read: Version | Literal["never"] | None = "never"  # the version of eval.jsonl that _known is of
        self._manifests: dict[int, tuple[Version | None, str, int]] = {}  # version, checksum, epoch
        self._complete: set[tuple[int, str]] = set()  # step and checksum of those whose files were checked
        self._failures: dict[int, _Failure] = {}
        self._has_warned = False  # of records of other settings
        self._listed: dict[Path, Version] | None = None  # of a run on a store, while `take` is at work

    def known(self) -> dict[int, dict[str, Any]]:
        """The latest record of each step by now, in order of step. Raises UserError for a damaged line."""
        if (now := self._version(self.run.eval_metrics)) != self._read:
            self._known, self._read = records.latest(self.run, self.split, self.dataset, self.share), now
        return self._known

    def steps(self) -> list[int]:
        """The run's committed checkpoints. Of a run on a store its files are listed once, for the next `take` as well."""
        folder = self.run.checkpoints
        if not on_store(folder):
            return checkpoint.steps(folder)
        self._listed = versions_below(folder)
        if (known := version(self.run.eval_metrics)) is not None:
            self._listed[self.run.eval_metrics] = known
        names = (
            file.parent.name for file in self._listed if file.name == "manifest.json" and file.parents[1] == folder
        )
        return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdecimal())

    def take(self, steps: Iterable[int], final: int | None = None) -> Claim | None:
        """Claims the next of `steps` that awaits evaluation.

        Args:
            final: the last step of a run that has finished, which is evaluated whatever `every` is.
        Returns: None where there is none now: each has its record, is claimed by another process, or failed just now.
        """
        try:
            for step in sorted(steps, reverse=self.order == "newest"):
                if (step == final or self._is_chosen(step)) and self._awaits(step) and (claim := self._claim(step)):
                    return claim
        finally:
            self._listed = None
        return None

    def record(self, claim: Claim, record: dict[str, Any]) -> None:
        """Adds the record of a claimed checkpoint to eval.jsonl, durably. Raises UserError as `records.put`."""
        records.put(self.run, record)
        self._complete.add((claim.step, record["checkpoint"]))

    def is_damaged(self, claim: Claim) -> bool:
        """Whether a claimed checkpoint was deleted, damaged or written anew since; reads all its files."""
        try:
            with checkpoint.reading(checkpoint.folder(self.run.checkpoints, claim.step)):
                return version(self._manifest_file(claim.step)) != claim.version
        except (UserError, OSError):
            return True

    def failed(self, steps: Iterable[int]) -> dict[int, str]:
        """Of `steps` those whose checkpoints, as they are, failed and have no record of another evaluator; why, of each."""
        found = ((step, self._failures.get(step)) for step in steps)
        return {
            step: failure.error
            for step, failure in found
            if failure and failure.version == self._manifest(step)[0] and not self._is_recorded(step)
        }

    def retry(self) -> None:
        """Lets the checkpoints that failed be taken again at once."""
        self._failures = {step: replace(failure, retry=0.0) for step, failure in self._failures.items()}

    def fail(self, claim: Claim, error: Exception) -> None:
        """Puts a claimed checkpoint off for RETRY_AFTER seconds, or until it is written anew."""
        earlier = self._failures.get(claim.step)
        self._failures[claim.step] = _Failure(claim.version, str(error), time.monotonic() + RETRY_AFTER)
        if earlier is None or earlier.error != str(error):
            logger.warning("step %s: left out, its checkpoint was deleted or damaged (%s)", claim.step, error)

    def _claim(self, step: int) -> Claim | None:
        name = self._figures(step).stem
        if (lock := self.run.try_lock(name)) is None:
            return None
        with ExitStack() as stack:
            stack.callback(lock.release)  # should the store not answer now
            if self._listed is not None:
                self.steps()  # a listing from before the lock may lack the record of whoever had it
            known = self._version(self._manifest_file(step))
            claim = Claim(step, self.run.lock_file(name), lock, known, commit_time(self.run, step))
            stack.pop_all()
            stack.enter_context(claim)
            if not self._awaits(step):  # whoever had the lock until now has recorded it
                return None
            self._warn_of_other_settings(step)
            remove_leftovers(self._figures(step))
            # Evaluations of several datasets write to one place, so that only an old one belongs to nobody.
            remove_leftovers(predictions.path(self.run, self.split, step), ABANDONED_AFTER)
            stack.pop_all()
            return claim

    def _awaits(self, step: int) -> bool:
        """Whether a step has no complete evaluation of its checkpoint as it is now, and did not fail just now."""
        failure = self._failures.get(step)
        if failure and failure.version == self._manifest(step)[0] and time.monotonic() < failure.retry:
            return False
        return not self._is_recorded(step)

    def _is_recorded(self, step: int) -> bool:
        checksum, record = self._manifest(step)[1], self.known().get(step)
        if record is None or not checksum or record.get("checkpoint") != checksum:
            return False
        return (step, checksum) in self._complete or self._is_complete(step, record)

    def _is_complete(self, step: int, record: dict[str, Any]) -> bool:
        """Whether a record is of these settings, and its files are there and of its evaluation.

        It is checked once: an evaluator of other settings may replace the record, and one of another dataset the predictions,
        and the two must not go on by turns.
        """
        checksum = record["checkpoint"]
        if record.get("measure") != self.measure:
            return False
        try:
            found = evaluated.read(self._figures(step)).provenance
        except UserError:
            return False
        keys = ("checkpoint", "dataset", "split", "cluster", "buckets", "measure")
        if any(getattr(found, key) != record.get(key) for key in keys) or found.share != self.share:
            return False
        if self.with_predictions:
            file = predictions.path(self.run, self.split, step)
            if not predictions.is_from(file, {"checkpoint": checksum, "dataset": self.dataset}):
                return False
        self._complete.add((step, checksum))
        return True

    def _warn_of_other_settings(self, step: int) -> None:
        """One line, where the first such record is replaced."""
        others = [record for record in self.known().values() if record.get("measure") != self.measure]
        if step in [record["step"] for record in others] and not self._has_warned:
            self._has_warned = True
            logger.info(
                "%s: split %s has records that were measured with other settings (slices, buckets, table_precision, ...), %d: "
                "their checkpoints, as far as they are here and asked for, are evaluated again and the records replaced",
                self.run.eval_metrics, self.split, len(others),
            )  # fmt: skip

    def _is_chosen(self, step: int) -> bool:
        if self.every == 1:
            return True
        if self.spacing:
            return step % (self.every * self.spacing) == 0
        return (self._manifest(step)[2] + 1) % self.every == 0

    def _manifest(self, step: int) -> tuple[Version | None, str, int]:
        """Version, checksum and epoch of a checkpoint, read once per version; no checksum where it cannot be read."""
        now = self._version(self._manifest_file(step))
        if (cached := self._manifests.get(step)) and cached[0] == now:
            return cached
        try:
            manifest = checkpoint.read(checkpoint.folder(self.run.checkpoints, step))
            self._manifests[step] = now, manifest.checksum, manifest.epoch
        except UserError:
            self._manifests[step] = now, "", 0
        return self._manifests[step]

    def _figures(self, step: int) -> Path:
        of = Provenance(
            run=str(self.run.path), step=step, checkpoint="", dataset=self.dataset, split=self.split, share=self.share
        )
        return evaluated.path(self.run, of, self.own_dataset)

    def _manifest_file(self, step: int) -> Path:
        return checkpoint.folder(self.run.checkpoints, step) / "manifest.json"

    def _version(self, file: Path) -> Version | None:
        return version(file) if self._listed is None else self._listed.get(file)


def _spacing(run: Run) -> int | None:
    try:
        return _Spacing.model_validate(run.config()["train"]).checkpoint_every
    except ValidationError as error:
        raise UserError(f"{run.path / 'config.yaml'}: train.{first_fault(error)}. Restore it.") from None
