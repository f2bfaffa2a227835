"""A step of an architecture search against Algorithm 1 by hand, in float64, and what changes alpha, beta and weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from search_twin import ALPHA, BETA, Twin, endless
from tiny_search import prepared, run_search, searching
from tiny_training import assert_identical, initial_state, last, model, write_checkpoint
from torch import Tensor

from features.batch import PADDING, Batch
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.search import learner as search_learner
from pipeline.storage.files import read_lines
from pipeline.training import step as training_step
from pipeline.training.observer import Observer
from pipeline.training.optim.dense import build
from pipeline.training.optim.settings import DenseOptimizer
from pipeline.training.step import StepOutput
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

STEEP = {"name": "sgd", "lr": 0.5, "decay": "cosine"}
FAST = {"warmup": 0.34, "alpha_lr": 0.01, "beta_lr": 0.02}  # of three steps, beta learns in two


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Asserts that states are close, and that nearly everything has moved by more than the tolerance.

    Adam's steps are of the size of its rate, however small a gradient and its share of rounding error: 0.01 and 0.02 here.
    """
    assert found.keys() == wanted.keys()
    moved = 0
    for name, value in wanted.items():
        atol = 1e-5 if name in (*ALPHA, BETA) else 1e-6
        torch.testing.assert_close(
            found[name].double(), value.detach(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved += bool((value - start[name]).abs().max() > (100 if atol > 1e-6 else 3) * atol)
    assert moved > 0.9 * len(wanted)


# Algorithm 1


@pytest.mark.parametrize(
    ("search", "space"),
    [
        ({}, {}),
        ({"order": 2, "warmup": 0.0}, {}),
        ({"diversity": 0.0, "auxiliary": 0.2}, {"homogeneous": True}),
    ],
    ids=["first", "second", "homogeneous"],
)
def test_three_steps_are_those_of_algorithm_1(folder: Path, request: Any, search: dict, space: dict) -> None:
    run = folder / f"three-{request.node.callspec.id}"
    config = searching(folder / "data", run, space, FAST | search, max_steps=3, dense=STEEP)
    start = initial_state(config)
    twin = Twin(config, start)
    wanted = twin.run()
    prepared(config).run_to_end()
    assert twin.warmup == (0 if search.get("warmup") == 0 else 1)
    assert_near(model(last(run)), twin.ranker.state_dict(), model(start))
    # One evaluation a step: none of them has another step's loss.
    found = [line["valid_loss"] for line in read_lines(run / "metrics" / "search.jsonl")]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_adam_of_alpha_and_beta_counts_their_own_updates(folder: Path) -> None:
    search = FAST | {"alpha_every": 2}
    config = searching(folder / "data", folder / "counted", search=search, max_steps=3, dense=STEEP)
    prepared(config).run_to_end()
    state = last(folder / "counted")
    assert [int(state[f"search.optimizers.{name}.step"]) for name in ("alpha_I", "alpha_NLO", "beta_TN")] == [2, 2, 2]


def test_beta_stays_during_the_warm_up_and_weights_do_not(folder: Path) -> None:
    config = searching(folder / "data", folder / "warm", search={"warmup": 1.0}, max_steps=4)
    start = initial_state(config)
    prepared(config).run_to_end()
    found = last(folder / "warm")
    moved = {n for n, v in model(found).items() if not torch.equal(v, start[f"model.{n}"])}
    assert moved == set(model(found)) - {BETA}
    assert not found["search.optimizers.beta_TN.exp_avg"].any()


def test_with_gates_no_beta_learns_and_gates_do(folder: Path) -> None:
    config = searching(folder / "data", folder / "gates", {"selection": "gates"}, {"warmup": 0.0}, max_steps=3)
    start = initial_state(config)
    found = prepared(config).run_to_end()
    state = last(folder / "gates")
    moved = {n for n, v in state.items() if n in start and not torch.equal(v, start[n])}
    assert f"model.{BETA}" not in moved
    assert any(name.startswith("model.fusion.gate") for name in moved)
    [*_, line] = read_lines(found.search_metrics)
    assert set(map(tuple, line["architecture"]["tasks"].values())) == {(1, 2, 3)}


# The second order


def second_order(folder: Path, name: str, step: int, **search: Any) -> tuple[dict[str, Tensor], Twin, Batch, Batch]:
    """Alpha's gradient in a step of a fresh search, with its twin and the two batches."""
    steep = FAST | {"beta_lr": 50.0 if step == 0 else 5.0, "order": 2} | search
    config = searching(folder / "data", folder / name, search=steep, max_steps=3, dense=STEEP | {"lr": 2.0})
    made = prepared(config)
    made.learner.supernet.beta_TN.data[:] = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [0.5, -1.0, 1.0]])
    write_checkpoint(made)
    twin = Twin(config, last(folder / name))
    valid, batch = next(endless(twin.valid)), next(endless(twin.train))
    made.learner.valid = iter([valid])
    made.learner.forward(batch, step)
    fusion = made.learner.supernet
    twin.ranker.fusion.auxiliary, twin.ranker.fusion.sharpness = fusion.auxiliary, fusion.sharpness
    return {name: fusion.get_parameter(name.removeprefix("fusion.")).grad for name in ALPHA}, twin, valid, batch


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_second_order_is_the_derivative_of_equation_4(folder: Path, step: int) -> None:
    """Steps 1 and 2 come after the warm-up: then beta is a step ahead too."""
    found, twin, valid, batch = second_order(folder, f"eq4-{step}", step)
    wanted = twin.validation(valid, batch, step)[1]
    twin.search = twin.search.model_copy(update={"order": 1})
    first = twin.validation(valid, batch, step)[1]
    for name in ALPHA:
        gap = (wanted[name] - first[name]).abs().max().item()
        assert gap > 1e-5
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=0, atol=gap / 200)


def test_the_second_order_is_what_finite_differences_say(folder: Path) -> None:
    found, twin, valid, batch = second_order(folder, "differences", 1)

    def after(name: str, place: int, shift: float) -> float:
        value = twin.params[name].detach().clone()
        value.view(-1)[place] += shift
        values = twin.params | {name: value.requires_grad_()}
        return twin.loss(valid, values | twin.ahead(batch, 1, values)).item()

    for name in ALPHA:
        for place in (0, 3):
            wanted = (after(name, place, 1e-4) - after(name, place, -1e-4)) / 2e-4
            assert found[name].view(-1)[place].item() == pytest.approx(wanted, rel=1e-3, abs=1e-6)


# One path


class Draws(Observer):
    """The noise of every train batch's path."""

    def __init__(self) -> None:
        self.noise: list[tuple[float, ...]] = []
        self.temperatures: set[float] = set()

    def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
        path = trainer.learner.ranker.fusion.path
        self.noise.append(tuple(path.noise_I.tolist()))
        self.temperatures.add(path.temperature)


def test_each_batch_has_a_path_of_its_own_which_the_seed_decides(folder: Path) -> None:
    draws = {name: Draws() for name in ("seed-5", "seed-5-again", "seed-6")}
    for name, observer in draws.items():
        search = {"paths": "one", "temperature": 0.7}
        run_search(folder, f"path-{name}", observer, search=search, max_steps=4, seed=int(name[5]))
    assert len(set(draws["seed-5"].noise)) == 4
    assert draws["seed-5"].noise == draws["seed-5-again"].noise
    assert not {*draws["seed-5"].noise} & {*draws["seed-6"].noise}
    assert draws["seed-5"].temperatures == {0.7}


# Which rows


class Seen:
    """The rows that each gradient of alpha, and each of weights and beta, was taken of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alpha: list[list[int]] = []
        self.weights: list[list[int]] = []
        for module, name, place, rows in (
            (search_learner, "global_loss", 3, self.alpha), (training_step, "loss_after_lookup", 2, self.weights),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self.recording(getattr(module, name), place, rows))

    def recording(self, loss: Callable[..., Any], place: int, rows: list[list[int]]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            rows.append(rows_of(arguments[place]))
            return loss(*arguments)

        return record


def rows_of(batch: Batch) -> list[int]:
    return batch.row_id_B[batch.row_id_B != PADDING].tolist()


def split_rows(data: Path, split: str) -> set[int]:
    return set(pq.read_table(data / split, columns=["row_id"])["row_id"].to_pylist())


@pytest.mark.parametrize("every", [1, 3])
def test_alpha_learns_from_every_nth_steps_validation_batch_and_all_else_from_train_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    seen = Seen(monkeypatch)
    made = run_search(folder, f"rows-{every}", search={"alpha_every": every}, max_steps=13)
    assert len(seen.weights) == 13
    rows = [row for step in seen.weights for row in step]
    assert len(rows) == len(set(rows))
    assert set(rows) == split_rows(folder / "data", "train")
    loader = Loader(Dataset(folder / "data"), "valid", 32, 4, 5, window=24)
    batches = endless(loader)
    assert seen.alpha == [rows_of(next(batches)) for _ in range(0, 13, every)]
    assert {row for step in seen.alpha for row in step} == split_rows(folder / "data", "valid")
    assert len({tuple(step) for step in seen.alpha}) == len(seen.alpha)  # in another order in each epoch
    assert made.learner.alpha.state_dict()["state"]["alpha_I"]["step"] == -(-13 // every)


def test_alpha_rests_during_its_warm_up_and_takes_the_first_validation_batch_after_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    search = {"alpha_warmup": 0.5, "alpha_every": 2, "evaluate_every": 3, "patience": None, "sharpness": 1.0}
    made = run_search(folder, "alpha-warm", search=search, max_steps=12)
    batches = endless(Loader(Dataset(folder / "data"), "valid", 32, 4, 5, window=24))
    assert seen.alpha == [rows_of(next(batches)) for _ in (6, 8, 10)]  # the steps before which 6 lie, every second one
    records = list(read_lines(made.run.search_metrics))
    assert [line["valid_loss"] is None for line in records] == [True, True, False, False]
    assert records[0]["interaction"] == records[1]["interaction"] != records[2]["interaction"]


def test_a_search_does_not_end_while_alpha_rests(folder: Path) -> None:
    search = {
        "alpha_warmup": 0.75,
        "warmup": 0.25,
        "evaluate_every": 1,
        "patience": 2,
        "beta_lr": 1e-6,
        "alpha_lr": 1e-6,
    }
    found = run_search(folder, "resting", search=search, max_steps=12)
    records = list(read_lines(found.run.search_metrics))
    assert [line["unchanged"] for line in records] == [0] * 9 + [1, 2]
    assert found.state.step == 11


def test_strengths_have_the_sharpness_that_the_steps_before_them_have_come_to(folder: Path) -> None:
    """It rises by the same factor in each step, to the one that is set at the end of the last."""
    search = FAST | {"sharpness": 50.0, "patience": None}
    run = run_search(folder, "sharp", search=search, max_steps=4).run
    alpha_O = model(last(run.path))[ALPHA[0]].double()
    *_, line = read_lines(run.search_metrics)
    assert line["step"] == 4
    wanted_O = (50 * alpha_O).exp() / (50 * alpha_O).exp().sum()
    assert line["interaction"] == pytest.approx(wanted_O.tolist(), rel=1e-4)


@pytest.mark.parametrize("paths", ["all", "one"])
def test_weights_and_beta_are_the_same_to_the_last_bit_whatever_rows_alpha_sees(folder: Path, paths: str) -> None:
    """With a rate of alpha that moves nothing: alpha's gradient leaves nothing behind, nor draws from their random state."""
    search = {"alpha_lr": 1e-30, "paths": paths}
    for name, split in (("valid", "valid"), ("test", "test")):
        made = prepared(searching(folder / "data", folder / f"{paths}-on-{name}", search=search, dropout=0.3))
        made.valid = Loader(made.dataset, split, 32, 4, 5, window=24)
        made.run_to_end()
    states = [last(folder / f"{paths}-on-{name}") for name in ("valid", "test")]
    mine, theirs = ({n: v for n, v in s.items() if not n.startswith("search.")} for s in states)
    assert_identical(mine, theirs)
    moments = "search.optimizers.alpha_NLO.exp_avg"
    assert not torch.equal(states[0][moments], states[1][moments])


def test_alpha_is_the_same_to_the_last_bit_whatever_rows_the_weights_see(folder: Path) -> None:
    still = {"dense": {"name": "sgd", "lr": 1e-30}, "tables": {"lr": 1e-30}, "max_steps": 2}
    for split in ("train", "test"):
        config = searching(folder / "data", folder / f"weights-on-{split}", search={"beta_lr": 1e-30}, **still)
        made = prepared(config)
        made.loader = Loader(made.dataset, split, 32, 4, 5, window=24)
        made.run_to_end()
    one, other = (last(folder / f"weights-on-{split}") for split in ("train", "test"))
    for name in (*(f"model.{n}" for n in ALPHA), *(n for n in one if n.startswith("search.optimizers.alpha"))):
        assert torch.equal(one[name], other[name]), name
    assert not torch.equal(*(state["search.optimizers.beta_TN.exp_avg"] for state in (one, other)))


# Falling weights


def test_the_weights_of_both_helpers_fall_in_a_line_to_0_and_eq_2s_from_the_end_of_the_warm_up(folder: Path) -> None:
    search = {"auxiliary": 0.5, "diversity": 2.0, "warmup": 0.25}
    run_search(folder, "falling", search=search, max_steps=8)
    found = [line["search"] for line in read_lines(folder / "falling" / "metrics" / "train.jsonl")]
    # A line tells of the step that it follows; the weight of eq. 2 is that of the step to come.
    assert [line["auxiliary"] for line in found] == pytest.approx([0.5 * (1 - step / 8) for step in range(8)])
    weights = [2.0 * (8 - step) / 6 if step >= 2 else 0.0 for step in range(1, 9)]
    assert [line["diversity_weight"] for line in found] == pytest.approx(weights)


def test_the_loss_that_is_said_is_the_mean_since_the_last_evaluation(folder: Path) -> None:
    every_step = run_search(folder, "said-1", search={"evaluate_every": 1, "patience": None}, max_steps=9)
    every_fourth = run_search(folder, "said-4", search={"evaluate_every": 4, "patience": None}, max_steps=9)
    one, four = (read_lines(made.run.search_metrics) for made in (every_step, every_fourth))
    losses = [line["valid_loss"] for line in one]
    found = {line["step"]: line["valid_loss"] for line in four}
    assert found == {
        4: pytest.approx(sum(losses[:4]) / 4), 8: pytest.approx(sum(losses[4:8]) / 4), 9: pytest.approx(losses[8]),
    }  # fmt: skip
    # A line of train.jsonl says the mean so far, that of the evaluation included.
    said = [line["search"]["valid_loss"] for line in read_lines(every_fourth.run.train_metrics)]
    assert said == pytest.approx([sum(losses[i - i % 4 : i + 1]) / (i % 4 + 1) for i in range(9)])
    counts = {f"search.{name}": torch.zeros(()) for name in ("loss_sum_2", "unchanged", "chosen")}
    assert_identical(last(folder / "said-1") | counts, last(folder / "said-4") | counts)


def test_a_search_warns_of_nothing(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.set_warn_always(True)
    try:
        run_search(folder, "quiet", search={"warmup": 0.0}, max_steps=2)
    finally:
        torch.set_warn_always(False)
    assert [str(warning.message) for warning in recwarn if "requires_grad" in str(warning.message)] == []


# SGD


def test_sgd_of_the_dense_part_is_the_formula_with_its_decay() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = build(DenseOptimizer(name="sgd", lr=0.1, weight_decay=0.01), [("weight", weight)], None)
    assert weight.tolist() == [1.0, -2.0, 0.5]  # making the state moves nothing
    wanted = weight.detach().double().clone()
    for step in range(3):
        weight.grad = torch.tensor([0.3, -0.1, 2.0]) * (step + 1)
        wanted -= 0.1 * (weight.grad.double() + 0.01 * wanted)
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), wanted, rtol=1e-6, atol=0)


def test_a_run_of_sgd_moves_dense_weights_by_rate_times_gradient(folder: Path) -> None:
    """One step at two rates: movements are in proportion."""
    config = searching(folder / "data", folder / "sgd", max_steps=1)
    start = model(initial_state(config))
    for name, lr in (("sgd", 0.01), ("sgd-4", 0.04)):
        run_search(folder, name, max_steps=1, dense={"name": "sgd", "lr": lr})
    one, four = (model(last(folder / name)) for name in ("sgd", "sgd-4"))
    name = "towers.out.weight_SDH"
    torch.testing.assert_close(four[name] - start[name], 4 * (one[name] - start[name]), rtol=1e-3, atol=1e-7)
