"""Shards with kept columns: texts are read as codes, within limits, and other columns than the schema's are refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_from_rows import write_dataset

from features import parquet_limits
from features.batch import Rows
from features.errors import UserError
from features.fit.encoders import arrow_schema
from features.parquet_limits import check_footer
from features.parquet_pages import check_pages, is_part_of
from features.schema.schema import Schema
from pipeline.dataset import shards
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.dataset.manifest import footer_sha256
from pipeline.dataset.shards import open_shard, with_plain_texts
from pipeline.dataset.verify import verify
from pipeline.evaluation import predictions
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.metrics.slices import dimensions

CONTENT: dict[str, Any] = {
    "source": {"files": "log.csv", "types": {"a.b": "int"}},
    "categorical": {"raw": {"hash": 10}},
    "tasks": {"click": {"kind": "binary", "label": "click = '1'"}},
    "split": {"by": "row_index", "modulo": 1, "train": [0]},
    "keep": ["word", "a.b", "raw"],
}
SCHEMA = Schema.parse(CONTENT, where="mine.yaml")
TEXTS = ["raw.word", "raw.raw"]
CODES = pa.dictionary(pa.int32(), pa.string())


def rows(count: int = 50) -> pa.Table:
    content = [
        {
            "raw": number % 11,
            "label.click": float(number % 2),
            "weight": 1.0,
            "event_time": number,
            "row_id": number,
            "raw.word": [None, "", "ä ü", "w" * number][number % 4],
            "raw.a.b": None if number % 3 == 0 else number,
            "raw.raw": f"id {number}",
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(content, arrow_schema(SCHEMA))


def dataset(folder: Path, table: pa.Table | None = None) -> Dataset:
    return write_dataset(folder / "data", SCHEMA, {"train": rows() if table is None else table}, 16, 1000)


def test_texts_are_codes_into_their_values_and_come_back_as_they_were(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    (shard,) = data.shards("train")
    with open_shard(data, shard) as file:
        assert [file.schema_arrow.field(name).type for name in TEXTS] == [CODES, CODES]
        assert file.schema_arrow.field("raw.a.b").type == pa.int64()
        found = [file.read_row_group(number) for number in range(file.num_row_groups)]
    assert [table.num_rows for table in found] == [16, 16, 16, 2]
    assert pa.concat_tables([with_plain_texts(table, tmp_path) for table in found]).equals(rows())
    with open_shard(data, shard, ["raw.word", "row_id"]) as file:
        some = file.read_row_group(1, ["raw.word", "row_id"])
    assert some["raw.word"].to_pylist() == rows()["raw.word"].to_pylist()[16:32]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("word LIKE 'w%'", lambda row: (row["raw.word"] or "").startswith("w")),
        ("LENGTH(word) > 2 AND word <> 'ä ü'", lambda row: (row["raw.word"] or "").startswith("ww")),
        ("word = 'ä ü' OR `a.b` > 40", lambda row: row["raw.word"] == "ä ü" or (row["raw.a.b"] or 0) > 40),
    ],
)
def test_conditions_of_slices_see_kept_texts_as_texts(
    tmp_path: Path, condition: str, expected: Callable[[dict[str, Any]], bool]
) -> None:
    data = dataset(tmp_path)
    settings = MeasureConfig.model_validate({"slices": [{"sql": condition}], "by_time": [], "cold_start": False})
    (dimension,) = dimensions(settings, data)
    with open_shard(data, data.shards("train")[0], dimension.columns) as file:
        found = dimension.values(file.read(dimension.columns))
    assert found.to_pylist() == [expected(row) for row in rows().to_pylist()]
    assert 0 < sum(found.to_pylist()) < 50


def test_batches_are_those_of_a_dataset_without_kept_columns(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    loader = Loader(data, "train", 10)
    assert not set(loader.read_columns) & set(SCHEMA.kept)
    (found,) = {batch.row_id_B.numel() for batch in loader.batches(loader.start())}
    assert found == 10
    decoded = Rows.decode(rows(), SCHEMA)
    assert decoded.id_NF.tolist() == [[number % 11] for number in range(50)]


def test_a_text_that_many_rows_have_is_in_memory_once_and_refused_where_it_would_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, long = 2000, "x" * 100_000  # 200 MB as plain text
    table = rows(count)
    place = table.column_names.index("raw.word")
    words = pa.chunked_array([pa.array([long] * 100, pa.large_string())] * 20)
    table = table.set_column(place, table.schema.field("raw.word"), words)
    monkeypatch.setattr(shards, "ALWAYS_ALLOWED_BYTES", 10_000_000)
    data = write_dataset(tmp_path / "data", SCHEMA, {"train": table}, count, count)
    (shard,) = data.shards("train")
    assert shard.bytes < 300_000
    del table, words
    before = pa.total_allocated_bytes()
    with open_shard(data, shard) as file:
        read = file.read_row_group(0)
    assert pa.total_allocated_bytes() - before < 20_000_000
    with pytest.raises(
        UserError, match=r"a\.parquet: column raw\.word has 200,000,000 bytes of text in a row group, more"
    ):
        with_plain_texts(read, Path("a.parquet"))


def test_a_damaged_page_of_a_kept_text_is_found_before_it_is_unpacked_where_it_is_read(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    (shard,) = data.shards("train")
    file = data.path / shard.path
    group = pq.read_metadata(file).row_group(1)
    (chunk,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "raw.word")
    content = bytearray(file.read_bytes())
    content[chunk.dictionary_page_offset : chunk.dictionary_page_offset + 4] = b"\xff" * 4
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"column raw\.word has a page without a valid header"):
        open_shard(data, shard, ["row_id", "raw.word"])
    with open_shard(data, shard, ["row_id"]) as opened:
        assert opened.read(["row_id"]).num_rows == 50


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("raw.word", pa.array(range(50))),
        ("raw.a.b", pa.array(["x"] * 50, pa.large_string())),
        ("raw.a.b", pa.array([1.5] * 50)),
        ("raw.raw", pa.array([["x"]] * 50)),
        ("raw.word", None),
    ],
)
def test_columns_of_another_type_or_without_one_are_refused(tmp_path: Path, name: str, values: pa.Array | None) -> None:
    data = dataset(tmp_path)
    (shard,) = data.shards("train")
    place = rows().column_names.index(name)
    table = rows().drop_columns([name]) if values is None else rows().set_column(place, name, values)
    pq.write_table(table, data.path / shard.path, row_group_size=16)
    again = shard.model_copy(
        update={
            "bytes": (data.path / shard.path).stat().st_size,
            "footer_sha256": footer_sha256(data.path / shard.path),
        }
    )
    with pytest.raises(pa.ArrowInvalid, match="its columns are not the schema's"):
        open_shard(data, again)
    data.manifest.shards[:] = [again]
    with pytest.raises(UserError, match=r"checksum|differs from the schema"):
        list(verify(data))


# Limits: the name of a kept column has a dot.


def test_a_column_with_dots_in_its_name_is_found_by_name() -> None:
    assert is_part_of("raw.word", {"raw.word"})
    assert is_part_of("raw.a.b", {"raw.a.b"})
    assert is_part_of("bag.list.element", {"bag"})
    assert not is_part_of("raw.word", {"word", "raw.words", "raw.wor"})


def test_what_a_column_with_a_dot_unpacks_to_counts_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_limits, "ALWAYS_ALLOWED_BYTES", 1 << 20)
    pq.write_table(pa.table({"raw.n": np.zeros(1 << 20, np.int64), "x": np.zeros(1 << 20, np.int8)}), tmp_path / "a")
    footer, size = pq.read_metadata(tmp_path / "a"), (tmp_path / "a").stat().st_size
    with pytest.raises(UserError, match=r"a: row group 0 has .* bytes that unpack to 8,\d"):
        check_footer(footer, "a", size, ["raw.n"])
    check_footer(footer, "a", size, ["raw.m"])
    check_pages(tmp_path / "a", footer, ["raw.n"])


def test_rows_that_share_an_id_have_none_of_each_others_kept_columns(monkeypatch):
    """As in a log whose source.row_id is not one of each row."""
    kept = pl.DataFrame({"row_id": [7, 7, 8], "raw.who": ["first", "second", "third"]})
    monkeypatch.setattr(predictions, "kept_rows", lambda *_: kept)
    dataset: Any = SimpleNamespace(schema=SimpleNamespace(keep=["who"]))
    rows = pl.DataFrame({"row_id": [7, 7, 8], "logit.t": [0.1, 0.2, 0.3]})
    assert predictions.with_kept(rows, dataset, ["train"])["who"].to_list() == [None, None, "third"]
