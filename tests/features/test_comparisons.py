"""Text is not compared with numbers: '10' is below '9.4' as text, and no label may mean that."""

import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from omegaconf import OmegaConf
from test_schema import changed, refusal

from features.errors import UserError
from features.parse import compute
from features.schema.comparisons import mixed_comparison
from features.schema.schema import Schema
from features.yaml_text import read_yaml

FRAME = pl.DataFrame(
    {
        "v": ["10", "9.5", None],
        "price": [1.0, 5.0, None],
        "n": [1, 2, 3],
        "yes": [True, False, None],
        "tags": [["9"], [], None],
    }
)
TYPES = dict(FRAME.schema)

OF_TEXT = [
    "v > 9.4", "v > 9", "v = 10.0", "v <> 10.0", "v != 1e1", "9.0 < v", "v >= 9.0", "v <= -9.0", "v > price * 2", "v > price",
    "v > n", "v BETWEEN 1.5 AND 9.5", "v NOT BETWEEN 1 AND 2", "v BETWEEN '1' AND 2.5", "v IN (9.5, 10.0)", "v NOT IN (1)",
    "v IN (price, 2.0)", "CASE v WHEN 10.0 THEN 1 ELSE 0 END", "CASE WHEN v > 9.0 THEN 1 ELSE 0 END", "NULLIF(v, 10.0) = '1'",
    "v <=> 1.0", "NOT (v > 9.0)", "n = 1 AND v > 9.0",
    "COALESCE(v, '0') > 9.4", "SUBSTR(v, 1, 2) > 9.4", "v > CAST(9 AS DECIMAL(5, 2))", "v > FLOOR(9.4)", "LN(1 + (v > 1.0))",
    "CASE WHEN n > 1 THEN v END > 9.5", "v > CASE WHEN n > 1 THEN 9.5 ELSE 1.0 END", '"v" > 9.4', "(v || '0') > 9.4",
]  # fmt: skip


@pytest.mark.parametrize("expression", OF_TEXT)
def test_text_is_not_compared_with_a_number(expression: str) -> None:
    with pytest.raises(UserError) as caught:
        compute.evaluate(FRAME, "tasks.t.label", expression, "label")
    message = str(caught.value)
    assert message.startswith("tasks.t.label: ")
    assert "compares text (v) with a number" in message
    assert (
        "write TRY_CAST(v AS DOUBLE), which is null where it is no number, or set source.types.v to float or int"
        in message
    )
    assert "\n" not in message


@pytest.mark.parametrize("expression", OF_TEXT)
def test_the_cure_of_the_message_computes(expression: str) -> None:
    cured = re.sub(r'(?<!\w)"?v"?(?!\w)', "TRY_CAST(v AS DOUBLE)", expression)
    if not any(sign in cured for sign in ("||", "SUBSTR", "'")):  # of text in any case
        assert compute.evaluate(FRAME, "tasks.t.label", cured, "label").len() == 3
        number = FRAME.with_columns(v=pl.Series([10.0, 9.5, None]))
        assert compute.evaluate(number, "tasks.t.label", expression, "label").len() == 3


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("v = TRUE", "compares text (v) with a truth value: compare it with text, such as 'true'"),
        ("v = yes", "compares text (v) with a truth value (yes): compare it with text"),
        ("yes = 'true'", "compares text with a truth value (yes): write TRUE or FALSE without quotes"),
        ("yes BETWEEN v AND TRUE", "compares text (v) with a truth value (yes)"),
        ("price > '9.4'", "compares text with a number (price): remove the quotes"),
        ("n IN ('1', '2')", "compares text with a number (n): remove the quotes"),
        ("'10' > 9.4", "compares text with a number: remove the quotes"),
        (
            "CAST(n AS TEXT) > 9.4",
            "compares text (n) with a number: write TRY_CAST(n AS DOUBLE), which is null where it is no number",
        ),
    ],
)
def test_text_is_compared_with_text_alone(expression: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        compute.evaluate(FRAME, "weight", expression, "weight")


@pytest.mark.parametrize(
    ("expression", "values"),
    [
        ("v = '10'", [True, False, None]),
        ("v > '9.4'", [False, True, None]),
        ("v IN ('10', '9')", [True, False, None]),
        ("CAST(v AS DOUBLE) > 9.7", [True, False, None]),
        ("price > 1.5", [False, True, None]),
        ("price > n", [False, True, None]),
        ("n IN (1.0, 2)", [True, True, False]),
        ("yes = TRUE", [True, False, None]),
        ("yes = 1", [True, False, None]),
        ("v = NULL", [None, None, None]),
        ("COALESCE(v, '') = ''", [False, False, True]),
        ("v IS NULL OR n > 2.5", [False, False, True]),
        ("STARTS_WITH(v, '9') AND LENGTH(v) > 2.5", [False, True, None]),
        ("ARRAY_CONTAINS(tags, '9')", [True, False, None]),
    ],
)
def test_other_comparisons_mean_what_they_did(expression: str, values: list) -> None:
    assert compute.evaluate(FRAME, "weight", expression, "weight").to_list() == values


def test_a_block_is_compared_by_its_types_whatever_an_earlier_one_had() -> None:
    assert mixed_comparison("v > 9.4", TYPES | {"v": pl.Float64()}) is None
    assert mixed_comparison("v > 9.4", TYPES)
    assert mixed_comparison("v > 9.4", {}) is None  # of any type


def accepted(content: dict[str, Any]) -> Schema:
    return Schema.parse(content, where="mine.yaml")


# In a schema, before a row is read

ORDER = {"files": "o", "key": "id", "time": "at", "window": "1d", "columns": {"revenue": "float", "note": "string"}}
ITEM = {"files": "i", "key": "item", "columns": {"cost": "float", "size": "string"}}


def with_streams(path: str, value: Any) -> dict[str, Any]:
    content = changed("source.outcomes.order", ORDER)
    content = changed("source.tables.thing", ITEM | {"by": "item"}, content)
    return changed(path, value, content)


KEYS = {
    "tasks.good.label": "{}",
    "tasks.good.observed_when": "{}",
    "weight": "CASE WHEN {} THEN 2 ELSE 1 END",
    "source.derived.more": "CASE WHEN {} THEN 2 ELSE 1 END",
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("column", "declared"),
    [
        ("stars", "source.types.stars"),
        ("order_note", "source.outcomes.order.columns.note"),
        ("thing_size", "source.tables.thing.columns.size"),
    ],
)
def test_a_schema_is_refused_by_key_with_what_to_declare(key: str, column: str, declared: str) -> None:
    content = with_streams(key, KEYS[key].format(f"{column} > 3.5"))
    message = refusal(content)
    assert f"mine.yaml: {key}: " in message
    assert f"compares text ({column}) with a number" in message
    assert message.endswith(f"or set {declared} to float or int")
    *parents, last = declared.split(".")
    place = content
    for part in parents:
        place = place.setdefault(part, {})
    place[last] = "float"
    if column == "stars":
        content["tasks"]["good"]["label"] = "stars > 3.5"
    accepted(content)


def test_conditions_of_histories_and_counters_are_checked() -> None:
    history = {"user": "user", "item": "item", "when": "stars > 3.5"}
    assert "mine.yaml: bag.recent.history.when: 'stars > 3.5' compares text" in refusal(
        changed("bag.recent.history", history)
    )
    counter = {"by": "user", "of": "price", "take": "sum", "when": "stars > 3.5"}
    assert "source.counters.spend.when: 'stars > 3.5' compares text" in refusal(
        changed("source.counters.spend", counter)
    )
    counter = {"by": "user", "of": "CASE WHEN stars > 3.5 THEN 1 ELSE 0 END", "take": "sum"}
    assert "source.counters.spend.of: " in refusal(changed("source.counters.spend", counter))


def test_derived_columns_are_compared_by_what_they_are() -> None:
    text = changed("source.derived.shown", "UPPER(stars)")
    message = refusal(changed("tasks.good.label", "shown > 3.5", text))
    assert message.endswith(
        "write TRY_CAST(shown AS DOUBLE), which is null where it is no number"
    )  # it has no type to set
    number = changed("source.derived.shown", "CAST(stars AS DOUBLE) / 2")
    accepted(changed("tasks.good.label", "shown > 3.5", number))
    assert "compares text (stars) with a number (shown)" in refusal(
        changed("tasks.good.label", "stars > shown", number)
    )
    assert "compares text (stars) with a number (price)" in refusal(changed("tasks.good.label", "stars > price * 2"))
    counted = changed("source.counters.seen", {"by": "user", "take": "count"})
    half = changed("source.derived.half", "seen / 2", counted)
    assert "with a number (half)" in refusal(changed("tasks.good.label", "stars = half", half))
    assert "with a number (click_count)" in refusal(changed("tasks.good.label", "stars = click_count"))
    assert "with a truth value (click)" in refusal(changed("tasks.good.label", "stars = click"))


def test_a_column_that_may_hold_lists_is_checked_with_the_first_block() -> None:
    content = changed("source.derived.words", "CASE WHEN recent > 3.5 THEN 1 ELSE 0 END")
    assert "recent" in accepted(content).raw_columns
    with pytest.raises(UserError, match=r"source.derived.words: .+ compares text \(recent\) with a number"):
        compute.derived(pl.DataFrame({"recent": ["10"]}), {"words": content["source"]["derived"]["words"]})


def test_the_schemas_of_the_repository_compare_numbers_with_numbers() -> None:
    files = sorted((Path(__file__).parents[2] / "jobs" / "conf" / "data").glob("*.yaml"))
    assert files
    for file in files:
        content = read_yaml(file)
        parents = [read_yaml(file.with_stem(name)) for name in content.get("defaults", ()) if name != "_self_"]
        schemas = [{"schema": part["schema"]} for part in (*parents, content)]  # without what Hydra alone resolves
        accepted(OmegaConf.to_container(OmegaConf.merge(*schemas))["schema"])
