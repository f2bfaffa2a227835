"""Runs of a weighting, and what each task contributes to their steps, from a model in float64 on one device."""

from pathlib import Path
from typing import Any

import torch
from tiny_training import SCHEMA, configuration, dwell_variance, last, model, tensors, unsharded, write_checkpoint
from torch import Tensor
from two_ranks import trainer

from features.batch import Batch
from models.ranker import Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.run import checkpoint

TASKS = ["click", "conversion", "dwell"]
SCHEMAS = {name: task.get("loss_weight", 1.0) for name, task in SCHEMA["tasks"].items()}


def run(folder: Path, name: str, weighting: str, options: dict[str, Any] | None = None, **train: Any) -> Path:
    """A finished run of a weighting with options."""
    made = trainer(folder, name, weighting={"name": weighting} | (options or {}), **train)
    made.run_to_end()
    return folder / name


class Steps:
    """The first steps of a run: its states, and per step each task's loss and gradients from a model in float64."""

    def __init__(self, folder: Path, name: str, weighting: str, steps: int, **options: Any) -> None:
        settings = {"weighting": {"name": weighting} | options, "max_steps": steps, "checkpoint_every": 1}
        write_checkpoint(trainer(folder, f"{name}-start", **settings))
        run(folder, name, weighting, options, max_steps=steps, checkpoint_every=1)
        self.states = [last(folder / f"{name}-start")]
        self.states += [tensors(checkpoint.folder(folder / name / "checkpoints", s + 1)) for s in range(steps)]
        data = Dataset(folder / "data")
        config, loader = configuration(data.path, folder / "unused"), Loader(data, "train", 32, 4, 5, window=24)
        self.rankers: list[Ranker] = []
        self.batches: list[Batch] = []
        self.values: list[dict[str, float]] = []
        self.gradients: list[dict[str, dict[str, Tensor]]] = []
        for state, batch in zip(self.states[:-1], loader.batches(loader.start()), strict=False):
            weights = {n: v for n, v in model(state).items() if not n.startswith("loss.")}
            ranker = unsharded(config, data.schema, data.encoders, weights)
            batch = Batch(**(vars(batch) | {"dense_BD": batch.dense_BD.double()}))
            found = task_losses(ranker(batch), batch)
            named = {n: p for n, p in ranker.named_parameters() if not n.startswith("embeddings.")}
            self.rankers.append(ranker)
            self.batches.append(batch)
            self.values.append({task: loss.item() for task, loss in found.items()})
            self.gradients.append({task: gradients(loss, named) for task, loss in found.items()})

    def shared(self, step: int) -> list[Tensor]:
        """Each task's gradient of the shared parameters, in one row."""
        return [
            torch.cat([g.flatten() for n, g in self.gradients[step][task].items() if not n.startswith("towers.")])
            for task in TASKS
        ]


def task_losses(logit_BT: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Weighted means over observed rows, row by row, without loss weights."""
    found = {}
    for t, task in enumerate(TASKS):
        top, bottom = logit_BT[:, t].sum() * 0, 0.0
        for b in range(len(logit_BT)):
            if batch.observed_BT[b, t]:
                weight, label, z = float(batch.weight_BT[b, t]), float(batch.label_BT[b, t]), logit_BT[b, t]
                one = (z - label) ** 2 / dwell_variance() if task == "dwell" else torch.log1p(torch.exp(z)) - label * z
                top, bottom = top + weight * one, bottom + weight
        found[task] = top / (bottom or 1.0)
    return found


def gradients(loss: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return dict(zip(named, found, strict=True))


def adams(states: list[dict[str, Tensor]], step: int, name: str) -> Tensor:
    """The gradient that Adam was given, from its first moment m = 0.9 m + 0.1 g."""
    before, after = (states[s][f"dense.ranker.{name}.exp_avg"].double() for s in (step, step + 1))
    return 10 * (after - 0.9 * before)
