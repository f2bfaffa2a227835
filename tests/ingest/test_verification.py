"""Verification of a dataset that is whole, and of one with every kind of damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_by_hand import CONTENT, SCHEMA, draw_rows, write_dataset, write_manifest, write_shard

from features.errors import UserError
from features.schema.schema import Schema
from pipeline.dataset import verify as verification
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.verify import verify
from pipeline.storage.files import copy_file
from pipeline.storage.store_path import on_store

SHARD = "valid/part-00001-of-00002.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", draw_rows(500))
    return tmp_path / "data"


def fault_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(verify(Dataset(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def replaced(folder: Path, edit: Callable[[pa.Table], pa.Table], keep_sums: bool = False) -> None:
    """Writes SHARD with other rows, and a manifest that knows of the new file (but not, on request, of its sums)."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    old = next(s for s in manifest.shards if s.path == SHARD)
    new = write_shard(folder, SHARD, "valid", edit(pq.read_table(folder / SHARD)))
    if keep_sums:
        sums = ("rows", "row_groups", "observed", "positives")
        new = new.model_copy(update={name: getattr(old, name) for name in sums})
    write_manifest(folder, [new if s is old else s for s in manifest.shards], manifest.dead_letter_files)


def set_column(name: str, values: Callable[[pa.ChunkedArray], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    return lambda rows: rows.set_column(rows.column_names.index(name), rows.schema.field(name), values(rows[name]))


def test_of_a_dataset_on_a_store_the_same_is_said_and_each_shard_is_copied_once(folder, memory, monkeypatch):
    for file in folder.rglob("*"):
        if file.is_file():
            copy_file(file, memory / file.relative_to(folder).as_posix())
    copied = []
    local_file = verification.local_file
    monkeypatch.setattr(verification, "local_file", lambda file: copied.append(file) or local_file(file))
    there = Dataset(memory)
    assert list(verify(there)) == list(verify(Dataset(folder)))
    files = [*there.manifest.shards, *there.manifest.dead_letter_files]
    assert sorted(file for file in copied if on_store(file)) == sorted(memory / file.path for file in files)
    content = bytearray((memory / SHARD).read_bytes())
    content[100] ^= 1
    (memory / SHARD).write_bytes(bytes(content))
    (folder / SHARD).write_bytes(bytes(content))
    with pytest.raises(UserError) as caught:
        list(verify(there))
    assert str(caught.value) == fault_of(folder).replace(str(folder), str(memory))


def test_a_whole_dataset_is_described_in_numbers(folder):
    said = "\n".join(verify(Dataset(folder)))
    clicks = int(np.array(draw_rows(500)["label.click"]).sum())
    for words in ("8 files", f"{1000 + clicks:,} observed labels", "500 rows", "dead letters: 5 rows", "row ids: 500"):
        assert words in said


@pytest.mark.parametrize("path", [SHARD, "dead_letters/click.parquet"])
def test_one_flipped_bit_in_any_file_is_found(folder, path):
    data = bytearray((folder / path).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / path).write_bytes(data)
    assert fault_of(folder).startswith(f"{folder / path}: checksum ")


def test_a_file_of_dead_letters_that_is_missing_is_named(folder):
    (folder / "dead_letters/click.parquet").unlink()
    assert fault_of(folder).startswith(f"{folder}/dead_letters/click.parquet is missing")


@pytest.mark.parametrize("name", ["train/part-00000-of-00003.parquet", "notes.txt", "dead_letters/.old"])
def test_a_file_that_the_manifest_does_not_name_is_found(folder, name):
    (folder / name).write_text("from another run")
    assert fault_of(folder).startswith(f"{folder / name}: the manifest does not name")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["rows"].update(train=1), "rows of train are 300, the manifest says 1"),
        (lambda m: m["observed"]["test"].update(spent=7), "observed labels of spent in test"),
        (lambda m: m["positives"]["valid"].update(click=0.5), "sum of labels of click in valid"),
        (lambda m: m["read"].update(impressions=516), "rows of impressions by destination are 515"),
        (lambda m: m["left_out"].update(more=1), "rows of impressions by destination are 516"),
        (lambda m: m["outcomes"]["click"].update(joined=71), "rows of click by destination are 82"),
        (lambda m: m["read"].update(view=1), "rows of view"),
        (lambda m: m["dead_letters"].update(odd=1), "dead letters by reason are 5, the manifest says 6"),
        (lambda m: m["shards"][0]["row_groups"].append(1), "row groups of train/part-00000"),
        (lambda m: m["letters"][0].update(bytes=3), "bytes are"),
        (
            lambda m: m.update(undecided={"click": {"window still open": 515, "other": 1}}),
            "more impressions are undecided",
        ),
        (lambda m: m.update(absent_days={"click": ["2026-03-01.."]}), "absent_days.click.0"),
        (lambda m: m["shards"][3].update(footer_sha256="0"), "footer"),
    ],
)
def test_a_manifest_whose_sums_do_not_hold_is_refused(folder, edit, words):
    change(folder, edit)
    assert words in fault_of(folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda rows: rows.slice(1), "row groups"),
        (set_column("label.click", lambda c: pa.nulls(len(c), c.type)), "observed labels of click are 0"),
        (set_column("label.spent", lambda c: pa.array(np.array(c) + 1)), "sum of labels of spent"),
        (lambda rows: rows.drop_columns("price"), "column price"),
        (lambda rows: rows.set_column(0, "price", rows["price"].cast(pa.float64())), "column price"),
    ],
)
def test_a_shard_that_is_not_what_its_sums_say_is_named(folder, edit, words):
    replaced(folder, edit, keep_sums=True)
    found = fault_of(folder)
    assert found.startswith(f"{folder / SHARD}: ")
    assert words in found


@pytest.mark.parametrize("at_once", [1 << 26, 60])
@pytest.mark.parametrize("twice", ["in one file", "in two files"])
def test_a_row_id_that_is_there_twice_is_found_with_its_files_however_many_fit_in_memory(
    folder, monkeypatch, at_once, twice
):
    monkeypatch.setattr(verification, "IDS_AT_ONCE", at_once)
    assert len(list(verify(Dataset(folder)))) == 7
    first = pq.read_table(folder / "train/part-00000-of-00002.parquet")["row_id"][0].as_py()
    replaced(
        folder,
        set_column(
            "row_id", lambda c: pa.array([c[1].as_py() if twice == "in one file" else first, *c.to_pylist()[1:]])
        ),
    )
    found = fault_of(folder)
    assert found.startswith(f"{folder / SHARD}: row_id ")
    assert (SHARD if twice == "in one file" else "train/part-00000-of-00002.parquet") in found.split("is also in")[1]


def test_a_row_id_that_is_negative_is_found(folder):
    replaced(folder, set_column("row_id", lambda c: pa.array([-1, *c.to_pylist()[1:]])))
    assert "negative" in fault_of(folder)


def test_a_split_without_rows_and_a_dataset_without_letters_can_be_verified(tmp_path):
    write_dataset(tmp_path / "data", draw_rows(100))
    manifest = Manifest.model_validate_json((tmp_path / "data/manifest.json").read_text())
    gone: list[Shard] = [s for s in manifest.shards if s.split == "test"]
    for s in gone:
        (tmp_path / "data" / s.path).unlink()
    for letters in manifest.dead_letter_files:
        (tmp_path / "data" / letters.path).unlink()
    kept = [s for s in manifest.shards if s.split != "test"]
    write_manifest(tmp_path / "data", kept, [], dead_letters={})
    assert len(list(verify(Dataset(tmp_path / "data")))) == 7
    assert SCHEMA.fingerprint == manifest.fingerprint


# Days read as one


@pytest.fixture
def days(tmp_path: Path) -> Path:
    """Three days of the same rows, with the same row ids."""
    for day in (1, 2, 3):
        write_dataset(tmp_path / f"2026-11-0{day}", draw_rows(60))
    return tmp_path


def test_days_are_verified_one_by_one_and_then_their_row_ids_together(days):
    said = list(verify(open_dataset(days, "2026-11-02..2026-11-03")))
    alone = list(verify(Dataset(days / "2026-11-02")))
    assert said[:-1] == [f"{day}  {line}" for day in ("2026-11-02", "2026-11-03") for line in alone]
    assert said[-1] == "row ids of 2 days: 120, all unique"


def test_a_fault_in_one_of_several_days_is_named_with_its_day(days):
    whole = open_dataset(days, "2026-11-01..2026-11-03")
    data = bytearray((days / "2026-11-02" / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (days / "2026-11-02" / SHARD).write_bytes(data)
    with pytest.raises(UserError, match=f"2026-11-02/{SHARD}: checksum "):
        list(verify(whole))


def test_a_row_id_of_a_column_that_two_days_have_is_found_with_both(days):
    schema = Schema.parse(CONTENT | {"source": {**CONTENT["source"], "row_id": "id"}}, "named.yaml")
    for day in days.iterdir():
        (day / "schema.yaml").write_text(json.dumps(schema.model_dump(mode="json", exclude_unset=True)))
        change(day, lambda m: m.update(fingerprint=schema.fingerprint))
        assert len(list(verify(Dataset(day)))) == 7
    with pytest.raises(UserError, match=r"2026-11-03/train/.*: row_id 100 is also in 2026-11-02/train/"):
        list(verify(open_dataset(days, "2026-11-02..2026-11-03")))
