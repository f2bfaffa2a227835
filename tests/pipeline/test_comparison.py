"""Differences between models against a bootstrap and by hand, predictions row by row, gates, sizes and trees."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import log_loss

from features.errors import UserError
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.evaluation import predictions, trees
from pipeline.evaluation.follow import EvaluateConfig, evaluate
from pipeline.evaluation.model_cost import model_cost
from pipeline.evaluation.scorer import Scorer
from pipeline.run.run import Run
from pipeline.search import compare, report
from pipeline.search.compare import stop_early
from pipeline.search.compare_config import CompareConfig
from pipeline.search.comparison import Entry, differences
from pipeline.storage.files import read_lines
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

MODEL = ModelConfig(fusion={"name": "mmoe", "num_experts": 3, "levels": [[8], [4]]}, tower=[4])


@pytest.fixture(scope="module")
def run(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("compared") / "run"
    settings = Settings(batch_size=32, lanes=4, epochs=1, max_steps=6, threads=1)
    train(TrainConfig(dataset=small_dataset, run=path, model=MODEL, train=settings))
    return Run(path)


def rows_file(path: Path, logit_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray) -> Path:
    columns = {"row_id": np.arange(len(label_N)), "weight": weight_N, "logit.t": logit_N, "label.t": label_N}
    pl.DataFrame(columns).fill_nan(None).write_parquet(path)
    return path


def drawn(folder: Path, seeds: int, rows: int = 4000) -> tuple[Entry, Entry, np.ndarray]:
    """Two models' runs on the same rows: the second is the truth with a little noise, the first with more."""
    rng = np.random.default_rng(seeds)
    truth_N = rng.normal(-1, 1.5, rows)
    label_N = (rng.random(rows) < 1 / (1 + np.exp(-truth_N))).astype(float)
    label_N[rng.random(rows) < 0.2] = np.nan
    weight_N = rng.choice([0.0, 1.0, 3.0], rows)
    entries = []
    for name, noise in (("better", 0.3), ("baseline", 0.8)):
        files = [
            rows_file(folder / f"{name}-{seed}.parquet", truth_N + rng.normal(0, noise, rows), label_N, weight_N)
            for seed in range(seeds)
        ]
        entries.append(Entry(name, rows=files))
    return entries[0], entries[1], np.isnan(label_N)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_difference_is_that_of_the_log_losses_in_percent(tmp_path: Path, seeds: int) -> None:
    better, baseline, hidden_N = drawn(tmp_path, seeds)
    losses = []
    for entry in (better, baseline):
        frames = [pl.read_parquet(path).filter(~pl.Series(hidden_N)) for path in entry.rows]
        losses.append(np.mean([
            log_loss(f["label.t"], 1 / (1 + np.exp(-f["logit.t"].to_numpy())), sample_weight=f["weight"]) for f in frames
        ]))  # fmt: skip
    mean, half = differences(better, baseline, {"t": "binary"})["t"]
    assert mean == pytest.approx(100 * (losses[0] / losses[1] - 1), rel=1e-6)
    assert mean + half < 0


def test_the_interval_is_a_bootstraps_over_rows(tmp_path: Path) -> None:
    better, baseline, _ = drawn(tmp_path, 1)
    loss, base = (predictions.row_losses(pl.read_parquet(e.rows[0]), "t", "binary") for e in (better, baseline))
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        chosen = rng.integers(0, len(loss[0]), len(loss[0]))
        weight_N = loss[1][chosen]
        found.append(((loss[0] - base[0])[chosen] * weight_N).sum() / weight_N.sum())
    half = differences(better, baseline, {"t": "binary"})["t"][1]
    scale = 100 / ((base[0] * base[1]).sum() / base[1].sum())
    assert half == pytest.approx(1.96 * np.std(found) * scale, rel=0.08)


def test_seeds_that_disagree_widen_the_interval(tmp_path: Path) -> None:
    label_N, one_N = np.tile([0.0, 1.0], 50), np.ones(100)
    quiet = Entry("b", rows=[rows_file(tmp_path / f"b{s}", np.zeros(100), label_N, one_N) for s in range(2)])
    same = Entry("s", rows=[rows_file(tmp_path / f"s{s}", (2 * label_N - 1) * 0.5, label_N, one_N) for s in range(2)])
    other = [(2 * label_N - 1) * lift for lift in (0.25, 0.75)]
    apart = Entry("a", rows=[rows_file(tmp_path / f"a{s}", z, label_N, one_N) for s, z in enumerate(other)])
    assert differences(same, quiet, {"t": "binary"})["t"][1] == pytest.approx(0, abs=1e-9)
    means = [100 * (math.log1p(math.exp(-z)) - math.log(2)) / math.log(2) for z in (0.25, 0.75)]
    assert differences(apart, quiet, {"t": "binary"})["t"][1] == pytest.approx(1.96 * np.std(means, ddof=1) / 2**0.5)


def test_an_entry_does_not_differ_from_itself_and_squares_are_compared_for_regression(tmp_path: Path) -> None:
    _, baseline, _ = drawn(tmp_path, 2)
    assert differences(baseline, baseline, {"t": "binary"})["t"] == (0, 0)
    label_N, one_N = np.array([0.0, 1.0, 2.0, np.nan]), np.ones(4)
    base = Entry("b", rows=[rows_file(tmp_path / "b", label_N + 2, label_N, one_N)])
    half = Entry("h", rows=[rows_file(tmp_path / "h", label_N + 1, label_N, one_N)])
    assert differences(half, base, {"t": "regression"})["t"][0] == pytest.approx(-75)


def test_predictions_are_the_rankers_for_every_row_of_the_split_once(run: Run, small_dataset: Path) -> None:
    (record,) = evaluate(EvaluateConfig(run=run.path, step="newest", predictions=True, threads=1))
    rows = pl.read_parquet(predictions.path(run, "test", record["step"]))
    dataset = Dataset(small_dataset)
    known = pl.concat(pl.read_parquet(small_dataset / s.path) for s in dataset.shards("test")).sort("row_id")
    assert rows["row_id"].to_list() == known["row_id"].to_list()
    for column in ("weight", "label.click", "label.bought", "label.dwell"):
        assert rows[column].to_list() == known[column].to_list(), column
    scorer = Scorer(run, dataset, "test", 64)
    metrics = scorer.metrics(record["step"])[0].compute()
    loss_N, weight_N = predictions.row_losses(rows, "click", "binary")
    share = (known["label.click"] * known["weight"]).sum() / known["weight"].sum()
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert (loss_N * weight_N).sum() / weight_N.sum() / entropy == pytest.approx(metrics["click"]["ne"], rel=1e-5)
    assert not list(evaluate(EvaluateConfig(run=run.path, step="newest", predictions=True, threads=1)))
    assert len(list(read_lines(run.eval_metrics))) == 1


def test_predictions_that_are_missing_are_made_without_a_second_record(run: Run) -> None:
    list(evaluate(EvaluateConfig(run=run.path, step="newest", threads=1, split="valid")))
    before = len(list(read_lines(run.eval_metrics)))
    list(evaluate(EvaluateConfig(run=run.path, step="newest", threads=1, split="valid", predictions=True)))
    assert predictions.path(run, "valid", 6).exists()
    assert len(list(read_lines(run.eval_metrics))) == before


def test_gate_means_are_those_of_all_real_rows(run: Run, small_dataset: Path) -> None:
    record = Scorer(run, Dataset(small_dataset), "test", 64).evaluate(6)  # 300 rows: the last batch has padding
    other = Scorer(run, Dataset(small_dataset), "test", 300)
    other.metrics(6)
    batch = next(other.batches())
    with torch.inference_mode():
        expected = other.ranker.fusion.gates(other.ranker.inputs(batch))
    assert [len(level) for level in record["gates"]] == [3, 3]
    for level, weight_BUE in zip(record["gates"], expected, strict=True):
        torch.testing.assert_close(torch.tensor(level), weight_BUE[batch.row_id_B >= 0].mean(0), rtol=1e-4, atol=1e-5)


def test_flops_and_parameters_are_those_of_the_layers(small_dataset: Path) -> None:
    dataset = Dataset(small_dataset)
    config = ModelConfig(fusion={"name": "single_task", "widths": [8, 4]}, tower=[])
    ranker = Ranker(dataset.schema, dataset.encoders, config, device="cpu")
    loader = Loader(dataset, "test", 32)
    batch = next(loader.batches(loader.start()))
    found = model_cost(ranker, batch)
    width, tasks = ranker.numbers.out_dim, len(dataset.schema.tasks)
    products = tasks * (width * 8 + 8 * 4 + 4)
    assert found["flops_per_row"] == 2 * products
    assert found["parameters"] == products + tasks * (8 + 4 + 1)
    rows = {name: dataset.encoders.num_embeddings(name) for name in dataset.schema.all_tables}
    assert found["table_parameters"] == sum(rows[n] * t.dim for n, t in dataset.schema.all_tables.items())


@pytest.mark.parametrize("kind", trees.TREES)
def test_trees_learn_and_are_measured_as_the_networks_are(small_dataset: Path, tmp_path: Path, kind: str) -> None:
    found = trees.TREES[kind](Dataset(small_dataset), 10_000, 0, tmp_path / "rows.parquet")
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    assert found["metrics"].keys() == {"click", "bought", "dwell"}
    observed = rows.drop_nulls("label.dwell")
    weight = observed["weight"]
    error = ((observed["logit.dwell"] - observed["label.dwell"]) ** 2 * weight).sum() / weight.sum()
    assert found["metrics"]["dwell"]["mse"] == pytest.approx(error, rel=1e-4)
    assert json.dumps(found)
    if kind == "rmtgb":
        assert all(0 < weight < 1 for weight in found["outlier_weight"].values())


@pytest.mark.parametrize(
    ("kind", "splits", "label", "says"),
    [
        (
            "boosted",
            ["train"],
            None,
            "is not observed in the first 50 train rows, so no trees can learn it. Raise trees_max",
        ),
        (
            "rmtgb",
            ["train"],
            None,
            "is not observed in the first 50 train rows, so no trees can learn it. Raise trees_max",
        ),
        ("boosted", ["valid"], None, "is not observed in valid, where the number of trees is found. Set trees=[]."),
        ("rmtgb", ["valid"], None, "is not observed in valid, where the number of trees is found. Set trees=[]."),
        ("boosted", ["train"], 0.0, "has labels of one class in train, which boosted"),
        ("boosted", ["train"], 0.5, "has soft labels, which boosted"),
        ("boosted", ["valid"], 0.5, "has soft labels, which boosted"),
        ("rmtgb", ["train"], 0.0, None),
        ("rmtgb", ["train", "valid"], 0.5, None),
    ],
)
def test_trees_name_a_task_whose_labels_they_cannot_take_and_what_they_advise_works(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, splits: list[str],
    label: float | None, says: str | None,
) -> None:  # fmt: skip
    read, constant = trees._rows, pl.lit(label, pl.Float32).alias("label.bought")
    monkeypatch.setattr(
        trees, "_rows", lambda data, split: read(data, split).with_columns(*[constant] * (split in splits))
    )
    if says is None:
        assert trees.TREES[kind](Dataset(small_dataset), 50, 0, tmp_path / "rows.parquet")["trees"]["bought"] > 0
        return
    with pytest.raises(UserError, match=rf"^tasks\.bought {re.escape(says)}"):
        trees.TREES[kind](Dataset(small_dataset), 50, 0, tmp_path / "rows.parquet")
    assert not (tmp_path / "rows.parquet").exists()


def test_both_kinds_of_trees_are_fitted_once_and_are_rows_of_the_tables(small_dataset: Path, tmp_path: Path) -> None:
    config, dataset = CompareConfig(folder=tmp_path, models=["ple"], baseline="ple"), Dataset(small_dataset)
    entries = [compare._trees(kind, config, dataset) for kind in config.trees]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    assert sorted(path.relative_to(tmp_path).as_posix() for path in files) == [
        "rmtgb/test.parquet", "rmtgb/trees.json", "trees/test.parquet", "trees/trees.json",
    ]  # fmt: skip
    assert [compare._trees(kind, config, dataset) for kind in config.trees] == entries
    assert {path: path.stat().st_mtime_ns for path in files} == files
    fewer = config.model_copy(update={"trees_max_rows": 100})
    with pytest.raises(
        UserError, match=r"trees was made with trees_max_rows=1000000. Choose another folder=, or remove it"
    ):
        compare._trees("boosted", fewer, dataset)
    kinds = {name: task.kind for name, task in dataset.schema.tasks.items()}
    quality = report.tables(entries, entries[0], kinds, "github").split("\n\n")[0]
    assert list(cells(quality)) == ["boosted trees", "R-MTGB"]


def cells(table: str) -> dict[str, dict[str, str]]:
    """Model → column → cell of a table in github style."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


@pytest.fixture
def compared(tmp_path: Path) -> tuple[Entry, Entry]:
    """Two models on two seeds with a label of both kinds, of which the second deviates between seeds."""
    better, baseline, _ = drawn(tmp_path, 2)
    for entry, ne in ((better, 0.8), (baseline, 0.9)):
        for seed, path in enumerate(entry.rows):
            rows = pl.read_parquet(path)
            rows.with_columns(**{"logit.r": pl.col("logit.t") + seed, "label.r": pl.col("label.t")}).write_parquet(path)
            metrics = {"t": {"auc": 0.75, "ne": ne}, "r": {"r2": 10.6 + seed, "nrmse": 10.5 * ne}}
            early = {
                share: {"t": {"ne": ne + rest}, "r": {"nrmse": ne}} for share, rest in (("1/7", 0.1), ("3/7", 0.05))
            }
            entry.runs.append({"metrics": metrics, "rows_per_s": 1000.0 + seed, "early": early | {"7/7": metrics}})
            entry.runs[-1] |= {"hours": 1.5 + seed, "search_hours": 0.25 if entry is better else None}
        entry.cost = {"parameters": 1234, "table_parameters": 5, "flops_per_row": 10}
    return better, baseline


KINDS = {"t": "binary", "r": "regression"}


def test_tables_show_means_deviations_costs_and_differences(compared: tuple[Entry, Entry]) -> None:
    better, baseline = compared
    quality, cost, early = map(cells, report.tables([better, baseline], baseline, KINDS, "github").split("\n\n"))
    gaps = differences(better, baseline, KINDS)
    shown = {"AUC t": ".7500±.0000", "R2 r": "11.1000±.7071", "NE t": ".8000±.0000", "NRMSE r": "8.4000±.0000"}
    shown |= {
        f"{word} % {task}": f"{gaps[task][0]:+.2f} ±{gaps[task][1]:.2f}" for word, task in (("NE", "t"), ("MSE", "r"))
    }
    assert quality["better"] == {"model": "better"} | shown
    assert [quality["baseline"][column] for column in ("NE t", "NE % t", "MSE % r")] == [".9000±.0000", "", ""]
    numbers = {"parameters": "1,234", "in tables": "5", "FLOPs/row": "10", "rows/s": "1,000"}
    numbers |= {"hours": "2.0000"}
    searched = {"better": ".2500", "baseline": ""}
    assert cost == {name: {"model": name} | numbers | {"search": hours} for name, hours in searched.items()}
    assert early.keys() == {"better"}
    expected = [
        100 * (0.9 / 1.0 - 1),
        100 * (0.85 / 0.95 - 1),
        100 * (0.8 / 0.9 - 1),
        *[100 * (0.8**2 / 0.9**2 - 1)] * 3,
    ]
    assert list(early["better"].values())[1:] == [f"{value:+.2f}" for value in expected]


def test_parquet_has_every_run_share_and_task(compared: tuple[Entry, Entry], tmp_path: Path) -> None:
    better, baseline = compared
    report.parquet([better, baseline], baseline, KINDS, tmp_path / "c.parquet")
    frame = pl.read_parquet(tmp_path / "c.parquet")
    assert sorted(frame.select("model", "seed", "at", "task").rows()) == sorted(
        (name, seed, at, task)
        for name in ("better", "baseline") for seed in range(2) for at in ("chosen", "1/7", "3/7", "7/7") for task in KINDS
    )  # fmt: skip
    for row in frame.iter_rows(named=True):
        entry = better if row["model"] == "better" else baseline
        run = entry.runs[row["seed"]]
        metrics = (run["metrics"] if row["at"] == "chosen" else run["early"][row["at"]])[row["task"]]
        assert {name: row[name] for name in metrics} == metrics
        gap = (row["difference_percent"], row["half_interval_percent"])
        assert gap == differences(entry, baseline, KINDS)[row["task"]]
        assert (row["parameters"], row["rows_per_s"]) == (1234, run["rows_per_s"])
        assert (row["hours"], row["search_hours"]) == (run["hours"], run["search_hours"])


def test_the_picture_shows_differences_and_intervals(compared: tuple[Entry, Entry]) -> None:
    better, baseline = compared
    panels = report.picture([baseline, better], baseline, KINDS).axes
    assert [panel.get_title() for panel in panels] == ["t", "r"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["better"]
    for panel, (mean, half) in zip(panels, differences(better, baseline, KINDS).values(), strict=True):
        [bar] = panel.containers
        point, _, [interval] = bar
        assert (point.get_xdata().tolist(), point.get_ydata().tolist()) == ([mean], [0])
        assert interval.get_segments()[0][:, 0] == pytest.approx([mean - half, mean + half])


@pytest.mark.parametrize(
    ("aucs", "patience", "kept"),
    [
        ([0.5, 0.6, 0.7], 2, 3),
        ([0.5, 0.6, 0.55, 0.58, 0.9], 2, 2),  # stopped before the best
        ([0.5, 0.6, 0.55, 0.7, 0.1], 2, 4),
        ([0.5, 0.5, 0.5], 5, 1),  # of equal ones the first
        ([None, 0.5], 2, 2),
    ],
)
def test_early_stopping_keeps_the_best_mean_until_patience_runs_out(aucs: list, patience: int, kept: int) -> None:
    evaluated = [
        {"step": step, "metrics": {"t": {"auc": auc, "ne": 1.0}, "r": {"r2": 0.3}}} for step, auc in enumerate(aucs, 1)
    ]
    assert stop_early(evaluated, KINDS, patience) == kept


def test_a_comparison_is_written_with_a_page_of_the_first_seeds_at_the_chosen_checkpoints(
    run: Run, tmp_path: Path
) -> None:
    kinds = {name: task.kind for name, task in run.schema().tasks.items()}
    entries = []
    for name in ("mine", "other"):
        copy = Run(shutil.copytree(run.path, tmp_path / f"{name}-0"))
        copy.eval_metrics.unlink(missing_ok=True)  # of other tests
        [record] = evaluate(
            EvaluateConfig(run=copy.path, step="newest", predictions=True, threads=1, buckets=5, by_time=[])
        )
        rows = [predictions.path(copy, "test", record["step"])]
        found = {"run": f"{name}-0", "step": record["step"], "metrics": record["metrics"], "rows_per_s": 1.0}
        entries.append(Entry(name, [found], rows))
    trees_entry = Entry("trees", [{"metrics": entries[0].runs[0]["metrics"], "rows_per_s": 1.0}], entries[0].rows)
    report.write([*entries, trees_entry], entries[1], kinds, tmp_path)
    page = (tmp_path / "compare.html").read_text()
    assert "<h1>mine, other</h1>" in page
    assert "Seed 0 of each model" in page
    assert "mine against other: 0 better, 0 worse, 3 without a clear difference." in page
    assert {"compare.json", "compare.parquet", "compare.png", "compare.md"} < {file.name for file in tmp_path.iterdir()}
    entries[0].runs[0]["step"] = 3
    with pytest.raises(UserError, match=r"eval.jsonl: no record of step 3 on test. Run jobs.evaluate on it again."):
        report.write(entries, entries[1], kinds, tmp_path)


def test_a_comparison_on_a_store_is_refused():
    with pytest.raises(ValidationError, match="s3://bucket/compare must be on a mounted file system"):
        CompareConfig(folder="s3://bucket/compare", models=["ple"])
