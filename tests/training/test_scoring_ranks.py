"""Logits of a checkpoint on 1, 2 and 4 ranks, whatever ranks have written it, and in 16 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from ranks_scoring import BATCH, CASES, EMM, TWO, make_runs, scores, weights
from tiny_training import torchrun
from torch import Tensor

from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation import predictions
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.weights import Loading
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import read_lines

pytestmark = pytest.mark.usefixtures("device")

HERE = Path(__file__).parent
RANKS = (2, 4)
ERROR = {"fp16": 2e-4, "bf16": 2e-3}  # of a logit of these models, whose embeddings have a standard deviation of 0.1


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Path:
    folder = tmp_path_factory.mktemp("scoring")
    make_runs(folder)
    for count in RANKS:
        torchrun(str(HERE / "ranks_scoring.py"), str(folder), ranks=count).check_returncode()
    return folder


def by_row(found: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    rows = {int(row): logit for row_id_N, logit_NT in found for row, logit in zip(row_id_N, logit_NT, strict=True)}
    assert len(rows) == sum(len(row_id_N) for row_id_N, _ in found)
    return rows


def of_ranks(folder: Path, case: str, how: str, ranks: int) -> dict[int, Tensor]:
    return by_row([torch.load(folder / f"{case}.{how}.{ranks}-{rank}.pt") for rank in range(ranks)])


def largest_difference(found: dict[int, Tensor], wanted: dict[int, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[row] - wanted[row]).abs().max()) for row in wanted)


@pytest.mark.parametrize("case", CASES)
def test_logits_on_any_number_of_ranks_are_those_of_one_process(ranks: Path, case: str) -> None:
    wanted = by_row([scores(weights(ranks, case))])
    assert len(wanted) == 51
    assert torch.stack([*wanted.values()]).std(0).min() > 1e-4  # the rows differ
    for count in RANKS:
        assert largest_difference(of_ranks(ranks, case, "fp32", count), wanted) < 1e-6


def test_logits_are_read_once_the_next_batch_is_on_its_way(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, order = weights(ranks, TWO), []

    def in_main_memory(x: Tensor) -> Callable[[], Tensor]:
        order.append("scored")
        return lambda: (order.append("read"), x)[1]

    batches = list(SplitReader(made.dataset, "valid", BATCH).batches())
    wanted = [made(batch) for batch in batches]
    monkeypatch.setattr("pipeline.evaluation.weights.in_main_memory", in_main_memory)
    for (batch, logit_BT), known, wanted_BT in zip(made.scored(iter(batches)), batches, wanted, strict=True):
        assert batch is known
        assert torch.equal(logit_BT, wanted_BT)
    assert order == ["scored", *["scored", "read"] * (len(batches) - 1), "read"]


def test_tables_that_do_not_fit_on_a_gpu_are_one_line(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    monkeypatch.setattr("pipeline.evaluation.weights.allocate_tables", full)
    with pytest.raises(UserError, match=r"do not fit into the free memory of cpu. Shard them by jobs.launch"):
        weights(ranks, TWO)


@pytest.mark.parametrize("case", [TWO, EMM])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_logits_of_tables_in_16_bits_are_close(ranks: Path, case: str, precision: str) -> None:
    wanted = by_row([scores(weights(ranks, case))])
    made = weights(ranks, case, Loading(precision=precision))
    tables = [t for part in (made.ranker.embeddings, made.ranker.unpooled) if part for t in part.parameters()]
    assert {t.element_size() for t in tables} == {2}
    found = by_row([scores(made)])
    assert 0 < largest_difference(found, wanted) < ERROR[precision]
    if case == TWO and precision == "fp16":
        for count in RANKS:
            assert largest_difference(of_ranks(ranks, case, "fp16", count), found) < ERROR[precision]


@pytest.mark.parametrize("case", CASES)
def test_the_rows_that_are_needed_give_the_same_logits(ranks: Path, case: str) -> None:
    made = weights(ranks, case, Loading("needed"))
    held = {table.name: table.num_embeddings for table in made.ranker.tables}
    every = {table.name: table.num_embeddings for table in weights(ranks, case).ranker.tables}
    assert held.keys() == every.keys()
    managed = {"user", "item"} if case.startswith("managed") else set()  # their rows are known to the checkpoint alone
    assert {name for name in held if held[name] == every[name]} >= managed
    assert any(held[name] < every[name] for name in held.keys() - managed)
    wanted = by_row([scores(weights(ranks, case))])
    assert largest_difference(by_row([scores(made)]), wanted) == 0


def test_the_rows_that_are_needed_give_the_same_figures_of_every_slice(ranks: Path) -> None:
    run, dataset = Run(ranks / TWO), Dataset(ranks / "plain" / "data")
    [step] = checkpoint.steps(run.checkpoints)
    measure = MeasureConfig(min_rows=1)
    whole, needed = (
        Scorer(run, dataset, "all", BATCH, measure, Loading(tables)).score(step).figures for tables in ("all", "needed")
    )
    assert {"user: rare", "device: missing"} <= {*whole["slice"]}
    assert needed.equals(whole)


def test_the_rows_that_are_needed_give_the_same_logits_on_several_ranks(ranks: Path) -> None:
    wanted = by_row([scores(weights(ranks, TWO))])
    for count in RANKS:
        found = of_ranks(ranks, TWO, "needed", count)
        assert largest_difference(found, wanted) == 0


def test_a_record_of_several_ranks_is_that_of_one_process(ranks: Path) -> None:
    run = Run(ranks / TWO)
    [step] = checkpoint.steps(run.checkpoints)
    wanted = Scorer(run, Dataset(ranks / "plain" / "data"), "valid", BATCH).evaluate(step, write_predictions=True)
    wanted_rows = predictions.read(predictions.path(run, "valid", step))
    for count in RANKS:
        record, rows = torch.load(ranks / f"record.{count}.pt")
        assert record["rows_evaluated"] == wanted["rows_evaluated"] > 20
        assert (record["ranks"], wanted["ranks"]) == (count, 1)
        for key in ("metrics", "intervals"):
            assert record[key].keys() == wanted[key].keys()
            for task, figures in wanted[key].items():
                found = record[key][task]
                assert {m for m in found if found[m] is None} == {m for m in figures if figures[m] is None}
                for metric, value in figures.items():
                    if value is not None:
                        assert found[metric] == pytest.approx(value, rel=1e-5, abs=1e-7), (key, task, metric)
        for level, means in enumerate(wanted["gates"]):
            torch.testing.assert_close(torch.tensor(record["gates"][level]), torch.tensor(means), rtol=1e-5, atol=1e-6)
        written = pl.DataFrame(rows)
        assert written["row_id"].equals(wanted_rows["row_id"])
        assert np.abs(written["logit.click"].to_numpy() - wanted_rows["logit.click"].to_numpy()).max() < 1e-6


def test_the_job_records_a_checkpoint_once_on_two_ranks(ranks: Path) -> None:
    run = Run(ranks / "plain" / "adatt")
    for _ in range(2):
        done = torchrun("-m", "jobs.evaluate", f"run={run.path}", "split=valid", "threads=1", "table_precision=fp16")
        done.check_returncode()
        assert done.stdout.count(str(run.report)) == 1
    assert " s on 2 ranks" in run.report.read_text()
    [record] = read_lines(run.eval_metrics)
    [step] = checkpoint.steps(run.checkpoints)
    wanted = Scorer(run, Dataset(ranks / "plain" / "data"), "valid", BATCH).score(step).value("dwell", "mse")
    assert record["metrics"]["dwell"]["mse"] == pytest.approx(wanted, rel=1e-3)


def test_sharded_tables_have_no_optimiser_state(ranks: Path) -> None:
    for rank in range(2):
        _, (scoring, training) = torch.load(ranks / f"refused.2-{rank}.pt")
        assert scoring == 0 < training


def test_what_one_rank_finds_wrong_ends_all_of_them_in_one_line(ranks: Path) -> None:
    for count in RANKS:
        for rank in range(count):
            (bf16, damaged, unread, changed), _ = torch.load(ranks / f"refused.{count}-{rank}.pt")
            assert "fp32 and fp16 only" in bf16
            assert "rank-00001.bin: its checksum is not the manifest's" in damaged
            assert "a batch has an id that the split did not have" in changed
            assert unread == (
                "part-7 cannot be read" if rank == 1 else "another rank cannot read its rows: its own error says why"
            )
