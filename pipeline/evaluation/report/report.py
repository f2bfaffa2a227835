"""What a person sees of an evaluation: a table, a picture of NE over rows seen, and a page that holds both."""

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from tabulate import tabulate

from features.schema.schema import Split
from pipeline.evaluation import expert_weights
from pipeline.evaluation.oracle import best_path
from pipeline.run import records
from pipeline.run.run import Run
from pipeline.storage.files import write_text

matplotlib.use("Agg")
COLUMNS = {
    "binary": {"ne": "NE", "auc": "AUC", "calibration": "calib"},
    "regression": {"nrmse": "NRMSE", "r2": "R2"},
}


def evaluated(run: Run, split: Split, dataset: Path) -> list[dict[str, Any]]:
    """The records of a dataset's split, one for each step, in order."""
    return list(records.latest(run, split, str(dataset.absolute())).values())


def best(run: Run, split: Split, dataset: Path) -> dict[str, dict[str, Any]] | None:
    """Metrics of the true probabilities, where the log was generated and they are known."""
    path = best_path(run, split)
    known = json.loads(path.read_text()) if path.exists() else {}
    return known["metrics"] if known.get("dataset") == str(dataset.absolute()) else None


def table(run: Run, split: Split, dataset: Path, style: str = "simple") -> str:
    """Per checkpoint and task: NE, AUC, calibration; NRMSE and R2 for regression; then the best possible and the share of
    the way from NE 1 to it that the last checkpoint has closed."""
    kinds = {name: task.kind for name, task in run.schema().tasks.items()}
    header = [
        "step",
        "rows seen",
        *(f"{task}\n{word}" for task, kind in kinds.items() for word in COLUMNS[kind].values()),
    ]
    found = evaluated(run, split, dataset)
    lines = [[f"{r['step']:,}", f"{r['rows']:,}", *_cells(r["metrics"], kinds)] for r in found]
    if (limit := best(run, split, dataset)) and found:
        lines.append(["best", "possible", *_cells(limit, kinds)])
        lines.append(
            [
                "gap",
                "closed",
                *(
                    _closed(found[-1]["metrics"][t], limit[t], key)
                    for t, kind in kinds.items()
                    for key in COLUMNS[kind]
                ),
            ]
        )
    return tabulate(lines, header, tablefmt=style, disable_numparse=True, stralign="right")


def closed(metrics: dict[str, Any], limit: dict[str, Any], key: str = "ne") -> float | None:
    """Share of the way from 1, which knows nothing, to the best possible value of `key`."""
    if metrics[key] is None or limit[key] is None or limit[key] == 1:
        return None
    return (1 - metrics[key]) / (1 - limit[key])


def _closed(metrics: dict[str, Any], limit: dict[str, Any], key: str) -> str:
    share = closed(metrics, limit, key) if key in ("ne", "nrmse") else None
    return "" if share is None else f"{share:.0%}"


def _cells(metrics: dict[str, dict[str, Any]], kinds: Mapping[str, str]) -> list[str]:
    values = [metrics[task][key] for task, kind in kinds.items() for key in COLUMNS[kind]]
    return ["-" if value is None else f"{value:.4f}" for value in values]


def picture(run: Run, split: Split, dataset: Path) -> Figure:
    """NE (regression: NRMSE) of each task over training rows seen, with the best possible as a dashed line."""
    kinds = {name: task.kind for name, task in run.schema().tasks.items()}
    found, limit = evaluated(run, split, dataset), best(run, split, dataset)
    figure = Figure(figsize=(4.2 * len(kinds), 3.4), layout="constrained")
    for axes, (task, kind) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        key = "ne" if kind == "binary" else "nrmse"
        axes.plot(
            [r["rows"] / 1e6 for r in found],
            [r["metrics"][task][key] for r in found],
            marker="o",
            label=f"model, {split}",
        )
        if limit and limit[task][key] is not None:
            axes.axhline(
                limit[task][key], linestyle="--", color="tab:green", label=f"best possible {limit[task][key]:.3f}"
            )
        axes.set(
            title=task,
            xlabel="million training rows seen",
            ylabel="Normalized Entropy" if kind == "binary" else "NRMSE",
        )
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def write(run: Run, split: Split, dataset: Path) -> None:
    """Writes report.html, which needs nothing beside it, ne.png, and gates.png for a model with gates."""
    image = _drawn(picture(run, split, dataset), run.path / "ne.png")
    found, gate_image = evaluated(run, split, dataset), ""
    if found and (means := found[-1].get("gates")):
        drawn = _drawn(expert_weights.picture(means, list(run.schema().tasks)), run.path / "gates.png")
        gate_image = f"""<p>Mean weight of each expert, step {found[-1]["step"]:,}.</p>
<img alt="mean gate weights" src="data:image/png;base64,{drawn}">"""
    name = html.escape(str(run.path))
    page = f"""<!doctype html><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 15px sans-serif; margin: 2em; }}
td, th {{ padding: .2em .8em; text-align: right; }}
img {{ max-width: 100%; }}
</style>
<h1>{name}</h1>
<p>Split {split} of {html.escape(str(dataset))}.
NE: log loss over the entropy of the base rate; 1 knows nothing, lower is better.</p>
<img alt="NE over rows seen" src="data:image/png;base64,{image}">
{gate_image}
{table(run, split, dataset, "html").replace(chr(10), " ")}
"""
    write_text(run.report, page)


def _drawn(figure: Figure, path: Path) -> str:
    """Saves a picture, and gives it for a page to hold."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    path.write_bytes(image.getvalue())
    return base64.b64encode(image.getvalue()).decode()
