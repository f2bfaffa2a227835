"""Random draws and CSV files that the generated logs share."""

# Shapes: B rows.

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

Array = NDArray[Any]


def bias(logit_B: Array, weight_B: Array, rate: float) -> float:
    """The constant that, added to the logits, makes their weighted mean probability the rate; by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.average(sigmoid(logit_B + middle), weights=weight_B) < rate else (low, middle)
    return low


def zipf(count: int, power: float, head: float = 0.0) -> Array:
    """Shares of ranks 1..count, proportional to (rank + head)^-power: Zipf-Mandelbrot."""
    share = (np.arange(1, count + 1) + head) ** -power
    return share / share.sum()


def draw(rng: np.random.Generator, cdf: Array, count: int) -> Array:
    """Draws `count` indices; the last step of the cdf takes what rounding leaves above it."""
    return np.minimum(np.searchsorted(cdf, rng.random(count), side="right"), len(cdf) - 1)


def sigmoid(x: Array) -> Array:
    """Probabilities of logits."""
    return 1 / (1 + np.exp(-x))


def named(prefix: str, id_B: Array, missing_B: Array | None = None) -> pa.Array:
    """Ids as strings: 12 with prefix i is i12."""
    return pc.binary_join_element_wise(prefix, pa.array(id_B, mask=missing_B).cast(pa.string()), "")


def write_csv(path: Path, columns: dict[str, Any]) -> None:
    """A header line and the rows, nothing quoted; pyarrow quotes a header it writes itself."""
    with path.open("wb") as file:
        file.write((",".join(columns) + "\n").encode())
        options = pa.csv.WriteOptions(include_header=False, quoting_style="none")
        pa.csv.write_csv(pa.table(columns), file, options)
