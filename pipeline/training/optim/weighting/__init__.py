"""Task weightings: a registry with one entry a method, and the loss that a configuration asks for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from features.errors import UserError
from features.schema.task import Task
from models.losses import TaskLoss
from pipeline.training.optim.weighting.aligned import Aligned
from pipeline.training.optim.weighting.base import WeightingSettings
from pipeline.training.optim.weighting.cagrad import CAGrad
from pipeline.training.optim.weighting.dwa import DWA
from pipeline.training.optim.weighting.fairgrad import FairGrad, NashMTL
from pipeline.training.optim.weighting.famo import FAMO
from pipeline.training.optim.weighting.fixed import Equal, Fixed, Uncertainty
from pipeline.training.optim.weighting.flat_minima import FlatMinima
from pipeline.training.optim.weighting.gradnorm import GradNorm
from pipeline.training.optim.weighting.mgda import MGDA
from pipeline.training.optim.weighting.pcgrad import PCGrad
from pipeline.training.optim.weighting.rep_mtl import RepMTL
from pipeline.training.optim.weighting.stch import STCH

WEIGHTINGS: dict[str, type[WeightingSettings]] = {
    "fixed": Fixed,
    "equal": Equal,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
    "dwa": DWA,
    "famo": FAMO,
    "stch": STCH,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "nash_mtl": NashMTL,
    "fairgrad": FairGrad,
    "aligned": Aligned,
    "rep_mtl": RepMTL,
    "flat_minima": FlatMinima,
}

if TYPE_CHECKING:
    Weighting = WeightingSettings
else:
    Weighting = Annotated[Union[tuple(WEIGHTINGS.values())], Field(discriminator="name")]  # noqa: UP007


def task_loss(weighting: WeightingSettings, tasks: Mapping[str, Task], seed: int) -> TaskLoss:
    """The loss of these tasks under a weighting.

    Args:
        seed: of random draws.

    Raises:
        UserError: a weight for a task that does not exist, weights that are all 0, or a loss that the weighting cannot work
            with.
    """
    below = [name for name, task in tasks.items() if task.loss.name == "ziln"]
    if below and weighting.positive:
        fitting = ", ".join(name for name, other in WEIGHTINGS.items() if not other.positive)
        raise UserError(
            f"train.weighting.name={weighting.name} needs losses above 0, and loss ziln of {below[0]} falls below: "
            f"choose one of {fitting}"
        )
    weights = weighting.task_weights(tasks)
    if not any(weights):
        raise UserError(
            "every task has loss weight 0: nothing would be learnt. Give one a weight above 0, or tasks= without it."
        )
    return weighting.build([task.kind for task in tasks.values()], weights, seed)
