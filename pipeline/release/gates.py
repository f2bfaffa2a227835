"""The verdict on a checkpoint: its figures, and their changes to those of the serving one, against gates.yaml.

A gate is judged on the one-sided bounds of its figure, low and high, each at the gate's confidence. With [least, most] as
what is allowed: pass where low >= least and high <= most, fail where low > most or high < least, else undecided. For a change
that may be worse by a margin this is a test of non-inferiority by confidence interval (ICH E9, section 3.3.2), for a gain to
be shown one of superiority by a margin.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from features.errors import UserError, did_you_mean
from features.printable import printable
from features.schema.task import Task
from pipeline.evaluation.metrics.evaluated import ALL, Evaluated
from pipeline.evaluation.metrics.registry import METRICS, WHOLE_ONLY
from pipeline.evaluation.metrics.slice_names import Dimensions, can_cover, can_occur
from pipeline.release.gate_figures import Estimate, Figures
from pipeline.release.gates_config import NE, Gate, Gates
from pipeline.release.verdict import GateVerdict, Judged, Outcome, Verdict, interval, worst
from pipeline.run.headline import HEADLINE

BELOW_ONE = Gate(metric="ne", max=1.0)  # of every binary task, unless allowed
MOST_ROWS = 1e15  # that are worth a number


def check_same_tasks(ours: Mapping[str, str], theirs: Mapping[str, str], our_run: str, their_run: str) -> None:
    """Raises UserError where two runs' tasks differ in name, kind or order. Args: task → kind; names of the runs."""
    if [*ours.items()] != [*theirs.items()]:
        a, b = (", ".join(f"{task} ({kind})" for task, kind in kinds.items()) for kinds in (ours, theirs))
        raise UserError(
            f"{our_run} predicts {printable(a)}; {their_run} predicts {printable(b)}: only models of the same tasks in the "
            "same order can be compared"
        )


def check_same_labels(ours: Mapping[str, Task], theirs: Mapping[str, Task], our_run: str, their_run: str) -> None:
    """Raises UserError where a task of both runs has another label, or is observed on other rows."""
    for name, task in ours.items():
        for key in ("label", "observed_when", "given"):
            a, b = getattr(task, key), getattr(theirs[name], key)
            if a != b:
                raise UserError(
                    printable(f"tasks.{name}.{key} of {our_run} is {a}, of {their_run} {b}")
                    + ": only models of the same labels on the same rows can be compared"
                )


def check_gates(gates: Gates, kinds: Mapping[str, str], dimensions: Dimensions, where: str) -> None:
    """Raises UserError for a gate that can never be judged (no such task, metric of its kind, or slice), or a task without one.

    Args:
        kinds: task → kind. dimensions: that the evaluation has slices of.
        where: gates.yaml, for the message.
    """
    for task, own in gates.tasks.items():
        if task not in kinds:
            known, near = printable(", ".join(kinds)), did_you_mean(task, kinds)
            raise UserError(f"{where}: tasks.{printable(task)}: no such task{near}; there are {known}")
        if own.allow_ne_above_one and kinds[task] != "binary":
            raise UserError(f"{where}: tasks.{printable(task)}.allow_ne_above_one: is for binary tasks: remove it")
    lists = [("default", gates.default, sorted(set(kinds.values())))]
    lists += [(f"tasks.{printable(task)}", own.gates, [kinds[task]]) for task, own in gates.tasks.items()]
    for place, found, of_kinds in lists:
        for at, gate in enumerate(found):
            if fault := _fault(gate, of_kinds, dimensions):
                raise UserError(f"{where}: {place}.{at}: {fault}")
    for task, kind in kinds.items():
        if not _wanted(gates, task, kind):
            raise UserError(
                f"{where}: task {printable(task)} has no gate, and would pass whatever its figures are: add one, such as "
                f"{{metric: {HEADLINE[kind]}, change: {{worse_by_at_most: 1%}}}}"
            )


def judge(gates: Gates, kinds: Mapping[str, str], candidate: Evaluated, serving: Evaluated | None) -> Verdict:
    """Judges a checkpoint by its figures, and by their changes to the serving one's (None: there is none yet).

    Args:
        gates: that passed `check_gates`. kinds: task → kind.
    Raises:
        UserError: they are not of the same rows, or have other tasks.
    """
    for evaluated in (candidate, serving):
        if evaluated and (found := set(evaluated.figures["task"].unique())) != kinds.keys():
            source = evaluated.provenance
            raise UserError(
                f"{source.run} step {source.step} was evaluated on the tasks {printable(', '.join(sorted(found)))}, not on "
                f"{printable(', '.join(kinds))}: evaluate it again"
            )
    everything = [*gates.default, *(gate for own in gates.tasks.values() for gate in own.gates), BELOW_ONE]
    figures = Figures(everything, candidate, serving)
    verdicts = [verdict for task, kind in kinds.items() for verdict in _of_task(gates, task, kind, figures)]
    return Verdict(worst(verdict.outcome for verdict in verdicts), verdicts)


def decide(
    figure: Estimate, confidence: float, least: float, most: float
) -> tuple[Outcome, float | None, float | None, int | None]:
    """Whether a figure is within [least, most].

    Returns: the outcome, the figure's bounds, and how many more rows would decide an undecided one: the bounds move in with
        1 / sqrt(rows), and must not reach beyond the nearer end.
    """
    reach = figure.reach(confidence)
    if reach is None:
        return "undecided", None, None, None
    low, high = figure.value - reach, figure.value + reach
    if low >= least and high <= most:
        return "pass", low, high, None
    if low > most or high < least:
        return "fail", low, high, None
    distance = min(abs(figure.value - least), abs(figure.value - most))
    rows = figure.rows * (reach / distance) * (reach / distance) if distance else math.inf
    return "undecided", low, high, max(math.ceil(rows) - figure.rows, 1) if rows <= MOST_ROWS else None


def _fault(gate: Gate, kinds: Sequence[str], dimensions: Dimensions) -> str | None:
    """Why a gate can be judged for no task of these kinds."""
    metrics = {name: metric for kind in kinds for name, metric in METRICS[kind].items()}
    if gate.metric not in metrics:
        near = did_you_mean(gate.metric, metrics)
        return f"metric {printable(gate.metric)}{near}: {' and '.join(kinds)} tasks have {', '.join(metrics)}"
    if gate.metric in WHOLE_ONLY and (gate.slices or gate.slice != ALL):
        return f"metric {gate.metric}: is of the whole split only: leave slice out"
    if gate.change and metrics[gate.metric].higher_is_better is None:
        return f"metric {gate.metric}: no change of it is a worse one, since neither direction is better: give a band"
    known = printable("; ".join(dimensions)) or "nothing"
    for pattern in gate.slices or ():
        if not can_cover(pattern, dimensions):
            return f"slices {printable(pattern)}: the evaluation has slices of {known}, and a pattern is like device=*"
    if not can_occur(gate.slice, dimensions):
        names = (name for of_dimension in dimensions.values() for name in (of_dimension or ())[:100])
        hint = did_you_mean(gate.slice, names)
        if can_cover(gate.slice, dimensions):
            hint = f" (for each slice of it: slices: {printable(gate.slice)})"
        return f"slice {printable(gate.slice)}: the evaluation has slices of {known}{hint}"
    return None


def _of_task(gates: Gates, task: str, kind: str, figures: Figures) -> Iterator[GateVerdict]:
    """The verdicts on one task."""
    non_finite = figures.ours((task, "non_finite", ALL))
    if non_finite and (count := non_finite.value):
        why = f"{count:,.0f} predictions are not finite"
        yield GateVerdict(
            "predictions are finite", task, ALL, "non_finite", 1.0, count, figures.theirs((task, "non_finite", ALL)), "value",
            count, count, count, non_finite.rows, None, "fail", why,
        )  # fmt: skip
    for gate in _wanted(gates, task, kind):
        names = figures.covered(task, gate.metric, gate.slices) if gate.slices else [gate.slice]
        for name in names or [", ".join(gate.slices or ())]:
            yield _judge(gate, METRICS[kind][gate.metric].higher_is_better, (task, gate.metric, name), figures)


def _wanted(gates: Gates, task: str, kind: str) -> list[Gate]:
    """The gates of one task, of a binary one with NE below 1."""
    own = gates.of_task(task)
    wanted = [gate for gate in gates.default if own.default and gate.metric in METRICS[kind]] + own.gates
    if own.allow_ne_above_one:
        return [g.model_copy(update={"allow_ne_above_one": True}) if g.metric in NE else g for g in wanted]
    of_all = [gate for gate in wanted if gate.metric == "ne" and gate.slice == ALL and gate.slices is None]
    if kind != "binary" or any(_bounds_ne(gate) for gate in of_all):
        return wanted
    missing = "pass" if any(gate.missing == "pass" for gate in of_all) else "fail"
    return [*wanted, BELOW_ONE.model_copy(update={"missing": missing})]


def _bounds_ne(gate: Gate) -> bool:
    """Whether a gate on the NE of all rows takes the place of BELOW_ONE: it lets no NE of 1 or more, or undefined one, pass."""
    lets_pass = "pass" in (gate.missing, gate.below_min_rows)
    return gate.allow_ne_above_one or (gate.change is None and gate.bounds[1] <= 1 and not lets_pass)


def _judge(gate: Gate, higher_is_better: bool | None, key: tuple[str, str, str], figures: Figures) -> GateVerdict:
    """One gate on one slice."""
    ours, theirs, rows = figures.ours(key), figures.theirs(key), figures.rows(key)
    judged: Judged = "value"
    figure, (least, most) = ours, gate.bounds
    if gate.change:
        judged = "relative change" if gate.change.relative else "change"
        figure, margin = figures.change(key, gate.change.relative), gate.change.margin
        least, most = (-margin, math.inf) if higher_is_better else (-math.inf, margin)
    task, metric, name = key
    verdict = GateVerdict(
        str(gate), task, name, metric, gate.confidence, ours.value if ours else None, theirs, judged,
        figure.value if figure else None, None, None, rows, None, "pass", "",
    )  # fmt: skip
    if gate.min_rows is not None and 0 < rows < gate.min_rows:
        more = gate.min_rows - rows if gate.below_min_rows == "undecided" else None
        why = f"{rows:,} rows of the {gate.min_rows:,} that are needed"
        return replace(verdict, outcome=gate.below_min_rows, more_rows=more, why=why)
    if ours and gate.change and figures.serving is None:
        verdict = replace(verdict, why="no serving checkpoint to compare with yet")
    elif ours is None or figure is None:
        verdict = replace(verdict, outcome=gate.missing, why=_missing(ours, theirs, rows, judged))
    else:
        verdict = _decided(verdict, gate, figure, least, most)
    if ours and gate.metric in NE and not gate.allow_ne_above_one and ours.value >= 1:
        verdict = _with_ne_above_one(verdict, gate, ours)
    return verdict


def _missing(ours: Estimate | None, theirs: float | None, rows: int, judged: Judged) -> str:
    """Why there is nothing to judge."""
    if not rows:
        return "no rows, or too few for a slice (min_rows and top of the evaluation)"
    if ours is None:
        return "undefined on these rows"
    if theirs is None:
        return "undefined for the serving checkpoint"
    return f"the {judged} is undefined"


def _decided(verdict: GateVerdict, gate: Gate, figure: Estimate, least: float, most: float) -> GateVerdict:
    """The verdict with the outcome of its interval."""
    if not figure.has_intervals and gate.min_rows is not None:  # on rows enough
        figure = replace(figure, se=0.0)
    outcome, low, high, more = decide(figure, gate.confidence, least, most)
    why = interval(verdict.judged, figure.value, low, high, gate.confidence)
    if low is None and figure.has_intervals:
        why += ", no interval: too few buckets of users have rows, or rows of both classes"
    elif low is None:
        why += ", without an interval: set min_rows to judge it by its value"
    elif outcome == "undecided":
        why += f"; about {more:,} more rows would decide" if more else "; no number of rows would decide"
    return replace(verdict, outcome=outcome, low=low, high=high, more_rows=more, why=why)


def _with_ne_above_one(verdict: GateVerdict, gate: Gate, ours: Estimate) -> GateVerdict:
    """A verdict on a figure of NE that is 1 or more: it does not pass, and fails where its bound is, too."""
    found = _decided(replace(verdict, judged="value"), gate, ours, -math.inf, math.nextafter(1, 0))
    if worst((found.outcome, verdict.outcome)) == verdict.outcome:
        return verdict
    why = f"not below 1, the NE of the base rate: {found.why}"
    return replace(verdict, outcome=found.outcome, more_rows=found.more_rows, why=why)
