"""Encoders that were handed over: links, vocabularies of other types or sizes, numbers that are none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_by_hand import SCHEMA, draw_rows, fit_encoders
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated

from features.errors import UserError
from features.fit import fitted_files
from features.fit.encoders import Encoders
from features.fit.fitted_files import encoder_files

CITY = "vocabularies/city.parquet"
ROWS = draw_rows(200)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "encoders"
    fit_encoders(ROWS)[0].save(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "encoders"))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Encoders.load(folder, SCHEMA)
    assert str(caught.value).isprintable()
    return str(caught.value)


def write_city(folder: Path, values: Any, **more: Any) -> None:
    table = pa.table({"value": values, "id": pa.array(np.arange(len(values)) + 2), **more})
    pq.write_table(table, folder / CITY)


def cities(folder: Path) -> list[str]:
    return pq.read_table(folder / CITY)["value"].to_pylist()


def test_encoders_that_are_whole_are_read_by_a_link_to_their_folder_too(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        assert Encoders.load(path, SCHEMA).encode(ROWS) == fit_encoders(ROWS)[0].encode(ROWS)
    assert encoder_files(SCHEMA) == [CITY, "vocabularies/tags.parquet", "encoders.json"]


def test_values_in_many_row_groups_or_small_strings_are_the_same_vocabulary(folder, monkeypatch):
    before = Encoders.load(folder, SCHEMA).vocabularies["city"]
    monkeypatch.setattr(fitted_files, "MAX_BATCH", 3)
    table = pa.table({"value": pa.array(before, pa.string()), "id": pa.array(np.arange(len(before)) + 2)})
    for options in ({"row_group_size": 4}, {"use_dictionary": False}, {"data_page_size": 16}):
        pq.write_table(table, folder / CITY, **options)
        assert Encoders.load(folder, SCHEMA).vocabularies["city"] == before


@pytest.mark.parametrize("name", ["encoders.json", CITY, "vocabularies"])
@pytest.mark.parametrize("target", ["the file", "/dev/zero", "nowhere"])
def test_a_link_is_not_followed(folder, name, target):
    (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to(folder.parent / "moved" if target == "the file" else target)
    assert "link" in refused(folder)


def test_a_vocabulary_that_the_schema_does_not_need_is_not_read(folder):
    (folder / "vocabularies/zz.parquet").symlink_to("/dev/zero")
    assert Encoders.load(folder, SCHEMA).vocabularies.keys() == {"city", "tags"}


@pytest.mark.parametrize(
    "kind",
    [
        pa.struct([("a", pa.string())]),
        pa.list_(pa.string()),
        pa.int64(),
        pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_a_vocabulary_of_another_type_is_refused(folder, kind):
    texts = cities(folder)
    values = {
        pa.struct([("a", pa.string())]): [{"a": text} for text in texts],
        pa.list_(pa.string()): [[text] for text in texts],
        pa.int64(): list(range(len(texts))),
        pa.binary(): [text.encode() for text in texts],
    }
    write_city(folder, pa.array(values.get(kind, texts), kind))
    assert "its columns are not those of a vocabulary" in refused(folder)


def test_a_vocabulary_with_a_value_twice_missing_or_with_more_columns_is_refused(folder):
    texts = cities(folder)
    write_city(folder, pa.array([*texts[:-1], None]))
    assert "missing" in refused(folder)
    write_city(folder, pa.array(texts), more=pa.array(texts))
    assert "its columns are not those" in refused(folder)


def test_a_vocabulary_of_few_bytes_that_unpack_to_many_is_refused_before_they_are(folder, monkeypatch):
    monkeypatch.setattr(fitted_files, "ALWAYS_ALLOWED_BYTES", 1 << 23)
    count = 20_000
    content = json.loads((folder / "encoders.json").read_text())
    content["num_embeddings"]["city"] = count + 2
    (folder / "encoders.json").write_text(json.dumps(content))
    long = "x" * 100_000  # one value of a dictionary: 2 GB when unpacked
    write_city(folder, pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([long])).cast(
        pa.dictionary(pa.int32(), pa.string())))  # fmt: skip
    table = pq.read_table(folder / CITY)
    plain = pa.schema([("value", pa.string()), ("id", pa.int64())])
    writer_schema = pa.schema([("value", pa.dictionary(pa.int32(), pa.string())), ("id", pa.int64())])
    with pq.ParquetWriter(
        folder / CITY, writer_schema, store_schema=False, dictionary_pagesize_limit=1 << 22
    ) as writer:
        writer.write_table(table.cast(writer_schema))
    assert pq.read_schema(folder / CITY) == plain
    assert (folder / CITY).stat().st_size < 1_000_000
    usual = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(usual)  # from zero: the peak of `usual` is that of the whole process
    pa.set_memory_pool(counted)
    try:
        assert "a value is there more than once" in refused(folder)
    finally:
        pa.set_memory_pool(usual)
    assert 1 << 20 < counted.max_memory() < 1 << 28


@pytest.mark.parametrize("count", [10**15, 0, 1, -1, 3.0, True, 10**30])
@pytest.mark.parametrize("table", ["city", "user", "age"])
def test_another_number_of_embeddings_is_refused_before_anything_is_allocated(folder, table, count):
    content = json.loads((folder / "encoders.json").read_text())
    content["num_embeddings"][table] = count
    (folder / "encoders.json").write_text(json.dumps(content))
    refused(folder)


def _set(part: str, name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part].update({name: value})


@pytest.mark.parametrize(
    "edit",
    [
        _set("edges", "age", []), _set("edges", "age", [1.0]), _set("edges", "age", [2.0, 1.0]),
        _set("edges", "age", [1.0, 1.0]), _set("edges", "age", [1.0, float("inf")]),
        _set("edges", "age", [float("nan"), 1.0]), _set("edges", "age", list(range(100_000))),
        _set("edges", "age", ["1", "2"]), _set("edges", "other", [1.0, 2.0]), _set("moments", "price", {}),
        _set("moments", "other", {"count": 1, "missing": 0, "mean": 0.0, "squares": 0.0}),
        lambda content: content["moments"].pop("price"), lambda content: content["edges"].pop("age"),
        lambda content: content["moments"]["price"].update(mean=float("nan")),
        lambda content: content["moments"]["price"].update(squares=-1.0),
        lambda content: content["moments"]["price"].update(count=-1),
        lambda content: content["num_embeddings"].pop("city"),
        lambda content: content["num_embeddings"].update({"../../city": 5}),
    ],
)  # fmt: skip
def test_numbers_and_names_that_do_not_fit_are_refused(folder, edit):
    content = json.loads((folder / "encoders.json").read_text())
    edit(content)
    (folder / "encoders.json").write_text(json.dumps(content))
    refused(folder)


@settings(max_examples=100, deadline=2000)
@given(data=st.data())
def test_changed_encoders_are_read_and_encode_or_are_refused(whole, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "encoders"
    shutil.copytree(whole, folder)
    content = json.loads((whole / "encoders.json").read_text())
    (folder / "encoders.json").write_bytes(data.draw(mutated(content)))
    try:
        encoders = Encoders.load(folder, SCHEMA)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        return
    assert encoders.encode(ROWS).num_rows == 200


@settings(max_examples=100, deadline=2000)
@given(data=st.data())
def test_a_damaged_vocabulary_is_read_or_refused(whole, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "encoders"
    shutil.copytree(whole, folder)
    content = bytearray((folder / CITY).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / CITY).write_bytes(content[: data.draw(st.sampled_from([len(content), 100, 3, 0]))])
    try:
        Encoders.load(folder, SCHEMA)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
