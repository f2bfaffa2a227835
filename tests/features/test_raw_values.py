"""Columns of lists where a row needs one value, and numbers that cannot be computed."""

from typing import Any

import pyarrow as pa
import pytest
from test_raw import parsed, schema, typed

from features.errors import UserError
from features.parse.raw import column, parse, view


def test_what_cannot_be_computed_is_missing_as_a_number_as_an_id_in_a_bag_and_in_an_expression():
    roots = {"root": "SQRT(a)", "same": "SQRT(a)", "all": "SQRT(a)", "other": "SQRT(b)"}
    s = schema(
        source={"files": "x", "types": {"a": "float", "b": "float"}, "derived": roots},
        dense={"root": {}},
        categorical={"same": {}, "half": {"column": "root", "bins": 2}},
        bag={"all": {}},
        tasks={"t": {"kind": "binary", "label": "other > 1"}},
    )
    found = parsed(s, a=["-1", "4", "1e22"], b=["-1", "4", "0.25"])
    assert found.bad.is_empty()
    assert found.rows["same"].to_pylist() == [None, "2", "100000000000"]
    assert found.rows["root"].to_pylist() == found.rows["half"].to_pylist() == [None, 2.0, 1e11]
    assert found.rows["label.t"].to_pylist() == [None, 1.0, 0.0]
    assert found.rows["all"].to_pylist() == [[], ["2"], ["100000000000"]]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"categorical": {"c": {"column": "half"}}}, "categorical.c: column half"),
        ({"bag": {"c": {"column": "half"}}}, "bag.c: column half"),
        ({"categorical": {"c": {"column": "a"}}}, "categorical.c: column a"),
        ({"split": {"by": "hash", "key": "half", "valid": 0.1, "test": 0.1}}, "split.key: column half"),
    ],
)
def test_a_fraction_is_no_id_and_no_key_of_a_split(changes: dict[str, Any], where: str) -> None:
    source = {"files": "x", "types": {"a": "float", "b": "float"}, "derived": {"half": "a / 2"}}
    s = schema(source=source, tasks={"t": {"kind": "binary", "label": "b"}}, **changes)
    with pytest.raises(UserError, match=rf"^{where} holds 1\.5, which is no id\. Make it whole or text"):
        parsed(s, a=["2", "3"] if where != "categorical.c: column a" else ["4", "1.5"], b=["1", "0"])
    parsed(s, a=["2", "4"], b=["1", "0"])


def test_a_missing_number_is_no_letter_beside_one_that_is_infinite():
    s = schema(source={"files": "x", "types": {"a": "float"}, "derived": {"d": "LN(a)"}}, dense={"d": {}})
    found = parsed(s, a=["-1", "0", "1"])
    assert found.rows["d"].to_pylist() == [None, 0.0]
    assert found.bad["line"].to_list() == [5]


LISTS = pa.array([["p", "q"], ["r"]], pa.list_(pa.string()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"categorical": {"c": {"column": "l"}}}, r"^categorical\.c: column l holds lists: make it a bag$"),
        ({"split": {"by": "hash", "key": "l", "valid": 0.1, "test": 0.1}}, r"^split\.key: column l holds lists: "),
        ({"tasks": {"t": {"kind": "binary", "label": "l"}}}, r"^tasks\.t\.label: 'l' is List.*: it must be a number$"),
        ({"categorical": {"c": {"column": "l", "bins": 2}}, "source": {"files": "x", "derived": {"l": "list"}}},
         r"^categorical\.c: column l is List.*, it must be a number$"),
    ],
)  # fmt: skip
def test_lists_are_refused_where_a_row_needs_one_value(changes, says):
    with pytest.raises(UserError, match=says):
        parsed(schema(**changes), x=["1", "2"], y=["1", "0"], l=LISTS, list=LISTS)


def test_lists_are_no_keys_users_or_items_raw_or_derived_and_still_a_bag_beside_them():
    derived = {"derived": "STRING_TO_ARRAY(z, ',')"}
    s = schema(source={"files": "x", "derived": derived}, bag={"l": {}, "derived": {}})
    rows = typed(
        s, {"x": pa.array(["1", "2"]), "y": pa.array(["1", "0"]), "z": pa.array(["1", "0,0"]), "l": LISTS}
    ).rows
    for name in ("l", "derived"):
        with pytest.raises(UserError, match=f"^column {name} holds lists, but is used where a row needs one value"):
            column(s, rows, name)
        with pytest.raises(UserError, match=f"^column {name} holds lists"):
            view(s, rows, None, ["x"], ["y", name])
    assert view(s, rows, None, ["ARRAY_LENGTH(l)"], ["y"])["l"].to_list() == LISTS.to_pylist()
    assert parse(s, rows, 0).rows["derived"].to_pylist() == [["1"], ["0", "0"]]
