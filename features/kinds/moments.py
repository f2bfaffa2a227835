"""Moments of numbers and sums of labels, over parts of the rows that merge."""

# Shapes: B rows, T tasks.

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of a number (merged as in Chan et al. 1979).

    Of weighted values, the count is the sum of their weights, and the others are weighted.
    """

    count: float = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> "Moments":
        """Moments of float64 values, none of them NaN; weights are above 0."""
        if not values.size:
            return cls()
        if weights is not None:
            count = float(weights.sum())
            mean = float(values @ weights / count)
            return cls(count, mean, float((values - mean) ** 2 @ weights))
        mean = float(values.mean())
        return cls(len(values), mean, float(((values - mean) ** 2).sum()))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both parts' values together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count if count else 0.0
        squares = self.squares + other.squares + delta**2 * self.count * share
        return Moments(count, self.mean + delta * share, squares)

    @property
    def std(self) -> float:
        """Standard deviation of the present values, 0 where there are none or all are equal."""
        std = float(np.sqrt(self.squares / self.count)) if self.count else 0.0
        # The mean of equal values is off by its last digits: what that leaves is rounding, and no scale to divide by.
        return std if std > 1e-13 * abs(self.mean) else 0.0

    def standardized(self, values: np.ndarray) -> np.ndarray:
        """Deviations from the mean in standard deviations."""
        # A constant column carries nothing: it becomes 0 instead of a division by 0.
        return (values - self.mean) / self.std if self.std > 0 else np.zeros_like(values)


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
