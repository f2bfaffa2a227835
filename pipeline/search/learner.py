"""A step of an architecture search: alpha from a validation batch, then weights and beta from a train batch (Algorithm 1)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchrec.optim.keyed import KeyedOptimizer

from features.batch import Batch
from models.automtl import architecture
from models.automtl.architecture import Architecture
from models.fusion.automtl import Supernet, diversity_loss
from models.ranker import is_table
from pipeline.dataset.dataset import Dataset
from pipeline.search.config import SearchConfig
from pipeline.training.learner import Learner
from pipeline.training.optim.dense import build, rate
from pipeline.training.optim.settings import DenseOptimizer
from pipeline.training.step import DensePart, StepOutput, begin_weight_sums, global_loss

Weights = dict[str, Tensor]  # of the dense part, by name in the ranker


class SearchLearner(Learner):
    """One rank's part of a supernet in training. Arguments and the order of calls are those of Learner.

    The tables learn from train batches alone: eq. 4 takes no step ahead of them, since their optimisers are fused into a
    backward.

    Attributes:
        supernet: the fusion. valid: validation batches, one for each update of alpha.
        budget: FLOPs of the candidates, where the search has a budget.
        alpha_outputs: of the batches whose losses alpha's last update is made of, in the order of their forwards.
        loss_sum_2: sum of the validation losses since they were last read, and their number.
        chosen: the architecture found last, as numbers (`encode`). unchanged: how many evaluations have found the same since.
    """

    def __init__(
        self, config: SearchConfig, dataset: Dataset, rank: int, device: torch.device, steps: int, epoch_steps: int
    ) -> None:
        super().__init__(config, dataset, rank, device, steps, epoch_steps)
        assert isinstance(self.ranker.fusion, Supernet)
        self.search, self.bf16 = config.search, config.train.precision == "bf16"
        self.supernet = net = self.ranker.fusion
        self.warmup, self.alpha_warmup = round(self.search.warmup * steps), round(self.search.alpha_warmup * steps)
        self.alpha = _adam({"alpha_I": net.alpha_I, "alpha_NLO": net.alpha_NLO}, self.search.alpha_lr)
        self.beta = _adam({"beta_TN": net.beta_TN}, self.search.beta_lr)
        # Only now: what has no gradient while the model is distributed is none of DDP's, nor of the dense optimiser's.
        net.beta_TN.requires_grad_(net.gate is None)
        self.valid: Iterator[Batch] = iter(())
        self.budget: architecture.Budget | None = None
        self.alpha_outputs: list[StepOutput] = []
        self.loss_sum_2 = torch.zeros(2, device=device)
        blocks, tasks = net.experts * len(net.blocks), len(net.beta_TN) * net.experts
        self.chosen = torch.full((1 + blocks + tasks,), -1)
        self.unchanged = torch.zeros((), dtype=torch.int64)

    def state(self) -> dict[str, Any]:
        """As of a learner; alpha and beta are in the model's."""
        search = {"loss_sum_2": self.loss_sum_2, "chosen": self.chosen, "unchanged": self.unchanged}
        optimizers = self.alpha.state_dict()["state"] | self.beta.state_dict()["state"]
        return super().state() | {"search": search | {"optimizers": optimizers}}

    def forward(self, batch: Batch | None, step: int) -> StepOutput:
        """An update of alpha, where one is due, then the losses of a train batch."""
        assert batch is not None
        self.prepare(step)
        self.supernet.sharpness = self._sharpness(step)
        self.supernet.auxiliary = self.search.auxiliary * (1 - step / self.steps)
        self.alpha_outputs = []
        if self.updates_of_alpha(step + 1) > self.updates_of_alpha(step):
            self._sample(2 * step)
            self._update_alpha(self._placed(next(self.valid)), self._placed(batch))
        self.supernet.beta_TN.grad = None
        self._sample(2 * step + 1)
        return super().forward(batch, step)

    def updates_of_alpha(self, step: int) -> int:
        """How many there have been before a step, each with a validation batch of its own."""
        since = max(step - self.alpha_warmup, 0)
        return -(-since // self.search.alpha_every)

    def update(self) -> None:
        """Updates weights, and after the warm-up beta, by the loss of the same batch and eq. 2."""
        super().update()
        beta_TN = self.supernet.beta_TN
        if self.step < self.warmup or beta_TN.grad is None:
            return
        beta_TN.grad = average([beta_TN.grad])[0] + self._diversity_gradient(beta_TN)
        self.beta.step()

    def diversity_weight(self, step: int) -> float:
        """w_JSD in a step: its start after the warm-up, 0 at the end of the run."""
        left = (self.steps - step) / max(self.steps - self.warmup, 1)
        return self.search.diversity * left if step >= self.warmup else 0.0

    def strengths(self, step: int) -> architecture.Strengths:
        """What alpha and beta stand for before a step, whether or not the one before it was skipped; in main memory."""
        self.supernet.sharpness = self._sharpness(step)
        return architecture.Strengths(*(part.detach().cpu() for part in self.supernet.strengths()))

    def _sharpness(self, step: int) -> float:
        return self.search.sharpness ** (step / self.steps)

    def _diversity_gradient(self, beta_TN: Tensor) -> Tensor:
        leaf_TN = beta_TN.detach().requires_grad_()
        weighted = self.diversity_weight(self.step) * diversity_loss(leaf_TN)
        return torch.autograd.grad(weighted, leaf_TN)[0]

    def _placed(self, batch: Batch) -> Batch:
        return batch.to(self.device) if self.device.type != "cpu" else batch

    def _sample(self, draw: int) -> None:
        """The candidates of a forward, the same on every rank."""
        if self.search.paths == "one":
            rng = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + draw)
            self.supernet.sample(rng, self.search.temperature)

    def _update_alpha(self, valid: Batch, batch: Batch) -> None:
        leaves = [p.detach().requires_grad_() for p in (self.supernet.alpha_I, self.supernet.alpha_NLO)]
        names = ("fusion.alpha_I", "fusion.alpha_NLO")
        alpha = dict(zip(names, leaves, strict=True))
        with torch.no_grad():
            valid_BE = self.ranker.embedded(valid)
        with sdpa_kernel(SDPBackend.MATH) if self.search.order == 2 else nullcontext():
            if self.search.order == 1:
                loss = self._loss(self._frozen() | alpha, valid_BE, valid)
                found = torch.autograd.grad(loss, leaves)
            else:
                loss, found = self._second_order(alpha, valid_BE, valid, batch)
        *grads, loss = average([*found, loss])
        if self.budget is not None:
            over = torch.autograd.grad(self._over_budget(*leaves), leaves)
            grads = [grad + more for grad, more in zip(grads, over, strict=True)]
        for parameter, grad in zip((self.supernet.alpha_I, self.supernet.alpha_NLO), grads, strict=True):
            parameter.grad = grad
        self.alpha.step()
        self.loss_sum_2 += torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float)])

    def _second_order(
        self, alpha: Weights, valid_BE: Tensor, valid: Batch, batch: Batch
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Validation loss, and its gradient by alpha after a step of weights and beta (eq. 4), on this rank.

        The derivative through that step is one of the train loss along the validation gradient: exact, and linear in each
        rank's loss.
        """
        with torch.no_grad():
            train_BE = self.ranker.embedded(batch)
        frozen = self._frozen()
        trained = {
            name: frozen[name].requires_grad_() for name, p in self.ranker.named_parameters()
            if name in frozen and p.requires_grad
        }  # fmt: skip
        rates = {name: rate(self.settings.dense, self.step, self.steps) for name in trained}
        beta = "fusion.beta_TN"
        if beta in trained:
            rates[beta] = self.search.beta_lr if self.step >= self.warmup else 0.0
        train_loss = self._loss(frozen | trained | alpha, train_BE, batch)
        train_grads = torch.autograd.grad(train_loss, list(trained.values()), create_graph=True, materialize_grads=True)
        ahead = {}
        for (name, weight), grad in zip(trained.items(), average(train_grads), strict=True):
            grad = grad + self._diversity_gradient(weight) if name == beta else grad
            ahead[name] = (weight - rates[name] * grad).detach().requires_grad_()
        loss = self._loss(frozen | ahead | alpha, valid_BE, valid)
        inputs = [*alpha.values(), *ahead.values()]
        grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
        direct, by_weight = grads[: len(alpha)], average(grads[len(alpha) :])
        parts = zip(trained, train_grads, by_weight, strict=True)
        along = torch.stack([rates[name] * (grad * v).sum() for name, grad, v in parts]).sum()
        through = torch.autograd.grad(along, list(alpha.values()), materialize_grads=True)
        return loss, tuple(d - t for d, t in zip(direct, through, strict=True))

    def _frozen(self) -> dict[str, Tensor]:
        """The dense weights as constants: nothing is spent on their gradients."""
        return {name: p.detach() for name, p in self.ranker.named_parameters() if not is_table(name)}

    def _loss(self, weights: Weights, embedding_BE: Tensor, batch: Batch) -> Tensor:
        """The tasks' loss with other weights; its average over ranks is that of the global batch."""
        replaced = {f"ranker.{name}": value for name, value in weights.items()}
        divisors = begin_weight_sums(self.ranker, batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out_KBT = functional_call(DensePart(self.ranker), replaced, (embedding_BE, batch), tie_weights=False)
        total, output = global_loss(self.loss, self.ranker, out_KBT, batch, divisors)
        self.alpha_outputs.append(output)
        return total

    def _over_budget(self, alpha_I: Tensor, alpha_NLO: Tensor) -> Tensor:
        """By how much the expected FLOPs of the experts that tasks use now are above the budget."""
        assert self.budget is not None
        assert self.search.budget is not None
        cost_I, cost_O = (
            torch.tensor(list(costs.values()), device=self.device)
            for costs in (self.budget.interaction, self.budget.blocks)
        )
        used = self.supernet.beta_TN.topk(self.budget.chosen).indices.unique()
        expert_NLO = self.supernet.weights(alpha_NLO).expand(self.supernet.experts, -1, -1)[used]
        flops = (self.supernet.weights(alpha_I) * cost_I).sum() + (expert_NLO * cost_O).sum()
        return self.search.budget.weight * torch.relu(flops / self.budget.flops - 1)


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means of tensors over all ranks, in one message."""
    if (ranks := dist.get_world_size()) == 1:
        return [tensor.detach() for tensor in tensors]
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / ranks).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def encode(found: Architecture, space: architecture.Space) -> Tensor:
    """An architecture as numbers: its candidates, then for each task and expert whether they go together."""
    candidates = [space.interaction.index(found.interaction)]
    candidates += [space.blocks.index(name) for name in chain(*found.experts)]
    pairs = [int(n + 1 in found.tasks[task]) for task in space.tasks for n in range(len(found.experts))]
    return torch.tensor(candidates + pairs)


def _adam(parameters: Mapping[str, nn.Parameter], lr: float) -> KeyedOptimizer:
    """Adam, its state made: that is of parameters with a gradient alone, which these have not in the end."""
    for parameter in parameters.values():
        parameter.requires_grad_()
    optimizer = build(DenseOptimizer(name="adam", lr=lr), parameters.items(), None)
    for parameter in parameters.values():
        parameter.requires_grad_(False).grad = None
    return optimizer
