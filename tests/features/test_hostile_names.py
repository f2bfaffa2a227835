"""Names of a schema that would control a terminal, lead out of a folder or fill a screen are refused where it is read."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile_text import CONTROLS

from features.errors import UserError
from features.printable import has_controls
from features.schema.schema import Schema

CONTENT: dict[str, Any] = {
    "source": {
        "files": "log.csv",
        "columns": ["id", "city", "x", "user", "t", "x2"],
        "types": {"x": "float"},
        "key": "id",
        "row_id": "id",
        "outcomes": {
            "click": {
                "files": "c.csv", "key": "id", "time": "at", "columns": {"n": "int"}, "read": {"columns": ["id", "at", "n"]}
            },
        },
        "derived": {"double": "x * 2"},
    },
    "tables": {"shared": {"dim": 4}},
    "dense": {"x": {}},
    "categorical": {"city": {"column": "city", "table": "shared"}},
    "bag": {"seen": {"history": {"user": "user", "item": "city", "when": "click"}}},
    "vector": {"v": {"length": 2, "column": "x2"}},
    "tasks": {"t": {"kind": "binary", "label": "click"}},
    "event_time": "t",
    "split": {"by": "hash", "key": "user", "valid": 0.1, "test": 0.1},
}  # fmt: skip
# Where names stand in a schema: the way to a mapping whose key, or to a value, that is the name.
KEYS = [("dense",), ("categorical",), ("bag",), ("vector",), ("tables",), ("tasks",), ("source", "derived")]
KEYS += [("source", "outcomes"), ("source", "types"), ("source", "outcomes", "click", "columns")]
VALUES: list[tuple[Any, ...]] = [
    ("event_time",),
    ("split", "key"),
    ("source", "key"),
    ("source", "row_id"),
    ("source", "files"),
]
VALUES += [("dense", "x", "column"), ("categorical", "city", "column"), ("bag", "seen", "history", "user")]
VALUES += [("bag", "seen", "history", "item"), ("source", "columns", 1), ("source", "outcomes", "click", "key")]
VALUES += [("source", "outcomes", "click", "time"), ("source", "outcomes", "click", "files")]
VALUES += [("source", "outcomes", "click", "read", "columns", 2)]


def changed(place: tuple[Any, ...], name: str, as_key: bool) -> dict[str, Any]:
    """The schema with another name: of the last entry of a mapping, or in place of a value."""
    content = copy.deepcopy(CONTENT)
    part: Any = content
    for step in place if as_key else place[:-1]:
        part = part[step]
    if as_key:
        last = list(part)[-1]
        part[name] = part.pop(last)
    else:
        part[place[-1]] = name
    return content


def fault(content: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        Schema.parse(content, where="mine.yaml")
    return str(caught.value)


def test_the_schema_that_the_tests_change_is_valid() -> None:
    Schema.parse(CONTENT, where="mine.yaml")


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("place", KEYS, ids=".".join)
def test_a_name_with_a_control_character_is_refused(place: tuple[str, ...], name: str) -> None:
    found = fault(changed(place, name, as_key=True))
    assert "control character" in found
    assert not has_controls(found)


@pytest.mark.parametrize("place", VALUES, ids=lambda place: ".".join(map(str, place)))
def test_a_column_or_file_pattern_with_a_control_character_is_refused(place: tuple[Any, ...]) -> None:
    for name in CONTROLS:
        assert "control character" in fault(changed(place, name, as_key=False))


def test_a_column_of_an_expression_with_a_control_character_is_refused() -> None:
    for place in (("tasks", "t", "label"), ("source", "derived", "double"), ("bag", "seen", "history", "when")):
        assert "control character" in fault(changed(place, '"x\x1b[31m" > 1', as_key=False))


@pytest.mark.parametrize("place", KEYS[:8], ids=".".join)
def test_an_empty_name_and_a_very_long_one_are_refused(place: tuple[str, ...]) -> None:
    assert "a name is empty" in fault(changed(place, "", as_key=True))
    for name in ("n" * 201, "漢" * 67):
        found = fault(changed(place, name, as_key=True))
        assert "201 bytes, more than 200" in found
        assert len(found) < 1000
    assert "1001 bytes" in fault(changed(("categorical", "city", "column"), "c" * 1001, as_key=False))


@pytest.mark.parametrize("name", ["../../owned", "a/b", "/etc/owned", "a\\b"])
@pytest.mark.parametrize("place", [("source", "outcomes"), ("tables",), ("categorical",), ("dense",)], ids=".".join)
def test_a_name_that_would_lead_files_out_of_their_folder_is_refused(place: tuple[str, ...], name: str) -> None:
    assert "cannot name a file" in fault(changed(place, name, as_key=True))


@pytest.mark.parametrize(
    "name", ["é", "漢字", "🙂", "عربى", "two words", "$x_{$", "<script>", "a-b", "a:b", "a|b", "n" * 200]
)
@pytest.mark.parametrize("place", [("vector",), ("categorical",), ("bag",), ("tasks",)], ids=".".join)
def test_any_other_name_is_taken_as_it_is(place: tuple[str, ...], name: str, tmp_path: Path) -> None:
    content = changed(place, name, as_key=True)
    (tmp_path / "schema.yaml").write_text(
        yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8"
    )
    schema = Schema.load(tmp_path / "schema.yaml")
    assert name in schema.tasks or name in schema.features


def test_a_column_may_have_the_odd_name_that_a_file_gives_it() -> None:
    for name in ("", "Unnamed: 0", "price (€/kg)", "a.b/c\\d", "Q17. " + "How much " * 30):
        content = changed(("categorical", "city", "column"), name, as_key=False)
        content["source"]["columns"].append(name)
        Schema.parse(content, where="mine.yaml")


def test_controls_that_are_no_names_are_allowed() -> None:
    """Hive separates by \\x01, and a value may be anything."""
    content = copy.deepcopy(CONTENT)
    content["source"] |= {"delimiter": "\x01", "missing": ["\\N", "\x1b"]}
    content["tasks"]["t"]["label"] = "click AND CAST(id AS TEXT) <> 'a\x1b'"
    content["categorical"] = {"x2": {"table": "shared"}}
    Schema.parse(content, where="mine.yaml")
