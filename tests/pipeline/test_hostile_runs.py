"""Folders of runs that were handed over: what we write stays inside of them, and what they hold is checked."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated
from pydantic import ValidationError

from features.errors import UserError
from features.regular_files import open_regular
from jobs import inspect
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation import oracle, predictions
from pipeline.evaluation.follow import EvaluateConfig, Evaluation
from pipeline.evaluation.report import page
from pipeline.release.config import NightlyConfig
from pipeline.release.nightly import nightly
from pipeline.run import records
from pipeline.run.run import FILES, FOLDERS, Run, keep_lines
from pipeline.search.compare import Runs
from pipeline.search.compare_config import CompareConfig
from pipeline.search.trained import Jobs
from pipeline.storage.files import append_line, appending, make_folder, read_lines, sha256
from pipeline.synthetic.event_log import LogConfig, generate
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

SECRET = "secret"  # content of a file outside, which nothing may read, change or replace


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file that nothing may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text(SECRET)
    yield folder
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == SECRET


@pytest.fixture(scope="module")
def trained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    model = ModelConfig(fusion={"name": "mmoe", "num_experts": 2, "levels": [[4]]}, tower=[4])
    train(TrainConfig(dataset=small_dataset, run=path, model=model, train=configured(4)))
    return path


def configured(steps: int) -> Settings:
    return Settings(batch_size=64, lanes=2, epochs=2, max_steps=steps, checkpoint_every=2, threads=1)


def evaluate(run: Path) -> None:
    evaluation = Evaluation(EvaluateConfig(run=run, threads=1, predictions=True, step="newest"))
    list(evaluation.records())
    page.write_run(evaluation.results())


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Links in the folder of a run


@pytest.mark.parametrize("name", [*FOLDERS, *FILES, "metrics/eval.jsonl", "metrics/.test.lock", "metrics/best-test.json",
                                  "metrics/train.jsonl", "tensorboard/events"])  # fmt: skip
@pytest.mark.parametrize("target", ["something", "nothing"])
def test_a_run_with_a_link_where_something_of_ours_belongs_is_not_opened(tmp_path, outside, name, target):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    there = outside if name in FOLDERS else outside / "file"
    path.symlink_to(there if target == "something" else outside / "new")
    assert name.split("/")[0] in refused(lambda: Run(tmp_path / "run"))


def test_a_run_may_be_named_by_a_link(tmp_path):
    run = Run(tmp_path / "run")
    make_folder(run.eval_metrics.parent)
    run.write_status("training", 1, 2)
    append_line(run.eval_metrics, {"step": 1})
    (tmp_path / "link").symlink_to(tmp_path / "run")
    linked = Run(tmp_path / "link")
    assert linked.status().step == 1
    assert list(read_lines(linked.eval_metrics)) == [{"step": 1}]
    with linked.lock("test", "busy"):
        assert (tmp_path / "run/metrics/.test.lock").exists()


def test_a_hidden_folder_of_an_editor_is_no_fault_of_a_run(tmp_path):
    for name in ("metrics", "predictions"):
        (tmp_path / name / ".ipynb_checkpoints").mkdir(parents=True)
    Run(tmp_path)
    (tmp_path / "metrics" / "folder").mkdir()
    assert "metrics/folder" in refused(lambda: Run(tmp_path))


def test_links_that_appear_once_a_run_is_open_are_not_followed(tmp_path, outside):
    run = Run(tmp_path / "run")
    make_folder(run.eval_metrics.parent)
    for path in (run.eval_metrics, run.eval_metrics.with_name(".test.lock"), run.path / "status.json", run.report):
        path.symlink_to(outside / "file")
    run.predictions = run.path / "predictions"
    run.predictions.symlink_to(outside)
    assert "is a link" in refused(lambda: append_line(run.eval_metrics, {"step": 1}))
    assert "is a link" in refused(lambda: run.lock("test", "busy"))
    assert "link" in refused(lambda: list(read_lines(run.eval_metrics)))
    assert "link" in refused(lambda: records.latest(run, "test", "d"))
    assert "link" in refused(run.status)
    assert "is a link" in refused(lambda: predictions.write(pl.DataFrame(), predictions.path(run, "test", 1)))
    run.write_status("training", 1, 2)  # takes the link's place
    assert run.status().step == 1


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_neither_read_nor_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "device", Path("/dev/zero"), tmp_path):
        for act in (appending, open_regular, sha256):
            said = refused(lambda a=act, p=path: a(p))
            assert "regular file" in said or "link" in said


def test_a_folder_of_ours_is_made_where_nothing_is_and_never_in_place_of_a_file_or_link(tmp_path, outside):
    assert make_folder(make_folder(tmp_path / "a/b")).is_dir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "nowhere").symlink_to(outside / "new")
    for name in ("file", "link", "nowhere"):
        refused(lambda n=name: make_folder(tmp_path / n))


def test_an_evaluation_writes_through_no_link(trained, tmp_path, outside):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    evaluate(run)  # the good twin
    assert {path.name for path in run.iterdir()} >= {"report.html", "ne.png", "predictions"}
    for name in ("report.html", "ne.png"):
        shutil.rmtree(run)
        shutil.copytree(trained, run)
        evaluation = Evaluation(EvaluateConfig(run=run, threads=1, step="newest"))
        list(evaluation.records())
        (run / name).symlink_to(outside / "file")
        page.write_run(evaluation.results())  # takes the link's place
        assert not (run / name).is_symlink()
        (run / name).unlink()
        (run / name).symlink_to(outside / "file")
        assert name in refused(lambda: evaluate(run))


@pytest.mark.parametrize(
    "name", ["tensorboard", "metrics", "checkpoints", "metrics/train.jsonl", "metrics/.train.lock"]
)
def test_a_training_that_resumes_writes_through_no_link(trained, small_dataset, tmp_path, outside, name):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    again = TrainConfig(dataset=small_dataset, run=run, model=config_of(run), train=configured(6))
    if (path := run / name).is_dir():
        shutil.rmtree(path)
        path.symlink_to(outside)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(outside / "file")
    assert name in refused(lambda: train(again))


def config_of(run: Path) -> ModelConfig:
    return ModelConfig.model_validate(Run(run).config()["model"])


# Content of a run


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"state": "training"}', b'{"state": "\x1b", "step": 1, "steps": 2, "time": 0}',
                b'{"state": "training", "step": 1, "steps": 2, "time": NaN}', b"[" * 60_000, b" " * 100_000]
)  # fmt: skip
def test_a_status_that_is_none_is_one_line_of_error(tmp_path, content):
    (tmp_path / "status.json").write_bytes(content)
    assert "status.json" in refused(Run(tmp_path).status)


RECORD = {
    "step": 4, "checkpoint": "c", "split": "test", "dataset": "d", "rows": 10,
    "metrics": {"click": {"ne": 0.9, "auc": 0.6, "calibration": None}}, "gates": [[[0.5, 0.5], [0.2, 0.8]]],
}  # fmt: skip


@settings(max_examples=150, deadline=2000)
@given(data=st.data())
def test_a_changed_record_is_read_or_refused(data, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"))
    make_folder(run.eval_metrics.parent)
    run.eval_metrics.write_bytes(data.draw(mutated(RECORD)) + b"\n" + json.dumps(RECORD).encode() + b"\n")
    try:
        found = records.latest(run, "test", "d")
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        return
    assert found[4] == RECORD


@pytest.mark.parametrize("line", [b"[1]\n", b'{"a": 1}\n', b'{"step": "1"}\n', b'{"step": null}\n', b"{\n"])
def test_a_line_without_a_step_is_named_when_a_run_resumes(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"step": 1, "loss": NaN}\n{"step": 5}\n')
    keep_lines(path, 3)
    assert path.read_bytes() == b'{"step": 1, "loss": NaN}\n'
    path.write_bytes(path.read_bytes() + line)
    assert "line 2" in refused(lambda: keep_lines(path, 3))


def test_a_line_that_never_ends_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.storage.files.MAX_RECORD_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 50)
    assert list(read_lines(path)) == [{"a": 1}]  # a killed writer's last line
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 500)
    assert "line 2: longer than 100 bytes" in refused(lambda: list(read_lines(path)))


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record["metrics"].pop("click"),
        lambda record: record["metrics"]["click"].pop("auc"),
        lambda record: record.pop("rows"),
        lambda record: record.update(gates=[[[0.5] * 5000]]),
        lambda record: record.update(gates=[[[0.5], [0.5, 0.5]]]),
        lambda record: record.update(gates=[[]]),
        lambda record: record.update(gates=[[[]]]),
        lambda record: record["metrics"][next(iter(record["metrics"]))].update(ne=1e308),
    ],
)
def test_a_record_that_reports_cannot_show_is_refused(trained, tmp_path, edit):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    evaluate(run)
    file = Run(run).eval_metrics
    [line] = read_lines(file)
    edit(line)
    file.write_text(json.dumps(line) + "\n")
    assert "eval.jsonl" in refused(lambda: evaluate(run))


@pytest.mark.parametrize("content", ["{}", "[]", '{"dataset": "d", "metrics": {}}', '{"dataset": "d", "metrics": 1}'])
def test_an_oracle_that_is_none_is_refused(tmp_path, content):
    run = Run(tmp_path)
    make_folder(run.eval_metrics.parent)
    good = {"dataset": "d", "metrics": {"click": {"ne": 0.5, "auc": 0.9, "calibration": 1, "rows": 3}}}
    oracle.path(run, "test").write_text(json.dumps(good))
    assert oracle.read(run, "test", "d", {"click": "binary"}) == good["metrics"]
    assert oracle.read(run, "test", "other", {"click": "binary"}) is None
    assert oracle.read(run, "test", "d", {"click": "binary"}, share=0.1) is None
    oracle.path(run, "test").write_text(content)
    assert "best-test.json" in refused(lambda: oracle.read(run, "test", "d", {"click": "binary"}))


# Other folders


def test_a_comparison_writes_into_no_run_that_is_a_link(trained, small_dataset, tmp_path, outside):
    config = CompareConfig(folder=tmp_path / "compare", models=["mmoe"], baseline="mmoe")
    runs = Runs(config, Jobs([]), Dataset(small_dataset))
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/mmoe-0").symlink_to(outside)
    assert "mmoe-0 is a link" in refused(lambda: runs.run("mmoe", 0))
    (tmp_path / "compare/mmoe-0").unlink()
    (tmp_path / "compare/mmoe-0").mkdir()
    (tmp_path / "compare/mmoe-0/log.txt").symlink_to(outside / "file")
    assert "log.txt is a link" in refused(lambda: runs.run("mmoe", 0))
    (tmp_path / "compare/mmoe-0/made.json").write_text("[" * 100_000)
    assert "made.json: no valid JSON" in refused(lambda: runs.run("mmoe", 0))


def test_the_page_of_a_dataset_takes_the_place_of_a_link(small_dataset, tmp_path, outside, capsys):
    data = Path(shutil.copytree(small_dataset, tmp_path / "data"))
    (tmp_path / "data.card.html").symlink_to(outside / "file")
    inspect.main([str(data)])
    assert not (tmp_path / "data.card.html").is_symlink()
    assert "<title>data</title>" in (tmp_path / "data.card.html").read_text()


@pytest.mark.parametrize("name", ["day", "night.json", "encoded day", "lock", "pins", "serving.json", "figures"])
def test_a_nightly_writes_through_no_link(trained, small_log, tmp_path, outside, name):
    run = shutil.copytree(trained, tmp_path / "run")
    given = {"run": run, "input": str(small_log), "out": tmp_path / "nightly", "date": "2026-11-09"}
    lax = {"metric": "ne", "max": 9, "allow_ne_above_one": True}
    (run / "gates.yaml").write_text(json.dumps({"default": [lax, {"metric": "rows", "min": 1}]}))
    config = NightlyConfig(
        **given, data_gates={"action": "warn"}, bless="pass", by_time=[], cold_start=False, buckets=5
    )
    config.out.mkdir()
    if name == "day":
        config.folder.symlink_to(outside)
        assert "2026-11-09 is a link" in refused(lambda: nightly(config))
        return
    if name == "lock":
        (config.out / ".nightly.lock").symlink_to(outside / "file")
        assert "nightly.lock is a link" in refused(lambda: nightly(config))
        return
    if name == "pins":
        (run / "pins").symlink_to(outside)
        assert "pins is a link" in refused(lambda: nightly(config))
        return
    if name in ("night.json", "serving.json"):
        config.folder.mkdir()
        file = (config.folder if name == "night.json" else config.out) / name
        file.symlink_to(outside / "file")
        assert f"{name} is a link" in refused(lambda: nightly(config))
        return
    if name == "figures":
        config.folder.mkdir()
        (config.folder / "candidate.parquet").symlink_to(outside / "file")
    assert nightly(config).night.outcome == "pass"
    if name == "encoded day":
        [day] = config.folder.glob("day-*")
        day.rename(tmp_path / "other")
        day.symlink_to(tmp_path / "other")
        before = (tmp_path / "other/manifest.json").stat()
        again = config.model_copy(update={"again": True})
        assert f"{day.name} is a link" in refused(lambda: nightly(again))
        assert (tmp_path / "other/manifest.json").stat() == before


@pytest.mark.parametrize("date", ["..", ".", "../x", "a/b", "", "\x1b"])
def test_a_night_may_not_lie_outside_of_its_folder(trained, tmp_path, date):
    with pytest.raises(ValidationError):
        NightlyConfig(run=trained, input="x", out=tmp_path, date=date)


@pytest.mark.parametrize("kind", ["a link", "of text", "no Parquet file", "whole"])
def test_the_truth_of_a_generated_log_that_is_none_is_refused(tmp_path, outside, kind):
    config = LogConfig(impressions=1000, days=1, users=1000, items=100)
    out = tmp_path / "raw"
    generate(config, out)
    file = out / "truth.parquet"
    before = file.read_bytes()
    if kind == "a link":
        file.unlink()
        file.symlink_to(outside / "file")
    elif kind == "of text":
        pq.write_table(pa.table({"impression_id": [1], "note": ["x"]}), file)
    elif kind == "no Parquet file":
        file.write_text("x" * 100)
    if kind == "whole":
        generate(config, out)
        assert file.read_bytes() == before
    else:
        assert "truth.parquet" in refused(lambda: generate(config, out))
