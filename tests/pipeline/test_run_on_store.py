"""A run and its dataset on a store: the same figures, packages and predictions as on disk."""

import errno
import io
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import SECRET
from store_fixtures import use_store

from features.errors import UserError
from models.ranker import ModelConfig
from pipeline.evaluation import follow, predictions, priority
from pipeline.evaluation.follow import EvaluateConfig, Evaluation, dataset_of, evaluate, results_of
from pipeline.evaluation.metrics import evaluated as figures
from pipeline.evaluation.report import page
from pipeline.evaluation.scorer import Scorer as Evaluator
from pipeline.release.export import export as exporting
from pipeline.release.export.config import ExportConfig
from pipeline.release.export.export import export
from pipeline.release.predict.config import PredictConfig
from pipeline.release.predict.predict import predict
from pipeline.run import records
from pipeline.run.run import Run
from pipeline.serving import fetching
from pipeline.serving.scorer import Scorer
from pipeline.storage import objects
from pipeline.storage.files import copy_file, read_lines
from pipeline.storage.store_path import StorePath, files_below
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

pytestmark = pytest.mark.integration
MODEL = ModelConfig(fusion={"name": "adatt", "levels": [[8], [4]]}, tower=[4])


@pytest.fixture(scope="module")
def trained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4."""
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(batch_size=64, lanes=2, epochs=2, max_steps=4, checkpoint_every=2, threads=1)
    train(TrainConfig(dataset=small_dataset, run=run, model=MODEL, train=settings))
    return run


def put(folder: Path, target: StorePath) -> StorePath:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            copy_file(file, target / file.relative_to(folder).as_posix())
    return target


def put_run(run: Path, dataset: StorePath, target: StorePath) -> Run:
    """A copy of a run on a store, trained on the dataset there."""
    put(run, target)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"dataset": str(dataset), "run": str(target)}
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    return Run(target)


@pytest.fixture
def world(trained: Path, small_dataset: Path, s3: StorePath, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run on S3, with its dataset."""
    monkeypatch.setattr(priority, "lower", lambda _: None)
    monkeypatch.setattr(follow, "POLL_INTERVAL_OF_STORE", 0.05)
    return put_run(trained, put(small_dataset, s3 / "data"), s3 / "run")


def evaluated(run: Path, **settings: Any) -> list[dict[str, Any]]:
    return list(evaluate(EvaluateConfig(run=run, threads=1, **settings)))


def test_evaluations_are_those_of_the_run_on_disk_and_name_no_secret(
    world: Run, trained: Path, small_dataset, tmp_path
):
    here = Run(shutil.copytree(trained, tmp_path / "run"))
    wanted = evaluated(here.path, predictions=True)
    found = evaluated(world.path, predictions=True, follow=True)
    same = ("step", "checkpoint", "metrics", "intervals", "reliability", "rows_evaluated", "evaluation", "measure")
    assert [[record[key] for key in same] for record in found] == [[record[key] for key in same] for record in wanted]
    assert list(read_lines(world.eval_metrics)) == found
    assert [record["dataset"] for record in found] == [f"{world.path.parent}/data"] * 2
    for record in found:
        file = f"test-{record['step']:08d}.parquet"
        there = figures.read(world.path / "evaluations" / file).figures
        assert there.equals(figures.read(here.path / "evaluations" / file).figures)
        there = predictions.read(world.path / "predictions" / file)
        assert there.equals(predictions.read(here.path / "predictions" / file))
    assert evaluated(world.path, predictions=True) == []
    page.write_run(results_of(world, "test", found[0]["dataset"], {n: t.kind for n, t in world.schema().tasks.items()}))
    assert "dwell" in world.report.read_text()
    assert not [file for file in files_below(world.path.parent) if SECRET.encode() in file.read_bytes()]


def test_two_evaluators_of_a_run_on_s3_share_its_checkpoints_and_a_poll_asks_twice(world: Run, proxy, monkeypatch):
    late = Evaluation(EvaluateConfig(run=world.path, threads=1)).pending
    assert late.known() == {}
    listed = late.steps()
    with ThreadPoolExecutor(2) as pool:
        both = [*pool.map(lambda _: evaluated(world.path), range(2))]
    assert sorted(record["step"] for records in both for record in records) == [2, 4]
    assert sorted(line["step"] for line in read_lines(world.eval_metrics)) == [2, 4]
    assert late.take(listed) is None  # listed before the others had recorded them
    use_store(proxy.env, monkeypatch)
    pending = Evaluation(EvaluateConfig(run=world.path, threads=1)).pending
    assert (pending.steps(), pending.take([2, 4])) == ([2, 4], None)  # looks into the files of each record, once
    proxy.requests.clear()
    assert pending.take(pending.steps()) is None
    assert [method for method, _ in proxy.requests] == ["GET", "HEAD"]  # however many checkpoints there are


def test_a_record_is_not_lost_to_a_writer_that_read_before_it_was_put(world: Run, monkeypatch):
    first, second = (
        {"split": "test", "dataset": "d", "step": step, "checkpoint": "c", "metrics": {}} for step in (1, 2)
    )
    put = records.replace_version

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(records, "replace_version", put)
        records._put_object(world.eval_metrics, second)
        put(*arguments)

    monkeypatch.setattr(records, "replace_version", overtaken)
    records.put(world, first)
    assert [line["step"] for line in read_lines(world.eval_metrics)] == [2, 1]


@pytest.mark.system
def test_an_evaluation_outlives_a_server_that_is_killed_and_started_again(
    world: Run, trained: Path, s3_server, monkeypatch
):
    metrics = Evaluator.metrics
    restarted = []

    def with_a_crash(self: Evaluator, step: int, on_batch: Any = None) -> Any:
        def crash(*arguments: Any) -> None:
            if not restarted:
                s3_server.kill()
                restarted.append(Thread(target=s3_server.start))
                restarted[0].start()
            on_batch(*arguments)

        return metrics(self, step, crash)

    monkeypatch.setattr(Evaluator, "metrics", with_a_crash)
    found = evaluated(world.path, batch_size=32, step=4)
    restarted[0].join()
    monkeypatch.undo()
    [wanted] = (Evaluator(Run(trained), dataset_of(Run(trained), EvaluateConfig(run=trained)), "test", 32).evaluate(4),)
    assert [record["metrics"] for record in found] == [wanted["metrics"]]


def test_a_package_and_its_delta_on_s3_are_those_of_a_disk(world: Run, trained: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv(fetching.CACHE, str(tmp_path / "cache"))
    root = world.path.parent
    whole = export(ExportConfig(run=world.path, step=2, out=root / "p2", archive=True, threads=1))
    export(ExportConfig(run=world.path, out=root / "p4", since=2, threads=1))
    export(ExportConfig(run=trained, step=2, out=tmp_path / "p2", archive=True, threads=1))
    export(ExportConfig(run=trained, out=tmp_path / "p4", since=2, threads=1))
    for name in ("p2", "p4"):
        here, there = tmp_path / name, root / name
        named = {file.relative_to(here).as_posix() for file in here.rglob("*") if file.is_file()}
        assert {str(file).removeprefix(f"{there}/") for file in files_below(there)} == named
        for file in named - {"manifest.json", "model_card.md"}:
            assert (there / file).read_bytes() == (here / file).read_bytes(), file
    assert whole.bytes == sum(file.stat().st_size for file in files_below(root / "p2"))
    with tarfile.open(fileobj=io.BytesIO((root / "p2.tar").read_bytes())) as archive:
        members = {entry.name: archive.extractfile(entry).read() for entry in archive if entry.isfile()}
    assert members == {f"p2/{str(f).removeprefix(f'{root}/p2/')}": f.read_bytes() for f in files_below(root / "p2")}

    rows = [{"user": f"u{n}", "city": "Köln", "item": f"i{n}", "price": 1.5 * n, "age": 20 + n} for n in range(40)]
    wanted = Scorer.load(tmp_path / "p4", base=tmp_path / "p2").score(rows, extra=True)
    found = Scorer.load(f"{root}/p4", base=f"{root}/p2").score(rows, extra=True)
    assert {task: x_B.tobytes() for task, x_B in found.items()} == {task: x_B.tobytes() for task, x_B in wanted.items()}
    with pytest.raises(UserError, match="is there already"):
        export(ExportConfig(run=world.path, out=root / "p2", threads=1))


@pytest.mark.parametrize("read", [figures.read, predictions.read], ids=["figures", "predictions"])
def test_a_file_of_a_store_that_does_not_answer_is_not_said_to_be_damaged(memory, monkeypatch, read):
    def refused(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    monkeypatch.setattr(MemoryFileSystem, "info", refused)
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "0.2")
    with pytest.raises(UserError, match=r"has not answered for 0\.2 s.*Run the same command again") as stop:
        read(memory / "test-2.parquet")
    assert "Remove it" not in str(stop.value)


@pytest.fixture
def small_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export writes the text that stands for its source."""

    class Small:
        def __init__(self, config: ExportConfig, source: str, *rest: Any) -> None:
            self.folder, self.content = rest[2], source

        def write(self) -> SimpleNamespace:
            for name in ("rows", "manifest.json"):
                (self.folder / name).write_text(self.content)
            return SimpleNamespace(files=["rows"])

    monkeypatch.setattr(exporting, "Package", Small)


def written(folder: StorePath) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in files_below(folder)}


def test_an_archive_that_cannot_be_written_leaves_the_package_before_and_its_archive(
    memory, small_packages, monkeypatch
):
    def no_room(*_: object) -> None:
        raise OSError("no room")

    config = ExportConfig(run=memory / "run", out=memory / "p", archive=True, overwrite=True)
    exporting.write_package(config, "old", None, None, None)
    before = written(memory)
    assert before.keys() == {"p/rows", "p/manifest.json", "p.tar"}
    with monkeypatch.context() as patched:
        patched.setattr(exporting, "write_archive", no_room)
        with pytest.raises(OSError, match="no room"):
            exporting.write_package(config, "new", None, None, None)
    assert written(memory) == before
    exporting.write_package(config, "new", None, None, None)
    assert written(memory)["p/rows"] == b"new"
    with tarfile.open(fileobj=io.BytesIO(written(memory)["p.tar"])) as archive:
        assert archive.extractfile("p/rows").read() == b"new"


def test_no_archive_stands_beside_a_package_that_it_is_not_of(memory, small_packages, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError("the store refuses")

    config = ExportConfig(run=memory / "run", out=memory / "p", archive=True, overwrite=True)
    exporting.write_package(config, "old", None, None, None)
    monkeypatch.setattr(objects, "copy_all", refused)
    with pytest.raises(UserError, match="is not written to its end"):
        exporting.write_package(config, "new", None, None, None)
    assert not (memory / "p.tar").exists()


def test_what_a_killed_export_left_of_its_archive_is_removed_by_one_without(memory, small_packages):
    (memory / f"p.tar.staging-{'0' * 32}" / "p.tar").write_bytes(b"half")
    exporting.write_package(ExportConfig(run=memory / "run", out=memory / "p"), "new", None, None, None)
    assert written(memory).keys() == {"p/rows", "p/manifest.json"}


def test_an_export_leaves_the_package_of_a_faster_one(memory, small_packages, monkeypatch):
    archived = exporting.write_archive

    def beside_another(*arguments: Any) -> None:
        archived(*arguments)
        monkeypatch.setattr(exporting, "write_archive", archived)
        exporting.write_package(config, "theirs", None, None, None)

    config = ExportConfig(run=memory / "run", out=memory / "p", archive=True)
    monkeypatch.setattr(exporting, "write_archive", beside_another)
    with pytest.raises(UserError, match="is there already"):
        exporting.write_package(config, "ours", None, None, None)
    assert written(memory).keys() == {"p/rows", "p/manifest.json", "p.tar"}
    assert written(memory)["p/rows"] == b"theirs"


def test_predictions_on_s3_are_the_bytes_of_those_on_a_disk(world: Run, small_log: Path, tmp_path: Path):
    there, here = world.path.parent / "scores", tmp_path / "scores"
    for out in (there, here):
        predict(
            PredictConfig(run=world.path, input=str(small_log), out=out, columns=["user"], threads=1, rows_per_file=400)
        )
    named = {file.relative_to(here).as_posix(): file.read_bytes() for file in here.rglob("*") if file.is_file()}
    assert {str(file).removeprefix(f"{there}/"): file.read_bytes() for file in files_below(there)} == named
    assert len(named) == 4  # three files of predictions and their manifest
    with pytest.raises(UserError, match="exists"):
        predict(PredictConfig(run=world.path, input=str(small_log), out=there))
