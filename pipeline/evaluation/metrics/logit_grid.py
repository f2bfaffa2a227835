"""Weights of both classes at logits rounded to a grid: what AUC of more rows than memory holds is computed from."""

# Shapes: N rows, G distinct logits on the grid.

import numpy as np

GRID = 1 << 17  # steps of a logit of 1: rows within 2⁻¹⁷ of each other may become ties
COMPACT_ROWS = 1 << 20  # that wait to be added, or as many as the table has: a row is then sorted O(log rows) times


class LogitGrid:
    """One binary task's table (3, G): logit, ascending, and the weights of both classes.

    Memory: 24 bytes for each distinct logit: about 100 MB for logits between -16 and 16.
    """

    def __init__(self, table_3G: np.ndarray | None = None) -> None:
        self.table_3G = np.zeros((3, 0)) if table_3G is None else table_3G
        self.pending: list[np.ndarray] = []

    def add(self, logit_N: np.ndarray, positive_N: np.ndarray, negative_N: np.ndarray) -> None:
        """Adds rows."""
        self.pending.append(np.stack((np.rint(logit_N * GRID) / GRID, positive_N, negative_N)))
        if sum(part.shape[1] for part in self.pending) >= max(COMPACT_ROWS, self.table_3G.shape[1]):
            self.table()

    def merge(self, other: "LogitGrid") -> None:
        """Adds the rows of another."""
        self.pending.append(other.table())

    def table(self) -> np.ndarray:
        """The table, after adding what is pending to it."""
        if self.pending:
            logit_N, *weights = np.concatenate([self.table_3G, *self.pending], 1)
            logit_G, place_N = np.unique(logit_N, return_inverse=True)
            self.table_3G = np.stack((logit_G, *(np.bincount(place_N, x_N, len(logit_G)) for x_N in weights)))
            self.pending = []
        return self.table_3G
