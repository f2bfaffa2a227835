"""Datasets that were handed over: nothing in them leads outside of the folder, hangs, or fills the memory."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_by_hand import SCHEMA, draw_rows, write_dataset, write_manifest, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated
from parquet_forgery import lied

from features import parquet_limits
from features.errors import UserError
from pipeline.dataset.card.card import read_card
from pipeline.dataset.card.page import page
from pipeline.dataset.card.tables import tables
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.loader import Loader
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.shards import table_sizes
from pipeline.dataset.verify import verify

SHARD = "train/part-00000-of-00002.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "data"
    write_dataset(folder, draw_rows(300))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def refused(folder: Path, act: Callable[[Dataset], object] = lambda _: None) -> str:
    with pytest.raises(UserError) as caught:
        act(Dataset(folder))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def epoch(dataset: Dataset) -> int:
    loader = Loader(dataset, "train", 50)
    return sum(int((batch.row_id_B >= 0).sum()) for batch in loader.batches(loader.start()))


def test_a_dataset_that_is_whole_is_read_verified_and_trained_on_by_a_link_too(folder, tmp_path):
    (tmp_path / "by link").symlink_to(folder)
    for path in (folder, tmp_path / "by link"):
        dataset = Dataset(path)
        assert epoch(dataset) == dataset.manifest.rows["train"] == 180
        assert len(list(verify(dataset))) == 7


# Names


@pytest.mark.parametrize(
    "name", ["../outside.parquet", "train/../../outside.parquet", "/etc/hostname", "./train/a", "train//a", "", "a\x1b[31m",
             "a/" * 2000 + "a", "a" * 300]
)  # fmt: skip
@pytest.mark.parametrize("what", ["shards", "letters"])
def test_a_name_that_leaves_the_folder_is_refused(folder, name, what):
    (folder.parent / "outside.parquet").write_bytes((folder / SHARD).read_bytes())
    change(folder, lambda m: m[what][0].update(path=name))
    assert "manifest.json" in refused(folder)


@pytest.mark.parametrize("name", ["encoders/encoders.json", "statistics.json", "manifest.json"])
def test_a_shard_that_is_another_file_of_the_dataset_is_refused(folder, name):
    change(folder, lambda m: m["shards"][0].update(path=name))
    assert "which is another file of a dataset" in refused(folder)


def test_a_shard_that_is_listed_twice_is_not_trained_on_twice(folder):
    def twice(m: dict[str, Any]) -> None:
        shard = m["shards"][0]
        m["shards"].append(shard)
        m["rows"]["train"] += shard["rows"]

    change(folder, twice)
    assert f"{SHARD} is listed twice" in refused(folder)


def test_a_shard_that_is_there_under_two_names_is_found_by_its_row_ids(folder):
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    (folder / "train/copy.parquet").hardlink_to(folder / SHARD)
    again = manifest.shards[0].model_copy(update={"path": "train/copy.parquet"})
    write_manifest(folder, [*manifest.shards, again], manifest.dead_letter_files)
    assert "is also in" in refused(folder, lambda d: list(verify(d)))


@pytest.mark.parametrize("target", ["a file", "/dev/zero", "nowhere"])
@pytest.mark.parametrize("name", [SHARD, "schema.yaml", "manifest.json", "statistics.json", "encoders/encoders.json",
                                  "encoders/vocabularies/city.parquet", "train", "encoders"])  # fmt: skip
def test_a_link_in_place_of_a_file_or_folder_is_not_followed(folder, target, name):
    path = folder / name
    path.rename(folder.parent / "moved")
    path.symlink_to(folder.parent / "moved" if target == "a file" else target)
    assert "link" in refused(folder, lambda d: list(verify(d)))


@pytest.mark.parametrize("name", [SHARD, "manifest.json", "statistics.json", "encoders/encoders.json",
                                  "encoders/vocabularies/city.parquet", "dead_letters/click.parquet"])  # fmt: skip
@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_does_not_hang(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "a pipe" in refused(folder, lambda d: list(verify(d)))


def test_a_link_beside_the_files_is_found_by_verify(folder):
    (folder / "train/more.parquet").symlink_to("/etc/hostname")
    assert "does not name this file" in refused(folder, lambda d: list(verify(d)))


def test_a_day_that_is_a_link_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "days" / "2026-11-01")
    assert open_dataset(tmp_path / "days", "2026-11-01").manifest.rows["train"] == 180
    (tmp_path / "days" / "2026-11-02").symlink_to(whole)
    with pytest.raises(UserError, match="2026-11-02 is a link"):
        open_dataset(tmp_path / "days", "2026-11-01..2026-11-02")


# Numbers


@pytest.mark.parametrize("rows", [10**15, -5, 2**63])
def test_impossible_numbers_of_rows_are_refused_before_anything_is_allocated(folder, rows):
    def claim(m: dict[str, Any]) -> None:
        difference = rows - m["shards"][0]["rows"]
        m["shards"][0].update(rows=rows, row_groups=[rows])
        m["rows"]["train"] += difference
        m["read"]["impressions"] += difference

    change(folder, claim)
    assert "manifest.json" in refused(folder, lambda d: Loader(d, "train", 50))


@pytest.mark.parametrize("skip", [0, 0.9])
def test_row_groups_that_are_not_those_of_the_file_are_refused_when_it_is_read(folder, skip):
    def claim(m: dict[str, Any]) -> None:
        m["shards"][0].update(rows=100_000, row_groups=[100_000])
        m["rows"]["train"] += 100_000 - 90
        m["read"]["impressions"] += 100_000 - 90

    change(folder, claim)
    loader = Loader(Dataset(folder), "train", 50, max_corrupt=skip)
    with pytest.raises(UserError, match="row groups have other numbers of rows"):
        next(loader.batches(loader.start()))
    assert "row groups have other numbers of rows" in refused(folder, lambda d: list(verify(d)))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["shards"][0]["observed"].update(click=True),
        lambda m: m["shards"][0].update(rows=str(m["shards"][0]["rows"])),
        lambda m: m["shards"][0]["observed"].pop("click"),
        lambda m: [s["observed"].pop("click") for s in m["shards"]] + [o.pop("click") for o in m["observed"].values()],
        lambda m: m["observed"].pop("train"),
        lambda m: m["positives"]["train"].update(click=float("nan")),
        lambda m: m["shards"][0]["positives"].update(click=float("inf")),
        lambda m: m["dead_letters"].update({"x": -1, "y": 1}),
        lambda m: m.update(shards=m["shards"] * 2),
        lambda m: m["shards"][0].update(sha256="\x1b[31m"),
        lambda m: m.update(fitted=[{"path": "../secret", "bytes": 1, "sha256": "0"}]),
        lambda m: m.update(fitted=[{"path": "train/a.parquet", "bytes": 1, "sha256": "0"}]),
        lambda m: m.update(version="2\x1b[31m"),
    ],
)
def test_entries_of_other_types_or_sums_are_refused_when_it_is_opened(folder, edit):
    change(folder, edit)
    refused(folder)


def test_encoders_and_statistics_that_the_manifest_lists_are_compared_with_it(folder):
    from pipeline.dataset.manifest import fitted_files

    fitted = [file.model_dump() for file in fitted_files(folder, SCHEMA)]
    assert [file["path"] for file in fitted] == [
        "encoders/vocabularies/city.parquet", "encoders/vocabularies/tags.parquet", "encoders/encoders.json",
        "statistics.json",
    ]  # fmt: skip
    change(folder, lambda m: m.update(fitted=fitted))
    assert "checksums of 12 files" in list(verify(Dataset(folder)))[2]
    content = (folder / "statistics.json").read_text()
    (folder / "statistics.json").write_text(content.replace("0.1", "0.2", 1))
    assert "statistics.json: checksum" in refused(folder, lambda d: list(verify(d)))


# Content of shards


def replace_shard(folder: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    new = write_shard(folder, SHARD, "train", edit(pq.read_table(folder / SHARD)))
    write_manifest(folder, [new, *manifest.shards[1:]], manifest.dead_letter_files)


def set_ids(table: pa.Table, name: str, value: int) -> pa.Table:
    column = table[name]
    if pa.types.is_list(column.type):
        values = [[value] if i == 7 else row for i, row in enumerate(column.to_pylist())]
    else:
        values = [value if i == 7 else row for i, row in enumerate(column.to_pylist())]
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, column.type))


@pytest.mark.parametrize("name", ["city", "user", "age", "tags"])
@pytest.mark.parametrize("place", ["first", "last", "past the last", "far", "negative"])
def test_verify_and_the_loader_find_an_id_outside_of_its_table(folder, name, place):
    size = Dataset(folder).encoders.num_embeddings(name)
    ids = {"first": 0, "last": size - 1, "past the last": size, "far": 2**31 - 1, "negative": -1}
    replace_shard(folder, lambda table: set_ids(table, name, ids[place]))

    def load(dataset):
        loader = Loader(dataset, "train", 50, table_sizes=table_sizes(dataset))
        return list(loader.batches(loader.start()))

    if ids[place] in (0, size - 1):
        assert len(list(verify(Dataset(folder)))) == 7
        assert load(Dataset(folder))
        return
    for read in (lambda d: list(verify(d)), load):
        said = refused(folder, read)
        assert f"{SHARD}: id {ids[place]:,} of {name} is not in its table, which has 0 .. {size - 1:,}" in said


def test_a_shard_that_unpacks_to_too_much_is_refused_before_it_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(parquet_limits, "ALWAYS_ALLOWED_BYTES", 1000)
    monkeypatch.setattr(parquet_limits, "MAX_RATIO", 1)
    loader = Loader(Dataset(folder), "train", 50)
    with pytest.raises(UserError, match="that unpack to"):
        next(loader.batches(loader.start()))


def test_a_list_of_more_values_than_the_footer_says_is_refused_before_it_is_decoded(folder):
    def one_long_list(table: pa.Table) -> pa.Table:
        lists = [[1] * 300_001, *[[]] * (table.num_rows - 1)]
        place = table.schema.get_field_index("tags")
        return table.set_column(place, "tags", pa.array(lists, table.schema.field("tags").type))

    replace_shard(folder, one_long_list)
    path = folder / SHARD
    true = 300_001 + pq.read_metadata(path).row_group(0).num_rows - 1
    footer = lied(path, true, 64)
    replaced = write_shard_entry(folder)
    assert footer.row_group(0).num_rows == replaced["row_groups"][0]
    loader = Loader(Dataset(folder), "train", 50)
    with pytest.raises(UserError, match=r"pages of column tags.* have 300,\d+ values"):
        next(loader.batches(loader.start()))


def write_shard_entry(folder: Path) -> dict[str, Any]:
    """Makes the manifest's first entry one of the file as it is now."""
    from pipeline.dataset.manifest import footer_sha256
    from pipeline.storage.files import sha256

    path = folder / SHARD
    found = {"bytes": path.stat().st_size, "sha256": sha256(path), "footer_sha256": footer_sha256(path)}
    change(folder, lambda m: m["shards"][0].update(found))
    return json.loads((folder / "manifest.json").read_text())["shards"][0]


# Any change


@settings(max_examples=100, deadline=2000)
@given(data=st.data())
def test_a_changed_manifest_is_read_or_refused_in_one_line(whole, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    content = data.draw(mutated(json.loads((whole / "manifest.json").read_text())))
    (folder / "manifest.json").write_bytes(content)
    for name in ("schema.yaml", "statistics.json", "train", "valid", "test", "dead_letters", "encoders"):
        (folder / name).symlink_to(whole / name)
    try:
        read_manifest(folder)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 2000


@settings(max_examples=40, deadline=2000)
@given(data=st.data())
def test_a_dataset_with_a_changed_manifest_is_read_and_shown_or_refused(whole, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    shutil.copytree(whole, folder, copy_function=os.link)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(data.draw(mutated(json.loads((whole / "manifest.json").read_text()))))
    card = read_card(whole, SCHEMA)
    try:
        dataset = Dataset(folder)
        tables(dataset.manifest, card)
        epoch(dataset)
        list(verify(dataset))
    except UserError as error:
        said = str(error)
        assert "\n" not in said


@settings(max_examples=100, deadline=2000)
@given(data=st.data())
def test_changed_statistics_are_shown_or_refused(whole, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    content = json.loads((whole / "statistics.json").read_text())
    (folder / "statistics.json").write_bytes(data.draw(mutated(content)))
    try:
        card = read_card(folder, SCHEMA)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        return
    manifest = Manifest.model_validate_json((whole / "manifest.json").read_text())
    tables(manifest, card)
    assert page("data", manifest, card).encode()


@settings(max_examples=40, deadline=4000)
@given(data=st.data())
def test_drift_from_changed_statistics_is_measured_or_refused(whole, data, tmp_path_factory):
    from dataset_by_hand import fit_encoders

    from pipeline.dataset.card.card import card

    folder = tmp_path_factory.mktemp("fuzz")
    content = json.loads((whole / "statistics.json").read_text())
    (folder / "statistics.json").write_bytes(data.draw(mutated(content)))
    encoders, statistics = fit_encoders(draw_rows(100))
    try:
        found = card(SCHEMA, encoders, statistics, read_card(folder, SCHEMA))
    except UserError:
        return
    assert np.isfinite([line["psi"] for line in found["drift"]]).all()
