"""Quantiles of a number over any amount of rows, kept in a few kilobytes."""

import numpy as np
from datasketches import tdigest_double

K = 200  # shares of values are right to about a thousandth, and better towards both ends
SAMPLE = 1 << 14  # of twice as many values at once or more, a sample of up to twice this size stands for all


def _one_of(every: int, values: np.ndarray) -> np.ndarray:
    """A value drawn from each run of `every` values: at random, since logs may repeat with any period."""
    if every == 1:
        return values
    starts = np.arange(0, len(values) - every + 1, every)
    return values[starts + np.random.default_rng(len(values)).integers(0, every, len(starts))]


class Digest:
    """A t-digest of numbers (Dunning and Ertl 2019).

    The same values in the same order of merges give the same digest, also when it is pickled in between. Another order
    gives another digest of the same accuracy. Of many values at once it is that of a sample.

    Args:
        values: float64 numbers; NaN is left out.
    """

    def __init__(self, values: np.ndarray | None = None) -> None:
        self._sketch = tdigest_double(K)
        if values is not None:
            present = np.ascontiguousarray(values[~np.isnan(values)], dtype=np.float64)
            halvings = max(1, len(present) // SAMPLE).bit_length() - 1
            self._sketch.update(_one_of(1 << halvings, present))
            for _ in range(halvings):  # each value of a sample weighs as many as it was drawn from
                self._sketch.merge(tdigest_double.deserialize(self._sketch.serialize()))
            if halvings:
                self._sketch.update(np.array([present.min(), present.max()]))
        self._sketch.compress()  # as a pickled one is

    def merge(self, *others: "Digest") -> "Digest":
        """The digest of all parts' values."""
        whole = Digest()
        for part in (self, *others):
            whole._sketch.merge(part._sketch)
        whole._sketch.compress()
        return whole

    @property
    def count(self) -> int:
        """About how many values it holds, and 0 only for none. All other methods need at least one."""
        return int(self._sketch.get_total_weight())

    @property
    def minimum(self) -> float:
        """The smallest value, exactly."""
        return float(self._sketch.get_min_value())

    @property
    def maximum(self) -> float:
        """The largest value, exactly."""
        return float(self._sketch.get_max_value())

    def below(self, value: float) -> float:
        """Share of values < value."""
        # For a value of many rows, the sketch itself ranks the middle of them.
        return float(self._sketch.get_rank(np.nextafter(value, -np.inf)))

    def at_most(self, value: float) -> float:
        """Share of values <= value."""
        return float(self._sketch.get_rank(np.nextafter(value, np.inf)))

    def quantile(self, share: float) -> float:
        """The smallest number that at least `share` of the values do not exceed."""
        # By bisection of ranks: the sketch's own quantiles are off by up to two hundredths of the rows.
        low, high = self.minimum, self.maximum
        if self.at_most(low) >= share:
            return low
        while low < (middle := low / 2 + high / 2) < high:
            low, high = (low, middle) if self.at_most(middle) >= share else (middle, high)
        # A value of many rows counts half in its own rank, which is `at_most` of the number below it: -5e-324 in place of 0.
        above = float(np.nextafter(high, np.inf))
        return above + 0.0 if self._is_value(above) else high + 0.0  # 0 for -0

    def _is_value(self, number: float) -> bool:
        """Whether rows have exactly this value, rather than others on both sides: their ranks have a step there."""
        step = self._sketch.get_rank(np.nextafter(number, np.inf)) - self._sketch.get_rank(number)
        return bool(step * self._sketch.get_total_weight() > 0.25)  # half a row, or more

    def __getstate__(self) -> bytes:
        return bytes(self._sketch.serialize())

    def __setstate__(self, state: bytes) -> None:
        self._sketch = tdigest_double.deserialize(state)
