"""A search that is stopped, told to end, ended early, or fed what cannot be learnt from, against one that was left alone."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_search import prepared, run_search, searching
from tiny_training import assert_identical, last, make_dataset
from two_ranks import stopped

from features.errors import Preempted, UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.run import checkpoint
from pipeline.storage.files import read_lines
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

VARIANTS: dict[str, dict[str, Any]] = {
    "all": {"search": {"alpha_every": 3, "evaluate_every": 4, "patience": None, "alpha_lr": 0.01, "beta_lr": 0.01}},
    "one": {
        "search": {
            "paths": "one", "alpha_warmup": 0.3, "evaluate_every": 2, "patience": None, "alpha_lr": 0.05, "beta_lr": 0.05,
        },
    },
    "second": {"search": {"order": 2, "evaluate_every": 5, "alpha_lr": 0.01}, "dropout": 0.3},
}  # fmt: skip
STOPS = {"all": 5, "one": 7, "second": 4}


def lines(run: Path, name: str = "search.jsonl") -> list[dict[str, Any]]:
    """Lines of a metrics file without what depends on the clock."""
    clock = ("time", "rows_per_s", "data_wait", "seconds_left")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_lines(run / "metrics" / name)]


def assert_same_search(run: Path, other: Path) -> None:
    """Weights, alpha, beta, their optimisers, loss sums and what was found, bit for bit; and every line."""
    assert_identical(last(run), last(other))
    for name in ("search.jsonl", "train.jsonl", "progressive.jsonl"):
        assert lines(run, name) == lines(other, name)
    assert lines(run)


# Stopped


@pytest.mark.parametrize("name", VARIANTS)
def test_a_search_that_was_stopped_goes_on_bit_for_bit(folder: Path, name: str) -> None:
    settings = VARIANTS[name] | {"checkpoint_every": STOPS[name]}
    run_search(folder, f"whole-{name}", **settings)
    stopped(folder, f"whole-{name}", f"part-{name}", STOPS[name])
    made = prepared(searching(folder / "data", folder / f"part-{name}", **settings))
    assert made.state.step == STOPS[name]
    made.run_to_end()
    assert_same_search(folder / f"part-{name}", folder / f"whole-{name}")
    assert len(lines(folder / f"whole-{name}")) == -(-12 // settings["search"]["evaluate_every"])


def test_a_checkpoint_holds_what_adam_keeps_of_alpha_and_beta_before_their_first_update(folder: Path) -> None:
    run_search(folder, "early", max_steps=2, search={"warmup": 1.0})
    kept = {name.removeprefix("search.optimizers.") for name in last(folder / "early") if ".optimizers." in name}
    wanted = {
        f"{name}.{part}" for name in ("alpha_I", "alpha_NLO", "beta_TN") for part in ("exp_avg", "exp_avg_sq", "step")
    }
    assert kept == wanted


class Preempting(Observer):
    """SIGTERM in the midst of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.state.step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [1, 3, 4, 11])
def test_a_search_that_was_told_to_end_goes_on_bit_for_bit(folder: Path, step: int) -> None:
    settings = VARIANTS["all"]
    if not (folder / "undisturbed").exists():
        run_search(folder, "undisturbed", **settings)
    with pytest.raises(Preempted, match=rf"SIGTERM: saved .*step-{step:08d}\."):
        run_search(folder, f"told-{step}", Preempting(step), **settings)
    assert not (folder / f"told-{step}" / "architecture.yaml").exists()
    run_search(folder, f"told-{step}", **settings)
    assert_same_search(folder / f"told-{step}", folder / "undisturbed")
    texts = [(folder / name / "architecture.yaml").read_text() for name in (f"told-{step}", "undisturbed")]
    assert texts[0].partition("width:")[2] == texts[1].partition("width:")[2] != ""


def test_another_order_of_alphas_gradient_is_refused_in_mid_search(folder: Path) -> None:
    run_search(folder, "first-order", max_steps=2)
    for change in ({"order": 2}, {"paths": "one"}, {"alpha_every": 2}, {"warmup": 0.5}):
        with pytest.raises(UserError, match="model and optimisers"):
            run_search(folder, "first-order", search=change)
    with pytest.raises(UserError, match="model and optimisers"):
        run_search(folder, "first-order", space={"experts": 4})


# Settled


UNCHANGING = {"search": {"alpha_lr": 1e-9, "beta_lr": 1e-9, "evaluate_every": 2, "patience": 2}, "max_steps": 16}


def test_a_search_ends_once_the_architecture_has_stayed_the_same_after_the_warm_up(folder: Path) -> None:
    made = run_search(folder, "unchanged", **UNCHANGING)
    assert made.learner.warmup == 4
    found = lines(folder / "unchanged")
    assert [(line["step"], line["unchanged"]) for line in found] == [(2, 0), (4, 0), (6, 1), (8, 2)]
    status = json.loads((folder / "unchanged" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 8)
    assert checkpoint.steps(folder / "unchanged" / "checkpoints") == [8]
    assert "step 8 of" in (folder / "unchanged" / "architecture.yaml").read_text()


def test_a_unchanged_search_run_again_does_nothing(folder: Path) -> None:
    if not (folder / "unchanged").exists():
        run_search(folder, "unchanged", **UNCHANGING)
    kept = [*(folder / "unchanged" / "checkpoints").rglob("*.bin"), *(folder / "unchanged" / "metrics").glob("*.jsonl")]
    kept.append(folder / "unchanged" / "architecture.yaml")
    before = {path: path.read_bytes() for path in kept}
    made = run_search(folder, "unchanged", **UNCHANGING)
    assert made.state.step == 8
    assert {path: path.read_bytes() for path in kept} == before
    status = json.loads((folder / "unchanged" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 8)


def test_a_unchanged_search_goes_on_with_more_patience_as_if_it_had_had_it_at_once(folder: Path) -> None:
    run_search(folder, "impatient", **UNCHANGING)
    patient = UNCHANGING | {"search": UNCHANGING["search"] | {"patience": 4}}
    run_search(folder, "impatient", **patient)
    run_search(folder, "patient", **patient)
    assert [line["step"] for line in lines(folder / "patient")] == [2, 4, 6, 8, 10, 12]
    assert_same_search(folder / "impatient", folder / "patient")


def test_without_patience_a_search_goes_to_its_end(folder: Path) -> None:
    made = run_search(folder, "endless", max_steps=16, search=UNCHANGING["search"] | {"patience": None})
    assert made.state.step == 16
    assert lines(folder / "endless")[-1]["unchanged"] == 6


def test_an_architecture_that_changes_is_counted_from_anew(folder: Path) -> None:
    made = run_search(
        folder, "changing", **UNCHANGING | {"search": UNCHANGING["search"] | {"patience": None, "alpha_lr": 0.3}}
    )
    found = lines(made.run.path)
    for before, line in zip(found, found[1:], strict=False):
        networks = [dict(other["architecture"], strengths=None) for other in (before, line)]
        same = networks[0] == networks[1] and line["step"] > 4
        assert line["unchanged"] == (before["unchanged"] + 1 if same else 0)
    assert any(line["unchanged"] == 0 for line in found[2:])


# What cannot be learnt from


def batches(folder: Path, split: str, epoch: int = 0) -> list[list[int]]:
    """The rows of each batch."""
    loader = Loader(Dataset(folder / "data"), split, 32, 4, 5, window=24)
    return [batch.row_id_B.tolist() for batch in loader.batches(loader.start(epoch))]


def spoilt(folder: Path, name: str, split: str) -> tuple[int, set[int]]:
    """Makes a dataset with a row that is not finite: its row_id, and the steps of eight that take it."""
    if split == "train":
        row_id, steps = batches(folder, split)[4][0], {5}
    else:  # the third step takes the first batch of the second pass; a pass has two
        row_id = batches(folder, split, 1)[0][0]
        steps = {2 * e + n + 1 for e in range(4) for n in range(2) if row_id in batches(folder, split, e)[n]}
    make_dataset(folder / name, spoil=("price", row_id))
    return row_id, steps


VARIATIONS: dict[str, dict[str, Any]] = {
    "first": {}, "second": {"search": {"order": 2}}, "gates": {"search": {"paths": "one"}, "space": {"selection": "gates"}},
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_steps_with_a_row_that_is_not_finite_are_skipped_as_if_they_had_not_been(
    folder: Path, variation: str, split: str
) -> None:
    name = f"{split}-{variation}"
    _, bad = spoilt(folder, name, split)
    settings = VARIATIONS[variation] | {"max_steps": 8, "checkpoint_every": 2, "nonfinite": "skip"}
    search = {"evaluate_every": 1, "patience": 3, "alpha_lr": 1e-6, "warmup": 0.25}
    settings["search"] = settings.get("search", {}) | search
    without = prepared(searching(folder / name, folder / f"without-{name}", **settings))
    without.state.skipped = set(bad)
    without.run_to_end()
    made = run_search(folder, f"run-{name}", data=name, **settings)
    assert made.state.step == without.state.step
    assert made.state.skipped & {*range(made.state.step + 1)} == bad & {*range(made.state.step + 1)} != set()
    assert_identical(last(made.run.path), last(without.run.path))
    assert lines(made.run.path) == lines(without.run.path)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_a_row_that_is_not_finite_stops_a_search_and_is_named(folder: Path, variation: str, split: str) -> None:
    name = f"stop-{split}-{variation}"
    row_id, bad = spoilt(folder, name, split)
    with pytest.raises(UserError, match=rf"step {min(bad)}, epoch 0: the loss of 1 rows .* row_id {row_id}\."):
        run_search(folder, f"run-{name}", data=name, checkpoint_every=1, **VARIATIONS[variation])
    kept = folder / f"run-{name}" / "checkpoints"
    assert checkpoint.steps(kept) == [*range(1, min(bad))]
    if min(bad) > 1:
        assert all(value.isfinite().all() for value in last(kept.parent).values())
