"""The quick way for features of one column: an id, the ids of a list, a number or a vector of each row's own value.

What it does not know (values of other types, and those to be refused) goes the exact way.
"""

# Shapes: B rows, V items of all lists, L length of a vector.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.fit.encoders import MISSING, Encoders
from features.kinds.bag import Bag
from features.kinds.categorical import Categorical
from features.kinds.dense import Dense
from features.kinds.values import LARGEST
from features.kinds.vector import Vector
from features.parse.convert import is_list
from features.schema.schema import Schema
from features.source import RawType
from pipeline.serving.encoded import Parts
from pipeline.serving.exact import Exact
from pipeline.serving.given import Column, Given
from pipeline.serving.memo import Memo
from pipeline.serving.row_error import RowError
from pipeline.serving.values import MAX_ITEMS

REMEMBERED = 1 << 18  # values of all columns: some 150 bytes each with their place in a dict, and at most 400
FEWEST = 1024  # of a column

Place = tuple[str, str, bool]  # a column, the table of its values, and whether these are items of lists


@dataclass
class Plan:
    """How some features are encoded, by the columns that they are made of.

    Attributes:
        ids, lists: with the ids that are known. computed: columns, and ids of what is computed of them alone, as far as these
            are known. rest: the features that are encoded the exact way.
    """

    ids: list[tuple[str, Memo, list[str]]] = field(default_factory=list)
    lists: list[tuple[str, Memo, list[str]]] = field(default_factory=list)
    numbers: list[tuple[str, list[str]]] = field(default_factory=list)
    vectors: list[tuple[str, list[str]]] = field(default_factory=list)
    computed: list[tuple[str, Memo, str]] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)


class Direct:
    """Encodes features of one column each.

    Attributes:
        memos: the ids that are known.
    """

    def __init__(self, schema: Schema, encoders: Encoders, exact: Exact, kinds: dict[str, RawType]) -> None:
        self.schema, self._encoders, self._exact, self._kinds = schema, encoders, exact, kinds
        self.memos: dict[Place, Memo] = {}
        sparse = [name for name in schema.sparse if self._way(name) in ("ids", "lists")]
        for name in sparse:
            own = self._exact_items if name in schema.lists else self._exact_ids
            self.memos.setdefault(self._place(name), Memo(partial(own, name), max(FEWEST, REMEMBERED // len(sparse))))
        # Requests of one second share the hour: each would take longer to compute it than for all of the rest.
        self._computed = {
            name: Memo(partial(self._exact_ids, name), max(FEWEST, REMEMBERED // len(schema.sparse)), missing=False)
            for name in schema.single
            if self._way(name) == "computed"
        }

    def plan(self, names: Iterable[str]) -> Plan:
        """How features are encoded."""
        plan, ways = Plan(), dict[str, dict[Any, list[str]]]()
        for name in names:
            if (way := self._way(name)) == "rest":
                plan.rest.append(name)
            elif way == "computed":
                plan.computed.append((self._exact.reads[name][0], self._computed[name], name))
            else:
                key = self._place(name) if way in ("ids", "lists") else self._exact.reads[name][0]
                ways.setdefault(way, {}).setdefault(key, []).append(name)
        plan.ids, plan.lists = (
            [(place[0], self.memos[place], found) for place, found in ways.get(way, {}).items()]
            for way in ("ids", "lists")
        )
        plan.numbers, plan.vectors = (list(ways.get(way, {}).items()) for way in ("numbers", "vectors"))
        return plan

    def encode(self, plan: Plan, given: Given) -> Parts:
        """Features of rows. Raises RowError."""
        parts, rest, new = Parts(), list(plan.rest), list[tuple[Memo, Sequence[Any], str]]()
        for name, memo, features in plan.ids:
            column = self._column(given, name)
            id_B = memo.of_values(column.values) if column.values is not None else None
            parts.id_B |= dict.fromkeys(features, memo.ids(column.array) if id_B is None else id_B)
        for name, memo, features in plan.lists:
            if (found := _ids_of_lists(memo, self._column(given, name))) is None:
                rest += features
            else:
                parts.lists |= {each: _cut(*found, self.schema.lists[each].max_length) for each in features}  # type: ignore[attr-defined]
        for name, features in plan.numbers:
            if (x_B := _numbers(self._column(given, name).array, self._kinds[name])) is None:
                rest += features
            else:
                self._add_numbers(parts, features, x_B)
        for name, features in plan.vectors:
            for each in features:
                vector: Any = self.schema.features[each]
                if (numbers := _vectors(vector, self._column(given, name).array)) is None:
                    rest.append(each)
                else:
                    parts.numbers[each] = numbers
        for name, memo, feature in plan.computed:
            values = self._column(given, name).values
            if values is not None and (id_B := memo.of_values(values)) is not None:
                parts.id_B[feature] = id_B
            else:
                rest.append(feature)
                new += [(memo, values, feature)] if values is not None else []
        if rest:
            used = {column for name in rest for column in self._exact.reads[name]}
            parts.add(self._exact.encode(rest, {c: self._column(given, c).array for c in used}, given.rows))
        for memo, values, feature in new:
            memo.learn(values, parts.id_B[feature])
        return parts

    def _way(self, name: str) -> str:
        """The list of a plan that a feature belongs to."""
        feature, schema = self.schema.features[name], self.schema
        if name not in schema.histories and schema.raw[name].column in schema.source.derived:
            alone = len(self._exact.reads[name]) == 1 and self._exact.reads[name][0] not in schema.added_columns
            return "computed" if alone and type(feature) is Categorical and not feature.binned(schema) else "rest"
        if type(feature) is Bag:
            return "lists"
        if type(feature) is Vector:
            return "vectors"
        if type(feature) is Dense or (type(feature) is Categorical and feature.binned(schema)):
            return "numbers"
        is_id = type(feature) is Categorical and schema.raw[name].column not in schema.added_columns
        return "ids" if is_id else "rest"

    def _place(self, name: str) -> Place:
        return self._exact.reads[name][0], self.schema.table_of(name), name in self.schema.lists

    def _column(self, given: Given, name: str) -> Column:
        found = given.columns.get(name)
        return Column(None, self._exact.absent(name, given.rows)) if found is None else found

    def _add_numbers(self, parts: Parts, features: Iterable[str], x_B: np.ndarray) -> None:
        for name in features:
            feature = self.schema.features[name]
            if isinstance(feature, Dense):
                parts.numbers[name] = feature.numbers(name, x_B, self._encoders)
            else:
                parts.id_B[name] = self._encoders.bins(self.schema.table_of(name), x_B)

    def _exact_ids(self, name: str, values: pa.Array) -> np.ndarray:
        """Ids of values of a feature's column."""
        return self._exact.encode([name], {self._exact.reads[name][0]: values}, len(values)).id_B[name]

    def _exact_items(self, name: str, values: pa.Array) -> np.ndarray:
        """Ids of items of a feature's lists, MISSING of those that are left out."""
        lists = pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1), pa.int32()), values)
        id_V, length_V = self._exact.encode([name], {self._exact.reads[name][0]: lists}, len(values)).lists[name]
        found = np.full(len(values), MISSING)
        found[length_V > 0] = id_V
        return found


def _ids_of_lists(memo: Memo, column: Column) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids of the items of B lists, and how many each has; None for what is no list, or too long a one. Raises RowError."""
    if column.values is not None and {*map(type, column.values)} <= {list, type(None)}:
        lists: list[Sequence[Any]] = [each or () for each in column.values]
        length_B = np.fromiter(map(len, lists), np.int64, len(lists))
        if length_B.max(initial=0) <= MAX_ITEMS and (id_V := memo.of_values([*chain.from_iterable(lists)])) is not None:
            return _present(id_V, length_B)
    values = column.array
    if pa.types.is_null(values.type):
        return np.zeros(0, np.int64), np.zeros(len(values), np.int64)
    if not is_list(values.type):
        return None
    length_B = pc.list_value_length(values).fill_null(0).to_numpy().astype(np.int64)
    if length_B.max(initial=0) > MAX_ITEMS:
        return None
    try:
        return _present(memo.ids(values.flatten()), length_B)
    except RowError as error:
        row = int(np.searchsorted(np.cumsum(length_B), error.row or 0, side="right"))
        raise RowError(row, error.field, f"item {error.reason}") from None


def _present(id_V: np.ndarray, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists without missing items."""
    kept_V = id_V != MISSING
    if kept_V.all():
        return id_V, length_B
    row_V = np.repeat(np.arange(len(length_B)), length_B)
    return id_V[kept_V], np.bincount(row_V[kept_V], minlength=len(length_B))


def _cut(id_V: np.ndarray, length_B: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The first items of lists."""
    if length_B.max(initial=0) <= most:
        return id_V, length_B
    start_B = np.cumsum(length_B) - length_B
    kept_V = np.arange(len(id_V)) - np.repeat(start_B, length_B) < most
    return id_V[kept_V], np.minimum(length_B, most)


def _numbers(values: pa.Array, kind: RawType) -> np.ndarray | None:
    """Float64 of shape (B,), NaN where missing; None for values that are read by way of text, or refused."""
    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan)
    if not _is_plain(values.type) or kind == "time" or (kind == "int" and pa.types.is_floating(values.type)):
        return None
    x_B = values.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return None if (np.abs(x_B) > LARGEST).any() else x_B


def _is_plain(kind: pa.DataType) -> bool:
    """Whether numpy has the numbers of a type as a log has them."""
    return (pa.types.is_floating(kind) and kind != pa.float16()) or (pa.types.is_integer(kind) and kind != pa.uint64())


def _vectors(vector: Vector, values: pa.Array) -> list[np.ndarray] | None:
    """What `Vector.decode` gives for B lists of numbers; None for others, and those of another length."""
    x_BL = np.zeros((len(values), vector.length), np.float32)
    missing_B = values.is_null().to_numpy(zero_copy_only=False)
    if not pa.types.is_null(values.type):
        if not is_list(values.type) or not _is_plain(values.type.value_type):
            return None
        length_B, number_V = pc.list_value_length(values).fill_null(0).to_numpy(), values.flatten()
        if number_V.null_count or not (missing_B | (length_B == vector.length)).all():
            return None
        x_V = number_V.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
        if not (np.abs(x_V) <= LARGEST).all():
            return None
        x_BL[~missing_B] = x_V.reshape(-1, vector.length)
    return [x_BL, *([missing_B.astype(np.float32)] if vector.missing_flag else [])]
