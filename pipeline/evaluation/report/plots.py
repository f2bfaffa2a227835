"""The headline metric over training rows as a picture, for what shows no page: ne.png."""

import io

from matplotlib.figure import Figure

from features.printable import printable
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.report.results import Results
from pipeline.run.headline import HEADLINE
from pipeline.storage.files import storage_of

FILE = "ne.png"


def literal(text: str) -> str:
    """A text as matplotlib draws it character by character: $ begins no formula, control characters are escapes."""
    return printable(text).replace("$", r"\$")


def learning_curves(results: Results) -> Figure:
    """The headline metric of each task over training rows seen, with the best possible value as a dashed line."""
    kinds = results.kinds
    figure = Figure(figsize=(4.2 * len(kinds), 3.4), layout="constrained")
    for axes, (task, kind) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        name = HEADLINE[kind]
        axes.plot(
            [r["rows"] / 1e6 for r in results.records],
            [r["metrics"][task][name] for r in results.records],
            marker="o",
            label=f"model, {results.split}",
        )
        if results.oracle and (best := results.oracle[task][name]) is not None:
            axes.axhline(best, linestyle="--", color="tab:green", label=f"best possible {best:.3f}")
        axes.set(title=literal(task), xlabel="million training rows seen", ylabel=METRICS[kind][name].label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def write_curves(results: Results) -> None:
    """Writes ne.png into the run's folder."""
    image, path = io.BytesIO(), results.run.path / FILE
    learning_curves(results).savefig(image, format="png", dpi=120)
    storage_of(path).write(path, image.getvalue())
