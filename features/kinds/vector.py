"""Vector: a list of numbers of one length a row, such as an embedding of an image or a text."""

# Shapes: B rows of a block, N rows of a run, V numbers of all rows, L length.

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from features.kinds.base import Feature, Layout, Raw, floats
from features.kinds.values import LARGEST, as_lists

if TYPE_CHECKING:
    from features.fit.encoders import Encoders
    from features.fit.statistics import Statistics
    from features.schema.schema import Schema


class Vector(Feature):
    """`length` numbers a row, as they are: text with separators, an array of a JSONL file or a list of a Parquet file.

    A missing vector is all zeros, with a 1 in a column NAME_missing on request.
    """

    section: ClassVar[str] = "vector"
    layout: ClassVar[Layout] = "numbers"

    column: str | None = None
    length: int = Field(ge=1, le=65_536)
    separator: str = Field(",", min_length=1)
    missing_flag: bool = False

    def raw(self, name: str, schema: Schema) -> Raw:
        return Raw(self.column or name, separator=self.separator)

    def parse(self, name: str, values: pa.Array, schema: Schema) -> tuple[pa.Array, pl.Series | None]:
        """To fixed-size lists of float32."""
        lists = as_lists(values, self.separator)
        missing_B = lists.is_null().to_numpy(False)
        length_B = pc.list_value_length(lists).fill_null(0).to_numpy()
        row_V, whole_B = np.repeat(np.arange(len(lists)), length_B), length_B == self.length
        texts = pl.Series(lists.flatten()).cast(pl.String)
        number_V = texts.str.strip_chars().cast(pl.Float64, strict=False)
        bad_V = ~(number_V.abs() <= LARGEST).fill_null(False).to_numpy()
        x_BL = np.zeros((len(lists), self.length), np.float32)
        x_BL[whole_B] = np.where(bad_V, 0.0, number_V.to_numpy())[whole_B[row_V]].reshape(-1, self.length)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_BL.ravel()), self.length, mask=pa.array(missing_B))
        if not bad_V.any() and (missing_B | whole_B).all():
            return vectors, None
        row, first = np.unique(row_V[bad_V], return_index=True)
        bad = texts.filter(pl.Series(bad_V)).fill_null("null").gather(first)
        texts_B = pl.Series([None], dtype=pl.String).new_from_index(0, len(lists)).scatter(row, bad)
        other_length = pl.format(f"{name}: {{}} numbers, it must have {self.length}", pl.Series(length_B))
        no_number = pl.format(f"{name}: '{{}}' is not a finite number", texts_B)
        wrong_length = pl.Series(~missing_B & ~whole_B)
        return vectors, pl.select(pl.when(wrong_length).then(other_length).otherwise(no_number)).to_series()

    def count(self, name: str, values: pa.Array, schema: Schema, statistics: Statistics) -> None:
        statistics.missing[name] = values.null_count

    def fields(self, name: str) -> dict[str, pa.DataType]:
        flag = {f"{name}_missing": pa.float32()} if self.missing_flag else {}
        # Parquet files call an item of a list so.
        return {name: pa.list_(pa.field("element", pa.float32()), self.length), **flag}

    def encode(self, name: str, values: pa.Array, encoders: Encoders) -> dict[str, pa.Array]:
        missing_B = values.is_null().to_numpy(False)
        x_BL = np.zeros((len(values), self.length), np.float32)
        x_BL[~missing_B] = values.flatten().to_numpy().reshape(-1, self.length)  # without those of missing rows
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_BL.ravel()), self.length)
        return {name: vectors} | (
            {f"{name}_missing": pa.array(missing_B.astype(np.float32))} if self.missing_flag else {}
        )

    def decode(self, name: str, rows: pa.Table) -> list[np.ndarray]:
        vectors = rows[name].combine_chunks()
        x_NL = vectors.flatten().to_numpy().reshape(-1, self.length)
        return [x_NL, *([floats(rows[f"{name}_missing"])] if self.missing_flag else [])]

    @property
    def width(self) -> int:
        return self.length + self.missing_flag
