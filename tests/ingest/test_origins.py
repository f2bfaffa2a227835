"""What features, histories and counters depend on: whatever changes their values, and nothing else."""

import copy
from typing import Any

import pytest

from features.fit.reuse import unchanged
from features.schema.schema import Schema
from pipeline.dataset.past_state import definition, meaning

CONTENT: dict[str, Any] = {
    "source": {
        "files": "log.csv",
        "key": "id",
        "types": {"rating": "int"},
        "outcomes": {"click": {"files": "clicks.csv", "key": "id", "time": "when", "window": "1h"}},
        "derived": {"liked": "rating >= 4", "asked": "LOWER(item)"},
        "tables": {
            "it": {"files": "items.csv", "key": "item", "by": "asked", "columns": {"cat": "string", "size": "int"}},
        },
        "counters": {
            "cat_rows": {"by": "it_cat", "take": "count"},
            "ctr": {"by": "user", "take": "mean", "of": "click", "smoothing": 5},
        },
    },
    "dense": {"cat_rows": {}, "ctr": {}},
    "categorical": {"item": {"dim": 4}, "cat": {"column": "it_cat", "dim": 4}},
    "bag": {"seen": {"dim": 4, "history": {"user": "user", "item": "item", "when": "liked"}}},
    "tasks": {"like": {"kind": "binary", "label": "rating >= 4", "observed_when": "signup IS NOT NULL"}},
    "event_time": "at",
    "split": {"by": "row_index", "modulo": 10, "train": [*range(8)], "valid": [8], "test": [9]},
}  # fmt: skip
PASTS = {"seen", "cat_rows", "ctr"}


def changed(path: str, value: Any) -> Schema:
    """The schema with another value under source.PATH."""
    content = copy.deepcopy(CONTENT)
    *keys, last = path.split(".")
    place = content["source"]
    for key in keys:
        place = place.setdefault(key, {})
    place[last] = value
    return Schema.parse(content, "small.yaml")


@pytest.mark.parametrize(
    ("path", "value", "features", "pasts"),
    [
        ("files", "other.csv", set(), set()),
        ("tables.it.columns.cat", "int", {"cat", "cat_rows"}, {"cat_rows"}),
        ("tables.it.columns.size", "float", set(), set()),
        ("tables.it.columns.more", "string", set(), set()),
        ("tables.it.files", "other.csv", set(), set()),
        ("tables.it.by", "also", {"cat", "cat_rows"}, {"cat_rows"}),
        ("tables.it.key", "other", {"cat", "cat_rows"}, {"cat_rows"}),
        ("tables.it.valid_from", "since", {"cat", "cat_rows"}, {"cat_rows"}),
        ("derived.asked", "UPPER(item)", {"cat", "cat_rows"}, {"cat_rows"}),
        ("derived.liked", "rating >= 3", {"seen"}, {"seen"}),
        ("types.rating", "float", {"seen"}, {"seen"}),
        ("outcomes.click.window", "2h", {"ctr"}, {"ctr"}),
        ("outcomes.click.files", "other.csv", set(), set()),
        ("outcomes.click.read", {"delimiter": ";"}, set(), set()),
        ("counters.ctr.smoothing", 6, {"ctr"}, {"ctr"}),
        ("missing", ["", "-"], set(), PASTS),
        ("times.at", "ms", set(), PASTS),
        ("times.when", "ms", set(), {"ctr"}),
        ("times.signup", "ms", set(), set()),
        ("optional.user", "u0", set(), {"seen", "ctr"}),
        ("optional.signup", "0", set(), set()),
    ],
)
def test_what_changes_the_values_of_a_feature_or_a_past_is_seen_and_nothing_else(
    path: str, value: Any, features: set[str], pasts: set[str]
) -> None:
    before, after = Schema.parse(CONTENT, "small.yaml"), changed(path, value)
    assert before.features.keys() - unchanged(after, before).features == features
    assert {name for name in PASTS if meaning(before, name) != meaning(after, name)} == pasts


def test_what_a_manifest_has_of_a_past_stays_as_earlier_releases_wrote_it() -> None:
    schema = Schema.parse(CONTENT, "small.yaml")
    assert {name: definition(schema, name) for name in schema.past} == {
        "seen": "233002ba859eae6a",
        "cat_rows": "87954b81eb706c1e",
        "ctr": "5fb5d412c787f488",
    }
