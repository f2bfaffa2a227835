"""What a page is made of, as plain values: models as they were evaluated, gates of a release, nights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.run.explanation import Explanation
from pipeline.run.headline import HEADLINE

Outcome = Literal["pass", "fail", "undecided"]
Figures = Mapping[str, Mapping[str, float | None]]  # task → metric → value


class Estimate(NamedTuple):
    """A figure and the ends of its 95% interval; None where there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TrainLine:
    """A line of train.jsonl or progressive.jsonl.

    Attributes:
        rows: trained on so far. ne, task_loss: by task. rates: learning rate (lr), rows/s (rows_per_s) and share of the time
            spent waiting for data (data_wait), where known.
    """

    rows: int
    ne: Mapping[str, float | None] = field(default_factory=dict)
    task_loss: Mapping[str, float | None] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model as it was evaluated on one split of one dataset.

    Attributes:
        name: of its run. dataset: see Dataset.name. kinds: of its tasks.
        records: of eval.jsonl (see pipeline.run.records), one for each step, in order; the page judges the last.
        evaluated: all figures of the last record's checkpoint, None where they were not kept.
        best: metrics of the true probabilities, where these are known.
        training, progressive: lines of its train.jsonl and progressive.jsonl.
        config: its config.yaml. card: a relative link to the page of its dataset's card.
        facts: further lines about it, a name and a text each.
        defaults: of its training settings, where known, to mark what was set.
        explanation: of the last record's checkpoint, where jobs.explain made one.
    """

    name: str
    split: str
    dataset: str
    kinds: Mapping[str, str]
    records: Sequence[Mapping[str, Any]]
    evaluated: Evaluated | None = None
    best: Figures | None = None
    training: Sequence[TrainLine] = ()
    progressive: Sequence[TrainLine] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    card: str | None = None
    facts: Sequence[tuple[str, str]] = ()
    defaults: Mapping[str, Any] | None = None
    explanation: Explanation | None = None

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest record, empty before the first."""
        return self.records[-1] if self.records else {}

    def metric(self, task: str, name: str | None = None) -> float | None:
        """A figure of the newest record, None where it is undefined; by default the task's headline metric."""
        found: Figures = self.last.get("metrics", {})
        return found.get(task, {}).get(name or HEADLINE[self.kinds[task]])

    def best_of(self, task: str) -> float | None:
        """The best possible value of a task's headline metric, None where it is not known."""
        return (self.best or {}).get(task, {}).get(HEADLINE[self.kinds[task]])


@dataclass(frozen=True)
class Gate:
    """One gate of a release, judged.

    Attributes:
        name: in gates.yaml. estimate: what it was judged on: the metric, or its change.
        bound: as it is to be read, such as "at most 1" or "increase below 0.1%". why: the outcome in a few words.
    """

    name: str
    task: str
    metric: str
    of_slice: str
    estimate: Estimate
    bound: str
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Judgement:
    """A verdict: its outcome, one line that says why, and the gates."""

    outcome: Outcome
    summary: str
    gates: Sequence[Gate] = ()


@dataclass(frozen=True)
class Check:
    """A check of a night's data, or one of its steps: what, its outcome, and a few words."""

    name: str
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Night:
    """One night: its date, candidate, what is compared with it, and the verdict.

    Attributes:
        serving: None where nothing is served. best: another model to compare with, such as the best of earlier nights.
        checks: of the day's data. steps: name and text of each, such as ("train", "done in 312 s").
    """

    date: str
    candidate: Model
    judgement: Judgement
    serving: Model | None = None
    best: Model | None = None
    checks: Sequence[Check] = ()
    steps: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class TrendNight:
    """One night of a trend.

    Attributes:
        candidate, serving: names of the models. figures: by model ("candidate", "serving") and task, the headline metric.
    """

    date: str
    outcome: Outcome
    candidate: str
    serving: str | None
    figures: Mapping[str, Mapping[str, Estimate]]
    summary: str = ""


@dataclass(frozen=True)
class Trend:
    """Many nights in order of their dates, and what is wrong with them, a line each. kinds: of the tasks."""

    name: str
    kinds: Mapping[str, str]
    nights: Sequence[TrendNight]
    alarms: Sequence[str] = ()
