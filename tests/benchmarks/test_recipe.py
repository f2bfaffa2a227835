"""The study of recipes: runs in one process do not affect each other, finished ones are kept, and the tables' arithmetic."""

import json
import math
import random
import time
from pathlib import Path
from typing import ClassVar

import pytest
import recipe
import torch
from recipe_run import configuration, gap_closed, trained_and_scored

from features.errors import UserError
from pipeline.storage.files import read_lines

SETTINGS = ["model=shared_bottom", "train.batch_size=64", "train.window=64", "train.epochs=2"]


@pytest.mark.integration
def test_a_run_has_the_same_metrics_whatever_was_trained_before_it_in_the_process(small_dataset, tmp_path):
    def metrics(seed: int, *more: str) -> dict:
        found = trained_and_scored(small_dataset, tmp_path / "run", [*SETTINGS, *more], seed, None)
        assert not (tmp_path / "run").exists()
        return found["metrics"]

    first, other, seed_1, again = metrics(0), metrics(0, "train.dense.lr=0.1"), metrics(1), metrics(0)
    assert first == again
    assert first != other
    assert first != seed_1


def test_settings_are_those_of_the_command_line_and_a_wrong_one_is_refused(tmp_path):
    config = configuration(tmp_path, tmp_path / "run", ["recipe=census", "train.dense.lr=0.5"], 7)
    assert (config.train.seed, config.train.dense.lr, config.train.epochs, config.model.input_dropout) == (
        7,
        0.5,
        15,
        0.2,
    )
    with pytest.raises(Exception, match="learning"):
        configuration(tmp_path, tmp_path / "run", ["train.learning=0.5"], 0)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_the_gap_is_that_of_losses_expected_over_the_labels(kind):
    draw = random.Random(3)
    true = [draw.uniform(0.01, 0.9) for _ in range(50)]
    predicted = [draw.uniform(0.01, 0.9) for _ in range(50)]
    weight = [draw.choice([0.0, 1.0, 2.5]) for _ in range(50)]

    def expected(p: float, q: float) -> float:
        return (q - p) ** 2 if kind == "regression" else -p * math.log(q) - (1 - p) * math.log(1 - q)

    def loss(guess: list[float]) -> float:
        return sum(w * expected(p, q) for w, p, q in zip(weight, true, guess, strict=True))

    base = sum(w * p for w, p in zip(weight, true, strict=True)) / sum(weight)
    wanted = (loss([base] * 50) - loss(predicted)) / (loss([base] * 50) - loss(true))
    values, true_B, weight_B = (torch.tensor(x, dtype=torch.float64) for x in (predicted, true, weight))
    values[weight_B == 0], true_B[weight_B == 0] = 0.5, float("nan")  # of rows that are not observed
    outputs = values.logit() if kind == "binary" else values
    assert gap_closed(kind, outputs, true_B, weight_B) == pytest.approx(wanted, abs=1e-12)


class FakeWorker:
    """Answers with a value made of the job; fails where the variant is `bad` and it is not `mended`."""

    asked: ClassVar[list[tuple[str, int]]] = []
    mended = False

    def __init__(self, log: Path) -> None:
        pass

    def run(self, job: recipe.Job) -> dict:
        self.asked.append((job["variant"], job["seed"]))
        if job["variant"] == "bad" and not FakeWorker.mended:
            return {"error": "loss is not finite"}
        value = {"shipped": 0.8, "lr": 0.7, "bad": 0.9}[job["variant"]] + 0.01 * job["seed"]
        return {"step": 1, "metrics": {"click": {"ne": value, "gap": 1 - value}}, "seconds": 3.0, "cpu": 2.0}

    def close(self) -> None:
        pass


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "Worker", FakeWorker)
    FakeWorker.asked, FakeWorker.mended = [], False
    (tmp_path / "demo" / "data").mkdir(parents=True)
    (tmp_path / "demo" / "data" / "manifest.json").write_text("{}")

    def make(**variants: list[str]) -> list[recipe.Job]:
        return recipe.jobs_of(tmp_path, tmp_path / "out", ["demo"], {"shipped": [], **variants}, [], 2)

    return make


def test_only_runs_without_a_result_are_run_and_one_that_failed_is_tried_again(jobs, tmp_path, capsys):
    out = tmp_path / "out"
    recipe.run(jobs(lr=["train.dense.lr=0.1"], bad=[]), out, 2)
    assert sorted(FakeWorker.asked) == [(variant, seed) for variant in ("bad", "lr", "shipped") for seed in (0, 1)]
    assert "loss is not finite" in capsys.readouterr().out
    with (out / "results.jsonl").open("a") as file:
        file.write('{"dataset": "demo", "var')  # of a killed writer
    FakeWorker.asked, FakeWorker.mended = [], True
    recipe.run(jobs(lr=["train.dense.lr=0.1"], bad=[]), out, 1)
    assert FakeWorker.asked == [("bad", 0), ("bad", 1)]
    assert len(list(read_lines(out / "results.jsonl"))) == 6
    FakeWorker.asked = []
    (tmp_path / "demo" / "data" / "manifest.json").write_text('{"other": 1}')
    recipe.run(jobs(lr=["train.dense.lr=0.2"]), out, 1)
    assert FakeWorker.asked == [("shipped", 0), ("lr", 0), ("shipped", 1), ("lr", 1)]


def test_a_variant_with_other_overrides_under_its_name_is_run_again(jobs, tmp_path):
    recipe.run(jobs(lr=["train.dense.lr=0.1"]), tmp_path / "out", 1)
    FakeWorker.asked = []
    recipe.run(jobs(lr=["train.dense.lr=0.2"]), tmp_path / "out", 1)
    assert FakeWorker.asked == [("lr", 0), ("lr", 1)]


def test_the_table_has_means_deviations_and_differences_of_the_same_seeds():
    values = {("shipped", 0): 0.80, ("shipped", 1): 0.84, ("lr", 0): 0.79, ("lr", 1): 0.82, ("lr", 2): 0.70}
    records = [
        {
            "dataset": "demo",
            "variant": variant,
            "seed": seed,
            "cpu": 2.0,
            "metrics": {"click": {"ne": ne}, "dwell": {"nrmse": None}},
        }
        for (variant, seed), ne in values.items()
    ]
    lines = recipe.table(records, "demo").splitlines()
    assert "0.8200±0.0283" in lines[3]
    assert "0.7700±0.0624" in lines[4]
    assert lines[5].split() == ["-0.0150±0.0071"]  # of seeds 0 and 1; shipped has no seed 2
    assert lines[4].split()[-1] == "-"


@pytest.mark.system
def test_a_worker_answers_and_ends_at_once_with_what_it_works_on(small_dataset, tmp_path):
    job = {"path": str(small_dataset), "run": str(tmp_path / "run"), "overrides": SETTINGS, "seed": 0, "truth": None}
    worker = recipe.Worker(tmp_path / "log.txt")
    alone = trained_and_scored(small_dataset, tmp_path / "alone", SETTINGS, 0, None)
    assert worker.run(job)["metrics"] == alone["metrics"]
    assert "NoneType" not in (answer := worker.run({**job, "overrides": ["model=none"]}))["error"]
    assert "model" in answer["error"]
    assert worker.run(job)["metrics"] == alone["metrics"]  # by a new process
    assert worker.process is not None
    print(json.dumps({**job, "overrides": [*SETTINGS, "train.epochs=100000"]}), file=worker.process.stdin, flush=True)
    begin = time.monotonic()
    worker.close()
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("content", ["lr: train.dense.lr=1", "shipped: [x=1]", "[a, b]", "lr: [1]"])
def test_a_file_of_variants_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "variants.yaml").write_text(content)
    with pytest.raises(UserError, match="NAME"):
        recipe.variants_of(tmp_path / "variants.yaml")
