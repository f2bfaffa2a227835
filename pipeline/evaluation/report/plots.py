"""Pictures of a run's evaluations: the headline metric over training rows, and the mean weight of each expert."""

import torch
from matplotlib.figure import Figure

from features.printable import printable
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.report.results import Results
from pipeline.run.headline import HEADLINE


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


def expert_heat_map(means: list[list[list[float]]], tasks: list[str]) -> Figure:
    """Mean gate weights as a heat map a level (AdaTT, figure 3): experts across, units down.

    Units are named by task where there are as many of them, or one more: the shared unit.
    """
    figure = Figure(figsize=(1 + 4.4 * len(means), 3.2), layout="constrained")
    for level, (axes, mean_UE) in enumerate(zip(figure.subplots(1, len(means), squeeze=False)[0], means, strict=True)):
        units, experts = len(mean_UE), len(mean_UE[0])
        names = (
            [*map(literal, tasks), "shared"][:units] if 0 <= units - len(tasks) <= 1 else [str(u) for u in range(units)]
        )
        image = axes.imshow(torch.tensor(mean_UE).numpy(), aspect="auto", cmap="viridis")
        axes.set(title=f"level {level + 1}", xlabel="expert", yticks=range(units), yticklabels=names)
        axes.set_xticks(range(experts) if experts <= 16 else range(0, experts, experts // 8))
        if units * experts <= 64:
            top = max(max(row) for row in mean_UE)
            for u, row in enumerate(mean_UE):
                for e, weight in enumerate(row):
                    axes.text(e, u, f"{weight:.2f}", ha="center", va="center", size=8,
                              color="black" if weight > top / 2 else "white")  # fmt: skip
        figure.colorbar(image, ax=axes)
    return figure
