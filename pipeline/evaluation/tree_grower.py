"""One histogram tree of given gradients, by scikit-learn's grower, which is not part of its public interface.

Boosting from an offset, or of a function that several losses share, is what its public classes cannot do. Nothing else of the
project imports these names; tests/pipeline/test_rmtgb.py grows a tree beside an exhaustive search.
"""

# Shapes: N rows, D columns.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble._hist_gradient_boosting.grower import TreeGrower
from sklearn.utils._openmp_helpers import _openmp_effective_n_threads

Floats = NDArray[np.float64]
MISSING_BIN = 255  # of the grower's 256; unused, since inputs hold no NaN
MAX_BINS = 255


@dataclass(frozen=True)
class Binning:
    """The bins of columns: numbers between edges, categories one by one.

    Attributes:
        edges: per column, rising; a value up to the first is in bin 0. categorical: whose values are ids below 255.
    """

    edges: list[Floats]
    categorical: list[bool]

    @classmethod
    def fit(cls, x_ND: NDArray[Any], categorical: Sequence[bool]) -> "Binning":
        """Bins of equal count, or one per value where a column has at most 255 of them."""
        columns = x_ND.T.astype(np.float64)
        return cls([_edges(x_N, c) for x_N, c in zip(columns, categorical, strict=True)], list(categorical))

    def transform(self, x_ND: NDArray[Any]) -> NDArray[np.uint8]:
        """Bins of values, in the memory order that the grower reads."""
        bin_ND = np.empty(x_ND.shape, np.uint8, order="F")
        for column, (edge, categorical) in enumerate(zip(self.edges, self.categorical, strict=True)):
            x_N = x_ND[:, column].astype(np.float64)
            bin_ND[:, column] = x_N if categorical else np.searchsorted(edge, x_N)
        return bin_ND


@dataclass(frozen=True)
class Tree:
    """A grown tree."""

    predictor: Any

    def predict(self, bin_ND: NDArray[np.uint8]) -> Floats:
        """Its leaf's value for each row."""
        return self.predictor.predict_binned(bin_ND, MISSING_BIN, _openmp_effective_n_threads())


def grow(
    bin_ND: NDArray[np.uint8], gradient_N: Floats, hessian_N: Floats, binning: Binning, *,
    learning_rate: float, max_leaves: int, min_rows: int,
) -> Tree:  # fmt: skip
    """The tree that lowers the loss's second-order expansion most, split by split; a leaf is worth -rate·Σgradient/Σhessian.

    Args:
        gradient_N, hessian_N: of the loss with respect to the function that the tree is added to, weighted.
        max_leaves, min_rows: of the tree, and of a leaf.
    """
    grower = TreeGrower(
        bin_ND, gradient_N.astype(np.float32), hessian_N.astype(np.float32), max_leaf_nodes=max_leaves,
        min_samples_leaf=min_rows, n_bins=MISSING_BIN + 1, n_bins_non_missing=[len(edge) + 1 for edge in binning.edges],
        is_categorical=binning.categorical, shrinkage=learning_rate,
    )  # fmt: skip
    grower.grow()
    return Tree(grower.make_predictor([np.append(edge, np.inf) for edge in binning.edges]))


def _edges(x_N: Floats, categorical: bool) -> Floats:
    if categorical:
        return np.arange(x_N.max(initial=0))  # as many bins as ids
    values = np.unique(x_N)
    if len(values) <= MAX_BINS:
        return (values[1:] + values[:-1]) / 2
    return np.unique(np.quantile(x_N, np.linspace(0, 1, MAX_BINS + 1)[1:-1]))
