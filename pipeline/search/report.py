"""A comparison as tables, as Parquet, as a picture and as a page."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure
from tabulate import tabulate

from features.printable import printable
from pipeline.evaluation.compared_runs import model_at
from pipeline.evaluation.follow import EvaluateConfig, dataset_of
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.report import page
from pipeline.evaluation.report.content import Model
from pipeline.evaluation.report.plots import literal
from pipeline.run.headline import HEADLINE, RANKING
from pipeline.run.run import Run
from pipeline.search.comparison import PAIRED, SHARES, Entry, differences
from pipeline.storage.files import write_json, write_text
from pipeline.storage.local import replacing
from pipeline.terminal import short_decimal

PAGE = "Seed 0 of each model, at the checkpoint that early stopping keeps; compare.md has all seeds, their hours, and trees."
HOURS = {"hours": "hours", "search_hours": "search"}  # of a seed's record: column of the cost table


def write(entries: Sequence[Entry], baseline: Entry, tasks: Mapping[str, str], folder: Path) -> None:
    """Writes compare.json (the runs' records), compare.parquet, compare.png, compare.md and compare.html."""
    write_json(folder / "compare.json", {entry.name: entry.runs for entry in entries})
    parquet(entries, baseline, tasks, folder / "compare.parquet")
    with replacing(folder / "compare.png") as temporary:
        picture(entries, baseline, tasks).savefig(temporary, format="png", dpi=120)
    write_text(folder / "compare.md", tables(entries, baseline, tasks, "github") + "\n")
    models = {entry.name: _first_run(entry, tasks, folder) for entry in entries if "step" in entry.runs[0]}
    page.write_comparison(list(models.values()), models[baseline.name], folder / "compare.html", PAGE)


def _first_run(entry: Entry, tasks: Mapping[str, str], folder: Path) -> Model:
    run = Run(folder / entry.runs[0]["run"])
    rows = dataset_of(run, EvaluateConfig(run=run.path)).name
    return replace(model_at(run, entry.runs[0]["step"], "test", rows, tasks, folder / "compare.html"), name=entry.name)


def tables(entries: Sequence[Entry], baseline: Entry, tasks: Mapping[str, str], style: str) -> str:
    """Three tables: quality, cost (hours: core-hours of all training of a seed, search: of its search alone, means over seeds),
    and the difference to the baseline in the course of training.

    Args:
        style: of tabulate; github is Markdown, in which names stay text whatever is in them.
    """

    def shown(name: str) -> str:
        text = printable(name)
        return re.sub(r"[&<>|\[\]`*~\\]", lambda found: f"&#{ord(found[0])};", text) if style == "github" else text

    columns = [(task, kind, names[kind]) for names in (RANKING, HEADLINE) for task, kind in tasks.items()]
    quality, cost, early = [], [], []
    for entry in entries:
        cells = [_mean([run["metrics"][task][name] for run in entry.runs]) for task, _, name in columns]
        gaps = differences(entry, baseline, tasks).values()
        cells += ["" if entry is baseline else f"{mean:+.2f} ±{half:.2f}" for mean, half in gaps]
        quality.append([shown(entry.name), *cells])
        counts = [
            f"{entry.cost[key]:,.0f}" if entry.cost else ""
            for key in ("parameters", "table_parameters", "flops_per_row")
        ]
        rate = f"{statistics.median(run['rows_per_s'] for run in entry.runs):,.0f}"
        cost.append([shown(entry.name), *counts, rate, *(_hours(entry, key) for key in HOURS)])
        if entry.runs[0].get("early") and entry is not baseline:
            early.append([shown(entry.name), *(_early(entry, baseline, task, kind, at) for task, kind in tasks.items()
                                        for at in range(len(SHARES) + 1))])  # fmt: skip
    headers = [f"{METRICS[kind][name].label} {shown(task)}" for task, kind, name in columns]
    headers += [f"{PAIRED[kind]} % {shown(task)}" for task, kind in tasks.items()]
    shares = [*(f"{round(share * 7)}/7" for share in SHARES), "all"]
    parts = [f"{shown(task)} {share}" for task in tasks for share in shares]
    return "\n\n".join(
        tabulate(lines, header, tablefmt=style, disable_numparse=True, stralign="right")
        for lines, header in (
            (quality, ["model", *headers]),
            (cost, ["model", "parameters", "in tables", "FLOPs/row", "rows/s", *HOURS.values()]),
            (early, [f"NE % to {shown(baseline.name)} after", *parts]),
        )
        if lines
    )


def parquet(entries: Sequence[Entry], baseline: Entry, tasks: Mapping[str, str], path: Path) -> None:
    """A row a model, seed, task and share of the training rows: every metric, and the model's difference and cost."""
    lines = []
    for entry in entries:
        gap = differences(entry, baseline, tasks)
        for seed, run in enumerate(entry.runs):
            cost = entry.cost | {"rows_per_s": run["rows_per_s"], **{key: run.get(key) for key in HOURS}}
            for share, metrics in [("chosen", run["metrics"]), *run.get("early", {}).items()]:
                for task in tasks:
                    known = {"difference_percent": gap[task][0], "half_interval_percent": gap[task][1], **cost}
                    lines.append(
                        {"model": entry.name, "seed": seed, "at": share, "task": task, **metrics[task], **known}
                    )
    with replacing(path) as temporary:
        floats = dict.fromkeys(HOURS, pl.Float64)  # where no model has any
        pl.DataFrame(lines, infer_schema_length=None, schema_overrides=floats).write_parquet(temporary)


def picture(entries: Sequence[Entry], baseline: Entry, tasks: Mapping[str, str]) -> Figure:
    """The differences to the baseline with their intervals, a panel a task; left of 0 is better."""
    others = [entry for entry in entries if entry is not baseline]
    gaps = [differences(entry, baseline, tasks) for entry in others]
    figure = Figure(figsize=(1.6 + 3.2 * len(tasks), 1.4 + 0.28 * len(others)), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, (task, kind) in zip(panels, tasks.items(), strict=True):
        for place, gap in enumerate(gaps):
            mean, half = gap[task]
            color = "tab:green" if mean + half < 0 else "tab:red" if mean - half > 0 else "tab:gray"
            axes.errorbar(mean, place, xerr=half, fmt="o", color=color, capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=literal(task), xlabel=f"{PAIRED[kind]} to {literal(baseline.name)}, %")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(others)), [literal(entry.name) for entry in others])
    panels[0].invert_yaxis()
    return figure


def _early(entry: Entry, baseline: Entry, task: str, kind: str, at: int) -> str:
    """Difference in percent of the mean over seeds, after a share of the training rows."""
    ours, theirs = (
        statistics.mean(list(run["early"].values())[at][task][HEADLINE[kind]] for run in e.runs)
        for e in (entry, baseline)
    )
    power = 1 if kind == "binary" else 2  # MSE, as in `differences`
    return f"{100 * (ours**power / theirs**power - 1):+.2f}"


def _hours(entry: Entry, key: str) -> str:
    """The mean over seeds; empty where a run has none, as trees."""
    values = [value for run in entry.runs if (value := run.get(key)) is not None]
    return short_decimal(statistics.mean(values)) if values else ""


def _mean(values: list[float]) -> str:
    deviation = f"±{short_decimal(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{short_decimal(statistics.mean(values))}{deviation}"
