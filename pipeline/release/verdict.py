"""What the gates came to: the outcome, each gate's reason, and a table for a terminal."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tabulate import tabulate

from features.printable import printable

Outcome = Literal["fail", "undecided", "pass"]
Judged = Literal["value", "change", "relative change"]

WORST_FIRST: tuple[Outcome, ...] = ("fail", "undecided", "pass")
EXIT_CODES: dict[Outcome, int] = {"pass": 0, "fail": 2, "undecided": 3}


@dataclass(frozen=True)
class GateVerdict:
    """One gate on one task and slice.

    Attributes:
        gate: in words. task, slice, metric: of the figure; a pattern where it covers no slice with rows.
        confidence: of each bound.
        candidate, serving: the figure's values; None where undefined, or where there is no serving checkpoint.
        judged: what the gate bounds: the value, candidate - serving, or this over serving's absolute value.
        estimate: of what is judged. low, high: its one-sided bounds, None where its standard error is not known.
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
    judged: Judged
    estimate: float | None
    low: float | None
    high: float | None
    rows: int
    more_rows: int | None
    outcome: Outcome
    why: str


@dataclass(frozen=True)
class Verdict:
    """The outcome of all gates (the worst of them), and each of them in the order of the tasks and of gates.yaml."""

    outcome: Outcome
    gates: list[GateVerdict]

    @property
    def exit_code(self) -> int:
        """0 pass, 2 fail, 3 undecided; 1 is an error's."""
        return EXIT_CODES[self.outcome]

    @property
    def worst_first(self) -> list[GateVerdict]:
        """The gates, those that failed first."""
        return sorted(self.gates, key=lambda gate: WORST_FIRST.index(gate.outcome))

    @property
    def line(self) -> str:
        """The outcome, how many gates came to it, and the first of them."""
        of_it = [gate for gate in self.gates if gate.outcome == self.outcome]
        if self.outcome == "pass":
            return f"pass: all of {len(self.gates)} gates"
        first = of_it[0]
        place = printable(f"{first.task}, {first.slice}")
        return f"{self.outcome}: {len(of_it)} of {len(self.gates)} gates; {place}: {first.gate}: {first.why}"


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """Fail before undecided before pass."""
    return min(outcomes, key=WORST_FIRST.index, default="pass")


def table(verdict: Verdict, style: str = "simple") -> str:
    """The gates, worst first. Args: style of tabulate."""
    lines = [
        [
            gate.outcome if gate.outcome == "pass" else gate.outcome.upper(), printable(gate.task), printable(gate.slice),
            gate.gate, number(gate.candidate), number(gate.serving), f"{gate.rows:,}", gate.why,
        ]
        for gate in verdict.worst_first
    ]  # fmt: skip
    header = ["", "task", "slice", "gate", "candidate", "serving", "rows", "why"]
    right = ("left", "left", "left", "left", "right", "right", "right", "left")
    return tabulate(lines, header, tablefmt=style, disable_numparse=True, colalign=right if lines else None)


def number(value: float | None) -> str:
    """Four decimals, or four digits of what is very small or large; a count whole; - for none."""
    if value is None:
        return "-"
    if value >= 10 and value.is_integer():
        return f"{value:,.0f}"
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:.4g}"


def interval(judged: Judged, estimate: float, low: float | None, high: float | None, confidence: float) -> str:
    """What was judged, in words: `change +0.0012 (-0.0003 to +0.0027, each at 95%)`; without bounds where it is exact."""
    text = _share if judged == "relative change" else number if judged == "value" else _signed
    ends = ""
    if low is not None and high is not None and low < high:
        ends = f" ({text(low)} to {text(high)}, each at {100 * confidence:.6g}%)"
    return f"{judged} {text(estimate)}{ends}"


def _signed(value: float) -> str:
    return number(value) if value < 0 else f"+{number(value)}"


def _share(value: float) -> str:
    return f"{value:+.3%}"
