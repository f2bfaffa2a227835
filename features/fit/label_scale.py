"""The scale that a regression task is learnt in: mean and deviation of its train labels, after its transform."""

# Shapes: N labels.

from dataclasses import asdict, dataclass, field

import numpy as np

from features.kinds.moments import Moments
from features.schema.task import Task


@dataclass(frozen=True)
class LabelScale:
    """What is subtracted from labels and what they are divided by; without train labels they stay as they are.

    Attributes:
        mean, std: of the labels; with transform log1p, of log(1 + label); with loss ziln, of the logarithm of those above 0.
        positive: with loss ziln, the share of labels above 0.
    """

    mean: float = 0.0
    std: float = 1.0
    positive: float = 0.5


@dataclass
class LabelMoments:
    """Weighted moments of a regression task's labels over a part of the rows.

    Attributes:
        of: those of what is standardised.
        weight: of all observed rows, also of those that `of` leaves out.
    """

    of: Moments = field(default_factory=Moments)
    weight: float = 0.0

    @classmethod
    def of_labels(cls, label_N: np.ndarray, weight_N: np.ndarray, task: Task) -> "LabelMoments":
        """Moments of float64 labels, NaN where not observed."""
        counts_N = ~np.isnan(label_N) & (weight_N > 0)
        label_N, weight_N = label_N[counts_N], weight_N[counts_N]
        whole = float(weight_N.sum())
        if task.loss.name == "ziln":
            label_N, weight_N = label_N[label_N > 0], weight_N[label_N > 0]
            label_N = np.log(label_N)
        elif task.transform == "log1p":
            label_N = np.log1p(label_N)
        return cls(Moments.of(label_N, weight_N), whole)

    def merge(self, other: "LabelMoments") -> "LabelMoments":
        """Moments of both parts' labels together."""
        return LabelMoments(self.of.merge(other.of), self.weight + other.weight)

    def scale(self) -> LabelScale:
        """The scale; of labels that are all equal the deviation is 1."""
        if not self.weight:
            return LabelScale()
        # A share of 0 or 1 would be learnt as certain from the first step on.
        share = (self.of.count + 0.5) / (self.weight + 1)
        return LabelScale(self.of.mean, self.of.std or 1.0, min(max(share, 1e-12), 1 - 1e-12))


def scale_entry(scale: LabelScale) -> dict[str, float]:
    """What encoders.json says of a scale."""
    return asdict(scale)
