"""What a model rests on, as jobs.explain found it: importance of features with intervals, affinity of tasks as a heat map."""

from collections.abc import Mapping

from pipeline.evaluation.report.blocks import Block, Cell, Drawing, Drawings, Note, Table, number, text
from pipeline.evaluation.report.content import Estimate, Model
from pipeline.evaluation.report.estimates import label
from pipeline.evaluation.report.forest import forest
from pipeline.evaluation.report.heat_map import heat_map
from pipeline.evaluation.report.numbers import NOTHING, count, difference, percent, significant
from pipeline.run.explanation import Affinity, Explanation

DRAWN = 12  # features of a task


def blocks(model: Model, name: str = "") -> list[Block]:
    """Drawings, tables and notes; none where the checkpoint was not explained. name: before each title."""
    found = model.explanation
    if found is None:
        return []
    before = f"{name}: " if name else ""
    importance = _importance(found, model.kinds, before) if found.importance else []
    return [*importance, *(_affinity(found.affinity, before) if found.affinity else [])]


def _importance(found: Explanation, kinds: Mapping[str, str], before: str) -> list[Block]:
    rises = {
        entry.name: {task: Estimate(rise.value, rise.low, rise.high) for task, rise in entry.tasks.items()}
        for entry in found.importance
    }
    interval = f"{100 * found.confidence:.6g}% interval"
    drawings, header, lines = [], ["permuted"], [[text(feature)] for feature in rises]
    for task, figure in ((task, found.figures[task]) for task in kinds if task in found.figures):
        metric = label(kinds[task], figure.metric)
        of_task = [(feature, by_task.get(task, Estimate())) for feature, by_task in rises.items()]
        largest = sorted(of_task, key=lambda entry: -(entry[1].value or 0.0))[:DRAWN]
        drawn = forest([(feature, one, "c0") for feature, one in largest], is_change=True)
        caption = figure.why or f"{metric} {significant(figure.value)} with nothing permuted"
        drawings.append(Drawing(f"{task}: rise of {metric}", drawn, caption))
        header += [f"{task}: rise of {metric}", interval]
        for line, (_, one) in zip(lines, of_task, strict=True):
            line += _cells(one)
    title = f"{before}Importance of features{f', the {DRAWN} largest of each task' if len(rises) > DRAWN else ''}"
    more = "features and groups in order of their mean rise"
    return [Drawings(drawings, title), Note(_definition(found, interval)), Table(header, lines, first=0, more=more)]


def _definition(found: Explanation, interval: str) -> str:
    several = f"the mean of {found.permutations} permutations" if found.permutations > 1 else "of one permutation"
    share = f", {percent(found.share)} of its clusters" if found.share < 1 else ""
    return (
        f"Importance: by how much a metric rises when a feature's values are permuted over the rows, {several}, with its "
        f"{interval}; {count(found.rows)} rows of {found.split}{share}, {count(found.buckets)} buckets of {found.cluster}. Of "
        "two features that carry the same, each may do without the other."
    )


def _cells(one: Estimate) -> list[Cell]:
    shown = difference(one)
    return [number(shown.value, one.value), text(shown.interval, "none" if shown.interval == NOTHING else "quiet")]


def _affinity(found: Affinity, before: str) -> list[Block]:
    def tip(i: int, j: int) -> str:
        z, error = found.z_TT[i][j], found.se_TT[i][j]
        known = "" if error is None else f", standard error {significant(100 * error, 2)}"
        return f"{found.tasks[j]} after a step on {found.tasks[i]}: {NOTHING if z is None else _percent(z)}{known}"

    drawn = heat_map(found.z_TT, found.tasks, found.tasks, "task affinity", _percent, tip, by_column=True)
    about = (
        "Affinity: by how many percent a step on the row's task lowers the loss of the column's task, on the step's batch "
        f"(Fifty et al. 2021); the mean over {count(found.batches)} batches of {count(found.batch_rows)} rows. Below 0 "
        "the step harms it. Shades are of each column, whose losses are of one task."
    )
    return [
        Drawings([Drawing("% of the loss, step on the row's task", drawn)], f"{before}Affinity of tasks"),
        Note(about),
    ]


def _percent(z: float) -> str:
    return f"{'+' if z > 0 else ''}{significant(100 * z, 2)}"
