"""When the value of an expression over outcomes becomes known."""

# Shapes: B rows of a block.

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from features.schema.expressions import column_of
from features.schema.schema import Schema


@dataclass(frozen=True)
class Known:
    """A block of impressions with what is known of their outcomes.

    Attributes:
        time: [B] event times, null where missing.
        outcomes: [B] the columns that outcomes add; None without outcomes.
        open_windows: per outcome [B] whether its window was still open when the log ended.
    """

    schema: Schema
    time: pl.Series
    outcomes: pl.DataFrame | None
    open_windows: Mapping[str, np.ndarray]

    def since(self, expressions: list[str]) -> tuple[pl.Series, pl.Series]:
        """When the value of all expressions is known of each row, and where the log ended before that.

        That an outcome happened is known when it does: of an expression that is its name, quoted or not. Its absence, and any
        other expression over outcomes, is known once the window has closed: at the event time plus the window.

        Returns: int64 seconds [B], null where it is never known; bool [B].
        """
        known = self.time
        undecided = pl.Series([False], dtype=pl.Boolean).new_from_index(0, len(known))
        for expression in expressions:
            for outcome in self.schema.outcomes_of(expression):
                decided, open_ = self._of(outcome, column_of(expression) == outcome)
                later = pl.max_horizontal(known, decided)
                known = pl.select(pl.when(known.is_null() | decided.is_null()).then(None).otherwise(later)).to_series()
                undecided |= open_
        return known.set(undecided, None), undecided

    def _of(self, outcome: str, happens: bool) -> tuple[pl.Series, pl.Series]:
        """The same of one outcome, of which it is asked whether it happens, or anything else."""
        assert self.outcomes is not None
        window, open_B = self.schema.source.outcomes[outcome].window, self.open_windows.get(outcome)
        never = pl.Series([None], dtype=pl.Int64).new_from_index(0, len(self.time))
        decided = never if window is None else self.time + window
        open_ = pl.Series(np.zeros(len(self.time), bool) if open_B is None else open_B)
        if not happens:
            return decided, open_
        happened = self.outcomes[outcome]
        return self.outcomes[f"{outcome}_time"].zip_with(happened, decided), open_ & ~happened
