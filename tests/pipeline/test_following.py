"""Evaluators that follow a run: order, lag, several at once, on several ranks, at a low priority; what jobs.evaluate prints."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fake_mlflow
import pytest
from evaluations_by_hand import set_commit_time
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from features.errors import UserError
from models.ranker import ModelConfig
from pipeline.evaluation import follow, oracle, predictions, priority, ranks
from pipeline.evaluation.follow import EvaluateConfig, Evaluation, evaluate
from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.oracle import Truth
from pipeline.evaluation.report import page, tables
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import read_lines
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])}


@pytest.fixture(scope="module")
def trained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(batch_size=64, lanes=2, epochs=2, max_steps=6, checkpoint_every=2, threads=1)
    model = ModelConfig(fusion={"name": "mmoe", "num_experts": 2, "levels": [[4]]}, tower=[4])
    train(TrainConfig(dataset=small_dataset, run=run, model=model, train=settings))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(priority, "lower", lambda _: None)
    monkeypatch.setattr(follow, "POLL_INTERVAL", 0.02)
    return Run(Path(shutil.copytree(trained, tmp_path / "run")))


def config(run: Run, **settings: object) -> EvaluateConfig:
    return EvaluateConfig(run=run.path, threads=1, **settings)


def lines(run: Run) -> list[tuple[int, str]]:
    return [(line["step"], line["split"]) for line in read_lines(run.eval_metrics)]


def test_two_evaluators_of_a_split_share_its_checkpoints(run: Run):
    first = evaluate(config(run))
    one = next(first)["step"]
    held = run.try_lock("test-00000004")
    assert [record["step"] for record in evaluate(config(run))] == [6]
    assert list(evaluate(config(run, follow=True))) == []  # it waits for nobody
    held.release()  # as a killed evaluator does
    assert [one, *(record["step"] for record in first)] == [2, 4]
    assert [r["step"] for r in evaluate(config(run, split="valid"))] == [2, 4, 6]
    assert sorted(lines(run)) == [(step, split) for step in (2, 4, 6) for split in ("test", "valid")]


def test_two_evaluators_at_the_same_time_leave_every_point_in_tensorboard(run: Run):
    first, second = (evaluate(config(run)) for _ in range(2))
    assert [next(each)["step"] for each in (first, second, first)] == [2, 4, 6]
    assert [list(second), list(first)] == [[], []]
    board = EventAccumulator(str(run.tensorboard / "eval_test")).Reload()
    assert [point.step for point in board.Scalars("eval_test/click/ne/low")] == [2, 4, 6]


@pytest.mark.parametrize(("behind", "written"), [(300.0, [3]), (0.0, [1, 2, 3])])
def test_a_follower_writes_the_report_and_sends_it_once_no_checkpoint_waits_or_after_a_long_time(
    run: Run, monkeypatch: pytest.MonkeyPatch, behind: float, written: list[int], caplog
):
    fake_mlflow.install(monkeypatch)
    monkeypatch.setattr(follow, "PAGE_EVERY_BEHIND", behind)
    run.write_status("training", 6, 8)
    pages: list[int] = []

    def write_page() -> None:
        run.report.write_text("<html>")
        pages.append(len(lines(run)))
        if pages[-1] == 3:
            run.write_status("finished", 6, 6)
            raise OSError("the disk is full")  # which is no reason to end

    tracking = {"tracking": "mlflow", "tracking_uri": "sqlite:////fake"}
    steps = [record["step"] for record in Evaluation(config(run, follow=True, **tracking)).records(write_page)]
    assert (steps, pages) == ([2, 4, 6], written)
    [sent] = fake_mlflow.STORES["sqlite:////fake"].runs.values()
    assert sent.files == ["report.html"] * (len(written) - 1)
    assert "report.html cannot be written now: the disk is full" in caplog.text


def test_a_follower_that_waits_writes_a_report_for_new_records_only_and_not_more_often_than_it_may(
    run: Run, monkeypatch
):
    monkeypatch.setattr(follow, "PAGE_EVERY", 5.0)
    clock, pages, kept = [0.0], list[float](), run.path / "kept"
    checkpoint.folder(run.checkpoints, 6).rename(kept)
    run.write_status("training", 6, 8)

    def sleep(_: float) -> None:
        clock[0] += 0.5
        if clock[0] == 2:
            kept.rename(checkpoint.folder(run.checkpoints, 6))
        if clock[0] == 20:
            run.write_status("finished", 6, 6)

    # Of this module alone: other threads of the process wait by the real clock.
    monkeypatch.setattr(
        follow, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: clock[0], "sleep": sleep})
    )
    assert len(list(Evaluation(config(run, follow=True)).records(lambda: pages.append(clock[0])))) == 3
    assert pages == [0.0, 5.0]


def test_a_follower_takes_what_a_killed_one_leaves(run: Run):
    held = run.try_lock("test-00000004")
    run.write_status("training", 6, 8)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(r["step"] for r in evaluate(config(run, follow=True))))
    thread.start()
    while thread.is_alive() and len(found) < 2:
        time.sleep(0.02)
    time.sleep(0.2)
    assert found == [2, 6]
    held.release()
    while thread.is_alive() and len(found) < 3:
        time.sleep(0.02)
    run.write_status("finished", 6, 6)
    thread.join(30)
    assert (found, len(lines(run))) == ([2, 6, 4], 3)


def test_the_newest_checkpoint_is_first_and_every_second_one_is_left_out_but_the_last_of_a_finished_run(run: Run):
    run.write_status("training", 6, 8)
    following = evaluate(config(run, follow=True, order="newest", every=2, give_up_after=0.2))
    assert next(following)["step"] == 4
    with pytest.raises(UserError, match="no trainer heartbeat"):
        next(following)
    run.write_status("finished", 6, 6)
    assert [record["step"] for record in evaluate(config(run, order="newest", every=2))] == [6]
    assert [record["step"] for record in evaluate(config(run, order="newest"))] == [2]


def test_a_record_has_its_lag_and_share_and_the_line_shows_the_lag(run: Run):
    from jobs.evaluate import progress_line

    run.write_status("training", 1044, 2000)
    set_commit_time(run, 4, run.status().time - 3.125)
    [record] = evaluate(config(run, step=4))
    assert record["lag"] == {"steps": 1040, "seconds": pytest.approx(3.125, abs=1e-3)}
    assert record["share"] == 1.0
    assert list(read_lines(run.eval_metrics)) == [record]
    line = re.sub(r"\d?\.\d{4}", ".8123", progress_line(record | {"seconds": 1.23}))
    assert line == "step 4  test  NE click .8123 bought .8123 NRMSE dwell .8123  1.2 s  lag 1,040 steps, 3.1 s"
    assert progress_line(record | {"seconds": 1.23, "lag": {"steps": 40}}).endswith(" 1.2 s  lag 40 steps")
    figures = {
        "dwell": {"nrmse": 1.25, "mae": 3.0},
        "click": {"ne": None},
        "price": {"nrmse": 0.5},
    }  # click: no label 1
    assert progress_line(record | {"metrics": figures}).startswith("step 4  test  NRMSE dwell 1.2500 price .5000  ")
    assert progress_line(record | {"seconds": 1.23, "lag": None}).endswith(" 1.2 s")


def test_files_are_written_before_the_line_and_made_again_where_they_are_damaged(run: Run):
    list(evaluate(config(run, predictions=True)))
    before = list(read_lines(run.eval_metrics))
    figures = run.path / "evaluations" / "test-00000004.parquet"
    figures.write_bytes(figures.read_bytes()[:50])
    predictions.path(run, "test", 2).unlink()
    assert [record["step"] for record in evaluate(config(run, predictions=True))] == [2, 4]
    assert list(evaluate(config(run, predictions=True))) == []
    after = list(read_lines(run.eval_metrics))
    assert sorted((r["step"], str(r["metrics"])) for r in after) == [(r["step"], str(r["metrics"])) for r in before]
    provenance = evaluated.read(figures).provenance
    assert (provenance.checkpoint, provenance.share_by) == (before[1]["checkpoint"], "")
    assert provenance.measure == before[1]["measure"]


def test_a_restart_with_other_slices_or_tables_in_16_bits_replaces_the_records(run: Run):
    def found(**settings: object) -> list[int]:
        return [record["step"] for record in evaluate(config(run, **settings))]

    assert found(step=[2, 4], by_time=[]) == [2, 4]
    assert found(step=[2, 4], by_time=["day"]) == [2, 4]
    assert found(by_time=["day"]) == [6]
    assert sorted(lines(run)) == [(2, "test"), (4, "test"), (6, "test")]
    assert found(by_time=["day"], table_precision="bf16", step=2) == [2]
    assert found(by_time=["day"], table_precision="bf16", step=2) == []
    assert found(by_time=["day"]) == [2]


def test_the_best_possible_is_of_the_share_that_it_was_computed_on(run: Run):
    evaluation, kinds = Evaluation(config(run, share=0.5)), {"click": "binary"}
    with mock.patch.object(oracle, "metrics", return_value={"click": {"ne": 0.5}}):
        oracle.write(evaluation.scorer, Truth(file=Path("truth"), key="row", columns={}))
    with mock.patch.object(oracle, "is_complete", return_value=True):
        name = evaluation.scorer.dataset.name
        assert oracle.read(run, "test", name, kinds, 0.5) == {"click": {"ne": 0.5}}
        assert oracle.read(run, "test", name, kinds) is None
        assert evaluation.results().oracle == {"click": {"ne": 0.5}}


def test_a_checkpoint_that_is_deleted_meanwhile_ends_an_evaluation_only_if_it_was_named(run: Run, caplog):
    found = evaluate(config(run))
    assert next(found)["step"] == 2
    shutil.rmtree(checkpoint.folder(run.checkpoints, 4))
    assert [record["step"] for record in found] == [6]
    assert [r.getMessage()[:16] for r in caplog.records if r.levelname == "WARNING"] == ["step 4: left out"]
    named = evaluate(config(run, split="valid", step=[2, 6]))
    assert next(named)["step"] == 2
    shutil.rmtree(checkpoint.folder(run.checkpoints, 6))
    with pytest.raises(UserError, match="step-00000006"):
        next(named)


def test_a_follower_ends_with_an_error_that_names_the_damaged_checkpoints_once_it_has_tried_them_again(run: Run):
    run.write_status("finished", 6, 6)
    files = [run.checkpoints / f"step-0000000{step}" / "tensors.json" for step in (4, 6)]
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(b"?" + file.read_bytes()[1:])
    following = evaluate(config(run, follow=True))
    assert next(following)["step"] == 2
    with pytest.raises(
        UserError, match=r"checkpoints: not evaluated: step 4 \(.*tensors.json: its checksum.*; step 6 \("
    ):
        next(following)
    evaluation = Evaluation(config(run, follow=True))
    retry = evaluation.pending.retry

    def restored() -> None:
        for file, content in zip(files, whole, strict=True):
            file.write_bytes(content)
        retry()

    with mock.patch.object(evaluation.pending, "retry", restored):
        assert [record["step"] for record in evaluation.records()] == [4, 6]


def test_a_follower_ends_at_once_where_rows_are_damaged_and_does_not_blame_the_checkpoint(run: Run, tmp_path, caplog):
    run.write_status("finished", 6, 6)
    data = Path(shutil.copytree(run.config()["dataset"], tmp_path / "data"))
    shard = min((data / "test").glob("*.parquet"))
    shard.write_bytes(b"?" * shard.stat().st_size)
    for tables_of in ("all", "needed"):
        with pytest.raises(UserError, match=shard.name):
            list(evaluate(config(run, follow=True, dataset=data, tables=tables_of)))
    with (
        mock.patch.object(evaluated, "write", side_effect=OSError(28, "No space left")),
        pytest.raises(OSError, match="space"),
    ):
        list(evaluate(config(run, follow=True)))
    assert "left out" not in caplog.text
    assert lines(run) == []


def test_a_follower_leaves_out_what_the_trainer_deletes_or_writes_anew_meanwhile(run: Run, tmp_path: Path):
    run.write_status("finished", 6, 6)
    evaluation = Evaluation(config(run, follow=True))
    load, again = evaluation.scorer.weights.load, []

    def late(step: int) -> object:
        folder = checkpoint.folder(run.checkpoints, step)
        if step == 4:
            checkpoint.remove(folder)
        if step == 6 and not again:  # rolled back: this step is another checkpoint
            again.append(step)
            shutil.copytree(folder, tmp_path / "new")
            checkpoint.remove(folder)
            (tmp_path / "new").rename(folder)
            raise OSError(116, "Stale file handle")
        return load(step)

    with mock.patch.object(evaluation.scorer.weights, "load", late):
        assert [record["step"] for record in evaluation.records()] == [2, 6]


def test_a_checkpoint_that_cannot_be_read_keeps_no_lock(run: Run):
    file = run.checkpoints / "step-00000004" / "rank-00000.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="step-00000004"):
        list(evaluate(config(run)))
    file.write_bytes(whole)
    assert [record["step"] for record in evaluate(config(run))] == [4, 6]
    assert not list(run.eval_metrics.parent.glob(".test-*"))


def test_a_run_that_ended_before_its_first_checkpoint_has_an_empty_table_and_a_report(run: Run):
    shutil.rmtree(run.checkpoints)
    run.write_status("finished", 6, 6)
    evaluation = Evaluation(config(run, follow=True))
    assert list(evaluation.records()) == []
    page.write_run(results := evaluation.results())
    assert "click" in tables.table(results)
    assert run.report.exists()


def test_a_run_whose_trainer_never_wrote_a_heartbeat_is_given_up(run: Run):
    (run.path / "status.json").unlink()
    found = evaluate(config(run, follow=True, give_up_after=0.3))
    assert [next(found)["step"] for _ in range(3)] == [2, 4, 6]
    with pytest.raises(UserError, match="no trainer heartbeat for 0 s"):
        next(found)


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_a_follower_that_always_follows_waits_for_the_next_training_however_long_that_takes(
    run: Run, tmp_path: Path, state: str
):
    last = checkpoint.folder(run.checkpoints, 6)
    later = Path(shutil.move(last, tmp_path / "later"))
    run.write_status(state, 4, 4)
    found = evaluate(config(run, follow="always", give_up_after=0.01))
    assert [next(found)["step"] for _ in range(2)] == [2, 4]

    def train_on() -> None:
        run.write_status("training", 4, 6)
        shutil.copytree(later, tmp_path / "copy")
        (tmp_path / "copy").rename(last)
        run.write_status("finished", 6, 6)

    timer = threading.Timer(0.3, train_on)
    timer.start()
    assert next(found)["step"] == 6
    timer.join()
    found.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"follow": True, "step": 4}, "=true .*leave step out"), ({"follow": "always", "step": 4}, "=always .*leave step out"),
     ({"follow": "never"}, "follow"), ({"every": 2, "step": [4]}, "leave step out"),
     ({"predictions": True, "share": 0.5}, "leave share out"), ({"share": 0}, "greater than 0"), ({"every": 0}, "every"),
     ({"step": []}, "List should have at least 1 item")],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings: dict, words: str):
    with pytest.raises(ValueError, match=words):
        EvaluateConfig(run=Path("run"), **settings)


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.evaluate", "threads=1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200, cwd=ROOT)


@pytest.mark.system
def test_the_job_prints_the_table_where_nothing_is_new_and_waits_for_a_run_that_does_not_exist_yet(
    trained: Path, tmp_path
):
    run, later = Run(tmp_path / "run"), []
    thread = threading.Thread(target=lambda: later.append(job(f"run={run.path}", "follow=true", "idle=false")))
    thread.start()
    time.sleep(1)
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy").rename(run.path)
    thread.join()
    [first] = later
    assert first.returncode == 0, first.stderr
    assert re.findall(r"^step (\d)  test  NE .* s  lag \d steps$", first.stdout, re.M) == ["2", "4", "6"]
    again = job(f"run={run.path}", "step=[6,2]")
    assert again.returncode == 0, again.stderr
    said, table = again.stdout.split("\n", 1)
    assert said.startswith("Nothing new: these checkpoints have a record")
    assert first.stdout.endswith(table)
    assert re.findall(r"^ +(\d)  ", again.stdout, re.M) == ["2", "4", "6"]
    assert len(lines(run)) == 3


@pytest.mark.system
def test_rank_0_of_an_evaluator_chooses_and_records_and_all_ranks_end_with_its_error(trained: Path, tmp_path: Path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    script = str(Path(__file__).with_name("two_following_ranks.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((run / f"said-{rank}.json").read_text()) for rank in range(2))
    assert (first["steps"], second["steps"]) == ([6, 4, 2], [])
    assert (first["first"], second["first"]) == (0, 0)
    assert ["step-00000004/rank-00000.bin: its checksum" in error for error in first["errors"]] == [True, True]
    assert "not evaluated: step 4 (" in first["errors"][1]
    assert first["errors"] == second["errors"]
    assert [line["step"] for line in read_lines(run / "first.jsonl")] == [6, 4, 2]
    assert [line["step"] for line in read_lines(run / "metrics" / "eval.jsonl")] == [2, 6]


def test_without_a_process_group_there_is_one_rank():
    assert ranks.is_first()
    assert ranks.from_first(lambda: 5) == 5
    assert ranks.first_error(None) is None


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    return done.stdout.strip()


PRIORITY: Callable[[bool], str] = """
import os, threading, pipeline.evaluation.priority as priority
ready, go, found = threading.Event(), threading.Event(), []
def report(): ready.set(); go.wait(); found.append(os.sched_getscheduler(0))
earlier = threading.Thread(target=report); earlier.start(); ready.wait()
priority.lower({})
go.set(); earlier.join()
later = threading.Thread(target=report); later.start(); later.join()
print(os.nice(0), os.sched_getscheduler(0), *found)
""".format


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="SCHED_IDLE is Linux")
def test_a_follower_runs_on_idle_cores_only_with_all_its_threads_or_at_a_low_priority():
    nice = os.nice(0)
    assert printed(PRIORITY(True)) == f"{nice + 10} {os.SCHED_IDLE} {os.SCHED_IDLE} {os.SCHED_IDLE}"
    assert printed(PRIORITY(False)) == f"{nice + 10} {os.SCHED_OTHER} {os.SCHED_OTHER} {os.SCHED_OTHER}"


def test_only_a_follower_lowers_its_priority(run: Run, monkeypatch: pytest.MonkeyPatch):
    called: list[bool] = []
    monkeypatch.setattr(priority, "lower", called.append)
    Evaluation(config(run))
    assert called == []
    Evaluation(config(run, follow=True))
    Evaluation(config(run, follow=True, idle=False))
    assert called == [True, False]
