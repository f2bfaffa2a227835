"""The protocol of a feature kind: settings in a schema, and the way from a raw column to a batch and a model's input."""

# Shapes: B rows of a block, N rows of a run, K numbers of a feature.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import polars as pl
import pyarrow as pa

from features.source import RawType, Strict

if TYPE_CHECKING:
    from features.fit.encoders import Encoders
    from features.fit.statistics import Statistics
    from features.schema.schema import Schema

Layout = Literal["numbers", "id", "ids"]


@dataclass(frozen=True)
class Raw:
    """The raw or derived column of a feature, and how its text is read.

    Attributes:
        column: its name.
        type: "string" unless the feature is a number.
        coded: its text is read as codes into its distinct values.
        separator: of items, where it may hold lists.
    """

    column: str
    type: RawType = "string"
    coded: bool = False
    separator: str | None = None


class Feature(Strict):
    """One feature: an entry of its kind's section of a schema.

    `name` is the feature's name in all methods; each of them works on whole columns.

    Attributes:
        section: key of the kind in a schema.
        layout: where a batch holds it: "numbers" in columns of `dense_BD`, "id" and "ids" in `sparse`, one or a list a row.
    """

    section: ClassVar[str]
    layout: ClassVar[Layout]

    @abstractmethod
    def raw(self, name: str, schema: Schema) -> Raw:
        """The column that it is read from."""

    @abstractmethod
    def parse(self, name: str, values: pa.Array, schema: Schema) -> tuple[pa.Array, pl.Series | None]:
        """B raw values to what `count` and `encode` take, null where missing.

        Returns: the values, and for each row why it is a dead letter, null for a good one (None: all are good).
        Raises:
            UserError: the column is not of a type that the kind can use.
        """

    @abstractmethod
    def count(self, name: str, values: pa.Array, schema: Schema, statistics: Statistics) -> None:
        """Adds B parsed values to the statistics; `statistics.missing[name]` at least."""

    @abstractmethod
    def fields(self, name: str) -> dict[str, pa.DataType]:
        """Its columns in a dataset."""

    @abstractmethod
    def encode(self, name: str, values: pa.Array, encoders: Encoders) -> dict[str, pa.Array]:
        """B parsed values to the columns of `fields`."""

    def decode(self, name: str, rows: pa.Table) -> list[np.ndarray]:
        """Its columns of `dense_ND` from those of `fields`: float32 of shape (N,) or (N, K). For layout "numbers"."""
        return [floats(rows[column]) for column in self.fields(name)]

    @property
    def width(self) -> int:
        """Columns of `dense_BD`, which are inputs of the model."""
        return 0

    @property
    def code_bins(self) -> int | None:
        """Bins of a piecewise code of its first number, which is an input of the model beside it; None: no code."""
        return None

    def code_edges(self, name: str, statistics: Statistics) -> list[float]:
        """Edges of these bins, in the scale of the dataset's column."""
        raise NotImplementedError

    def contradictions(self, name: str, schema: Schema) -> Iterator[str]:
        """What is wrong with the settings beside other parts of the schema."""
        yield from ()


def floats(column: pa.ChunkedArray) -> np.ndarray:
    """A numeric column as float32, NaN where it is null; a view where Arrow holds one chunk of it."""
    return column.to_numpy().astype(np.float32, copy=False)
