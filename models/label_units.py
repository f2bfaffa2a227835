"""The units of the towers' outputs: from numbers as they are learnt to logits and predictions in the label's unit."""

# Shapes: B rows, T tasks, K numbers a task (1, or what the task with most needs).

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from features.fit.label_scale import LabelScale
from features.schema.task import Task

MAX_EXPONENT = 80.0  # e^80 is a float32; beyond, a prediction would be infinite
START_SPREAD = math.log(math.e - 1)  # softplus of it is 1


class LabelUnits(nn.Module):
    """What the outputs of the towers mean.

    A binary task's is its logit. A regression task's is standardised: (label - mean) / std of the train labels, after log1p
    where the schema says so. One with loss ziln has three (Wang et al., arXiv 1912.07753, section 3.2): the logit of a label
    above 0, and mean and spread (before softplus) of its logarithm, standardised too.

    Args:
        tasks: of the schema. scales: of regression tasks; one that has none is learnt in its own unit.
        imputed: tasks that have an output more: the imputed loss of the doubly robust form (models.row_losses).
    Attributes:
        sizes: numbers of each task.
    Shapes: out_KBT -> logit_BT.
    """

    regression_T: Tensor
    log_T: Tensor
    lognormal_T: Tensor
    mean_T: Tensor
    std_T: Tensor

    def __init__(
        self, tasks: Mapping[str, Task], scales: Mapping[str, LabelScale], imputed: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.tasks, self.scales = tasks, {name: scales.get(name, LabelScale()) for name in tasks}
        self.sizes = [3 if task.loss.name == "ziln" else 1 + (name in imputed) for name, task in tasks.items()]
        for name, values in (
            ("regression_T", [task.kind == "regression" for task in tasks.values()]),
            ("log_T", [task.transform == "log1p" for task in tasks.values()]),
            ("lognormal_T", [task.loss.name == "ziln" for task in tasks.values()]),
            ("mean_T", [scale.mean for scale in self.scales.values()]),
            ("std_T", [scale.std for scale in self.scales.values()]),
        ):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.has_regression = any(task.kind == "regression" for task in tasks.values())
        self.has_log = any(task.transform == "log1p" for task in tasks.values())
        self.has_lognormal = any(task.loss.name == "ziln" for task in tasks.values())

    def standardised(self, label_BT: Tensor) -> Tensor:
        """Labels as regression tasks learn them; those of other tasks mean nothing here."""
        if self.has_log:
            label_BT = torch.where(self.log_T, label_BT.clamp(min=-1 + 1e-7).log1p(), label_BT)
        return (label_BT - self.mean_T) / self.std_T

    def forward(self, out_KBT: Tensor) -> Tensor:
        """logit_BT: of binary tasks the logit, of regression tasks the prediction in the label's unit."""
        logit_BT = out_KBT[0]
        if not self.has_regression:
            return logit_BT
        logit_BT = at_least_float32(logit_BT)
        value_BT = logit_BT * self.std_T + self.mean_T
        if self.has_log:
            value_BT = torch.where(self.log_T, value_BT.clamp(max=MAX_EXPONENT).expm1(), value_BT)
        if self.has_lognormal:
            mean_BT, spread_BT = lognormal_parameters(out_KBT)
            log_BT = self.mean_T + self.std_T * mean_BT + (self.std_T * spread_BT).square() / 2
            expected_BT = logit_BT.sigmoid() * log_BT.clamp(max=MAX_EXPONENT).exp()
            value_BT = torch.where(self.lognormal_T, expected_BT, value_BT)
        return torch.where(self.regression_T, value_BT, logit_BT)

    def start(self, rates: Mapping[str, float]) -> Tensor:
        """start_KT: outputs that answer with what is known of the train labels before anything is learnt of the rows.

        Args:
            rates: weighted mean label of each binary task, between 0 and 1.
        """
        start_KT = torch.zeros(max(self.sizes), len(self.tasks))
        for t, (name, task) in enumerate(self.tasks.items()):
            if task.loss.name == "ziln":
                positive = self.scales[name].positive
                start_KT[:3, t] = torch.tensor([math.log(positive / (1 - positive)), 0.0, START_SPREAD])
            elif task.kind == "binary":
                start_KT[0, t] = math.log(rates[name] / (1 - rates[name]))
        return start_KT


def lognormal_parameters(out_KBT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the logarithm of a label above 0, both standardised: mean_BT, spread_BT."""
    mean_BT, spread_BT = at_least_float32(out_KBT[1]), at_least_float32(out_KBT[2])
    return mean_BT, F.softplus(spread_BT).clamp(min=1e-3)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor, of half precision in float32: sums and differences of losses need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
