"""Learning rates of tables: the schedule of the dense part, and tables that stay as they are after some epochs."""

import math
from pathlib import Path

import pytest
import torch
from tiny_training import configuration, last, model, tensors, write_checkpoint

from models.ranker import is_table
from pipeline.training.optim.dense import table_rate
from pipeline.training.optim.settings import TableOptimizer
from pipeline.training.optim.tables import ReplicatedTables
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")
EPOCH = 13  # steps


def train(folder: Path, name: str, **settings: object) -> Path:
    made = prepare(configuration(folder / "data", folder / name, max_steps=None, **settings), None, torch.device("cpu"))
    made.run_to_end()
    return folder / name / "checkpoints"


def tables(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model(state).items() if is_table(name)}


def test_tables_stay_as_they_are_after_their_epochs_and_the_rest_goes_on(folder: Path) -> None:
    tables_of_one_epoch = {"name": "adagrad", "lr": 0.05, "epochs": 1}
    found = train(folder, "frozen", epochs=3, checkpoint_every=EPOCH, tables=tables_of_one_epoch)
    first, second, third = (tensors(found / f"step-{n * EPOCH:08d}") for n in (1, 2, 3))
    for name, value in tables(first).items():
        assert torch.equal(value, tables(second)[name])
        assert torch.equal(value, tables(third)[name])
    dense = [name for name in model(first) if not is_table(name)]
    assert any(not torch.equal(model(first)[name], model(third)[name]) for name in dense)


def test_tables_of_which_every_rank_has_a_copy_follow_the_same_rate(folder: Path) -> None:
    """One rank has no such tables: the optimiser that they would have is given one, and a gradient of 1."""
    settings = {"tables": {"name": "sgd", "lr": 0.5, "warmup_steps": 4, "epochs": 1}, "epochs": 2, "max_steps": None}
    learner = prepare(configuration(folder / "data", folder / "copies", **settings), None, torch.device("cpu")).learner
    for step, rate in ((0, 0.125), (1, 0.25), (EPOCH - 1, 0.5), (EPOCH, 0.0)):
        weight = torch.nn.Parameter(torch.zeros(2, 3))
        copies = ReplicatedTables({"ranker.embeddings.embedding_bags.t.weight": weight}, learner.settings.tables)
        learner.replicas = copies
        learner.prepare(step)
        weight.grad = torch.ones_like(weight)
        copies.step()
        torch.testing.assert_close(weight.detach(), torch.full((2, 3), -rate))


def test_the_rate_that_a_table_is_changed_by_is_that_of_its_step(folder: Path) -> None:
    """Of plain SGD, whose change is the rate times the gradient, which a warm-up of 4 steps quarters."""
    changes = []
    for name, warmup in (("whole", 0), ("quarter", 4)):
        settings = {"tables": {"name": "sgd", "lr": 0.5, "warmup_steps": warmup}, "max_steps": 1}
        made = prepare(configuration(folder / "data", folder / name, **settings), None, torch.device("cpu"))
        write_checkpoint(made)
        before = tables(last(folder / name))
        made.run_to_end()
        changes.append({n: value - before[n] for n, value in tables(last(folder / name)).items()})
    for name, whole in changes[0].items():
        torch.testing.assert_close(changes[1][name], whole / 4, rtol=1e-4, atol=1e-8)


def test_the_schedule_is_its_formula() -> None:
    config = TableOptimizer(lr=0.1, warmup_steps=2, decay="cosine", final=0.5, epochs=4)
    rates = [table_rate(config, step, 12, 2) for step in range(12)]
    for step, found in enumerate(rates):
        left = (1 + math.cos(math.pi * (step - 2) / 10)) / 2
        wanted = 0.1 * (step + 1) / 2 if step < 2 else 0.1 * (0.5 + 0.5 * left)
        assert found == pytest.approx(0.0 if step >= 8 else wanted)
