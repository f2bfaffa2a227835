"""Algorithm 1 of AutoMTL (Jiang et al. 2024) by hand, for test_search.py: one device, float64, optimisers written out."""

# Shapes: B rows, T tasks, N experts.

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from tiny_training import dwell_variance, model, unsharded
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from features.batch import Batch
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.search.config import SearchConfig

ALPHA = ("fusion.alpha_I", "fusion.alpha_NLO")
BETA = "fusion.beta_TN"
EPS = 1e-8


class Adam:
    """Kingma & Ba, Algorithm 1."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.m: dict[str, Any] = {}
        self.v: dict[str, Any] = {}

    def step(self, name: str, value: Tensor, gradient: Tensor, t: int) -> None:
        m = self.m[name] = 0.9 * self.m.get(name, 0.0) + 0.1 * gradient
        v = self.v[name] = 0.999 * self.v.get(name, 0.0) + 0.001 * gradient**2
        value -= self.lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + EPS)


class Twin:
    """Algorithm 1 on one device, without sharding, fused optimisers or a Hessian-vector product, in float64."""

    def __init__(self, config: SearchConfig, start: dict[str, Tensor]) -> None:
        data, self.config, self.search = Dataset(config.dataset), config, config.search
        self.schema, s = data.schema, config.train
        self.ranker = unsharded(config, self.schema, data.encoders, model(start)).requires_grad_()
        self.params: dict[str, Tensor] = dict(self.ranker.named_parameters())
        self.train, self.valid = (
            Loader(data, split, s.batch_size, s.lanes, s.seed, window=s.window) for split in ("train", "valid")
        )
        self.steps = s.max_steps
        self.warmup = round(config.search.warmup * self.steps)
        self.momentum = {n: torch.zeros(len(p), 1).double() for n, p in self.params.items() if n.startswith("embed")}
        self.alpha, self.beta = Adam(config.search.alpha_lr), Adam(config.search.beta_lr)

    def loss(self, batch: Batch, values: dict[str, Tensor]) -> Tensor:
        """Over tasks the weighted mean over observed rows."""
        batch = replace(batch, dense_BD=batch.dense_BD.double())
        with sdpa_kernel(SDPBackend.MATH):  # the only one with second derivatives
            logit_BT = functional_call(self.ranker, values, (batch,), tie_weights=False)
        total = torch.zeros((), dtype=torch.float64)
        for t, task in enumerate(self.schema.tasks.values()):
            weight_B = (batch.weight_BT[:, t] * batch.observed_BT[:, t]).double()
            z_B, label_B = logit_BT[:, t], batch.label_BT[:, t].double().nan_to_num()
            if task.kind == "binary":
                loss_B = torch.log1p(torch.exp(z_B)) - label_B * z_B
            else:
                loss_B = (z_B - label_B) ** 2 / dwell_variance()
            total = total + task.loss_weight * (weight_B * loss_B).sum() / weight_B.sum().clamp(min=1e-30)
        return total

    def diversity(self, beta_TN: Tensor) -> Tensor:
        """Eq. 2, summed up expert by expert."""
        p = [row.exp() / row.exp().sum() for row in beta_TN]
        total = torch.zeros((), dtype=torch.float64)
        for i in range(beta_TN.shape[1]):
            m_i = sum(row[i] for row in p) / len(p)
            total = total + m_i * m_i.log() - sum(row[i] * row[i].log() for row in p) / len(p)
        return total

    def rate(self, step: int) -> float:
        return self.config.train.dense.lr * (1 + math.cos(math.pi * step / self.steps)) / 2

    def diversity_weight(self, step: int) -> float:
        return self.search.diversity * (self.steps - step) / (self.steps - self.warmup)

    def validation(self, valid: Batch, batch: Batch, step: int) -> tuple[float, dict[str, Tensor]]:
        """The validation loss and its gradient by alpha: now, or (order 2) after a step of weights and beta (eq. 4)."""
        values = self.params
        if self.search.order == 2:
            values = values | self.ahead(batch, step, values)
        loss = self.loss(valid, values)
        grads = torch.autograd.grad(loss, [self.params[name] for name in ALPHA])
        return loss.item(), dict(zip(ALPHA, grads, strict=True))

    def ahead(self, batch: Batch, step: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights and beta after a plain step by the train loss, as functions of alpha; tables stay."""
        train_loss = self.loss(batch, values)
        names = [n for n in self.params if n not in (*ALPHA, BETA) and not n.startswith("embeddings.")]
        grads = torch.autograd.grad(train_loss, [values[n] for n in names], create_graph=True)
        found = {n: values[n] - self.rate(step) * g for n, g in zip(names, grads, strict=True)}
        if step >= self.warmup:
            objective = train_loss + self.diversity_weight(step) * self.diversity(values[BETA])
            [grad] = torch.autograd.grad(objective, [values[BETA]], create_graph=True)
            found[BETA] = values[BETA] - self.search.beta_lr * grad
        return found

    def step(self, step: int, valid: Batch, batch: Batch) -> float:
        """One turn of the loop; returns the validation loss."""
        self.ranker.fusion.sharpness = math.exp(math.log(self.search.sharpness) * step / self.steps)
        self.ranker.fusion.auxiliary = self.search.auxiliary * (1 - step / self.steps)
        valid_loss, grads = self.validation(valid, batch, step)
        with torch.no_grad():
            for name, grad in grads.items():
                self.alpha.step(name, self.params[name], grad, step + 1)
        names = [name for name in self.params if name not in ALPHA]
        train_loss = self.loss(batch, self.params)
        grads = dict(zip(names, torch.autograd.grad(train_loss, [self.params[n] for n in names]), strict=True))
        [jsd_TN] = torch.autograd.grad(self.diversity(self.params[BETA]), [self.params[BETA]])
        with torch.no_grad():
            for name in names:
                self.update(step, name, self.params[name], grads[name], jsd_TN)
        return valid_loss

    def update(self, step: int, name: str, value: Tensor, grad: Tensor, jsd_TN: Tensor) -> None:
        if name == BETA:
            if step >= self.warmup:
                grad = grad + self.diversity_weight(step) * jsd_TN
                self.beta.step(name, value, grad, step - self.warmup + 1)
        elif name in self.momentum:
            self.momentum[name] += (grad**2).mean(1, keepdim=True)
            value -= self.config.train.tables.lr * grad / (self.momentum[name].sqrt() + EPS)
        else:
            value -= self.rate(step) * grad

    def run(self) -> list[float]:
        """All steps: the validation losses. The valid split begins anew where it ends."""
        train, valid = self.train.batches(self.train.start()), endless(self.valid)
        return [self.step(step, next(valid), batch) for step, batch in enumerate(islice(train, self.steps))]


def endless(loader: Loader) -> Iterator[Batch]:
    """All batches of a loader, epoch after epoch."""
    epoch = 0
    while True:
        yield from loader.batches(loader.start(epoch))
        epoch += 1
