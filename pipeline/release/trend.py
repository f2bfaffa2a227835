"""Many nights: each checkpoint's headline metrics by night with intervals, and alarms where the serving model decays.

Two nights have other rows, so they cannot be paired: a night is compared with the first nights of the same checkpoint by a
two-sample z test of the difference over the root of the summed squared standard errors. These are those of the rows; that
days differ among themselves (weekends, campaigns) is not in them, so an alarm asks for an investigation and is no verdict.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import NormalDist

from tabulate import tabulate

from features.errors import UserError
from pipeline.dataset.days import day_of
from pipeline.release.night import Figure, ModelReference, Night, Scored, nights
from pipeline.release.serving import read_serving
from pipeline.release.verdict import Outcome

DECAY_NIGHTS = 3
CONFIDENCE = 0.99
ROLES = ("candidate", "serving")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alarm:
    """A task whose headline metric is worse than on the first nights of the checkpoint that serves.

    Attributes:
        first, now: the metric then (the mean of these nights) and on this night. z: their difference in standard errors.
    """

    task: str
    metric: str
    model: ModelReference
    first: float
    now: float
    z: float

    def __str__(self) -> str:
        return (
            f"{self.task}: {self.metric} of the serving model ({self.model}) is {self.now:.4f}, on its first nights "
            f"{self.first:.4f} ({self.z:.1f} standard errors worse)"
        )


@dataclass(frozen=True)
class NightPoint:
    """A night that was judged.

    Attributes:
        candidate, serving: what was scored; None: not scored, as where the data was refused or nothing served.
        blessed: what became of the pointer, in a line; empty where it was not asked for.
        judged: when, seconds since 1970. alarms: of the serving model.
    """

    date: str
    outcome: Outcome
    why: str
    candidate: Scored | None
    serving: Scored | None
    blessed: str
    judged: float
    alarms: list[Alarm]

    def figure(self, role: str, task: str) -> Figure | None:
        """The headline metric of a task; None where it was not scored."""
        scored = self.candidate if role == "candidate" else self.serving
        return scored.figures.get(task) if scored else None


@dataclass(frozen=True)
class Trend:
    """The nights of a folder in order of their dates.

    Attributes:
        confidence: of an alarm, one-sided. first_nights: of a checkpoint, with which later ones are compared.
    """

    nights: list[NightPoint]
    confidence: float
    first_nights: int

    @property
    def tasks(self) -> list[str]:
        """Every task that was scored on some night, in order of appearance."""
        scored = [s for night in self.nights for s in (night.candidate, night.serving) if s]
        return list(dict.fromkeys(task for s in scored for task in s.figures))


def trend(out: Path, first_nights: int = DECAY_NIGHTS, confidence: float = CONFIDENCE) -> Trend:
    """The trend of the nights below a folder.

    Args:
        first_nights: that a serving checkpoint is compared with: those on which it first served, after the one that blessed it.
        confidence: in (0.5, 1), one-sided; each task and night may raise a false alarm with the rest.
    """
    points: list[NightPoint] = []
    for night in nights(out):
        if night.outcome is None:
            continue
        candidate, serving = (_scored(night, role) for role in ROLES)
        blessed, judged = str((night.summary("bless") or {}).get("what", "")), night.judged or 0.0
        points.append(NightPoint(night.date, night.outcome, night.why, candidate, serving, blessed, judged, []))
    since = _blessed_days(out)
    found = [replace(point, alarms=_alarms(point, points, since, first_nights, confidence)) for point in points]
    return Trend(found, confidence, first_nights)


def table(found: Trend, most: int = 7) -> str:
    """The last nights for a terminal: outcome, and per task the metric of candidate and serving ± its 95% interval."""
    head = ["night", "outcome", *(f"{task} {role}" for task in found.tasks for role in ROLES)]
    lines = [
        [night.date, night.outcome, *(_cell(night.figure(role, task)) for task in found.tasks for role in ROLES)]
        for night in found.nights[-most:]
    ]
    return tabulate(lines, head, disable_numparse=True)


def decay(first: Sequence[Figure], now: Figure) -> tuple[float, float] | None:
    """The mean of the first nights and z of the change since, positive where it is worse; None: there are no intervals."""
    known = [(f.value, f.se) for f in first if f.value is not None and f.se is not None]
    if not known or now.value is None or now.se is None:
        return None
    mean = sum(value for value, _ in known) / len(known)
    error = math.sqrt(now.se**2 + sum(se**2 for _, se in known) / len(known) ** 2)
    return (mean, (now.value - mean) / error) if error > 0 else None


def _alarms(
    point: NightPoint, points: Sequence[NightPoint], since: dict[str, date | None], first_nights: int, confidence: float
) -> list[Alarm]:
    """Of a night: headline metrics are lower the better, so only a rise counts."""
    if point.serving is None:
        return []
    limit, serving, found = NormalDist().inv_cdf(confidence), point.serving, []
    served = _nights_served(points, serving.model.checkpoint, since.get(serving.model.checkpoint))
    if point not in served[first_nights:]:
        return []
    for task, now in serving.figures.items():
        first = [f for then in served[:first_nights] if (f := then.figure("serving", task)) and f.metric == now.metric]
        result = decay(first, now)
        if result and result[1] > limit and now.value is not None:
            found.append(Alarm(task, now.metric, serving.model, result[0], now.value, result[1]))
    return found


def _nights_served(points: Sequence[NightPoint], checkpoint: str, since: date | None) -> list[NightPoint]:
    """The nights on which a checkpoint served, in order of their dates.

    A day up to `since`, whose night blessed it, may be judged late: the checkpoint did not serve on it, and may have been
    trained on it. Where `since` is not known, as with serving=RUN, nights are in the order in which they were judged.
    """
    found = [point for point in points if point.serving and point.serving.model.checkpoint == checkpoint]
    if since is None:
        return sorted(found, key=lambda point: point.judged)
    return [point for point in found if (day := day_of(point.date)) is None or day > since]


def _blessed_days(out: Path) -> dict[str, date | None]:
    """Checkpoint → the day whose night blessed it first, of those that serving.json names."""
    try:
        pointer = read_serving(out)
    except UserError as error:
        logger.warning("alarms go by the order of judging: %s", error)
        return {}
    entries = [*pointer.entries, *pointer.withdrawn] if pointer else []
    return {entry.checksum: day_of(entry.night) for entry in entries}  # the newest first: the oldest one stays


def _scored(night: Night, role: str) -> Scored | None:
    try:
        return night.scored(role)
    except UserError as error:
        logger.warning("left out: %s", error)
        return None


def _cell(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "-"
    reach = "" if figure.low is None or figure.high is None else f" ± {(figure.high - figure.low) / 2:.4f}"
    return f"{figure.value:.4f}{reach}"
