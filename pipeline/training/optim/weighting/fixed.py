"""Weights that no gradient and no history of losses decides: given ones, ones, and learnt variances."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from models.losses import TaskLoss, UncertaintyLoss
from pipeline.training.optim.weighting.base import Weighted, WeightingSettings


class Fixed(Weighted):
    """The schema's loss weight for each task. When: weights are known or tuned; the place to start."""

    name: Literal["fixed"] = "fixed"

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """TaskLoss."""
        return TaskLoss(loss_weights)


class Equal(WeightingSettings):
    """1 for each task, whatever the schema says. When: as a baseline."""

    name: Literal["equal"] = "equal"

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """TaskLoss."""
        return TaskLoss(loss_weights)


class Uncertainty(WeightingSettings):
    """Learnt with the dense parameters (models.losses.UncertaintyLoss); the schema's loss weights do not count.

    When: losses of different scales or units, at no cost.
    """

    name: Literal["uncertainty"] = "uncertainty"
    positive: ClassVar = True

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """UncertaintyLoss."""
        return UncertaintyLoss(kinds)
