"""What is counted over rows: values and numbers per feature, labels per task; counts of parts of the rows merge."""

import io
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.fit.digest import Digest
from features.hashing import hash_strings
from features.schema.kinds import Dense
from features.schema.schema import Schema

# Shapes: B rows, T tasks, V distinct values, G groups.
GROUPS = 64  # of the values of a hashed feature, of which there are too many to count each
GROUP_SEED = 17  # apart from the buckets of its table


def transformed(feature: Dense, values: np.ndarray) -> np.ndarray:
    """The feature's transform in float64; log1p keeps the sign, so that negative amounts stay numbers."""
    return np.sign(values) * np.log1p(np.abs(values)) if feature.transform == "log1p" else values


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of a number (merged as in Chan et al. 1979)."""

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
class LabelSums:
    """Sums over the rows where the tasks of a row i and a column j are both observed; on the diagonal, where one is.

    Without rows, each is a plain 0.

    Attributes:
        count_TT: such rows.
        sum_TT, square_TT: sums of the labels of i, and of their squares.
        product_TT: sums of the label of i times the label of j.
    """

    count_TT: np.ndarray = field(default_factory=lambda: np.zeros(()))
    sum_TT: np.ndarray = field(default_factory=lambda: np.zeros(()))
    square_TT: np.ndarray = field(default_factory=lambda: np.zeros(()))
    product_TT: np.ndarray = field(default_factory=lambda: np.zeros(()))

    @classmethod
    def of(cls, label_BT: np.ndarray) -> "LabelSums":
        """Sums of float64 labels; NaN is not observed."""
        observed_BT = ~np.isnan(label_BT)
        label_BT = np.where(observed_BT, label_BT, 0.0)
        ones_BT = observed_BT.astype(np.float64)
        label_TB = label_BT.T
        return cls(ones_BT.T @ ones_BT, label_TB @ ones_BT, label_TB**2 @ ones_BT, label_TB @ label_BT)

    def merge(self, other: "LabelSums") -> "LabelSums":
        """Sums over both parts' rows."""
        return LabelSums(
            self.count_TT + other.count_TT,
            self.sum_TT + other.sum_TT,
            self.square_TT + other.square_TT,
            self.product_TT + other.product_TT,
        )

    def correlations(self) -> np.ndarray:
        """Pearson correlation of each pair over the rows where both are observed; NaN where one is constant there.

        Returns: float64 of shape (T, T).
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_TT = self.sum_TT / self.count_TT
            variance_TT = self.square_TT / self.count_TT - mean_TT**2
            # What a constant label leaves is rounding.
            variance_TT = np.where(variance_TT > 1e-12 * self.square_TT / self.count_TT, variance_TT, np.nan)
            covariance_TT = self.product_TT / self.count_TT - mean_TT * mean_TT.T
            return np.clip(covariance_TT / np.sqrt(variance_TT * variance_TT.T), -1, 1)


@dataclass
class Statistics:
    """Counts over a part of the rows.

    Counts do not depend on the order in which parts are merged; moments, digests and sums of labels do in their last digits.

    Attributes:
        rows: counted rows.
        missing: per feature, rows without a value (of a bag: with an empty list).
        values: per feature with a vocabulary, the frame (value, count).
        groups: per feature with a hash table, int64 counts of its values in GROUPS groups by another hash.
        moments: per dense feature, after its transform.
        raw: per dense feature and feature with a table of bins, moments before any transform.
        digests: as `raw`, what quantiles and histograms are made of.
        numbers: per table of bins, and per piecewise number after its transform, the frame (value, count).
        labels: of the tasks, in the schema's order.
    """

    rows: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    values: dict[str, pl.DataFrame] = field(default_factory=dict)
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    raw: dict[str, Moments] = field(default_factory=dict)
    digests: dict[str, Digest] = field(default_factory=dict)
    numbers: dict[str, pl.DataFrame] = field(default_factory=dict)
    labels: LabelSums = field(default_factory=LabelSums)

    @classmethod
    def of(cls, schema: Schema, rows: pa.Table) -> "Statistics":
        """Counts all rows of a table with a column for each feature and each `label.TASK`.

        Args:
            rows: numbers (dense, and categorical with a table of bins) as float64, null or NaN where missing; other
                categorical features as dictionaries of strings, null where missing; bags as lists of such.
        """
        found = cls(rows=rows.num_rows)
        for name, dense in schema.dense.items():
            present = found._count_number(name, rows[name])
            changed = transformed(dense, present)
            found.moments[name] = replace(Moments.of(changed), missing=found.missing[name])
            if dense.piecewise:
                found.numbers[name] = _counted(changed)
        for name in schema.sparse:
            table = schema.all_tables[schema.table_of(name)]
            if table.bins:
                counts = {schema.table_of(name): _counted(found._count_number(name, rows[name]))}
                found.numbers = _summed([found.numbers, counts])
            else:
                found._count_values(name, rows[name], hashed=not table.counted)
        label_BT = np.column_stack([_floats(rows[f"label.{task}"]) for task in schema.tasks])
        found.labels = LabelSums.of(label_BT)
        return found

    def _count_number(self, name: str, column: pa.ChunkedArray) -> np.ndarray:
        """Counts a number, and gives the values that are there."""
        x_B = _floats(column)
        present = x_B[~np.isnan(x_B)]
        self.missing[name] = len(x_B) - len(present)
        self.raw[name] = replace(Moments.of(present), missing=self.missing[name])
        self.digests[name] = Digest(present)
        return present

    def _count_values(self, name: str, column: pa.ChunkedArray, hashed: bool) -> None:
        array = column.combine_chunks()
        single = pa.types.is_dictionary(array.type)
        value_V, count_V = _frequencies(array if single else array.flatten())
        empty = len(array) - count_V.sum() if single else pc.sum(pc.equal(pc.list_value_length(array), 0)).as_py() or 0
        self.missing[name] = int(empty)
        if hashed:
            group_V = (hash_strings(value_V, GROUP_SEED) % np.uint64(GROUPS)).astype(np.int64)
            self.groups[name] = np.bincount(group_V, count_V, GROUPS).astype(np.int64)
        else:
            frame = pl.DataFrame({"value": pl.from_arrow(value_V), "count": count_V})
            self.values[name] = frame.group_by("value").agg(pl.col("count").sum())

    def table_values(self, schema: Schema, table: str) -> pl.DataFrame:
        """The frame (value, count) of all features of a table with a vocabulary together."""
        features = [name for name in schema.sparse if schema.table_of(name) == table and name in self.values]
        empty = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
        return _summed([{table: empty}, *({table: self.values[name]} for name in features)])[table]

    def merge(self, *others: "Statistics") -> "Statistics":
        """Statistics of all parts' rows together."""
        parts = (self, *others)
        whole = Statistics(
            rows=sum(part.rows for part in parts),
            values=_summed([part.values for part in parts]),
            numbers=_summed([part.numbers for part in parts]),
        )
        digests: dict[str, list[Digest]] = {}
        for part in parts:
            for name, count in part.missing.items():
                whole.missing[name] = whole.missing.get(name, 0) + count
            for name, count_G in part.groups.items():
                whole.groups[name] = whole.groups.get(name, 0) + count_G
            for name, moments in part.moments.items():
                whole.moments[name] = whole.moments.get(name, Moments()).merge(moments)
            for name, moments in part.raw.items():
                whole.raw[name] = whole.raw.get(name, Moments()).merge(moments)
            for name, digest in part.digests.items():
                digests.setdefault(name, []).append(digest)
            whole.labels = whole.labels.merge(part.labels)
        whole.digests = {name: found[0].merge(*found[1:]) for name, found in digests.items()}
        return whole

    def __getstate__(self) -> dict[str, object]:
        # Arrow IPC bytes: a pickled slice would carry its whole parent buffer from worker to worker.
        return self.__dict__ | {"values": _packed(self.values), "numbers": _packed(self.numbers)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self.values, self.numbers = (
            {name: pl.read_ipc(io.BytesIO(data)) for name, data in state[key].items()} for key in ("values", "numbers")
        )


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers in float64, NaN for null."""
    return column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64, copy=False)


def _frequencies(elements: pa.DictionaryArray) -> tuple[pa.Array, np.ndarray]:
    """The values that a dictionary array holds, and how often; a value that is twice in the dictionary comes twice.

    Returns: large strings without nulls, and int64 of shape (V,).
    """
    index = elements.indices.drop_null().to_numpy()
    count_V = np.bincount(index, minlength=len(elements.dictionary)).astype(np.int64)
    used_V = (count_V > 0) & elements.dictionary.is_valid().to_numpy(zero_copy_only=False)
    return elements.dictionary.cast(pa.large_string()).filter(pa.array(used_V)), count_V[used_V]


def _packed(counts: dict[str, pl.DataFrame]) -> dict[str, bytes]:
    return {name: frame.write_ipc(None).getvalue() for name, frame in counts.items()}


def _summed(parts: list[dict[str, pl.DataFrame]]) -> dict[str, pl.DataFrame]:
    names = {name: None for part in parts for name in part}
    return {
        name: pl.concat(part[name] for part in parts if name in part).group_by("value").agg(pl.col("count").sum())
        for name in names
    }


def _counted(present: np.ndarray) -> pl.DataFrame:
    return pl.Series("value", rounded(present)).value_counts().cast({"count": pl.Int64})


def rounded(values: np.ndarray) -> np.ndarray:
    """Values rounded down to 16 binary digits: bins need no more, and so the counts of any amount of rows stay small.

    Down, so that a value lies in the bin that starts with what it was rounded to.
    """
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.floor(mantissa * 65536) / 65536, exponent) + 0.0  # -0.0 is 0.0
