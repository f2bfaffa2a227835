"""Bag: a list of ids a row."""

# Shapes: B rows, V values of all lists.

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from features.kinds.base import Layout, Raw
from features.kinds.canonical import as_ids, canonical
from features.kinds.categorical import Categorical
from features.kinds.values import as_lists
from features.source import History

if TYPE_CHECKING:
    from features.fit.encoders import Encoders
    from features.fit.statistics import Statistics
    from features.schema.schema import Schema


class Bag(Categorical):
    """A list of ids a row; at most the first `max_length` count. It is a column's, or made of earlier rows.

    `pooling: mean` gives the mean of its items' embeddings. `sequence` keeps them apart, in order, for models that read them
    one by one; any other model reads their sum, weighted by how they fit the candidate (models.sequences).
    """

    section: ClassVar[str] = "bag"
    layout: ClassVar[Layout] = "ids"

    separator: str = Field("|", min_length=1)
    max_length: int = Field(50, ge=1, le=1_000_000)
    pooling: Literal["mean", "sequence"] = "mean"
    bins: None = Field(None, description="a list of numbers has none")
    history: History | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Bag:
        if self.history and self.column:
            raise ValueError("give one of column and history")
        return self

    def raw(self, name: str, schema: Schema) -> Raw:
        """The column of its lists, or of the single items of a history."""
        if self.history:
            return Raw(self.history.item, coded=True)
        return Raw(self.column or name, separator=self.separator)

    def parse(self, name: str, values: pa.Array, schema: Schema) -> tuple[pa.Array, pl.Series | None]:
        """To lists of codes into text."""
        where = f"bag.{name}: column {self.history.item if self.history else self.column or name}"
        return listed(values, self, where), None

    def count(self, name: str, values: pa.Array, schema: Schema, statistics: Statistics) -> None:
        """Counts the items; an empty list is missing."""
        statistics.count_values(name, values.flatten(), hashed=not schema.table(name).counted)
        statistics.missing[name] = pc.sum(pc.equal(pc.list_value_length(values), 0)).as_py() or 0

    def fields(self, name: str) -> dict[str, pa.DataType]:
        return {name: pa.list_(pa.int64())}

    def encode(self, name: str, values: pa.Array, encoders: Encoders) -> dict[str, pa.Array]:
        ids = encoders.ids(encoders.schema.table_of(name), values.values)
        return {name: pa.LargeListArray.from_arrays(values.offsets, ids)}

    def contradictions(self, name: str, schema: Schema) -> Iterator[str]:
        yield from super().contradictions(name, schema)
        if self.binned(schema):
            yield f"bag {name} has table {self.table}, which is of bins: only a categorical feature can be a number's"


def listed(values: pa.Array, bag: Bag, where: str) -> pa.LargeListArray:
    """Lists of a bag's values as codes into text, without empty ones, cut to its `max_length`; missing is an empty list.

    Args:
        values: B texts with separators, single ids, or lists of ids.
        where: the key and the column, for an error.

    Raises:
        UserError: an item is no id.
    """
    if pa.types.is_primitive(values.type) or pa.types.is_decimal(values.type):
        values = canonical(values, where)
    values = as_lists(values, bag.separator)
    length_B = np.where(values.is_null().to_numpy(False), 0, pc.list_value_length(values.fill_null([])).to_numpy(False))
    codes = as_ids(values.flatten(), where)
    empty = np.flatnonzero(pc.equal(codes.dictionary, "").to_numpy(False))
    kept_V = codes.indices.is_valid().to_numpy(False)
    if len(empty):
        kept_V &= ~np.isin(codes.indices.fill_null(-1).to_numpy(), empty)
    row_V = np.repeat(np.arange(len(length_B)), length_B)
    if not kept_V.all():
        length_B = np.bincount(row_V[kept_V], minlength=len(length_B))
        row_V, codes = row_V[kept_V], codes.filter(pa.array(kept_V))
    if len(length_B) and length_B.max(initial=0) > bag.max_length:
        start_B = np.cumsum(length_B) - length_B
        codes = codes.filter(pa.array(np.arange(len(row_V)) - start_B[row_V] < bag.max_length))
        length_B = np.minimum(length_B, bag.max_length)
    offsets = np.concatenate([[0], np.cumsum(length_B)]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), codes)
