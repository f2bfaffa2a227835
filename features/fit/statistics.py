"""Statistics of rows: counts of values and numbers per feature, of labels per task; those of parts of the rows merge."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.fit.digest import Digest
from features.fit.label_scale import LabelMoments
from features.hashing import hash_strings
from features.kinds.bins import counted
from features.kinds.moments import LabelSums, Moments
from features.kinds.values import MISSING_MARKERS, float64
from features.schema.schema import Schema

# Shapes: B rows, T tasks, V distinct values, G groups.

GROUPS = 64  # of the values of a hashed feature, of which there are too many to count each
MARKERS = pa.array(MISSING_MARKERS, pa.large_string())
GROUP_SEED = 17  # apart from the buckets of its table


@dataclass
class Statistics:
    """Counts over a part of the rows.

    Counts do not depend on the order in which parts are merged; moments, digests and sums of labels do in their last digits.

    Attributes:
        rows: counted rows.
        missing: per feature, rows without a value (of a bag: with an empty list); per column of `Schema.kept`.
        values: per feature with a vocabulary, the frame (value, count).
        groups: per feature with a hash table, int64 counts of its values in GROUPS groups by another hash.
        moments: per dense feature, after its transform.
        raw: per dense feature and feature with a table of bins, moments before any transform.
        digests: as `raw`, what quantiles and histograms are made of.
        numbers: per table of bins, and per piecewise number after its transform, the frame (value, count).
        labels: of the tasks, in the schema's order.
        targets: per regression task, moments of its labels as they are learnt.
        markers: per feature with a hash table, how often it has values that look like missing ones, by value.
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
    targets: dict[str, LabelMoments] = field(default_factory=dict)
    markers: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, schema: Schema, rows: pa.Table) -> "Statistics":
        """Counts all rows of a table with a column for each feature, each `label.TASK`, and weight.

        Args:
            rows: as `features.parse.raw.parse` returns them, null (of a number also NaN) where missing.
        """
        found = cls(rows=rows.num_rows)
        for name, feature in schema.features.items():
            feature.count(name, rows[name].combine_chunks(), schema, found)
        found.missing |= {column: rows[column].null_count for column in schema.kept}
        label_BT = np.column_stack([float64(rows[f"label.{task}"].combine_chunks()) for task in schema.tasks])
        found.labels = LabelSums.of(label_BT)
        weight_B = float64(rows["weight"].combine_chunks())
        found.targets = {
            name: LabelMoments.of_labels(label_BT[:, t], weight_B, task)
            for t, (name, task) in enumerate(schema.tasks.items())
            if task.kind == "regression"
        }
        return found

    def count_number(self, name: str, values: pa.Array) -> np.ndarray:
        """Counts a feature's numbers, and returns those that are not missing in float64."""
        x_B = float64(values)
        present = x_B[~np.isnan(x_B)]
        self.missing[name] = len(x_B) - len(present)
        self.raw[name] = Moments.of(present)
        self.digests[name] = Digest(present)
        return present

    def add_numbers(self, table: str, present: np.ndarray) -> None:
        """Counts numbers for the edges of a table of bins, which may serve several features."""
        self.numbers = _summed([self.numbers, {table: counted(present)}])

    def count_values(self, name: str, values: pa.DictionaryArray, hashed: bool) -> int:
        """Counts a feature's values, of a `hashed` one in groups. Returns how many are not missing."""
        value_V, count_V = _frequencies(values)
        if hashed:
            group_V = (hash_strings(value_V, GROUP_SEED) % np.uint64(GROUPS)).astype(np.int64)
            self.groups[name] = np.bincount(group_V, count_V, GROUPS).astype(np.int64)
            odd = np.flatnonzero(pc.is_in(value_V, value_set=MARKERS).to_numpy(False))
            _add(
                self.markers.setdefault(name, {}),
                zip(value_V.take(pa.array(odd)).to_pylist(), count_V[odd].tolist(), strict=True),
            )
        else:
            frame = pl.DataFrame({"value": pl.from_arrow(value_V), "count": count_V})
            self.values[name] = frame.group_by("value").agg(pl.col("count").sum())
        return int(count_V.sum())

    def marker_counts(self, name: str) -> dict[str, int]:
        """How often an id feature has values that look like missing ones, by value."""
        if name not in self.values:
            return self.markers.get(name, {})
        found = self.values[name].filter(pl.col("value").is_in(MISSING_MARKERS))
        return dict(found.sort("value").iter_rows())

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
            for name, found in part.markers.items():
                _add(whole.markers.setdefault(name, {}), found.items())
            for name, moments in part.moments.items():
                whole.moments[name] = whole.moments.get(name, Moments()).merge(moments)
            for name, moments in part.raw.items():
                whole.raw[name] = whole.raw.get(name, Moments()).merge(moments)
            for name, digest in part.digests.items():
                digests.setdefault(name, []).append(digest)
            for name, target in part.targets.items():
                whole.targets[name] = whole.targets.get(name, LabelMoments()).merge(target)
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


def _add(counts: dict[str, int], more: Iterable[tuple[str, int]]) -> None:
    for value, count in more:
        counts[value] = counts.get(value, 0) + count


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
