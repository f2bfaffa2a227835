"""Requests encode rows as the ingest job encoded the same rows of a log, in whatever form they are given."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from request_log import CONTENT, LISTS, PAST, ROWS, RequestLog, arrow, lists_of, no_beam, rows_of, same

from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess
from pipeline.serving import direct
from pipeline.serving.encoded import Encoded, concatenated, encoded
from pipeline.serving.exact import Exact
from pipeline.serving.requests import Requests

Row = dict[str, Any]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> RequestLog:
    return RequestLog(tmp_path_factory.mktemp("request_log"))


@pytest.fixture(scope="module")
def requests(log: RequestLog) -> Requests:
    return Requests(log.schema, log.encoders)


def rows_at(found: Encoded, rows: list[int]) -> tuple[Any, ...]:
    """Encoded rows as plain values."""
    lists = [[list_of[row] for row in rows] for ids in found.lists.values() for list_of in [lists_of(ids)]]
    return found.id_BF[rows].tolist(), found.dense_BD[rows].tolist(), [[x.tolist() for x in each] for each in lists]


def physical(table: pa.Table) -> pa.Table:
    """The same values in other types of Arrow."""
    kinds = {
        "at": pa.timestamp("ms"),
        "zip": pa.decimal128(24, 2),
        "qty": pa.int8(),
        "age": pa.float32(),
    }
    for place, name in enumerate(table.column_names):
        column = table[name].combine_chunks()
        if name == "at":
            column = pa.array([None if at is None else at * 1000 + 999 for at in column.to_pylist()], pa.int64())
        if name in kinds:
            column = column.cast(kinds[name])
        elif name in ("user", "shelf"):
            column = column.dictionary_encode()
        elif pa.types.is_string(column.type):
            column = column.cast(pa.string_view() if name == "city" else pa.large_string())
        elif pa.types.is_list(column.type) and name != "picture":
            column = column.cast(pa.large_list(column.type.value_type))
        table = table.set_column(place, name, column)
    return table


FORMS: dict[str, Callable[[RequestLog], Any]] = {
    "texts": lambda log: log.raw,
    "JSON values": lambda log: log.typed(),
    "a table of texts": lambda log: arrow(log.raw),
    "a table of values": lambda log: pa.concat_tables([arrow(log.typed())[:7], arrow(log.typed())[7:]]),
    "a record batch": lambda log: arrow(log.typed()).to_batches()[0],
    "a polars frame": lambda log: pl.from_arrow(arrow(log.typed())),
    "other types of Arrow": lambda log: physical(arrow(log.typed())),
    "texts and values in turn": lambda log: [
        pair[i % 2] for i, pair in enumerate(zip(log.raw, log.typed(), strict=True))
    ],
}


@pytest.mark.integration
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_form_are_encoded_as_the_job_encoded_them(form: str, log: RequestLog) -> None:
    requests = Requests(log.schema, log.encoders)
    assert same(requests.encode(FORMS[form](log)), log.expected)
    assert same(requests.encode(FORMS[form](log)), log.expected)  # of values that are known by now
    assert all(len(log.expected.id_BF[:, f].unique()) > 1 for f, name in enumerate(log.schema.single) if name != "lang")


@pytest.mark.integration
def test_a_row_is_encoded_alike_alone_in_any_order_by_many_threads_and_after_values_are_forgotten(
    log: RequestLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "REMEMBERED", 0)
    monkeypatch.setattr(direct, "FEWEST", 4)
    requests, rows = Requests(log.schema, log.encoders), log.typed()
    requests.warm_up(3)

    def alone(row: int) -> bool:
        return rows_at(requests.encode([rows[row]]), [0]) == rows_at(log.expected, [row])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(alone, [*range(0, ROWS, 4), *reversed(range(0, ROWS, 4))]))
    order = torch.randperm(ROWS).tolist()
    assert rows_at(requests.encode([rows[row] for row in order]), [*range(ROWS)]) == rows_at(log.expected, order)
    requests.encode([{"user": "x" * 1000, "clicked": ["y" * 1000]}, {"user": "\U0001f600" * 60}])
    known = [values for memo in requests.direct.memos.values() for values in memo.known]
    assert all(len(values) <= 5 for values in known)
    assert max(len(str(value)) for values in known for value in values) < 20


@pytest.mark.integration
@pytest.mark.parametrize("form", ["texts", "a table of values"])
def test_columns_of_the_user_are_those_of_each_row(form: str, log: RequestLog, requests: Requests) -> None:
    of_user = ("user", "age", "qty", "at", "zip", *PAST)
    for number in (8, 35):
        row = log.typed()[number]
        user = {name: row[name] for name in of_user if name in row}
        others = [
            {k: v for k, v in each.items() if k not in of_user}
            for each in (log.raw if form == "texts" else log.typed())
        ]
        merged = [each | user for each in others]
        expected = Requests(log.schema, log.encoders).encode(merged)
        found = requests.encode(others if form == "texts" else arrow(others), user=user)
        assert same(found, expected)
        assert [len(found.lists[name].length_R) for name in ("clicked", "brands")] == [1, 1]
        assert same(found.slice(3, 9), expected.slice(3, 9))
        both = [found, expected.slice(0, 4), requests.encode([]), found.slice(1, 3)]
        assert same(concatenated(both), concatenated([expected, expected.slice(0, 4), expected.slice(1, 3)]))
        assert same(requests.encode([{}] * 3, user=row), requests.encode([row] * 3))


@pytest.mark.integration
def test_what_is_not_given_is_missing_or_as_with_an_empty_past(log: RequestLog, requests: Requests) -> None:
    row = {k: v for k, v in log.typed()[9].items() if k in ("user", "price", "qty")}
    found = requests.encode([row, row | {"lang": "en"}, row | {"lang": "en", "shows": 0, "clicked": []}])
    values = dict(zip(log.schema.single, found.id_BF[0].tolist(), strict=True))
    assert {name for name, each in values.items() if each == 0} == {
        "city", "item", "age_bin", "hour", "pair", "zip", "item_brand", "rare", "cost_bin", "shelf"
    }  # fmt: skip
    assert rows_at(found, [1]) == rows_at(found, [2]) == rows_at(found, [0])
    assert [ids.length_R.sum() for ids in found.lists.values()] == [0] * 4
    dense = {name: found.dense_BD[0, list(columns)].tolist() for name, columns in log.schema.dense_ranges.items()}
    assert dense["ctr"] == [pytest.approx(log.encoders.counter_means["ctr"])]
    assert dense["spent"][1] == 1.0
    assert dense["picture"] == [0.0, 0.0, 1.0]
    null = requests.encode([row | {"shows": None}])
    assert not null.dense_BD.equal(found.dense_BD[:1])  # a count that is missing is none, as of a row without its key


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_a_row_lacks_and_what_is_null_are_as_in_a_log_of_the_same_format(kind: str, tmp_path: Path) -> None:
    rows: list[Row] = [
        {"n": 0, "x": 0, "lang": "de", "tags": ["a"]},
        {"n": 1, "x": 1, "lang": None, "tags": None},
        {"n": 2, "x": 4, "lang": "en", "tags": ["x", "y"]},
        {"n": 3, "x": 9},
    ]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        for name, part in (("a", rows[:3]), ("b", rows[3:])):
            pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    schema = Schema.parse(
        {
            "source": {
                "files": f"*.{kind}", "format": kind, "row_id": "n", "optional": {"lang": "en", "tags": "x|y"},
            },
            "categorical": {"lang": {}},
            "bag": {"tags": {}},
            "dense": {"x": {}},
            "tasks": {"click": {"kind": "binary", "label": "n = 1"}},
            "split": {"by": "row_index", "modulo": 1, "train": [0]},
        },
        "optional.yaml",
    )  # fmt: skip
    with no_beam():
        preprocess(PreprocessConfig(input=str(tmp_path), out=tmp_path / "dataset"), schema)
    found = rows_of(tmp_path / "dataset", "train").sort_by("row_id")
    requests = Requests(schema, Encoders.load(tmp_path / "dataset" / "encoders", schema))
    expected = encoded(found, schema)
    assert expected.id_BF[[1, 3], 0].tolist() == [expected.id_BF[2, 0] if kind == "jsonl" else 0, expected.id_BF[2, 0]]
    assert same(requests.encode(rows), expected)
    for given in (rows, [{"x": 0, "lang": None, "tags": None}]):  # with nulls of a type, and of none
        table = arrow(given[:3])
        assert same(requests.encode(table), requests.encode(given[:3]))
    lacking = requests.encode(pa.table({"x": [9]}))
    assert rows_at(lacking, [0]) == rows_at(expected, [3])


def test_what_is_computed_of_one_column_is_computed_once_for_each_of_its_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schema = Schema.parse(
        {
            "source": {"files": "log.csv", "derived": {"filled": "COALESCE(\"lang\", '7')", "both": '"lang" || "x"'}},
            "categorical": {"filled": {"hash": 10**6}, "plain": {"column": "lang", "hash": 10**6}, "both": {"hash": 9}},
            "tasks": {"click": {"kind": "binary", "label": "click"}},
            "split": {"by": "row_index", "modulo": 1, "train": [0]},
        },
        "computed.yaml",
    )
    requests = Requests(schema, Encoders(schema, {}, {}, {}))
    (de, _, _), (seven, plain, _) = requests.encode([{"lang": "de"}, {"lang": "7"}]).id_BF.tolist()
    assert seven == plain
    assert seven != de
    wanted = {"de": de, "7": seven, 7: seven, None: seven}
    blocks: list[list[Any]] = [["de", None], [None], [7, 7, None], [None, "7"], [7, "de"], [7.0, None], [], ["7"]]
    for values in [*blocks, *reversed(blocks)]:
        found = requests.encode([{"lang": value} for value in values])
        assert found.id_BF[:, 0].tolist() == [wanted[value] for value in values]
    assert requests.encode([{}, {"lang": "de"}]).id_BF[:, 0].tolist() == [seven, de]

    calls: list[list[str]] = []
    exact = Exact.encode
    monkeypatch.setattr(
        Exact, "encode", lambda self, names, *rest: (calls.append([*names]), exact(self, names, *rest))[1]
    )
    requests.encode([{"lang": "de"}, {"lang": None}])
    assert calls == [["both"]]


def test_equal_values_of_python_are_the_ids_of_their_own_texts(tmp_path: Path) -> None:
    schema = Schema.parse(
        {
            "source": {"files": "log.csv"}, "categorical": {"a": {"hash": 10**9}}, "bag": {"b": {"hash": 10**9}},
            "tasks": {"t": {"kind": "binary", "label": "y"}}, "split": {"by": "row_index", "modulo": 1, "train": [0]},
        },
        "plain.yaml",
    )  # fmt: skip
    requests = Requests(schema, Encoders(schema, {}, {}, {}))
    values = [
        "1",
        1,
        1.0,
        Decimal("1.00"),
        "1.0",
        True,
        "true",
        False,
        0,
        "0",
        -0.0,
        0.0,
        "-0",
        "01",
        2**53,
        str(2**53),
    ]
    texts = ["1", "1", "1", "1", "1", "true", "true", "false", "0", "0", "0", "0", "0", "01", str(2**53), str(2**53)]
    expected = requests.encode([{"a": text} for text in texts]).id_BF[:, 0].tolist()
    assert len({*expected}) == len({*texts})
    for order in (range(len(values)), reversed(range(len(values)))):  # whichever is known first
        for i in order:
            assert requests.encode([{"a": values[i]}]).id_BF.item() == expected[i]
    assert requests.encode([{"a": value} for value in values]).id_BF[:, 0].tolist() == expected
    assert requests.encode([{"b": values}]).lists["b"].id_V.tolist() == expected
    assert requests.encode(pa.table({"a": pa.array([1, 0], pa.uint64())})).id_BF[:, 0].tolist() == [
        expected[0],
        expected[8],
    ]


@pytest.mark.integration
def test_the_schema_of_a_row_names_every_column_with_its_readers(log: RequestLog, requests: Requests) -> None:
    found = requests.describe()
    assert [*found] == requests.columns
    assert not {"click", "id", "hour", "pair"} & found.keys()
    assert found["city"] == {
        "type": ["string", "integer", "number", "boolean", "null"],
        "description": "Read by city, rare.",
    }
    assert found["price"]["type"] == ["number", "string", "null"]
    assert {name for name, content in found.items() if "array" in content["type"]} >= {*LISTS, "clicked", "brands"}
    assert {*log.typed()[1]} - {"id"} <= {*found}
    assert CONTENT["event_time"] in found  # of the derived hour


def test_what_cannot_be_a_request_is_refused(requests: Requests) -> None:
    with pytest.raises(UserError, match=r"^rows: give a list of mappings or a table, not a set$"):
        requests.encode({1})  # type: ignore[arg-type]
