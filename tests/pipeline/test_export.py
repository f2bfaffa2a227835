"""Packages of a trained run: equal to its checkpoint, the same bytes twice, whole or not there."""

import errno
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from features.errors import UserError
from models.ranker import ModelConfig, is_table
from pipeline.dataset.dataset import open_dataset
from pipeline.evaluation.scorer import Scorer as Evaluator
from pipeline.evaluation.weights import ModelWeights, load_dense
from pipeline.release.export import config as config_module
from pipeline.release.export import export as export_module
from pipeline.release.export import tables
from pipeline.release.export.config import ExportConfig
from pipeline.release.export.export import Exported, export, report
from pipeline.release.export.model_card import escaped, records_of
from pipeline.release.export.program import write_program
from pipeline.release.export.tables import write_tables
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.serving.deltas import apply_delta
from pipeline.serving.encoded import encoded
from pipeline.serving.manifest import COMPILED, DENSE, FILE, Manifest, Model, check_files, read_manifest, write_manifest
from pipeline.serving.program import Program, load_program
from pipeline.serving.scorer import Scorer
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

STEPS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def trained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with four checkpoints, the last one evaluated on valid rows, with predictions."""
    path = tmp_path_factory.mktemp("exported") / "run"
    settings = Settings(batch_size=64, lanes=2, epochs=2, max_steps=4, checkpoint_every=1, threads=1)
    model = ModelConfig(fusion={"name": "adatt", "levels": [[8], [4]]}, tower=[4])
    train(TrainConfig(dataset=small_dataset, run=path, model=model, train=settings))
    run = Run(path)
    record = Evaluator(run, open_dataset(small_dataset), "valid", 512).evaluate(STEPS[-1], write_predictions=True)
    run.eval_metrics.parent.mkdir(exist_ok=True)
    run.eval_metrics.write_text(json.dumps(record) + "\n")
    return path


def exported(run: Path, out: Path, **settings: Any) -> Exported:
    return export(ExportConfig(run=run, out=out, threads=1, **settings))


@pytest.fixture(scope="module")
def package(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages") / "whole"
    exported(trained, out, archive=True)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def valid_rows(dataset: Path) -> Any:
    return pq.read_table(dataset / "valid")


def test_a_package_gives_the_evaluators_logits_of_every_row(trained, small_dataset, package):
    wanted = pl.read_parquet(trained / "predictions" / "valid-00000004.parquet").sort("row_id")
    table = valid_rows(small_dataset).sort_by("row_id")
    schema = open_dataset(small_dataset).schema
    found_BT = Scorer.load(package).score_encoded(encoded(table, schema)).numpy()
    assert table["row_id"].to_pylist() == wanted["row_id"].to_list()
    wanted_BT = np.stack([wanted[f"logit.{task}"].to_numpy() for task in schema.tasks], 1)
    np.testing.assert_allclose(found_BT, wanted_BT, rtol=1e-5, atol=1e-5)
    manifest = read_manifest(package)
    assert manifest.tolerances["rows"] == len(wanted) == 300
    assert manifest.tolerances["max_logit_difference"] <= 1e-5
    record = json.loads((trained / "metrics" / "eval.jsonl").read_text())
    for task, metric in (("click", "ne"), ("bought", "ne"), ("dwell", "nrmse")):
        recorded = record["metrics"][task][metric]
        assert manifest.metrics["valid"][task][metric] == recorded
        assert manifest.tolerances[f"{metric}.{task}.checkpoint"] == pytest.approx(recorded, rel=1e-5)
        assert manifest.tolerances[f"{metric}.{task}.package"] == pytest.approx(recorded, rel=1e-4)


def test_a_package_has_the_files_of_its_manifest_and_is_the_same_bytes_when_it_is_overwritten(
    trained, package, tmp_path
):
    check_files(package, read_manifest(package))
    assert {*contents(package)} == {FILE, *read_manifest(package).files}
    out, archive = tmp_path / "whole", tmp_path / "whole.tar"
    shutil.copytree(package, out)
    (out / "model_card.md").write_text("old")
    archive.write_text("old")
    with pytest.raises(UserError, match="is there already"):
        exported(trained, out)
    assert (out / "model_card.md").read_text() == archive.read_text() == "old"
    killed = tmp_path / f"whole.staging-{'0' * 32}"
    (killed / "tables").mkdir(parents=True)
    exported(trained, out, archive=True, overwrite=True)
    assert contents(out) == contents(package)
    assert archive.read_bytes() == package.with_name("whole.tar").read_bytes()
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    assert contents(tmp_path / "unpacked" / "whole") == contents(package)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "whole.tar", "unpacked"}


@pytest.fixture
def same_program(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense program is that of `package`: tracing it takes most of an export."""

    def copied(ranker: Any, embedding_dim: int, dense_width: int, folder: Path, compiled: bool) -> list[str]:
        shutil.copyfile(package / DENSE, folder / DENSE)
        return [DENSE]

    monkeypatch.setattr(export_module, "write_program", copied)


def test_rounded_tables_are_measured_and_recorded(trained, package, tmp_path, same_program):
    manifest = exported(trained, tmp_path / "int4", tables="int4", rows="occurring").manifest
    assert manifest.format == "int4"
    assert 0 < manifest.tolerances["max_logit_difference"] < 1
    sizes = [
        sum(file.bytes for name, file in found.files.items() if name.endswith(".bin"))
        for found in (manifest, read_manifest(package))
    ]
    assert 0 < 3 * sizes[0] < sizes[1]
    card = (tmp_path / "int4" / "model_card.md").read_text()
    assert "4-bit numbers, of the ids that occur in the train split alone" in card


def wrong_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        written = write_tables(*arguments)
        file = arguments[-1] / written[2][0]
        file.write_bytes((np.frombuffer(file.read_bytes(), np.float32) + 0.1).tobytes())
        return written

    monkeypatch.setattr(export_module, "write_tables", wrong)


def zeros(form: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A quantiser that loses everything; of whose format it is."""
    real = tables.stored
    return lambda monkeypatch: monkeypatch.setattr(tables, "stored", lambda x_ND, _: torch.zeros_like(real(x_ND, form)))


def other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of other weights than the checkpoint's."""

    def other(ranker: Any, *arguments: Any) -> Any:
        with torch.no_grad():
            next(ranker.towers.parameters()).mul_(1.01)
        return write_program(ranker, *arguments)

    monkeypatch.setattr(export_module, "write_program", other)


def other_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled program that is not the portable one."""

    def written(*arguments: Any) -> list[str]:
        (arguments[3] / COMPILED).write_bytes(b"")
        return [*write_program(*arguments[:4], compiled=False), COMPILED]

    def loaded(folder: Path, manifest: Manifest, compiled: bool) -> Program:
        portable = load_program(folder, manifest)
        return lambda embedding_BE, dense_BD: portable(embedding_BE, dense_BD) + 0.01

    monkeypatch.setattr(export_module, "write_program", written)
    monkeypatch.setattr(export_module, "load_program", loaded)


DEFECTS = {
    "numbers": ("fp32", "all", wrong_tables, r"its embeddings differ by 0\.1 on split valid of .*nothing is written"),
    "fp16": ("fp16", "all", zeros("fp16"), "its embeddings differ"),
    "int8": ("int8", "occurring", zeros("int8"), "its embeddings differ"),
    "int4": ("int4", "all", zeros("int4"), "its embeddings differ"),
    "program": ("int4", "all", other_weights, "logits of its program differ by .* the checkpoint's model"),
    "compiled": ("int8", "all", other_compiled, "logits of its compiled program differ by .* its portable one"),
}


@pytest.mark.parametrize("what", DEFECTS)
def test_a_package_that_differs_from_its_checkpoint_is_not_written(what, trained, tmp_path, monkeypatch, request):
    form, rows, change, message = DEFECTS[what]
    if what not in ("program", "compiled"):
        request.getfixturevalue("same_program")
    change(monkeypatch)
    with pytest.raises(UserError, match=message):
        exported(
            trained, tmp_path / "package", archive=True, tables=form, rows=rows,
            target="aot" if what == "compiled" else "eager",
        )  # fmt: skip
    assert [*tmp_path.iterdir()] == []


def test_a_base_and_what_changed_since_are_the_whole_package(trained, tmp_path):
    base, middle, whole, delta = (tmp_path / name for name in ("base", "middle", "whole", "delta"))
    exported(trained, base, step=1, tables="fp16")
    unfinished = tmp_path / f"a.staging-{'0' * 32}"  # of another process, perhaps
    shutil.copytree(base, unfinished)
    exported(trained, middle, step=2, tables="fp16", since=1)
    exported(trained, whole, tables="fp16")
    changed = exported(trained, delta, tables="fp16", since=2).manifest
    assert changed.base is not None
    assert changed.base.step == 2
    assert changed.whole() == read_manifest(whole)
    assert not {"manifest.json"} & {*changed.files}
    apply_delta(base, middle, tmp_path / "made2")
    apply_delta(tmp_path / "made2", delta, tmp_path / "made")
    assert contents(tmp_path / "made") == contents(whole)
    for other in ({"tables": "int8", "rows": "all"}, {"tables": "fp16", "rows": "occurring"}):
        with pytest.raises(UserError, match="no package of that step with tables={tables} rows={rows}".format(**other)):
            exported(trained, tmp_path / "other", since=2, **other)
    before = contents(base)
    for given in ({}, {"base": base}):
        with pytest.raises(UserError, match="base is the package that this delta changes"):
            exported(trained, base, tables="fp16", since=1, overwrite=True, **given)
    assert contents(base) == before
    names = {"base", "middle", "whole", "delta", "made2", "made", unfinished.name}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in ("base", "made2", "made"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(UserError, match="or it is a delta whose own base is not there"):
        exported(trained, tmp_path / "other", step=3, tables="fp16", since=2)


def test_a_delta_without_a_compiled_program_is_none_of_a_package_with_one(trained, package, tmp_path):
    shutil.copytree(package, tmp_path / "base")
    manifest = read_manifest(package).model_copy(update={"compiled": True, "model": model_of(trained, 2)})
    write_manifest(tmp_path / "base", manifest, [*manifest.files])
    with pytest.raises(UserError, match=r"has a compiled program\. Set target=aot here too"):
        exported(trained, tmp_path / "delta", since=2)


def model_of(run: Path, step: int) -> Model:
    path = checkpoint.folder(Run(run).checkpoints, step)
    return Model(run=str(run), step=step, checkpoint=checkpoint.read(path).checksum, fingerprint="", encoders="")


def test_where_there_is_no_room_nothing_is_left_and_an_old_archive_never_stands_beside_a_new_package(
    trained, package, tmp_path, monkeypatch, same_program
):
    out, archive = tmp_path / "whole", tmp_path / "whole.tar"
    shutil.copytree(package, out)
    archive.write_text("old")
    (tmp_path / f"whole.tar.staging-{'0' * 32}").mkdir()
    with pytest.raises(UserError, match=r"whole\.tar is of the package that is replaced"):
        exported(trained, out, overwrite=True)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for what in ("write_tables", "write_archive"):
        with monkeypatch.context() as patched:
            patched.setattr(export_module, what, full)
            with pytest.raises(UserError, match=r"whole cannot be written: .*No space left on device"):
                exported(trained, out, overwrite=True, archive=True)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "whole.tar"}
        assert archive.read_text() == "old"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)  # of the archive
        with pytest.raises(UserError, match="No space left"):
            exported(trained, out, step=4, overwrite=True, archive=True)
    assert not archive.exists()


def test_a_record_on_another_dataset_is_not_the_packages(trained, small_dataset):
    run = Run(trained)
    found = checkpoint.read(checkpoint.folder(run.checkpoints, 4))
    assert {*records_of(run, found, str(small_dataset))} == {"valid"}
    assert records_of(run, found, "/elsewhere") == {}
    assert records_of(run, found.model_copy(update={"checksum": "0"}), str(small_dataset)) == {}


@pytest.mark.system
def test_a_compiled_program_of_a_package_gives_the_answers_of_the_portable_one(trained, small_dataset, tmp_path):
    found = exported(trained, tmp_path / "package", target="aot", tables="int8")
    assert found.manifest.compiled
    assert found.manifest.tolerances["compiled.max_relative_difference"] <= 1e-5
    assert "of the compiled program's from the portable one's" in report(found)
    rows = encoded(valid_rows(small_dataset), open_dataset(small_dataset).schema)
    compiled, portable = (Scorer.load(tmp_path / "package", compiled=c).score_encoded(rows) for c in (True, False))
    assert not torch.equal(portable[0], portable[1])
    torch.testing.assert_close(compiled, portable, rtol=1e-5, atol=1e-5)


def test_what_is_no_package_is_not_replaced(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(UserError, match="is no package, and is not replaced"):
        exported(trained, tmp_path, overwrite=True)
    assert [*tmp_path.iterdir()] == [tmp_path / "notes.txt"]


def other_encoders(run: Path, dataset: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(dataset, folder / "dataset")
    file = folder / "dataset" / "encoders" / "encoders.json"
    file.write_text(file.read_text().replace("\n", "\n\n", 1) + " ")
    return {"dataset": folder / "dataset"}


REFUSED = {
    "no checkpoint": (lambda *_: {"step": 7}, r"no checkpoint \(step 7\); there are \[1, 2, 3, 4\]"),
    "no run": (lambda run, _, folder: {"run": folder / "none"}, r"no run \(config\.yaml is missing\)"),
    "no pointer": (lambda run, _, folder: {"run": None, "serving": folder}, "no night has released a checkpoint yet"),
    "other encoders": (other_encoders, "was encoded with"),
    "no base": (lambda *_: {"since": 2}, r"since=2: no package of that step with tables=fp32 rows=all"),
    "a later base": (lambda *_: {"since": 4}, "since=4: is not before step 4"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(what, trained, small_dataset, tmp_path):
    change, message = REFUSED[what]
    settings = {"run": trained} | change(trained, small_dataset, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        export(ExportConfig(out=tmp_path / "package", threads=1, **settings))
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.glob("package*")]


def test_a_checkpoint_that_is_trained_anew_once_the_pointer_was_read_is_not_exported(trained, tmp_path, monkeypatch):
    blessed = {"run": str(trained), "step": 4, "checksum": "of before", "night": "n", "verdict": "pass", "time": 1.0}
    (tmp_path / "serving.json").write_text(json.dumps(blessed | {"version": 1, "earlier": [], "withdrawn": []}))
    monkeypatch.setattr(config_module, "check_there", lambda *_: None)  # as it was then
    with pytest.raises(UserError, match="was trained anew after it was released"):
        export(ExportConfig(serving=tmp_path, out=tmp_path / "package", threads=1))
    assert [path.name for path in tmp_path.iterdir()] == ["serving.json"]


def test_the_dense_part_is_loaded_without_tables(trained, small_dataset):
    run, dataset = Run(trained), open_dataset(small_dataset)
    with checkpoint.reading(checkpoint.folder(run.checkpoints, 4)):
        dense = load_dense(run, 4, dataset)
    weights = ModelWeights(run, dataset, ["valid"], 64)
    weights.load(4)
    for name, tensor in weights.ranker.state_dict().items():
        found = dense.state_dict()[name]
        assert found.is_meta if is_table(name) else torch.equal(found, tensor), name


def test_the_card_has_the_recorded_figures_and_escapes_what_others_wrote(trained, package):
    card = (package / "model_card.md").read_text()
    record = json.loads((trained / "metrics" / "eval.jsonl").read_text())
    error = record["intervals"]["click"]["ne"]
    assert f"{record['metrics']['click']['ne']:.4f} ± {1.959964 * error:.4f}" in card
    assert "| test    | 300" in card
    assert "bought was learnt from rows alone where click" in card
    assert "No figure of the test split" in card
    hostile = escaped("<script>|a\n# b [x](http://y) `c` _d_ **e** \x1b[31m")
    assert not {"<", "\n", "\x1b"} & {*hostile}
    assert hostile.count("\\|") == hostile.count("|")
    assert escaped("a_b") == "a_b"
