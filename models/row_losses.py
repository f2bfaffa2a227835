"""Losses per row and task, from the towers' outputs: each kind of task by its own, conversions over all impressions."""

# Shapes: B rows, T tasks (twice: a task and those it is given), K numbers a task.

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from features.batch import Batch
from features.schema.task import HuberLoss, QuantileLoss, Task, given_chain
from models.label_units import LabelUnits, at_least_float32, lognormal_parameters

LOG_HALF = -0.6931471805599453


class GivenConfig(BaseModel):
    """How tasks with `given` in the schema are learnt (`model.given`), such as conversion given click.

    Attributes:
        name: "observed": from the rows where they are observed, as any other task. "esmm": from all rows where the task they
            are given is, as p(click) p(conversion | click) (ESMM, Ma et al., SIGIR 2018, eq. 2-3). "ipw" and "dr": esmm and the
            loss of the observed rows, weighted by 1 / p(click), or doubly robust (ESCM2, Wang et al., SIGIR 2022, eq. 7-13).
            Training figures are then of the product, evaluation's of p(conversion | click). Impressions without a click count
            by their click label of 0: after jobs.relabel has replaced it, only those with a conversion label do.
        weight: of that further loss.
        min_propensity: below which p(click) does not fall in 1 / p(click): few rows would outweigh all others.
    """

    model_config = ConfigDict(extra="forbid")
    name: Literal["observed", "esmm", "ipw", "dr"] = "observed"
    weight: float = Field(0.1, ge=0, allow_inf_nan=False)
    min_propensity: float = Field(0.02, gt=0, le=1)


class RowLosses(nn.Module):
    """The loss of each row and task, in float32, whether observed or not.

    Binary tasks: cross-entropy, soft labels in [0, 1] are allowed. Regression tasks, on standardised labels: squared error;
    huber, squared error up to delta and 2 delta |error| - delta^2 beyond; quantile, the pinball loss; ziln, the negative
    log-likelihood of a label that is 0 or below, or lognormal (Wang et al., arXiv 1912.07753, eq. 3), without its constants.

    Args:
        tasks: of the schema. units: of the outputs. given: for tasks that are given others.
    Call Args:
        out_KBT: from the towers. label_BT, observed_BT: of a batch as `training_batch` returns it.
    Returns: loss_BT to learn from, and the part of it that metrics are made of.
    """

    delta_T: Tensor
    quantile_T: Tensor
    huber_T: Tensor
    pinball_T: Tensor
    above_TT: Tensor
    given_T: Tensor

    def __init__(self, tasks: Mapping[str, Task], units: LabelUnits, given: GivenConfig) -> None:
        super().__init__()
        self.units, self.given = units, given
        self.kinds = [task.loss.name if task.kind == "regression" else "binary" for task in tasks.values()]
        losses = [task.loss for task in tasks.values()]
        deltas = [loss.delta if isinstance(loss, HuberLoss) else 1.0 for loss in losses]
        quantiles = [loss.q if isinstance(loss, QuantileLoss) else 0.5 for loss in losses]
        names = list(tasks)
        above = {name: given_chain(tasks, name) for name in names}
        above_TT = torch.tensor([[other in above[name] for other in names] for name in names])
        for name, values in (
            ("delta_T", torch.tensor(deltas)),
            ("quantile_T", torch.tensor(quantiles)),
            ("huber_T", torch.tensor([kind == "huber" for kind in self.kinds])),
            ("pinball_T", torch.tensor([kind == "quantile" for kind in self.kinds])),
            ("above_TT", above_TT),
            ("given_T", above_TT.any(1)),
        ):
            self.register_buffer(name, values, persistent=False)
        # Those whose labels train the others of their chain as well, where losses are over all impressions.
        self.chained = {task for name in names if above[name] for task in (name, *above[name])}
        self.entire_space = given.name != "observed" and bool(self.chained)

    def training_batch(self, batch: Batch) -> Batch:
        """The batch with the labels and the rows that are learnt from.

        Over all impressions, the label of a task is 1 where it and all that it is given are. It is known as soon as one of
        them is known not to be.
        """
        if not self.entire_space:
            return batch
        chain_TT = self.above_TT | torch.eye(len(self.above_TT), dtype=torch.bool, device=self.above_TT.device)
        observed_B1T, label_B1T = batch.observed_BT.unsqueeze(1), batch.label_BT.unsqueeze(1)
        known_B1T = torch.where(observed_B1T, label_B1T, 1.0)
        label_BT = torch.where(chain_TT, known_B1T, 1.0).prod(2)
        observed_BT = (observed_B1T | ~chain_TT).all(2) | (label_BT == 0)
        label_BT = torch.where(self.given_T, label_BT, batch.label_BT)
        return replace(batch, label_BT=label_BT, observed_BT=torch.where(self.given_T, observed_BT, batch.observed_BT))

    def forward(self, out_KBT: Tensor, label_BT: Tensor, observed_BT: Tensor) -> tuple[Tensor, Tensor]:
        out_KBT = at_least_float32(out_KBT)
        label_BT = label_BT.to(out_KBT.dtype)
        loss_BT = F.binary_cross_entropy_with_logits(out_KBT[0], label_BT, reduction="none")
        if self.units.has_regression:
            loss_BT = torch.where(self.units.regression_T, self._regression(out_KBT, label_BT), loss_BT)
        if not self.entire_space:
            return loss_BT, loss_BT
        log_BT = F.logsigmoid(out_KBT[0])
        above_TT = self.above_TT.to(log_BT.dtype)
        above_BT = log_BT @ above_TT.T  # log p of all that a task is given
        product_BT = _cross_entropy_of_log(above_BT + log_BT, label_BT)
        shown_BT = torch.where(self.given_T, product_BT, loss_BT)
        if self.given.name == "esmm":
            return shown_BT, shown_BT
        above_1_BT = torch.where(self.above_TT, label_BT.unsqueeze(1), 1.0).prod(2) * observed_BT
        propensity_BT = above_BT.detach().exp().clamp(min=self.given.min_propensity)
        further_BT = self._debiased(out_KBT, loss_BT, above_1_BT / propensity_BT)
        return torch.where(self.given_T, shown_BT + self.given.weight * further_BT, loss_BT), shown_BT

    def _debiased(self, out_KBT: Tensor, loss_BT: Tensor, ratio_BT: Tensor) -> Tensor:
        """The loss of the observed rows over p(click), as an estimate of that of all rows.

        Args:
            ratio_BT: 1 / p(click) of rows with a click, 0 of others.
        """
        if self.given.name == "ipw":
            return ratio_BT * loss_BT
        imputed_BT = F.softplus(out_KBT[1])  # a cross-entropy is above 0
        error_BT = loss_BT - imputed_BT
        return imputed_BT + ratio_BT * error_BT + ratio_BT * (loss_BT.detach() - imputed_BT).square()

    def _regression(self, out_KBT: Tensor, label_BT: Tensor) -> Tensor:
        error_BT = out_KBT[0] - self.units.standardised(label_BT)
        loss_BT = error_BT.square()
        if "huber" in self.kinds:
            size_BT = error_BT.abs()
            linear_BT = self.delta_T * (2 * size_BT - self.delta_T)
            loss_BT = torch.where(self.huber_T & (size_BT > self.delta_T), linear_BT, loss_BT)
        if "quantile" in self.kinds:
            pinball_BT = torch.maximum(-self.quantile_T * error_BT, (1 - self.quantile_T) * error_BT)
            loss_BT = torch.where(self.pinball_T, pinball_BT, loss_BT)
        if "ziln" in self.kinds:
            loss_BT = torch.where(self.units.lognormal_T, self._lognormal(out_KBT, label_BT), loss_BT)
        return loss_BT

    def _lognormal(self, out_KBT: Tensor, label_BT: Tensor) -> Tensor:
        positive_BT = label_BT > 0
        cross_entropy_BT = F.binary_cross_entropy_with_logits(
            out_KBT[0], positive_BT.to(out_KBT.dtype), reduction="none"
        )
        mean_BT, spread_BT = lognormal_parameters(out_KBT)
        log_BT = (torch.where(positive_BT, label_BT, 1.0).log() - self.units.mean_T) / self.units.std_T
        density_BT = ((log_BT - mean_BT) / spread_BT).square() / 2 + spread_BT.log()
        return cross_entropy_BT + torch.where(positive_BT, density_BT, 0.0)


def _cross_entropy_of_log(log_BT: Tensor, label_BT: Tensor) -> Tensor:
    """Cross-entropy of probabilities given by their logarithms, also where they are near 0 or 1."""
    log_BT = log_BT.clamp(max=-1e-30)
    # log(1 - p): the first form is exact for p above 1/2, the second below (Maechler 2012).
    inner_BT = torch.where(log_BT > LOG_HALF, log_BT, LOG_HALF)
    outer_BT = torch.where(log_BT > LOG_HALF, LOG_HALF, log_BT)
    other_BT = torch.where(log_BT > LOG_HALF, (-inner_BT.expm1()).log(), (-outer_BT.exp()).log1p())
    return -(label_BT * log_BT + (1 - label_BT) * other_BT)
