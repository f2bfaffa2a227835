"""The verdict on a checkpoint: its figures, and their changes to those of the serving one, against gates.yaml."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.release.gates_config import Gates

Outcome = Literal["fail", "undecided", "pass"]  # worst first
EXIT_CODES: dict[Outcome, int] = {"pass": 0, "fail": 2, "undecided": 3}


@dataclass(frozen=True)
class GateVerdict:
    """One gate on one task and slice.

    Attributes:
        gate: in words. task, slice, metric: of the figure. confidence: of each bound.
        candidate, serving: the figure's values; None where undefined, or where there is no serving checkpoint.
        judged: what the gate bounds: the value, candidate - serving, or this over serving's absolute value.
        estimate: of what is judged. low, high: its one-sided bounds at `confidence`.
        rows: of the slice that count for the task. more_rows: how many more would decide an undecided gate at these values;
            None where it is decided, and where no number of rows would.
        why: the outcome in a line.
    """

    gate: str
    task: str
    slice: str
    metric: str
    confidence: float
    candidate: float | None
    serving: float | None
    judged: Literal["value", "change", "relative change"]
    estimate: float | None
    low: float | None
    high: float | None
    rows: int
    more_rows: int | None
    outcome: Outcome
    why: str


@dataclass(frozen=True)
class Verdict:
    """The outcome of all gates, and each of them, worst first."""

    outcome: Outcome
    gates: list[GateVerdict]

    @property
    def exit_code(self) -> int:
        """0 pass, 2 fail, 3 undecided; 1 is an error's."""
        return EXIT_CODES[self.outcome]


def check_same_tasks(ours: Mapping[str, str], theirs: Mapping[str, str], our_run: str, their_run: str) -> None:
    """Raises UserError where two runs' tasks differ in name, kind or order. Args: task → kind; names of the runs."""
    raise NotImplementedError


def check_gates(gates: Gates, kinds: Mapping[str, str], dimensions: Sequence[str], where: str) -> None:
    """Raises UserError for a gate that can never be judged: no such task, metric of the task's kind, or slice.

    Args:
        kinds: task → kind. dimensions: that the evaluation has slices of (the column `dimension` of figures).
        where: gates.yaml, for the message.
    """
    raise NotImplementedError


def judge(gates: Gates, kinds: Mapping[str, str], candidate: Evaluated, serving: Evaluated | None) -> Verdict:
    """Judges a checkpoint by its figures, and by their changes to the serving one's (None: there is none yet).

    Raises:
        UserError: they are not of the same rows.
    """
    raise NotImplementedError


def table(verdict: Verdict) -> str:
    """The gates, worst first, for a terminal."""
    raise NotImplementedError
