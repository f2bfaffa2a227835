"""Numbers of a schema that no table, window or list can have: refused in one line before anything is allocated."""

from collections.abc import Callable
from typing import Any

import pytest

from features.errors import UserError
from features.schema.schema import Schema


@pytest.fixture
def parsed(small_content: Callable[[], dict[str, Any]]) -> Callable[[str, Any], Schema]:
    """The small schema with one key set to a value."""

    def parse(key: str, value: Any) -> Schema:
        content = small_content()
        content["source"]["outcomes"]["click"]["time"] = "clicked_at"
        content["categorical"]["more"] = {"column": "elsewhere"}
        content["bag"] = {**content.get("bag", {}), "many": {"column": "lists"}}
        *path, last = key.split(".")
        part = content
        for name in path:
            part = part.setdefault(name, {})
        part[last] = value
        return Schema.parse(content, "mine.yaml")

    return parse


LARGEST = {
    "categorical.more.dim": 65_536,
    "categorical.more.hash": 10**10,
    "categorical.more.managed.rows": 10**10,
    "categorical.more.vocabulary.max_size": 10**10,
    "categorical.more.vocabulary.min_count": 10**10,
    "categorical.more.bins": 1024,
    "bag.many.max_length": 1_000_000,
    "tasks.bought.loss_weight": 10**9,
    "source.outcomes.click.window": 10**10,
}


@pytest.mark.parametrize("key", LARGEST)
def test_numbers_have_a_bound_that_holds(key: str, parsed: Callable[[str, Any], Schema]) -> None:
    for value in (LARGEST[key] + 1, 10**18, 10**400):
        with pytest.raises(
            UserError, match=rf"^mine.yaml: {key}: Input should be (less than or equal to|a valid number)"
        ):
            parsed(key, value)
    assert parsed(key, LARGEST[key]).fingerprint


@pytest.mark.parametrize("modulo", [100_001, 10**9, 10**30])
def test_a_modulo_of_a_split_allocates_nothing_where_it_is_refused(
    modulo: int, parsed: Callable[[str, Any], Schema]
) -> None:
    with pytest.raises(UserError, match=r"^mine.yaml: split.modulo: Input should be less than or equal to 100000$"):
        parsed("split", {"by": "row_index", "modulo": modulo, "train": [0]})
    assert parsed("split", {"by": "row_index", "modulo": 3, "train": [0, 1], "test": [2]}).used_splits == {
        "train",
        "test",
    }
