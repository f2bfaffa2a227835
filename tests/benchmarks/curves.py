"""Learning curves of models under two configs: python tests/benchmarks/curves.py --before RUN... --after RUN... [--split test].

RUN is a run's folder, named MODEL or MODEL-SEED; seeds of a model are averaged. A data set has one picture, NE or NRMSE of each
task over the training rows seen, and one table below it, with what the second config changes. Both go to --out, as
curves-NAME.png and curves-NAME.md.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tabulate import tabulate

from features.errors import UserError
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.report.plots import literal
from pipeline.run.headline import HEADLINE, headline
from pipeline.storage.files import read_lines
from pipeline.terminal import short_decimal

RESULTS = Path(__file__).parent / "results"
STYLES = {"before": "--", "after": "-"}
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
LABELS = {name: METRICS[kind][name].label for kind, name in HEADLINE.items()}
ACROSS = 3  # panels beside each other, in 12 inches of 100 pixels
ROOM = 0.06  # above and below the curves, of their range


class Key(NamedTuple):
    """What one line of a panel is: a model under one of the configs."""

    group: str
    model: str


Curve = dict[int, float]  # rows seen → the task's headline metric
Curves = dict[str, dict[Key, Curve]]  # by task


def main() -> None:
    """Draws a picture and prints a table for each data set of the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for group in STYLES:
        parser.add_argument(f"--{group}", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument("--labels", nargs=2, default=list(STYLES), metavar="TEXT", help="of the two, in the legend")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    try:
        found = read({"before": options.before, "after": options.after}, options.split)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    labels = dict(zip(STYLES, options.labels, strict=True))
    options.out.mkdir(parents=True, exist_ok=True)
    for dataset, (curves, names) in found.items():
        path = options.out / f"curves-{dataset}.png"
        draw(curves, names, labels, f"{dataset}, {options.split} split").savefig(path, dpi=100)
        text = table(curves, names, labels)
        path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        print(f"{text}\n\n{path}")


def read(groups: Mapping[str, Sequence[Path]], split: str) -> dict[str, tuple[Curves, dict[str, str]]]:
    """The curves of each data set, and the metric of each task; of a step that was evaluated twice the later record counts.

    Raises:
        UserError: a run without an evaluation on the split, or without the rows or the metric of one.
    """
    values: dict[str, dict[str, dict[Key, dict[int, list[float]]]]] = {}
    runs: dict[tuple[str, Key], int] = defaultdict(int)
    metrics: dict[str, dict[str, str]] = defaultdict(dict)
    for group, paths in groups.items():
        for path in paths:
            file = path / "metrics" / "eval.jsonl"
            records = {record["step"]: record for record in read_lines(file) if record["split"] == split}
            if not records:
                raise UserError(
                    f"{file}: no evaluation of split {split}. Run jobs.evaluate run={path} split={split} first."
                )
            key = Key(group, re.sub(r"-\d+$", "", path.resolve().name))
            for dataset in {_name(record["dataset"]) for record in records.values()}:
                runs[dataset, key] += 1
            for record in records.values():
                dataset = _name(record["dataset"])
                for task, of_task in record["metrics"].items():
                    metrics[dataset][task] = headline(of_task)
                    value = of_task[metrics[dataset][task]]
                    if value is not None and record.get("rows") is not None:
                        curves = values.setdefault(dataset, {}).setdefault(task, {}).setdefault(key, {})
                        curves.setdefault(record["rows"], []).append(value)
    return {
        dataset: ({task: _means(curves, dataset, runs) for task, curves in tasks.items()}, metrics[dataset])
        for dataset, tasks in sorted(values.items())
    }


def draw(curves: Curves, names: Mapping[str, str], labels: Mapping[str, str], title: str) -> Figure:
    """A panel a task: a colour a model, dashed before and solid after."""
    across = min(ACROSS, len(curves))
    down = -(-len(curves) // across)
    figure = Figure(figsize=(12 * across / ACROSS if across > 1 else 6, 0.9 + 3.7 * down), layout="constrained")
    models = _models(curves)
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, (task, of_task) in zip(panels, curves.items(), strict=False):
        for key, curve in of_task.items():
            rows, values = zip(*sorted(curve.items()), strict=True)
            axes.plot(
                [count / 1e6 for count in rows], values, STYLES[key.group], color=models[key.model], marker="o", markersize=3,
                linewidth=1.6, alpha=0.6 if key.group == "before" else 1.0,
            )  # fmt: skip
        axes.set(title=literal(task), xlabel="million training rows seen", ylabel=LABELS[names[task]])
        axes.grid(alpha=0.3)
        _limit(axes, of_task)
    for axes in list(panels):
        axes.set_axis_off()
    handles = [Line2D([], [], color=colour, label=literal(model)) for model, colour in models.items()]
    handles += [Line2D([], [], color="black", linestyle=STYLES[g], label=literal(text)) for g, text in labels.items()]
    figure.suptitle(literal(title))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3 * across - 1), frameon=False)
    return figure


def table(curves: Curves, names: Mapping[str, str], labels: Mapping[str, str]) -> str:
    """The last value of each curve, their difference, and the share of the rows after which the second reaches the first's."""
    lines = []
    for model in _models(curves):
        for task, of_task in curves.items():
            before, after = (of_task.get(Key(group, model), {}) for group in STYLES)
            line = [
                model,
                f"{LABELS[names[task]]} {task}",
                *(short_decimal(_last(c)) if c else "" for c in (before, after)),
            ]
            if before and after:
                target = _last(before)
                reached = min((rows for rows, value in after.items() if value <= target), default=None)
                line += [
                    f"{100 * (_last(after) / target - 1):+.2f}",
                    f"{reached / max(before):.0%}" if reached else "not",
                ]
            lines.append(line)
    headers = ["model", "task", *labels.values(), "change, %", f"rows to {labels['before']}'s last"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, stralign="right")


def _name(dataset: str) -> str:
    """Of a data set's folder: census for runs/census/data."""
    path = Path(dataset.partition(" ")[0])
    name = path.parent.name if path.name == "data" else path.name
    return re.sub(r"[^\w.-]", "_", name) or "data"


def _means(
    curves: Mapping[Key, Mapping[int, list[float]]], dataset: str, runs: Mapping[tuple[str, Key], int]
) -> dict[Key, Curve]:
    """The mean over seeds, at rows that all of them have been evaluated at."""
    return {
        key: {rows: mean(values) for rows, values in curve.items() if len(values) == runs[dataset, key]}
        for key, curve in curves.items()
    }


def _models(curves: Curves) -> dict[str, str]:
    """Model → colour, in the order of the command line."""
    names = dict.fromkeys(key.model for of_task in curves.values() for key in of_task)
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}


def _limit(axes: Axes, curves: Mapping[Key, Curve]) -> None:
    """Leaves out what curves begin with, where that would flatten the rest: values above all curves' second ones."""
    series = [[value for _, value in sorted(curve.items())] for curve in curves.values()]
    low = min(min(values) for values in series)
    high = max(max(values[1:] or values) for values in series)
    top = max(max(values) for values in series)
    room = ROOM * (high - low or 1.0)
    if top > high + (high - low):
        axes.set_ylim(low - room, high + 3 * room)
        axes.annotate(
            f"first values up to {top:.2f}",
            (0.98, 0.98),
            xycoords="axes fraction",
            ha="right",
            va="top",
            size=8,
            color="gray",
        )


def _last(curve: Curve) -> float:
    return curve[max(curve)]


if __name__ == "__main__":
    main()
