"""Kept columns of a schema: their types, what is refused, the fingerprint, files without labels, the key of clusters."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from test_schema import BASE, changed, refusal

from features.fit.encoders import arrow_schema
from features.keys import cluster_column
from features.schema.schema import Schema
from features.schema.unlabelled import without_labels

TEXT, WHOLE, NUMBER = pa.large_string(), pa.int64(), pa.float64()
DERIVED = {
    "first": 'SUBSTR("user", 1, 1)', "cheap": "price < 1", "half": "price / 2", "day": "DATE '2026-01-01'",
    "exact": "CAST(price AS DECIMAL(10, 2))", "nothing": "NULL", "count": "CAST(price AS BIGINT)",
    "bulk": "qty", "heavy": "TRY_CAST(mass AS DOUBLE) * 2",
}  # fmt: skip
TABLE = {"files": "items.csv", "key": "item", "columns": {"brand": "string", "cost": "float", "since": "time"}}
COUNTER = {"by": "user", "take": "count"}


def accepted(content: dict[str, Any]) -> Schema:
    return Schema.parse(content, where="mine.yaml")


def whole() -> dict[str, Any]:
    """BASE with derived columns, a side table and a counter."""
    content = changed("source.derived", BASE["source"]["derived"] | DERIVED)
    content = changed("source.tables.goods", TABLE, content)
    return changed("source.counters.seen", COUNTER, content)


def kept(*names: str) -> dict[str, Any]:
    return changed("keep", list(names), whole())


def test_columns_of_any_origin_are_kept_with_the_type_that_the_schema_gives_them():
    expected = {
        "user": TEXT, "unread": TEXT, "price": NUMBER, "time": WHOLE, "hour": WHOLE, "first": TEXT, "cheap": WHOLE,
        "half": NUMBER, "day": WHOLE, "exact": NUMBER, "nothing": TEXT, "count": WHOLE, "click": WHOLE,
        "click_count": WHOLE, "click_dwell": NUMBER, "seen": NUMBER, "goods_brand": TEXT, "goods_cost": NUMBER,
        "goods_since": WHOLE, "stars": TEXT,
    }  # fmt: skip
    schema = accepted(kept(*expected))
    assert schema.kept == {f"raw.{name}": kind for name, kind in expected.items()}
    assert list(schema.kept) == [f"raw.{name}" for name in expected]
    plain = accepted(whole())
    assert plain.kept == {}
    columns = arrow_schema(schema)
    assert dict(zip(columns.names, columns.types, strict=True)) == {
        **dict(zip(arrow_schema(plain).names, arrow_schema(plain).types, strict=True)), **schema.kept,
    }  # fmt: skip
    assert {"unread"} == set(schema.raw_columns) - set(plain.raw_columns)
    assert schema.columns == plain.columns, "kept columns are no inputs"
    typed = accepted(changed("source.types", {"unread": "int"}, kept("unread")))
    assert typed.kept == {"raw.unread": WHOLE}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (kept("user", "price", "user"), "keep lists column user twice: remove one"),
        (kept("recent"), "keep: column recent may hold lists, as feature recent reads it: keep a column of one value a row"),
        (
            changed("vector.numbers", {"length": 3}, kept("numbers")),
            "keep: column numbers may hold lists, as feature numbers reads it",
        ),
        (
            changed("bag.seen_items", {"history": {"user": "user", "item": "item"}}, kept("seen_items")),
            "keep: seen_items is a feature made of earlier rows, a list and no column: allowed are columns of the log",
        ),
        (
            changed("source.derived.parts", "STRING_TO_ARRAY(stars, 'x')", kept("parts")),
            "keep: column parts is List(String), which is no text, number or time: CAST it in source.derived",
        ),
        (
            changed("source.derived.length", "ARRAY_LENGTH(recent)", kept("length")),
            "keep: the type of column length does not follow from the schema, as where it reads lists or computes with text",
        ),
        (kept("a\x1b"), "column 'a\\x1b' has a control character"),
        (changed("keep", "user"), "keep: Input should be a valid list"),
        (changed("keep", [3]), "keep.0: Input should be a valid string"),
        (changed("kept", ["user"]), "kept: unknown key (did you mean keep?)"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(content, message):
    assert message in refusal(content)


def test_a_column_that_is_not_in_source_columns_is_refused_with_what_is_allowed():
    listed = ["price", "user", "item", "recent", "id", "time", "stars", "qty", "mass", "other"]
    content = changed("source.columns", listed, whole())
    assert accepted(changed("keep", ["other", "hour", "goods_brand"], content)).kept.keys() == {
        "raw.other", "raw.hour", "raw.goods_brand",
    }  # fmt: skip
    message = refusal(changed("keep", ["goods_brant", "zzz"], content))
    assert "keep: there is no column goods_brant (did you mean goods_brand?), allowed are columns of the log" in message
    assert "keep: there is no column zzz, allowed are columns of the log, derived ones, and those" in message
    assert "is used, but source.columns" not in message, "one message for one fault"


def test_kept_columns_change_no_fingerprint_since_no_model_sees_them():
    plain, empty = accepted(BASE), accepted(changed("keep", []))
    assert plain.fingerprint == empty.fingerprint == "c4445aa0e6047c7b", "that of datasets which exist"
    some = [accepted(changed("keep", names)) for names in (["user"], ["price"], ["user", "price"], ["price", "user"])]
    assert {schema.fingerprint for schema in some} == {plain.fingerprint}
    assert {schema.inputs_fingerprint for schema in some} == {plain.inputs_fingerprint}


def test_a_schema_without_kept_columns_is_written_as_before_and_one_with_some_comes_back(tmp_path: Path):
    assert "keep" not in accepted(BASE).model_dump(mode="json", exclude_unset=True)
    schema = accepted(kept("user", "goods_cost"))
    (tmp_path / "schema.yaml").write_text(
        yaml.safe_dump(schema.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    )
    again = Schema.load(tmp_path / "schema.yaml")
    assert (again.kept, again.fingerprint) == (schema.kept, schema.fingerprint)
    assert schema.only(["good"]).kept == schema.kept


def test_files_without_labels_are_not_read_for_what_only_labels_the_weight_and_outcomes_know():
    content = kept(
        "user", "click", "click_dwell", "stars", "qty", "bulk", "mass", "heavy", "goods_brand", "seen", "extra"
    )
    content["tasks"]["bulk"] = {"kind": "regression", "label": "bulk + 1"}
    schema = accepted(content | {"weight": "heavy"})
    part = without_labels(schema)
    assert part.keep == ["user", "goods_brand", "seen", "extra"]
    assert part.kept == schema.kept, "all columns are in the dataset"
    assert not {"stars", "qty", "mass"} & set(part.raw_columns)
    assert {"extra", "item"} <= set(part.raw_columns)
    assert part.source.tables.keys() == {"goods"}, "looked up for what is kept alone"
    read = changed("categorical.stars", {}, content)
    read["tasks"]["good"]["label"] = "click"
    assert "stars" in without_labels(accepted(read)).keep, "a column of a feature is in the files"
    assert without_labels(accepted(kept("half"))).source.derived.keys() >= {"half"}


@pytest.mark.parametrize(
    ("names", "user", "expected"),
    [
        (["uid", "user", "user_id", "who"], None, "user_id"),
        (["uid", "user"], None, "user"),
        (["uid"], None, "uid"),
        (["uid", "who"], "who", "who"),
        (["uid"], "who", "uid"),
        (["price"], None, None),
        ([], "who", None),
    ],
)
def test_the_cluster_key_is_the_user_of_a_history_or_a_usual_name_where_it_is_kept(names, user, expected):
    content = changed("keep", names)
    if user:
        content = changed("bag.earlier", {"history": {"user": user, "item": "item"}}, content)
    assert cluster_column(accepted(content)) == expected
