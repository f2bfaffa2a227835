"""How a search came to its architecture: loss and entropies over its steps, strengths over its steps and at its end."""

import statistics
from collections.abc import Callable, Sequence

from markupsafe import Markup

from pipeline.evaluation.report import svg
from pipeline.evaluation.report.blocks import Block, Drawing, Drawings, Note, Section
from pipeline.evaluation.report.heat_map import heat_map
from pipeline.evaluation.report.numbers import count, significant
from pipeline.search.network import short
from pipeline.search.record import SearchRecord

COLUMNS = 24  # of a heat map over time: more could not be told apart
NAMED = 16  # columns with a name
DRAWN = 300  # points of a line
LEFT, RIGHT, TOP, BOTTOM = 46.0, 262.0, 26.0, 146.0  # of a chart's inside, in pixels; labels stand right of it
Series = Sequence[tuple[int, float]]


def section(
    records: Sequence[SearchRecord], interaction: Sequence[str], blocks: Sequence[str], tasks: Sequence[str]
) -> Section:
    """The section."""
    shown: list[Block] = [Drawings(_curves(records))]
    if all(record.valid_loss is None for record in records):
        shown.append(Note("No validation loss was measured."))
    shown += [*_of_blocks(records, interaction, blocks), *_of_selection(records, tasks)]
    return Section("course", "How did it come about?", lead(records), shown)


def _of_blocks(records: Sequence[SearchRecord], interaction: Sequence[str], blocks: Sequence[str]) -> list[Block]:
    """Strengths of candidates: over the steps, and at the end by expert."""
    last, seen = records[-1], thinned(records, COLUMNS)
    of_interaction = list(zip(*(record.interaction for record in seen), strict=True))
    mean = [[_mean_of(record, candidate) for record in seen] for candidate in range(len(blocks))]
    first = [
        Drawing("Feature interaction", _over_time("interaction", interaction, of_interaction, seen)),
        Drawing("Blocks, mean over all experts", _over_time("mean of the blocks", blocks, mean, seen)),
    ]
    experts = _numbers(last)
    places = []
    for level in range(len(last.experts[0])):
        values = list(zip(*(expert[level] for expert in last.experts), strict=True))
        drawn = _map(f"block {level + 1}", blocks, experts, values, lambda row, column: f"expert {column}, {row}")
        places.append(Drawing(f"Block {level + 1}{' (reads the interaction)' * (level == 0)}", drawn))
    return [
        Drawings(first, "Strength of each candidate over the steps"),
        Drawings(places, "Strength of each candidate at the end, by expert"),
    ]


def _of_selection(records: Sequence[SearchRecord], tasks: Sequence[str]) -> list[Block]:
    """Weights of experts: at the end by task, and over the steps."""
    last, seen = records[-1], thinned(records, COLUMNS)
    experts = _numbers(last)
    final = _map("selection weights", tasks, experts, last.tasks, lambda row, column: f"{row} ← expert {column}")
    over_time = []
    for t, task in enumerate(tasks):
        values = list(zip(*(record.tasks[t] for record in seen), strict=True))
        over_time.append(Drawing(task, _over_time(f"selection of {task}", experts, values, seen, "expert ")))
    return [
        Drawings([Drawing("At the end", final)], "Selection weight of each expert, by task"),
        Drawings(over_time, "Selection weight of each expert over the steps"),
    ]


def lead(records: Sequence[SearchRecord]) -> str:
    """How often the architecture was evaluated, and since when it is the same."""
    evaluations, last = len(records), records[-1]
    if evaluations == 1:
        return f"One evaluation of the architecture, at step {count(last.step)} after {count(last.rows)} rows."
    since = unchanged_since(records)
    words = f"{count(evaluations)} evaluations of the architecture up to step {count(last.step)}, "
    words += f"after {count(last.rows)} rows. "
    if since == 0:
        return f"{words}It has been the same since the first, at step {count(records[0].step)}."
    after = evaluations - 1 - since
    of_after = (
        f"the {count(after)} evaluations after it found the same" if after > 1 else "the one after it found the same"
    )
    change = f"It last changed at step {count(records[since].step)}"
    return (
        f"{words}{change}; {of_after}."
        if after
        else f"{words}{change}, the last evaluation: it might have changed further."
    )


def unchanged_since(records: Sequence[SearchRecord]) -> int:
    """The index of the first record from which on all have the last one's architecture."""
    index = len(records) - 1
    while index and records[index - 1].architecture.same(records[-1].architecture):
        index -= 1
    return index


def thinned(records: Sequence[SearchRecord], most: int) -> list[SearchRecord]:
    """At most so many, evenly, the first and the last among them."""
    if len(records) <= most:
        return list(records)
    return [records[round(index * (len(records) - 1) / (most - 1))] for index in range(most)]


def _numbers(record: SearchRecord) -> list[str]:
    return [str(number) for number in range(1, len(record.experts) + 1)]


def _mean_of(record: SearchRecord, candidate: int) -> float:
    return statistics.fmean(block[candidate] for expert in record.experts for block in expert)


def _over_time(
    about: str, rows: Sequence[str], values: Sequence[Sequence[float]], seen: Sequence[SearchRecord], of: str = ""
) -> Markup:
    """Rows down, steps across; of: before the name of a row in the words of a cell."""
    steps = [count(record.step) for record in seen]
    return _map(f"{about} over steps", rows, steps, values, lambda row, step: f"{of}{row} at step {step}")


def _map(
    about: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    words: Callable[[str, str], str],
) -> Markup:
    """Strengths by row and column; words: of a row and a column."""
    every = -(-len(columns) // NAMED)  # names of more columns would touch; the last one is named
    names = [name if (len(columns) - 1 - index) % every == 0 else "" for index, name in enumerate(columns)]
    return heat_map(
        values, [short(row, 16) for row in rows], names, about,
        shown=lambda value: f"{value:.2f}",
        tip=lambda r, c: f"{words(rows[r], columns[c])}: {significant(values[r][c], 3)}",
    )  # fmt: skip


def _curves(records: Sequence[SearchRecord]) -> list[Drawing]:
    """Validation loss, where it was measured, and both entropies; a dashed line where the architecture last changed."""
    seen, since = thinned(records, DRAWN), unchanged_since(records)
    changed = records[since].step if since else None
    loss = [(record.step, record.valid_loss) for record in seen if record.valid_loss is not None]
    alpha = [(record.step, record.alpha_entropy) for record in seen]
    beta = [(record.step, record.beta_entropy) for record in seen]
    end, mark = max(records[-1].step, 1), "Dashed: the architecture last changed." if changed is not None else ""
    drawings = []
    if loss:
        y = svg.Axis(*svg.span([value for _, value in loss], 0.12), BOTTOM, TOP)
        drawings.append(
            Drawing("Validation loss", _chart("validation loss", "loss", [("", loss)], end, y, changed), mark)
        )
    y = svg.Axis(0, 1.05, BOTTOM, TOP)
    both = [("blocks", alpha), ("selection", beta)]
    chart = _chart("entropy of the choices", "1: even, 0: certain", both, end, y, changed)
    drawings.append(Drawing("Entropy of the choices", chart, mark))
    return drawings


def _chart(
    about: str, unit: str, series: Sequence[tuple[str, Series]], end: int, y: svg.Axis, mark: int | None
) -> Markup:
    """Series over steps, each with its name and last value at its end."""
    x = svg.Axis(0, end, LEFT, RIGHT)
    parts, ends = [svg.frame(x, y, "step", unit)], []
    if mark is not None:
        parts.append(svg.element("line", x1=x.at(mark), x2=x.at(mark), y1=TOP, y2=BOTTOM, class_="ideal"))
    for index, (name, points) in enumerate(series):
        drawn = [(x.at(step), y.at(value)) for step, value in points]
        parts.append(svg.polyline(drawn, f"c{index}"))
        parts += [
            svg.dot(
                *place, f"c{index}", f"{f'{name}: ' if name else ''}{significant(value)} at step {count(step)}", 2.2
            )
            for place, (step, value) in zip(drawn, points, strict=True)
        ]
        ends.append((drawn[-1][1], f"{name} {significant(points[-1][1], 3)}".strip(), f"c{index}"))
    parts.append(svg.labels(ends, RIGHT + 7, TOP, BOTTOM))
    return svg.drawing(360, BOTTOM + 36, f"{about} over steps", *parts)
