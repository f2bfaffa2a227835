import json
import math
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from features.errors import UserError
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.evaluation import follow, oracle, predictions, priority
from pipeline.evaluation.follow import EvaluateConfig, Evaluation, evaluate
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.oracle import Truth
from pipeline.evaluation.report import page, plots, tables
from pipeline.evaluation.report.numbers import significant
from pipeline.run import checkpoint, records
from pipeline.run.checkpoint import lock
from pipeline.run.run import Run
from pipeline.storage.files import append_line, read_lines
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

MODEL = ModelConfig(fusion={"name": "adatt", "levels": [[8], [4]]}, tower=[4])


@pytest.fixture(scope="module")
def trained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(
        batch_size=64, lanes=2, epochs=2, max_steps=6, checkpoint_every=2, tables={"lr": 0.1}, threads=1
    )
    train(TrainConfig(dataset=small_dataset, run=run, model=MODEL, train=settings))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the run that a test may change; the tests' process keeps its priority."""
    monkeypatch.setattr(priority, "lower", lambda _: None)
    monkeypatch.setattr(follow, "POLL_INTERVAL", 0.02)
    shutil.copytree(trained, tmp_path / "run")
    return Run(tmp_path / "run")


def evaluated(run: Run, **settings: object) -> list[int]:
    return [record["step"] for record in evaluate(EvaluateConfig(run=run.path, threads=1, **settings))]


def test_metrics_are_those_of_the_formulas_on_the_checkpoints_predictions(run: Run, small_dataset: Path):
    [record] = evaluate(EvaluateConfig(run=run.path, split="valid", step=4, threads=1))
    dataset = Dataset(small_dataset)
    ranker = Ranker(dataset.schema, dataset.encoders, MODEL, device="cpu").eval()
    checkpoint.load(run.checkpoints / "step-00000004", {"model": ranker.state_dict()}, alone=True)
    rows = pq.read_table([small_dataset / shard.path for shard in dataset.shards("valid")])
    loader = Loader(dataset, "valid", batch_size=len(rows))
    logit = ranker(next(loader.batches(loader.start()))).detach().double().numpy()
    for t, task in enumerate(("click", "bought")):
        label = rows[f"label.{task}"].to_numpy()
        seen = ~np.isnan(label)
        y, p, w = label[seen], 1 / (1 + np.exp(-logit[seen, t])), rows["weight"].to_numpy()[seen]
        rate = np.average(y, weights=w)
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        found = record["metrics"][task]
        assert found["rows"] == seen.sum() > 0
        assert found["ne"] == pytest.approx(log_loss(y, p, sample_weight=w) / entropy, rel=1e-6)
        assert found["auc"] == pytest.approx(roc_auc_score(y, p, sample_weight=w), abs=1e-9)
        assert found["calibration"] == pytest.approx((w * p).sum() / (w * y).sum(), rel=1e-6)
    dwell = rows["label.dwell"].to_numpy()
    seen = ~np.isnan(dwell)
    error = np.average((logit[seen, 2] - dwell[seen]) ** 2, weights=rows["weight"].to_numpy()[seen])
    assert record["metrics"]["dwell"]["mse"] == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("bad", ["first", "last"])
@pytest.mark.parametrize("batch_size", [16, 10_000])
def test_rows_that_cannot_be_added_up_end_the_evaluation(run: Run, monkeypatch, batch_size: int, bad: str):
    dataset = Dataset(Path(run.config()["dataset"]))
    batches = -(-dataset.manifest.rows["test"] // batch_size)
    added, update = [], Metrics.update

    def fail(metrics: Metrics, *columns: object) -> None:
        added.append(len(added))
        if added[-1] == (0 if bad == "first" else batches - 1):
            raise UserError("a bad label")
        update(metrics, *columns)

    monkeypatch.setattr(Metrics, "update", fail)
    with pytest.raises(UserError, match="a bad label"):
        evaluated(run, step=6, batch_size=batch_size)
    assert len(added) == (1 if bad == "first" else batches)
    assert not run.eval_metrics.exists()


def test_each_checkpoint_is_evaluated_once_per_split(run: Run):
    assert evaluated(run) == [2, 4, 6]
    assert evaluated(run) == []
    assert evaluated(run, split="valid", step="newest") == [6]
    shutil.copytree(run.checkpoints / "step-00000006", run.checkpoints / "step-00000008")
    assert evaluated(run) == [8]
    assert [(r["step"], r["split"]) for r in read_lines(run.eval_metrics)] == [
        (2, "test"), (4, "test"), (6, "test"), (6, "valid"), (8, "test")
    ]  # fmt: skip


def trained_anew(run: Run, step: int, like: int) -> None:
    """Replaces a step's checkpoint by one of other weights: those of step `like`."""
    path = checkpoint.folder(run.checkpoints, step)
    shutil.rmtree(path)
    shutil.copytree(checkpoint.folder(run.checkpoints, like), path)
    manifest = checkpoint.read(path)
    (path / "manifest.json").write_text(
        manifest.model_copy(update={"step": step}).sealed(manifest.files).model_dump_json()
    )


def test_a_step_that_was_trained_anew_is_evaluated_again_and_its_last_record_counts(run: Run, small_dataset: Path):
    assert evaluated(run, predictions=True) == [2, 4, 6]
    trained_anew(run, step=4, like=2)
    assert evaluated(run) == [4]
    assert evaluated(run) == []
    assert [r["step"] for r in read_lines(run.eval_metrics)] == [2, 4, 6, 4]
    found = list(records.latest(run, "test", str(small_dataset)).values())
    assert [r["step"] for r in found] == [2, 4, 6]
    assert found[1]["metrics"] == found[0]["metrics"] != found[2]["metrics"]
    rows = {step: predictions.path(run, "test", step) for step in (2, 4)}
    assert not pl.read_parquet(rows[4]).equals(pl.read_parquet(rows[2]))
    assert evaluated(run, predictions=True) == [4]  # the rows were those of the weights before
    assert pl.read_parquet(rows[4]).equals(pl.read_parquet(rows[2]))
    assert len(list(read_lines(run.eval_metrics))) == 4


def test_a_step_trained_anew_is_evaluated_again_while_the_evaluator_follows(run: Run):
    run.write_status("training", 4, 6)
    found = evaluate(EvaluateConfig(run=run.path, threads=1, follow=True))
    assert [next(found)["step"] for _ in range(3)] == [2, 4, 6]
    trained_anew(run, step=4, like=2)
    run.write_status("finished", 6, 6)
    assert [record["step"] for record in found] == [4]


def test_records_that_do_not_say_which_weights_they_are_of_are_made_again(run: Run):
    evaluated(run)
    lines = [{k: v for k, v in record.items() if k != "checkpoint"} for record in read_lines(run.eval_metrics)]
    run.eval_metrics.unlink()
    for line in lines:
        append_line(run.eval_metrics, line)
    assert evaluated(run) == [2, 4, 6]
    assert evaluated(run) == []


def test_a_damaged_line_of_an_evaluation_is_an_error_that_names_the_file(run: Run):
    evaluated(run, step=2)
    run.eval_metrics.write_bytes(run.eval_metrics.read_bytes().replace(b'"split"', b'"split'))
    with pytest.raises(UserError, match=r"eval\.jsonl, line 1: no valid JSON: .* Remove it"):
        evaluated(run)


def test_a_line_torn_by_a_kill_is_written_again(run: Run):
    evaluated(run)
    whole = run.eval_metrics.read_bytes()
    run.eval_metrics.write_bytes(whole[:-20])
    assert evaluated(run) == [6]
    assert [r["step"] for r in read_lines(run.eval_metrics)] == [2, 4, 6]


def test_following_ends_with_the_run_and_misses_nothing(run: Run):
    kept = run.path / "kept"
    run.checkpoints.rename(kept)
    run.checkpoints.mkdir()
    run.write_status("training", 0, 6)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(evaluated(run, follow=True)))
    thread.start()
    for name in ("step-00000002", "step-00000004"):
        time.sleep(0.2)
        (kept / name).rename(run.checkpoints / name)
    while found[-1:] != [4] and len(list(read_lines(run.eval_metrics))) < 2:
        time.sleep(0.02)
    assert thread.is_alive()
    (kept / "step-00000006").rename(run.checkpoints / "step-00000006")
    run.write_status("finished", 6, 6)
    thread.join(30)
    assert found == [2, 4, 6]


def test_a_checkpoint_deleted_while_it_is_evaluated_is_left_out(run: Run, monkeypatch, caplog):
    check = checkpoint.check

    def deleted(path: Path, *part: int) -> checkpoint.CheckpointManifest:
        manifest = check(path, *part)
        if manifest.step == 4:
            shutil.rmtree(path)
        return manifest

    monkeypatch.setattr(lock, "check", deleted)
    assert evaluated(run, follow=True) == [2, 6]
    assert [r.getMessage()[:16] for r in caplog.records if r.levelname == "WARNING"] == ["step 4: left out"]


def test_a_damaged_checkpoint_is_named(run: Run):
    file = run.checkpoints / "step-00000004" / "rank-00000.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"step-00000004/rank-00000.bin: its checksum"):
        evaluated(run)


def test_rows_that_other_encoders_made_are_refused(run: Run, small_dataset: Path, tmp_path: Path):
    """Same schema, other vocabulary: the ids would look up other rows of the tables, without an error."""
    other = shutil.copytree(small_dataset, tmp_path / "other")
    vocabulary = other / "encoders" / "vocabularies" / "city.parquet"
    table = pq.read_table(vocabulary)
    pq.write_table(table.set_column(0, "value", table["value"].take(list(range(len(table)))[::-1])), vocabulary)
    with pytest.raises(UserError, match=r"other was encoded with .* its ids mean something else"):
        evaluated(run, dataset=other)


def test_two_trainers_do_not_write_to_one_run(run: Run, small_dataset: Path):
    settings = Settings(batch_size=64, lanes=2, epochs=2, max_steps=8, threads=1)
    with run.lock("train", "busy"), pytest.raises(UserError, match="another trainer writes to it"):
        train(TrainConfig(dataset=small_dataset, run=run.path, model=MODEL, train=settings))


def test_following_ends_with_an_error_once_the_trainer_is_gone_or_failed(run: Run):
    run.write_status("training", 6, 9)
    with pytest.raises(UserError, match=r"no trainer heartbeat for 0 s; is it running\?"):
        evaluated(run, follow=True, give_up_after=0.1)
    run.write_status("failed", 6, 9)
    with pytest.raises(UserError, match="training failed at step 6 and was not restarted"):
        evaluated(run, follow=True, give_up_after=0.1)


def test_missing_input_is_named(run: Run, tmp_path: Path):
    for settings, words in (
        ({"step": 5}, r"no checkpoint \(step 5\); there are \[2, 4, 6\]"),
        ({"dataset": tmp_path}, "no dataset"),
        ({"truth": {"file": tmp_path / "x", "key": "a", "columns": {}}}, "x: cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            evaluated(run, **settings)
    with pytest.raises(UserError, match="no run"):
        evaluated(Run(tmp_path / "nowhere"))


def test_best_possible_is_the_true_probabilitys_own_ne(run: Run, tmp_path: Path, small_dataset: Path):
    dataset = Dataset(small_dataset)
    rows = pl.read_parquet([small_dataset / shard.path for shard in dataset.shards("test")])
    rng = np.random.default_rng(0)
    truth = pl.DataFrame(
        {"id": rows["row_id"], "p": rng.uniform(0.05, 0.95, len(rows)), "m": rng.normal(size=len(rows))}
    )
    truth.sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "truth.parquet")
    columns = {"click": "p", "bought": "p", "dwell": "m"}
    config = EvaluateConfig(
        run=run.path, threads=1, truth=Truth(file=tmp_path / "truth.parquet", key="id", columns=columns)
    )
    evaluation = Evaluation(config)
    recorded = list(evaluation.records())
    found = json.loads(oracle.path(run, "test").read_text())["metrics"]
    y, w = rows["label.click"].to_numpy(), rows["weight"].to_numpy()
    rate = np.average(y, weights=w)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert found["click"]["ne"] == pytest.approx(
        log_loss(y, truth["p"].to_numpy(), sample_weight=w) / entropy, rel=1e-9
    )
    results = evaluation.results()
    assert results.records == recorded == list(read_lines(run.eval_metrics))
    assert results.oracle == found
    lines = [line.split("|")[2:-1] for line in tables.table(results, "github").replace("<br>", " ").splitlines()]
    ne, best = recorded[-1]["metrics"]["click"]["ne"], found["click"]["ne"]
    shown = [[cell.strip() for cell in line][1] for line in lines]
    steps = [f"{record['metrics']['click']['ne']:.4f}" for record in recorded]
    assert shown[-5:] == [*steps, f"{best:.4f}", f"{(1 - ne) / (1 - best):.0%}"]
    curve, limit = plots.learning_curves(results).axes[0].lines
    assert curve.get_xdata().tolist() == [record["rows"] / 1e6 for record in recorded]
    assert curve.get_ydata().tolist() == [record["metrics"]["click"]["ne"] for record in recorded]
    assert set(limit.get_ydata()) == {best}
    page.write_run(results)
    assert (run.path / "ne.png").read_bytes()[:4] == b"\x89PNG"
    text = run.report.read_text()
    shown_ne, *_ = re.findall(r'<p class="figure">([\d.]+)<span>NE</span></p>', text)
    assert float(shown_ne) == pytest.approx(ne, rel=1e-3)
    assert f"<dd>{significant(best)}, gap closed" in text
    assert text.count("<tr><td") > len(recorded)


def test_the_dataset_is_opened_and_records_that_do_not_change_are_read_once(run: Run, monkeypatch: pytest.MonkeyPatch):
    evaluated(run)
    calls: list[str] = []
    for module, name in ((follow, "open_dataset"), (records, "read_lines")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: calls.append(n) or f(*a))
    evaluation = Evaluation(EvaluateConfig(run=run.path, threads=1))
    assert list(evaluation.records()) == []
    page.write_run(evaluation.results())
    assert calls == ["open_dataset", "read_lines"]


def test_evaluation_leaves_what_the_trainer_wrote_alone(run: Run):
    def state() -> dict[str, float]:
        return {str(p): p.stat().st_mtime for p in run.checkpoints.rglob("*")}

    before = state()
    evaluated(run)
    assert state() == before


def test_a_line_is_appended_whole_after_a_torn_one(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    append_line(path, {"a": 3})
    assert [line["a"] for line in read_lines(path)] == [1, 3]
