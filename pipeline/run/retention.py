"""Which checkpoints of a run are kept."""

import hashlib
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from features.errors import UserError
from features.schema.schema import Split
from pipeline.run import checkpoint, records
from pipeline.run.headline import headline
from pipeline.run.run import Run
from pipeline.storage.files import make_folder, write_json
from pipeline.storage.store_path import place

PINS = "pins"  # folder of a run: a file for each checkpoint that others rely on, and who they are

logger = logging.getLogger(__name__)


class Keep(BaseModel):
    """Which checkpoints are kept once a newer one is committed; all of them if nothing is set. The newest is always kept.

    Attributes:
        last: that many of the newest.
        every: those of steps that are multiples of it.
        best: a split; of each task the one with the best headline metric there (NE; regression: NRMSE), on the dataset that
            the run trains on, as eval.jsonl has it. Checkpoints that are not evaluated yet are kept too.
    """

    model_config = ConfigDict(extra="forbid")
    last: int | None = Field(None, ge=1)
    every: int | None = Field(None, ge=1)
    best: Split | None = None


def steps_to_prune(
    steps: Sequence[int],
    keep: Keep,
    newest: int,
    evaluated: Mapping[int, Mapping[str, Any]] | None = None,
    pinned: Collection[int] = (),
) -> list[int]:
    """Those of `steps`, ascending, that no rule of `keep` covers; none where it has no rule.

    Args:
        newest: the step just written, which is kept. Those above it go: after a rollback the run trains them anew.
        evaluated: metrics per task of the checkpoints that were evaluated.
        pinned: steps that are kept whatever the rules are.
    Raises:
        UserError: metrics of a task without its headline metric.
    """
    if keep == Keep():
        return []
    behind = [step for step in steps if step <= newest]
    wanted = {newest, *pinned, *(behind[-keep.last :] if keep.last else [])}
    wanted |= {step for step in behind if keep.every and step % keep.every == 0}
    if keep.best:
        known = {step: metrics for step, metrics in (evaluated or {}).items() if step in behind}
        wanted |= {*behind} - known.keys() | best_steps(known)
    return [step for step in steps if step not in wanted]


def best_steps(evaluated: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """For each task the step of its lowest headline metric; of equal ones the first. Raises UserError as `headline`."""
    values: dict[str, list[tuple[float, int]]] = {}
    for step, metrics in evaluated.items():
        for task, measured in metrics.items():
            if (value := measured[headline(measured)]) is not None:
                values.setdefault(task, []).append((value, step))
    return {min(found)[1] for found in values.values()}


def prune(run: Run, keep: Keep, dataset: str, newest: int) -> None:
    """Deletes the checkpoints that `keep` does not cover; one that is being read is left for the next time.

    Args:
        dataset: name of the one that the run trains on; metrics on others do not decide which is best.
        newest: the step just written.
    """
    try:
        found = records.current(run, keep.best, str(place(dataset).absolute())) if keep.best else {}
        evaluated = {step: record["metrics"] for step, record in found.items()}
        for step in steps_to_prune(checkpoint.steps(run.checkpoints), keep, newest, evaluated, pinned_steps(run)):
            checkpoint.remove(checkpoint.folder(run.checkpoints, step))
    except (UserError, OSError) as error:
        logger.warning("%s: old checkpoints are not deleted: %s", run.checkpoints, error)


def pin(run: Run, step: int, owner: Path) -> None:
    """Keeps a step's checkpoint from being pruned until `unpin`; of several owners each has a pin of its own.

    Args:
        owner: what relies on the checkpoint, such as the folder of a serving pointer.
    """
    make_folder(run.path / PINS)
    write_json(_pin(run, step, owner), {"step": step, "owner": str(owner.absolute())})


def unpin(run: Run, step: int, owner: Path) -> None:
    """Takes an owner's pin away, if there is one."""
    _pin(run, step, owner).unlink(missing_ok=True)


def pinned_steps(run: Run) -> set[int]:
    """The steps that have a pin, by the names of their files."""
    found = (re.fullmatch(r"step-(\d{8,})-[0-9a-f]{16}\.json", file.name) for file in (run.path / PINS).glob("step-*"))
    return {int(name[1]) for name in found if name}


def _pin(run: Run, step: int, owner: Path) -> Path:
    name = hashlib.sha256(str(owner.absolute()).encode()).hexdigest()[:16]
    return run.path / PINS / f"step-{step:08d}-{name}.json"
