"""What a schema may say of side tables: names of their columns, how they are looked up, who may read them."""

from typing import Any

import pytest
from test_schema import BASE, changed, refusal

from features.schema.schema import Schema

ITEM = {"files": "items.csv", "key": "item", "columns": {"brand": "string", "cost": "float", "tags": "string"}}


def with_table(content: dict[str, Any] = BASE, **settings: Any) -> dict[str, Any]:
    return changed("source.tables.goods", {**ITEM, **settings}, content)


def accepted(content: dict[str, Any]) -> Schema:
    return Schema.parse(content, where="mine.yaml")


def test_columns_are_looked_up_by_a_column_of_the_impressions_which_is_read_for_it():
    schema = accepted(with_table(by="session"))
    assert schema.table_columns == dict.fromkeys(["goods_brand", "goods_cost", "goods_tags"], "goods")
    assert "session" in schema.raw_columns
    assert not schema.table_columns.keys() & {*schema.raw_columns, *schema.raw_types}
    by_derived = accepted(with_table(changed("source.derived.room", "session || '-'"), by="room"))
    assert "session" in by_derived.raw_columns
    assert "room" not in by_derived.raw_columns


def test_features_of_any_kind_histories_derived_columns_and_the_split_may_read_a_table():
    content = changed("dense.goods_cost", {}, with_table())
    content = changed("categorical.brand", {"column": "goods_brand"}, content)
    content = changed("bag.tags", {"column": "goods_tags"}, content)
    content = changed("vector.numbers", {"column": "goods_tags", "length": 3}, content)
    content = changed(
        "bag.brands", {"history": {"user": "user", "item": "goods_brand", "when": "goods_cost > 3"}}, content
    )
    content = changed("source.derived.cheap", "goods_cost < 1", content)
    content = changed("split", {"by": "hash", "key": "goods_brand", "valid": 0.1, "test": 0.1}, content)
    assert not set(accepted(content).raw_columns) & accepted(content).table_columns.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_table(columns={}), "source.tables.goods.columns: Dictionary should have at least 1 item"),
        (with_table(columns={"item": "string"}), "column item is read as key or valid_from already"),
        (with_table(valid_from="item"), "item is both key and valid_from"),
        (with_table(keys="item"), "goods.keys: unknown key (did you mean key?), allowed are files, key, by, columns, "),
        (with_table(columns={"brand": "text"}), "source.tables.goods.columns.brand: Input should be 'int', 'float', "),
        (changed("source.tables.click", ITEM), "source.tables.click has the name of another stream"),
        (changed("source.tables.impressions", ITEM), "source.tables.impressions has the name of another stream"),
        (
            changed("source.outcomes", {"impressions": {"files": "x.csv", "key": "id"}}),
            "source.outcomes.impressions has the name of another stream",
        ),
        (changed("source.tables.a/b", ITEM), "name in source.tables 'a/b' cannot name a file"),
        (with_table(key="a\x1b"), "column 'a\\x1b' has a control character"),
        (with_table(files="a\x1b"), "files 'a\\x1b' has a control character"),
        (with_table(changed("source.derived.goods_cost", "price")), "column goods_cost is added twice"),
        (with_table(by="click"), "source.tables.goods looks up click, which an outcome, counter or side table adds"),
        (with_table(by="goods_brand"), "goods looks up goods_brand, which an outcome, counter or side table adds"),
        (
            with_table(changed("source.derived.brand", "goods_brand || 'x'"), by="brand"),
            "source.tables.goods looks up goods_brand, which an outcome, counter or side table adds",
        ),
        (with_table(changed("source.key", "goods_brand")), "source.key reads goods_brand, which a side table adds"),
        (with_table(changed("event_time", "goods_cost")), "event_time reads goods_cost, which a side table adds"),
        (with_table(changed("source.row_id", "goods_cost")), "source.row_id reads goods_cost, which a side table adds"),
        (
            with_table(changed("dense.goods_tags", {})),
            "feature goods_tags reads goods_tags as a number, but it is text: write source.tables.goods.columns.tags: float",
        ),
        (
            with_table(changed("tasks.dear", {"kind": "binary", "label": "goods_cost > 5"}, changed("dense.goods_cost", {}))),
            "tasks.dear.label uses column goods_cost, which is also read by the feature goods_cost",
        ),
        # A table shows the value that it is looked up by.
        (
            with_table(changed("categorical.goods_brand", {}), by="stars"),
            "uses column stars, which is also read by the feature goods_brand",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_up_is_refused_in_one_line(content: dict[str, Any], message: str) -> None:
    assert message in refusal(content)


def test_a_label_of_a_table_leaves_the_id_that_it_is_looked_up_by_a_feature():
    accepted(with_table(changed("tasks.dear", {"kind": "binary", "label": "click AND goods_cost > 5"})))


def test_versions_need_an_event_time():
    content = with_table(valid_from="since")
    accepted(content)
    content = {**content, "split": {"by": "hash", "key": "user", "valid": 0, "test": 0}}
    del content["event_time"]
    assert "event_time is missing: side table goods has valid_from" in refusal(content)


def test_fingerprints_of_schemas_without_tables_stay_and_settings_of_tables_change_them():
    base = accepted(BASE)
    assert accepted(changed("source.tables", {})).fingerprint == base.fingerprint
    assert accepted(changed("source.tables", {})).inputs_fingerprint == base.inputs_fingerprint
    plain = accepted(with_table())
    others = [{"files": "other.csv"}, {"key": "id"}, {"by": "session"}, {"columns": {"brand": "string"}}]
    others += [{"valid_from": "since"}, {"read": {"format": "jsonl"}}]
    prints = [base.fingerprint, plain.fingerprint, *(accepted(with_table(**other)).fingerprint for other in others)]
    assert len(set(prints)) == len(prints)
    # Encoders depend on what columns hold, not on the files that they come from.
    assert accepted(with_table(files="other.csv")).inputs_fingerprint == plain.inputs_fingerprint
    assert accepted(with_table(columns={"brand": "string"})).inputs_fingerprint != plain.inputs_fingerprint
