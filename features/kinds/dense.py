"""Dense: one number a row."""

# Shapes: B rows.

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field

from features.kinds.base import Feature, Layout, Raw
from features.kinds.bins import bin_edges, counted, distinct
from features.kinds.moments import Moments
from features.kinds.values import finite_numbers, float64

if TYPE_CHECKING:
    from features.fit.encoders import Encoders
    from features.fit.statistics import Statistics
    from features.schema.schema import Schema


class Dense(Feature):
    """A number. A missing value becomes the mean of the train split, and a column NAME_missing on request."""

    section: ClassVar[str] = "dense"
    layout: ClassVar[Layout] = "numbers"

    column: str | None = None
    transform: Literal["none", "log1p"] = "none"
    standardize: bool = True
    missing_flag: bool = False
    piecewise: int | None = Field(None, ge=1, le=1024, description="bins of the code beside the number (models.inputs)")

    def raw(self, name: str, schema: Schema) -> Raw:
        return Raw(self.column or name, "float")

    def parse(self, name: str, values: pa.Array, schema: Schema) -> tuple[pa.Array, pl.Series | None]:
        """To float64."""
        return finite_numbers(name, values, f"dense.{name}: column {self.column or name}")

    def count(self, name: str, values: pa.Array, schema: Schema, statistics: Statistics) -> None:
        """Counts the number as it is, and its moments after the transform."""
        present = self._transformed(statistics.count_number(name, values))
        statistics.moments[name] = Moments.of(present)
        if self.piecewise:
            statistics.numbers[name] = counted(present)

    def fields(self, name: str) -> dict[str, pa.DataType]:
        return {name: pa.float32()} | ({f"{name}_missing": pa.float32()} if self.missing_flag else {})

    def encode(self, name: str, values: pa.Array, encoders: Encoders) -> dict[str, pa.Array]:
        return dict(zip(self.fields(name), map(pa.array, self.numbers(name, float64(values), encoders)), strict=True))

    def numbers(self, name: str, x_B: np.ndarray, encoders: Encoders) -> list[np.ndarray]:
        """Numbers, NaN where missing: transformed, filled with the mean, standardized. Returns float32, as `decode` does."""
        moments = encoders.moments[name]
        x_B = self._transformed(x_B)
        missing_B = np.isnan(x_B)
        if missing_B.any():
            x_B = np.where(missing_B, moments.mean, x_B)
        found = [
            x_B if not self.standardize else moments.standardized(x_B),
            *([missing_B] if self.missing_flag else []),
        ]
        return [each.astype(np.float32) for each in found]

    @property
    def width(self) -> int:
        return 1 + self.missing_flag

    @property
    def code_bins(self) -> int | None:
        return self.piecewise

    def code_edges(self, name: str, statistics: Statistics) -> list[float]:
        edges = bin_edges(statistics.numbers[name], self.piecewise or 1)
        return distinct(statistics.moments[name].standardized(edges) if self.standardize else edges)

    def _transformed(self, values: np.ndarray) -> np.ndarray:
        """In float64; log1p keeps the sign, so that negative amounts stay numbers."""
        return np.sign(values) * np.log1p(np.abs(values)) if self.transform == "log1p" else values
