"""Tasks of a schema: what to predict, where its label is known, and by which loss it is learnt."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from features.source import Strict


class SquaredLoss(Strict):
    """Squared error, in units of the train labels' variance: a prediction of the mean."""

    name: Literal["squared"]


class HuberLoss(Strict):
    """Squared error up to `delta` standard deviations of the train labels, linear beyond (Huber 1964): for outliers."""

    name: Literal["huber"]
    delta: float = Field(1.0, gt=0, le=1e6, allow_inf_nan=False)


class QuantileLoss(Strict):
    """Pinball loss (Koenker & Bassett 1978): a prediction that the label is below with probability `q`."""

    name: Literal["quantile"]
    q: float = Field(0.5, gt=0, lt=1)


class LognormalLoss(Strict):
    """Zero-inflated lognormal (Wang et al., arXiv 1912.07753): for revenue, which is 0 or below for most rows."""

    name: Literal["ziln"]


Loss = Annotated[
    SquaredLoss | HuberLoss | QuantileLoss | LognormalLoss,
    Field(discriminator="name"),
    BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),
]


class Task(Strict):
    """Something to predict. `label` and `observed_when` are SQL expressions over raw columns.

    Attributes:
        given: a binary task: where its label is not 1, this one's is not observed. `model.given` says how that is learnt.
        transform: of a regression's label before it is learnt; predictions and metrics stay in the label's unit.
        loss: of a regression task.
        loss_weight: of its mean loss in the total. A regression is learnt standardised, so 1 means the same for each task.
    """

    kind: Literal["binary", "regression"]
    label: str
    observed_when: str | None = None
    given: str | None = None
    transform: Literal["none", "log1p"] = "none"
    loss: Loss = SquaredLoss(name="squared")
    loss_weight: float = Field(1.0, ge=0, le=1e9, allow_inf_nan=False)


def given_chain(tasks: Mapping[str, Any], name: str) -> list[str]:
    """The tasks that must be 1 where a task is observed, the nearest first; without those that a schema left out."""
    found: list[str] = []
    while (given := tasks[name].given) and given in tasks and given not in found:
        found.append(name := given)
    return found
