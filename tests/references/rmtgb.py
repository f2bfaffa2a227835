"""Reference of R-MTGB: float64, one row, task and split at a time, from the blocks' definition; no import from pipeline/."""

# Shapes: N rows, T tasks, D columns, K functions: shared, regular, outlier, one a task.

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def prediction(base: float, values: Sequence[float], theta: float, task: int) -> float:
    """F_t(x) = base_t + shared + (1 - s_t) regular + s_t outlier + own_t."""
    shared, regular, outlier, *own = values
    s = sigmoid(theta)
    return base + shared + (1 - s) * regular + s * outlier + own[task]


def loss(raw: float, label: float, binary: bool) -> float:
    """-y log p - (1 - y) log(1 - p), or half the squared error."""
    if not binary:
        return 0.5 * (raw - label) ** 2
    p = sigmoid(raw)
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


def total(
    base: Sequence[float], values: Matrix, theta: Sequence[float], labels: Matrix, weights: Sequence[float],
    binary: Sequence[bool],
) -> float:  # fmt: skip
    """The weighted loss of all rows over the tasks that are observed on them."""
    found = 0.0
    for row, label_T in enumerate(labels):
        for task, label in enumerate(label_T):
            if not math.isnan(label):
                raw = prediction(base[task], values[row], theta[task], task)
                found += weights[row] * loss(raw, label, binary[task])
    return found


def row_terms(
    base: Sequence[float], values: Matrix, theta: Sequence[float], labels: Matrix, weights: Sequence[float],
    binary: Sequence[bool], row: int, function: int,
) -> tuple[float, float]:  # fmt: skip
    """A row's gradient for one function: its tasks' residuals times the function's weight; and its curvature, unscaled."""
    gradient = curvature = 0.0
    for task, label in enumerate(labels[row]):
        s = sigmoid(theta[task])
        scale = {0: 1.0, 1: 1 - s, 2: s}.get(function, 1.0 if function == 3 + task else 0.0)
        if math.isnan(label) or scale == 0:
            continue
        raw = prediction(base[task], values[row], theta[task], task)
        mean = sigmoid(raw) if binary[task] else raw
        gradient += weights[row] * scale * (mean - label)
        curvature += weights[row] * (mean * (1 - mean) if binary[task] else 1.0)
    return gradient, curvature


def grown(
    rows: Sequence[int],
    columns: Matrix,
    gradient: Sequence[float],
    curvature: Sequence[float],
    leaves: int,
    min_rows: int,
) -> list[list[int]]:
    """The leaves, as rows, of the tree whose every split, the best of all leaves first, gains most.

    Gain: G_l^2 / H_l + G_r^2 / H_r - G^2 / H, over all columns and all values of them; ties do not occur in drawn numbers.
    """

    def worth(part: Sequence[int]) -> float:
        return sum(gradient[n] for n in part) ** 2 / sum(curvature[n] for n in part)

    def best(part: list[int]) -> tuple[float, list[int], list[int]]:
        found: tuple[float, list[int], list[int]] = (0.0, [], [])
        for column in range(len(columns[0])):
            for value in sorted({columns[n][column] for n in part}):
                left = [n for n in part if columns[n][column] <= value]
                right = [n for n in part if columns[n][column] > value]
                if min(len(left), len(right)) >= min_rows:
                    gain = worth(left) + worth(right) - worth(part)
                    if gain > found[0]:
                        found = (gain, left, right)
        return found

    parts = [list(rows)]
    while len(parts) < leaves:
        gain, part, left, right = max(((*best(p)[:1], p, *best(p)[1:]) for p in parts), key=lambda x: x[0])
        if gain <= 0:
            break
        parts.remove(part)
        parts += [left, right]
    return parts
