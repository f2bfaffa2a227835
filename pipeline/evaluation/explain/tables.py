"""Tables of an explanation for a terminal."""

# Shapes: T tasks.

from collections.abc import Iterator

from tabulate import tabulate

from features.printable import printable
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.run.explanation import Affinity, Explanation, Rise

LABELS = {name: metric.label for metrics in METRICS.values() for name, metric in metrics.items()}


def tables(explanation: Explanation) -> str:
    """Importance of features, the largest mean rise over tasks first, then affinity of tasks where there is one."""
    return "\n\n".join(_parts(explanation))


def _parts(explanation: Explanation) -> Iterator[str]:
    figures = explanation.figures
    header = ["permuted", *(f"{printable(task)}\n{LABELS[found.metric]}" for task, found in figures.items())]
    lines = [["nothing", *("-" if found.value is None else f"{found.value:.4f}" for found in figures.values())]]
    lines += [[printable(e.name), *(_rise(e.tasks[task]) for task in figures)] for e in explanation.importance]
    yield f"Rise of each figure when a feature's values are permuted (± {100 * explanation.confidence:.6g}% interval):"
    yield _table(lines, header)
    if reasons := [f"{printable(task)} ({found.why})" for task, found in figures.items() if found.why]:
        yield f"Undefined: {', '.join(reasons)}."
    if explanation.affinity is not None:
        yield "Task affinity: 1 - loss after / loss before, of the column's task after a step on the row's:"
        yield _affinity(explanation.affinity)


def _rise(rise: Rise) -> str:
    if rise.value is None:
        return "-"
    return f"{rise.value:+.4f}" + ("" if rise.high is None else f" ±{rise.high - rise.value:.4f}")


def _affinity(affinity: Affinity) -> str:
    names = [printable(task) for task in affinity.tasks]
    lines = [
        [name, *map(_share, z_T, se_T)] for name, z_T, se_T in zip(names, affinity.z_TT, affinity.se_TT, strict=True)
    ]
    return _table(lines, ["step on", *names])


def _share(z: float | None, se: float | None) -> str:
    return "-" if z is None else f"{z:+.1e}" + ("" if se is None else f" (se {se:.0e})")


def _table(lines: list[list[str]], header: list[str]) -> str:
    align = ("left", *["right"] * (len(header) - 1))
    return tabulate(lines, header, tablefmt="simple", disable_numparse=True, colalign=align)
