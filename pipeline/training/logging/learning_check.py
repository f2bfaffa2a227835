"""Whether a run learns: a line for a task whose figures in train.jsonl are worse than no model, or become worse.

A figure is NE of a binary task, the loss of another, of a window: the rows since the record before, each by the
weights before it was trained on. So neither rises by overfitting before the second epoch.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from math import pi
from typing import Any, NamedTuple

from pipeline.terminal import short_decimal

ROWS = 10_000  # seen before anything is judged: 100 positives at a base rate of 1%, among which NE is off by some 10%
WINDOWS = 5  # that are compared as one, by their mean
ERRORS = 6.0  # standard errors that a difference must exceed: the highest of 200 windows is some 5 above the lowest by chance
NO_MODEL = 1.01  # NE, of the base rate and what is not worth a line above it
START = 2.0  # of the first step's loss, which is that of one batch
RISE = 1.1  # of a task's own best, beyond the changes of difficulty from day to day
DROWNED = 0.95  # share of the loss above which one task leaves little to others
LIGHT = 0.01  # weight relative to the heaviest task's, likewise

NORMAL_CHANGE = 2 / pi**0.5  # mean distance of two draws of the standard normal distribution

Record = Mapping[str, Any]


class Fault(NamedTuple):
    """What is wrong with a task: `cause` is the same for all lines of which one is enough."""

    task: str
    cause: str
    line: str


class Level(NamedTuple):
    """The mean of WINDOWS windows, and its standard error."""

    mean: float
    error: float


def faults(records: Sequence[Record], known: Collection[tuple[str, str]] = ()) -> list[Fault]:
    """What the newest record adds.

    Args:
        records: of train.jsonl, in order, with `step`, `rows`, `lr`, `loss`, and by task `ne`, `task_loss` and `weight`.
        known: tasks and causes that have had their line.
    """
    if len(records) < 2 * WINDOWS or records[-1]["rows"] < ROWS:
        return []
    found: list[Fault | None] = []
    series = {task: Series(records, task) for task in records[-1]["weight"]}
    for task, figures in series.items():
        if all(value is None for value in figures.values):
            found.append(_unlabelled(task, records))
        elif now := figures.level(len(records)):
            found.append(_rising(task, now, series, records) or _worse(task, now, figures, records))
    return [fault for fault in found if fault and (fault.task, fault.cause) not in known]


class Series:
    """A task's figure in each record, None where a window has no label, or labels of one class only."""

    def __init__(self, records: Sequence[Record], task: str) -> None:
        self.values = [record["ne"].get(task, record["task_loss"].get(task)) for record in records]

    def level(self, end: int) -> Level | None:
        """Of the windows before a place; None where one has no figure.

        Its noise is taken from the mean change between windows, of twice as many, to which a slow trend adds little.
        """
        known = [value for value in self.values[end - WINDOWS : end] if value is not None]
        if len(known) < WINDOWS:
            return None
        near = self.values[max(end - 2 * WINDOWS, 0) : end]
        changes = [abs(b - a) for a, b in pairwise(near) if a is not None and b is not None]
        return Level(sum(known) / WINDOWS, sum(changes) / len(changes) / NORMAL_CHANGE / WINDOWS**0.5)

    def best(self) -> tuple[Level, int] | None:
        """The lowest level that ends before the newest windows, twice as many, and where."""
        ends = range(WINDOWS, len(self.values) - 2 * WINDOWS + 1)
        return min(((level, end) for end in ends if (level := self.level(end))), default=None)


def _unlabelled(task: str, records: Sequence[Record]) -> Fault:
    what = "observed labels are none or of one class" if task in records[-1]["ne"] else "no label is observed"
    return Fault(
        task, "no labels",
        f"{task}: {what} in each of the last {len(records)} windows, so nothing is learnt of it. Check tasks.{task}.label "
        f"and tasks.{task}.observed_when.",
    )  # fmt: skip


def _worse(task: str, now: Level, figures: Series, records: Sequence[Record]) -> Fault | None:
    """NE above that of the base rate, loss above that of the untrained model, for the reason that the figures support."""
    last, start = records[-1], figures.values[0] if records[0]["step"] == 1 else None
    low = now.mean - ERRORS * now.error
    if task in last["ne"]:
        bad, standard = low > NO_MODEL, "its base rate's 1"
    else:
        bad, standard = (
            start is not None and low > START * start > 0,
            f"the untrained model's {short_decimal(start or 0.0)}",
        )
    if not bad:
        return None
    head = f"{task}: {_name(task, last)} {short_decimal(now.mean)} after {last['rows']:,} rows, worse than {standard}"
    before = figures.level(len(records) - WINDOWS)
    if before and start is not None and start > now.mean and _falls(before, now):
        reason = (
            ", but falling: a start far from the base rate, or slow learning. Set model.start=base_rate (the default), or "
            f"raise train.dense.lr ({last['lr']:g} now)."
        )
    elif heavy := _heaviest(task, records):
        reason = (
            f": {heavy}. Weigh it more, with +train.weighting.weights.{task}=… where train.weighting.name takes weights, or "
            "set another train.weighting.name."
        )
    else:
        reason = (
            f": likely the learning rate is too high. Lower train.dense.lr ({last['lr']:g} now) and train.tables.lr."
        )
    return Fault(task, "worse than no model", head + reason)


def _rising(task: str, now: Level, series: Mapping[str, Series], records: Sequence[Record]) -> Fault | None:
    """A figure that has been above its own best for twice WINDOWS, alone or with those of all tasks."""
    best, before = series[task].best(), series[task].level(len(records) - WINDOWS)
    if best is None or best[0].mean <= 0:  # a log likelihood of a density may be: no share of it says anything
        return None
    if any(a is None or a.mean <= RISE * best[0].mean or not _falls(a, best[0]) for a in (now, before)):
        return None
    (then, at), last = best, records[-1]
    levels_shown = f"{short_decimal(then.mean)} to {short_decimal(now.mean)}"
    head = f"{task}: after {last['rows']:,} rows {_name(task, last)} has risen from {levels_shown}"
    levels = {other: (s.level(at), s.level(len(records))) for other, s in series.items() if other != task}
    falling = [other for other, (a, b) in levels.items() if a and b and _falls(a, b)]
    if falling:
        reason = (
            f" while {', '.join(falling)} fell: the tasks likely conflict. Set train.weighting.name=pcgrad or gradnorm, or a "
            "model with parts of each task's own (model=adatt)."
        )
    else:
        reason = (
            f", and no other task fell: likely the learning rate is too high. Lower train.dense.lr ({last['lr']:g} now) and "
            "train.tables.lr, or set train.dense.decay=cosine."
        )
    return Fault(task, "rising", head + reason)


def _heaviest(task: str, records: Sequence[Record]) -> str | None:
    """The reason in words why the loss is another task's, as far as records show it; one that diverges is no reason."""
    first, last = records[0], records[-1]
    for other, value in last["task_loss"].items():
        loss = last["weight"][other] * (value or 0.0)
        if other != task and loss > DROWNED * last["loss"] > 0 and value <= (first["task_loss"][other] or value):
            return f"{other} makes {min(loss / last['loss'], 1):.0%} of the loss"
    heaviest = max(last["weight"], key=last["weight"].get)
    if last["weight"][task] < LIGHT * last["weight"][heaviest]:
        return f"its weight is {last['weight'][task]:g}, that of {heaviest} {last['weight'][heaviest]:g}"
    return None


def _name(task: str, record: Record) -> str:
    return "NE" if task in record["ne"] else "loss"


def _falls(before: Level, after: Level) -> bool:
    """Whether the difference exceeds chance."""
    return before.mean - after.mean > ERRORS * (before.error**2 + after.error**2) ** 0.5
