"""A package from its files to predictions, against plain loops; damaged and mistaken packages are refused."""

import copy
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import real_package
from real_package import expected
from torch import Tensor

from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from pipeline.serving import scorer as module
from pipeline.serving.manifest import Base, Lookup, Manifest, StoredTable, read_manifest, write_manifest
from pipeline.serving.scorer import Scorer

ROWS: list[dict[str, Any]] = [
    {"city": "rome", "recent": ["c", "a", "a", "b"], "age": 55},
    {"city": "oslo", "recent": [], "age": 20.5},
    {"city": None, "recent": ["b", "new"]},
    {"city": "paris", "recent": None, "age": None},
    {"city": "paris", "recent": ["a"], "age": 40},
]


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "copy"))


def close(found: dict[str, np.ndarray], rows: list[dict[str, Any]], seed: int = 1) -> None:
    wanted = [expected(row, seed) for row in rows]
    for place, task in enumerate(("click", "spent")):
        assert found[task].dtype == np.float32
        np.testing.assert_allclose(found[task], [each[place] for each in wanted], rtol=1e-5, atol=1e-6)


def test_predictions_are_those_of_plain_loops_whatever_rows_are_given_as(package: Path) -> None:
    scorer = Scorer.load(package)
    close(scorer.score(ROWS), ROWS)
    user = {"age": 33, "recent": ["b"]}
    close(scorer.score([{"city": "rome"}, {"city": "x"}], user), [{"city": c, **user} for c in ("rome", "x")])
    columns = {name: [row.get(name) for row in ROWS] for name in ("city", "recent", "age")}
    table = pa.table(columns | {"id": pa.array(range(5), pa.int64())})
    close(scorer.score(table, extra=True), ROWS)
    batches = list(scorer.batches(table.to_batches(max_chunksize=2), keep=["id", "city"]))
    assert pa.Table.from_batches(batches).column_names == ["id", "city", "click", "spent"]
    assert pa.Table.from_batches(batches)["id"].to_pylist() == [0, 1, 2, 3, 4]
    close({t: pa.Table.from_batches(batches)[t].to_numpy() for t in ("click", "spent")}, ROWS)
    assert {task: len(value_B) for task, value_B in scorer.score([]).items()} == {"click": 0, "spent": 0}
    with pytest.raises(UserError, match="keep: the batch has no column nothing"):
        next(scorer.batches(table.to_batches(), keep=["nothing"]))


def test_chunks_and_threads_change_no_prediction(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer.load(package, warm_up=0)
    rows = ROWS * 20
    whole = scorer.score(rows)
    found: list[dict[str, np.ndarray]] = []
    threads = [threading.Thread(target=lambda: found.append(scorer.score(rows))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls: list[int] = []

    def counted(embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:
        calls.append(len(dense_BD))
        return scorer.program(embedding_BE, dense_BD)

    counting, user = replace(scorer, program=counted), {"recent": ["a", "b", "c"]}
    same = [{"city": "rome"}] * 40
    found_of_user = scorer.score(same, user)
    for name, most in (("CHUNK", 7), ("ITEMS", 2), ("NUMBERS", 40)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, most)
            calls.clear()
            found.append(counting.score(rows))
            assert sum(calls) == len(rows)
            assert max(calls) <= {"CHUNK": 7, "ITEMS": 5, "NUMBERS": 5}[name]
            calls.clear()
            for task, value_B in counting.score(same, user).items():
                np.testing.assert_allclose(value_B, found_of_user[task], rtol=0, atol=1e-6)
            assert len(calls) == 1 or name != "ITEMS"  # rows that share their list are not divided for it
    assert len(found) == 9
    for each in found:
        for task, value_B in each.items():
            np.testing.assert_allclose(value_B, whole[task], rtol=0, atol=1e-6)


def test_every_file_is_compared_with_its_checksum(package: Path, copied: Path) -> None:
    names = sorted(str(path.relative_to(package)) for path in package.rglob("*") if path.is_file())
    assert len(names) == 7
    for name in names:
        content = (package / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (content[:-1], b"", content + b"\n\n", flipped):
            if name == "manifest.json" and damaged == content + b"\n\n":
                continue  # the same JSON
            (copied / name).write_bytes(damaged)
            with pytest.raises(UserError) as refused:
                Scorer.load(copied)
            assert name.rpartition("/")[2] in str(refused.value)
        (copied / name).unlink()
        with pytest.raises(UserError):
            Scorer.load(copied)
        (copied / name).symlink_to(package / name)
        with pytest.raises(UserError, match="link"):
            Scorer.load(copied)
        (copied / name).unlink()
        (copied / name).write_bytes(content)
    Scorer.load(copied)


def resealed(folder: Path, change: Callable[[Manifest], dict[str, Any]]) -> None:
    """The package with another manifest, whose checksums are right."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update=change(manifest)), list(manifest.files))


def newer(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text()) | {"version": 2, "what_is_new": 1}
    (folder / "manifest.json").write_text(json.dumps(content))


def moved_on(folder: Path) -> None:
    text = (folder / "schema.yaml").read_text().replace("age: {}", "age: {transform: log1p}")
    (folder / "schema.yaml").write_text(text)
    resealed(folder, lambda _: {})


def other_encoders(folder: Path) -> None:
    content = json.loads((folder / "encoders" / "encoders.json").read_text())
    content["num_embeddings"]["city"] += 1
    (folder / "encoders" / "encoders.json").write_text(json.dumps(content))
    resealed(folder, lambda _: {})


def more_values(folder: Path) -> None:
    schema = Schema.load(folder / "schema.yaml")
    found = Encoders.load(folder / "encoders", schema)
    cities = pa.array([*real_package.CITIES, "oslo"], pa.large_string())
    shutil.rmtree(folder / "encoders")
    replace(found, vocabularies={**found.vocabularies, "city": cities}, counts={}).save(folder / "encoders")
    resealed(folder, lambda _: {})


def not_finite(folder: Path) -> None:
    row_RX = real_package.numbers(1)[0].copy()
    row_RX[0, 0] = np.nan  # of a missing city
    (folder / "tables" / "dim-00004.bin").write_bytes(row_RX.tobytes())
    resealed(folder, lambda _: {})


def unlisted(folder: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, manifest, [name for name in manifest.files if "city" not in name])


def lookup(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: resealed(
        folder, lambda m: {"lookups": [m.lookups[0].model_copy(update=changes), m.lookups[1]]}
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (newer, "package of version 2, this release reads 1"),
        (moved_on, "the schema changed after the export"),
        (other_encoders, "city"),
        (not_finite, "the prediction of click for an empty row is not finite"),
        (unlisted, "no checksum of encoders/vocabularies/city.parquet"),
        (lambda f: resealed(f, lambda _: {"tasks": {"click": "regression", "spent": "regression"}}), "the manifest's task"),
        (lambda f: resealed(f, lambda _: {"dense_width": 2}), "dense_width 2"),
        (lookup(feature="town"), "look-up of town"),
        (lookup(table="town"), "town"),
        (more_values, "table city has 4 rows, the encoders 5 ids of city"),
        (lookup(pooling="mean"), "look-up of city is mean"),
    ],
)  # fmt: skip
def test_packages_that_do_not_fit_together_are_refused(
    copied: Path, change: Callable[[Path], None], error: str
) -> None:
    change(copied)
    with pytest.raises(UserError, match=error):
        Scorer.load(copied)


def test_lookups_in_another_order_than_the_schema_has_features_are_refused(package: Path) -> None:
    content = copy.deepcopy(real_package.SCHEMA) | {
        "categorical": {"town": {"hash": 3}, "city": {"hash": 3}},
        "bag": {},
    }
    schema, table = Schema.parse(content, "s"), StoredTable(file="t", first=0, rows=4, dim=4, num_embeddings=4)
    for names, refused in ((["town", "city"], False), (["city", "town"], True), (["town"], True)):
        lookups = [Lookup(feature=name, table=name, pooling="single") for name in names]
        manifest = read_manifest(package).model_copy(
            update={"lookups": lookups, "tables": {"town": table, "city": table}}
        )
        with pytest.raises(UserError, match="the schema's order is town, city") if refused else nullcontext():
            module.check_lookups(package, manifest, schema, Encoders(schema, {}, {}, {}))


def test_a_package_that_is_replaced_while_it_is_loaded_is_refused(
    package: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = module.load_program

    def replaced(folder: Path, *rest: Any) -> Any:
        resealed(folder, lambda m: {"model": m.model.model_copy(update={"step": 7})})
        return load(folder, *rest)

    monkeypatch.setattr(module, "load_program", replaced)
    with pytest.raises(UserError, match="was replaced by another package while it was loaded"):
        Scorer.load(copied)


def test_scoring_and_serving_import_neither_training_nor_ingest(package: Path) -> None:
    forbidden = {
        "torchrec", "fbgemm_gpu", "apache_beam", "hydra", "datasketches", "scipy", "sklearn", "matplotlib", "sympy",
        "torch._dynamo", "torch._inductor", "s3fs", "botocore",
        "pipeline.run", "pipeline.dataset", "pipeline.evaluation", "models.ranker",
    }  # fmt: skip
    script = (
        "import sys; from pipeline.serving.scorer import Scorer\n"
        f"scorer = Scorer.load({str(package)!r}); scorer.score([{{'city': 'rome', 'recent': ['a'], 'age': 3}}])\n"
        f"assert not {{'fastapi', 'starlette', 'uvicorn'}} & {{*sys.modules}}\n"
        "import pipeline.serving.http.server\n"
        f"print(sorted({forbidden!r} & {{*sys.modules}}))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


def delta(folder: Path, base: Manifest, *rows: int) -> None:
    """Makes a package a delta of another: with all of its table file, or some rows."""
    manifest = read_manifest(folder)
    names = [*manifest.files]
    if rows:
        table = folder / "tables" / "dim-00004.bin"
        table.write_bytes(np.frombuffer(table.read_bytes(), np.float32).reshape(9, 4)[[*rows]].tobytes())
        names.append("tables/dim-00004.bin.rows")
        (folder / names[-1]).write_bytes(np.array(rows, np.int64).tobytes())
    reference = Base(step=base.model.step, checkpoint=base.model.checkpoint, package=base.checksum)
    write_manifest(folder, manifest.model_copy(update={"base": reference, "result": manifest.files}), names)


@pytest.mark.parametrize("rows", [(), range(9), (2, 5)])
def test_a_delta_on_its_base_is_the_whole_package(package: Path, tmp_path: Path, rows: tuple[int, ...]) -> None:
    manifest, base = real_package.write(tmp_path / "whole", seed=2), read_manifest(package)
    changed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "delta"))
    delta(changed, base, *rows)
    scorer = Scorer.load(changed, base=package)
    assert scorer.manifest == manifest
    if len(rows) == 2:  # of rome and of item a, which these are new; the program is of the second package
        wanted, old = (real_package.numbers(seed)[0].copy() for seed in (2, 1))
        wanted[[r for r in range(9) if r not in rows]] = old[[r for r in range(9) if r not in rows]]
        row_RX = scorer.tables.files[0].byte_RW.numpy().view(np.float32)
        np.testing.assert_array_equal(row_RX, wanted)
    else:
        close(scorer.score(ROWS), ROWS, seed=2)
    close(Scorer.load(package).score(ROWS), ROWS)  # as it was
    with pytest.raises(UserError, match="give that one's folder as well, base=FOLDER"):
        Scorer.load(changed)
    with pytest.raises(UserError, match="is a whole package, which has no base"):
        Scorer.load(package, base=package)
    with pytest.raises(UserError, match="Apply it to the one that it was exported against"):
        Scorer.load(changed, base=tmp_path / "whole")


def test_a_whole_file_in_a_chain_of_deltas_takes_the_place_of_rows_that_changed_before(
    package: Path, tmp_path: Path
) -> None:
    second, third = (real_package.write(tmp_path / f"{seed}", seed) for seed in (2, 3))
    delta(tmp_path / "2", read_manifest(package), *range(9))
    delta(tmp_path / "3", second)
    scorer = Scorer.load(tmp_path / "3", base=[package, tmp_path / "2"])
    assert scorer.manifest == third
    close(scorer.score(ROWS), ROWS, seed=3)
