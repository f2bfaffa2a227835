"""What is counted on the train split: values per embedding table and moments per dense feature; partial counts merge."""

import io
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from features.raw import SPLIT
from features.schema import Dense, Schema


def transformed(feature: Dense, values: np.ndarray) -> np.ndarray:
    """The feature's transform in float64; log1p keeps the sign, so that negative amounts stay numbers."""
    return np.sign(values) * np.log1p(np.abs(values)) if feature.transform == "log1p" else values


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of a dense feature after its transform (merged as in Chan et al. 1979)."""

    count: int = 0
    missing: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Moments of float64 values; NaN is missing."""
        present = values[~np.isnan(values)]
        if not present.size:
            return cls(missing=len(values))
        mean = float(present.mean())
        return cls(len(present), len(values) - len(present), mean, float(((present - mean) ** 2).sum()))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both parts' values together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count if count else 0.0
        squares = self.squares + other.squares + delta**2 * self.count * share
        return Moments(count, self.missing + other.missing, self.mean + delta * share, squares)

    @property
    def std(self) -> float:
        """Standard deviation of the present values, 0 where there are none or all are equal."""
        std = float(np.sqrt(self.squares / self.count)) if self.count else 0.0
        # The mean of equal values is off by its last digits: what that leaves is rounding, and no scale to divide by.
        return std if std > 1e-13 * abs(self.mean) else 0.0


@dataclass
class Statistics:
    """Counts of a part of the train split.

    Attributes:
        values: per table with a vocabulary, the frame (value, count).
        moments: per dense feature.
        numbers: per table of bins, and per piecewise number after its transform, the frame (value, count).
    """

    values: dict[str, pl.DataFrame] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    numbers: dict[str, pl.DataFrame] = field(default_factory=dict)

    @classmethod
    def of(cls, schema: Schema, rows: pl.DataFrame) -> "Statistics":
        """Statistics of the train rows among parsed rows."""
        rows = rows.filter(pl.col(SPLIT) == 0)
        columns: dict[str, list[pl.Series]] = {}
        numbers: dict[str, list[np.ndarray]] = {}
        for name, feature in schema.sparse.items():
            table = schema.all_tables[schema.table_of(name)]
            if table.bins:
                x_B = rows[feature.column or name].cast(pl.Float64).to_numpy()
                numbers.setdefault(schema.table_of(name), []).append(x_B)
            elif table.counted:
                column = rows[feature.column or name].cast(pl.String).alias("value")
                elements = bag_elements(schema, name, column).explode() if name in schema.bag else column
                columns.setdefault(schema.table_of(name), []).append(elements.drop_nulls())
        moments = {}
        for name, dense in schema.dense.items():
            x_B = transformed(dense, rows[dense.column or name].cast(pl.Float64).to_numpy())
            moments[name] = Moments.of(x_B)
            if dense.piecewise:
                numbers[name] = [x_B]
        values = {table: pl.concat(parts).value_counts() for table, parts in columns.items()}
        return cls(values, moments, {name: _counted(np.concatenate(parts)) for name, parts in numbers.items()})

    def merge(self, *others: "Statistics") -> "Statistics":
        """Statistics of all parts' rows together."""
        moments = dict(self.moments)
        for other in others:
            moments |= {name: moments.get(name, Moments()).merge(m) for name, m in other.moments.items()}
        parts = (self, *others)
        return Statistics(_summed([p.values for p in parts]), moments, _summed([p.numbers for p in parts]))

    def __getstate__(self) -> dict[str, object]:
        # Arrow IPC bytes: a pickled slice would carry its whole parent buffer from worker to worker.
        return {"values": _packed(self.values), "moments": self.moments, "numbers": _packed(self.numbers)}

    def __setstate__(self, state: dict) -> None:
        self.values, self.numbers = (
            {name: pl.read_ipc(io.BytesIO(data)) for name, data in state[key].items()} for key in ("values", "numbers")
        )
        self.moments = state["moments"]


def _packed(counts: dict[str, pl.DataFrame]) -> dict[str, bytes]:
    return {name: frame.write_ipc(None, compression="zstd").getvalue() for name, frame in counts.items()}


def _summed(parts: list[dict[str, pl.DataFrame]]) -> dict[str, pl.DataFrame]:
    names = {name: None for part in parts for name in part}
    return {
        name: pl.concat(part[name] for part in parts if name in part).group_by("value").agg(pl.col("count").sum())
        for name in names
    }


def _counted(values: np.ndarray) -> pl.DataFrame:
    return pl.Series("value", rounded(values[~np.isnan(values)])).value_counts()


def rounded(values: np.ndarray) -> np.ndarray:
    """Values rounded down to 16 binary digits: bins need no more, and so the counts of any amount of rows stay small.

    Down, so that a value lies in the bin that starts with what it was rounded to.
    """
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.floor(mantissa * 65536) / 65536, exponent) + 0.0  # -0.0 is 0.0


def bag_elements(schema: Schema, name: str, column: pl.Series) -> pl.Series:
    """Lists of a bag's values, cut to its `max_length`; missing and empty are empty lists."""
    feature = schema.bag[name]
    lists = column.fill_null("").str.split(feature.separator).list.eval(pl.element().filter(pl.element() != ""))
    return lists.list.head(feature.max_length)
