"""The schema: what is refused and how it is said, and what a schema that is not refused means."""

import copy
from typing import Any

import pytest

from features.errors import UserError
from features.schema.schema import Schema

BASE: dict[str, Any] = {
    "source": {
        "files": "log-*.csv",
        "key": "id",
        "outcomes": {"click": {"files": "click-*.csv", "key": "id", "columns": {"dwell": "float"}}},
        "derived": {"hour": "CAST(FLOOR(time / 3600) % 24 AS BIGINT)"},
    },
    "tables": {"item": {"dim": 4, "vocabulary": {"min_count": 2}}},
    "dense": {"price": {"transform": "log1p"}},
    "categorical": {"user": {"hash": 10}, "item": {"table": "item"}, "hour": {}},
    "bag": {"recent": {"table": "item", "max_length": 3}},
    "tasks": {"click": {"kind": "binary", "label": "click"}, "good": {"kind": "binary", "label": "stars = '5'"}},
    "event_time": "time",
    "split": {"by": "time", "valid_from": "2026-01-02", "test_from": "2026-01-03"},
}

FORMAT = ["format", "columns", "delimiter", "quote", "multiline", "missing", "trim", "timezone"]


def changed(path: str, value: Any, base: dict[str, Any] = BASE) -> dict[str, Any]:
    """BASE with the value at a dotted path replaced; parents are made where they are missing."""
    content = copy.deepcopy(base)
    *parents, last = path.split(".")
    place = content
    for part in parents:
        place = place.setdefault(part, {})
    place[last] = value
    return content


def without(path: str) -> dict[str, Any]:
    content = copy.deepcopy(BASE)
    *parents, last = path.split(".")
    place = content
    for part in parents:
        place = place[part]
    del place[last]
    return content


def refusal(content: Any) -> str:
    with pytest.raises(UserError) as caught:
        Schema.parse(content, where="mine.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("mine.yaml: ")
    return message


def test_the_base_of_these_tests_is_a_schema():
    schema = Schema.parse(BASE, where="mine.yaml")
    assert list(schema.sparse) == ["user", "item", "hour", "recent"]
    assert schema.table_of("recent") == "item"
    assert set(schema.all_tables) == {"item", "user", "hour"}
    assert set(schema.raw_columns) == {"price", "user", "item", "recent", "id", "time", "stars"}


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("", ["source", "tables", "dense", "categorical", "bag", "tasks", "weight", "event_time", "split"]),
        ("source.", ["files", "types", "row_id", "key", "outcomes", "counters", "derived", *FORMAT]),
        ("source.counters.ctr.", ["by", "take", "of", "when", "window", "decay", "smoothing"]),
        (
            "source.outcomes.click.",
            ["files", "key", "columns", "time", "window", "take", "duplicates", "late", "open_window"],
        ),
        ("source.outcomes.click.read.", FORMAT),
        ("source.outcomes.read.", ["files", "key", "window", "read"]),
        ("tables.item.", ["dim", "vocabulary", "hash"]),
        ("tables.item.vocabulary.", ["min_count", "max_size", "unknown"]),
        ("tables.item.managed.", ["rows", "evict"]),
        ("dense.price.", ["column", "transform", "standardize", "missing_flag"]),
        ("categorical.user.", ["dim", "vocabulary", "hash", "column", "table"]),
        ("categorical.hour.vocabulary.", ["min_count", "max_size", "unknown"]),
        ("categorical.vocabulary.", ["dim", "vocabulary", "hash", "column", "table"]),
        ("bag.recent.", ["separator", "max_length", "table", "column", "history"]),
        ("bag.recent.history.", ["user", "item", "when"]),
        ("bag.history.", ["separator", "max_length", "table", "column", "history"]),
        ("tasks.click.", ["kind", "label", "observed_when", "loss_weight"]),
        ("split.", ["by", "valid_from", "test_from"]),
    ],
)
def test_an_unknown_key_is_refused_at_every_level_with_what_is_allowed_there(place, allowed):
    message = refusal(changed(f"{place}colour", "blue"))
    assert f"{place}colour: unknown key" in message
    assert set(allowed) <= set(message.partition("allowed are ")[2].split(", "))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("tasks.click.kind", "ordinal", ["tasks.click.kind", "'binary'", "'regression'"]),
        ("tasks", {}, ["tasks", "at least 1"]),
        ("tasks.click.loss_weight", -1, ["tasks.click.loss_weight", "greater than or equal to 0"]),
        ("tasks.click.loss_weight", float("nan"), ["tasks.click.loss_weight"]),
        ("tasks.click.loss_weight", float("inf"), ["tasks.click.loss_weight"]),
        ("dense.price.transform", "sqrt", ["dense.price.transform", "'none'", "'log1p'"]),
        ("categorical.user.hash", 0, ["categorical.user.hash", "greater than or equal to 1"]),
        ("categorical.hour.dim", 0, ["categorical.hour.dim", "greater than or equal to 1"]),
        ("categorical.hour.dim", 2, ["categorical.hour.dim: 2 is not a multiple of 4", "make it 4"]),
        ("bag.recent", {"dim": 18}, ["bag.recent.dim: 18 is not a multiple of 4", "make it 16 or 20"]),
        ("tables.item.dim", 65_535, ["tables.item.dim: 65535 is not a multiple of 4", "make it 65532 or 65536"]),
        ("categorical.hour.vocabulary", {"min_count": 0}, ["categorical.hour.vocabulary.min_count"]),
        ("bag.recent.max_length", 0, ["bag.recent.max_length"]),
        ("source.delimiter", "||", ["source.delimiter", "at most 1"]),
        ("source.delimiter", "¦", ["source.delimiter: '¦' is not one ASCII character within a line"]),
        ("source.quote", "“", ["source.quote: '“' is not one ASCII character within a line, such as , or \\t"]),
        ("source.quote", "\n", [r"source.quote: '\n' is not one ASCII character"]),
        ("source.quote", ",", ["source: quote and delimiter are both ',': change one of them, or set quote: null"]),
        (
            "source.outcomes.click.read",
            {"delimiter": "\r"},
            ["source.outcomes.click.read.delimiter", "is not one ASCII"],
        ),
        ("source.delimiter", "", ["source.delimiter", "at least 1"]),
        ("source.quote", "''", ["source.quote", "at most 1"]),
        ("source.multiline", "perhaps", ["source.multiline", "boolean"]),
        ("source.timezone", "Europe/Atlantis", ["source.timezone", "Europe/Atlantis is no time zone"]),
        ("source.timezone", "localtime", ["source.timezone", "localtime is no time zone"]),
        ("source.types", {"price": "decimal"}, ["source.types.price", "'int'", "'float'", "'string'", "'time'"]),
        ("source.outcomes.click.take", "mean", ["source.outcomes.click.take", "'first'", "'last'", "'sum'", "'max'"]),
        ("source.outcomes.click.duplicates", "count", ["source.outcomes.click.duplicates", "'drop'", "'keep'"]),
        ("source.outcomes.click.late", "move", ["source.outcomes.click.late", "'drop'", "'keep'"]),
        (
            "source.outcomes.click.open_window",
            "drop",
            ["source.outcomes.click.open_window", "'unobserved'", "'leave_out'", "'keep'"],
        ),
        ("source.outcomes.click.read", {"delimiter": "ab"}, ["source.outcomes.click.read.delimiter", "at most 1"]),
        ("source.outcomes.click.window", "1h", ["source.outcomes.click", "window needs time"]),
        ("source.outcomes.click.columns", {"count": "int"}, ["source.outcomes.click", "count and time", "join adds"]),
        ("source.outcomes.click.columns", {"time": "int"}, ["source.outcomes.click", "count and time", "join adds"]),
        (
            "source.outcomes.click.columns",
            {"id": "int"},
            ["source.outcomes.click", "id is read as key or time already"],
        ),
        ("tables.item.vocabulary.unknown", 0, ["tables.item.vocabulary.unknown", "greater than or equal to 1"]),
        ("bag.recent.history", {"user": "user"}, ["bag.recent.history.item", "required"]),
        ("split.by", "moon", ["split", "'hash'", "'row_index'", "'time'"]),
        ("split.valid_from", "soon", ["split.valid_from", "soon"]),
        ("split.test_from", "2026-01-01", ["split", "valid_from must not be after test_from"]),
        ("split", {"by": "hash", "key": "id", "valid": 1.5, "test": 0}, ["split.valid", "less than 1"]),
        ("split", {"by": "hash", "key": "id", "valid": 0.5, "test": 0.5}, ["split", "valid", "test", "less than 1"]),
        ("split", {"by": "hash", "valid": 0.5, "test": 0.5}, ["split.key", "required"]),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_key(path, value, says):
    message = refusal(changed(path, value))
    assert [word for word in says if word not in message] == []


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("45s", 45), ("30m", 1800), ("12 h", 43_200), ("7d", 604_800), ("2w", 1_209_600), (90, 90), ("90", 90)],
)
def test_a_window_is_seconds_or_a_number_with_a_unit(given, seconds):
    click = {"files": "c", "key": "id", "time": "at", "window": given}
    assert Schema.parse(changed("source.outcomes.click", click), "mine.yaml").source.outcomes["click"].window == seconds


@pytest.mark.parametrize("given", ["soon", "1y", "-1h", "0d", 0, -5, "1.5h", 1.5, "h"])
def test_what_is_no_length_of_time_is_no_window(given):
    click = {"files": "c", "key": "id", "time": "at", "window": given}
    assert "source.outcomes.click.window: " in refusal(changed("source.outcomes.click", click))


@pytest.mark.parametrize("take", ["sum", "min", "max"])
def test_outcomes_add_up_to_numbers_only(take):
    click = {"files": "c", "key": "id", "take": take, "columns": {"dwell": "float", "place": "string"}}
    assert f"take: {take} needs numbers, but column place is text" in refusal(changed("source.outcomes.click", click))
    Schema.parse(changed("source.outcomes.click", click | {"columns": {"dwell": "float", "seen": "time"}}), "mine.yaml")
    Schema.parse(changed("source.outcomes.click", click | {"take": "last"}), where="mine.yaml")


@pytest.mark.parametrize(
    "remainders",
    [
        {"train": [0, 1], "valid": [2], "test": [2, 3]},  # one twice
        {"train": [0, 1], "test": [3]},  # one never
        {"train": [0, 1, 2, 3, 4]},  # one too large
        {"train": [0, 1, 2, -1]},
    ],
)
def test_remainders_of_a_row_index_split_must_each_stand_once(remainders):
    assert "each of 0..3 once" in refusal(changed("split", {"by": "row_index", "modulo": 4, **remainders}))


@pytest.mark.parametrize("feature", ["dense", "categorical", "bag"])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_column_of_a_label_cannot_be_a_feature_of_any_kind_nor_under_another_name(feature, renamed):
    name, content = ("other", {"column": "stars"}) if renamed else ("stars", {})
    message = refusal(changed(f"{feature}.{name}", content))
    assert f"tasks.good.label uses column stars, which is also read by the feature {name}" in message


def test_a_label_cannot_reach_a_feature_through_derived_columns_on_either_side():
    sneaky = changed("source.derived.starry", "stars || '!'")
    assert "column stars" in refusal(changed("categorical.starry", {}, sneaky))
    assert "column stars" in refusal(changed("dense.bright", {"column": "starry"}, sneaky))
    # The label reads the derived column, the feature its source; and both the derived column itself.
    sneaky["tasks"]["good"]["label"] = "starry = '5!'"
    assert "column stars" in refusal(changed("categorical.stars", {}, sneaky))
    assert "starry" in refusal(changed("categorical.starry", {}, sneaky))


@pytest.mark.parametrize("column", ["click", "click_dwell"])
def test_an_outcome_cannot_be_a_feature_even_where_no_label_reads_it(column):
    content = changed("tasks.click.label", "other = '1'")
    message = refusal(changed(f"dense.{column}", {}, content))
    assert f"feature {column} reads {column}, an outcome that is known only after the impression" in message
    derived = changed("source.derived.late", f"CAST({column} AS BIGINT)", content)
    assert f"reads {column}, an outcome" in refusal(changed("dense.late", {}, derived))


def test_an_outcome_cannot_reach_a_feature_through_the_user_or_the_item_of_a_history():
    history = {"user": "user", "item": "item"}
    Schema.parse(changed("bag.recent.history", history), where="mine.yaml")
    for key in history:
        for column, says in (("click", "reads click, an outcome"), ("stars", "tasks.good.label uses column stars")):
            assert says in refusal(changed("bag.recent.history", history | {key: column}))
    # What came of earlier rows may well say which of them count.
    timed = changed("source.outcomes.click", {"files": "c", "key": "id", "time": "at", "window": "1d"})
    Schema.parse(changed("bag.recent.history", history | {"when": "click AND stars = '5'"}, timed), where="mine.yaml")


@pytest.mark.parametrize(
    "expression",
    [
        "stars IN (SELECT stars FROM read_csv('{file}'))",
        "stars IN (select stars from read_csv('{file}'))",
        "stars IN (FROM read_csv('{file}'))",
        "stars IN (/* */FROM read_csv('{file}'))",
        "\"'\" = (SELECT stars FROM read_csv('{file}')) OR \"'\" = ''",
        "stars = E'\\'' OR stars = (SELECT stars FROM read_csv('{file}')) OR stars = ''",
        "stars IN (WITH t AS (SELECT stars FROM read_csv('{file}')) SELECT * FROM t)",
    ],
)
@pytest.mark.parametrize("place", ["tasks.good.label", "tasks.good.observed_when", "source.derived.x", "weight"])
def test_an_expression_cannot_hold_a_query_that_reaches_a_file(expression, place, tmp_path):
    file = tmp_path / "stars"
    file.write_text("stars\n5\n")
    message = refusal(changed(place, expression.format(file=file)))
    assert f"mine.yaml: {place}: " in message
    assert "query" in message


@pytest.mark.parametrize("value", ["select", "a 'from' b", "from", "SELECT 1"])
def test_words_of_a_query_are_fine_within_a_text_or_a_quoted_column(value):
    quoted = value.replace("'", "''")
    Schema.parse(changed("tasks.good.label", f"stars = '{quoted}' OR \"{value}\" = '1'"), where="mine.yaml")


@pytest.mark.parametrize(
    "expression",
    [
        "stars > AVG(stars)",
        "COUNT(*) > 3",
        "SUM(stars) OVER (PARTITION BY id) > 3",
        "FIRST(stars)",
        "median (stars) = 1",
    ],
)
def test_an_expression_that_looks_at_other_rows_is_refused_because_its_value_would_depend_on_the_block(expression):
    assert "its row" in refusal(changed("tasks.good.label", expression))


@pytest.mark.parametrize("expression", ["stars =", "NOSUCH(stars)", "", "stars; stars", "COLUMNS('s.*') = '5'"])
def test_what_is_no_expression_is_refused_with_its_key(expression):
    assert "mine.yaml: tasks.good.label: " in refusal(changed("tasks.good.label", expression))


def test_a_shared_table_must_exist_and_holds_the_settings():
    assert "item.table is things, allowed are ['item']" in refusal(changed("categorical.item.table", "things"))
    assert "recent.table is things" in refusal(changed("bag.recent.table", "things"))
    message = refusal(changed("categorical.item", {"table": "item", "dim": 8, "hash": 5}))
    assert "categorical.item" in message
    assert "dim, hash belong to the shared table item" in message
    assert "tables.spare is used by no feature" in refusal(changed("tables.spare", {}))
    assert "tables.item exists" in refusal(changed("categorical.item", {}))


def test_ways_to_an_id_exclude_each_other():
    for place in ("tables.item", "categorical.hour"):
        for way in ({"vocabulary": {}}, {"managed": {"rows": 9}}):
            message = refusal(changed(place, {"hash": 5, **way}))
            assert place in message
            assert "one of vocabulary, hash, bins and managed" in message


def test_names_of_features_are_one_namespace_that_flags_and_fixed_columns_belong_to():
    assert "feature user is defined twice" in refusal(changed("dense.user", {}))
    flagged = changed("dense.price.missing_flag", True)
    assert "price_missing is defined twice" in refusal(changed("categorical.price_missing", {}, flagged))
    for taken in ("weight", "event_time", "row_id"):
        content = copy.deepcopy(BASE)
        content["categorical"][taken] = {"column": "other"}
        assert f"feature {taken}" in refusal(content)


def test_a_name_that_cannot_name_a_file_is_refused():
    for section, value in (("categorical", {"column": "other"}), ("tables", {})):
        content = copy.deepcopy(BASE)
        content[section]["../escape"] = value
        assert "../escape" in refusal(content)


def test_what_a_setting_needs_is_asked_for():
    assert "event_time is missing: a split by time needs it" in refusal(without("event_time"))
    assert "source.key is missing" in refusal(without("source.key"))
    assert "source.files" in refusal(without("source.files"))
    message = refusal(changed("source.outcomes.click.time", "at", timeless()))
    assert "event_time is missing: outcome click has a time" in message
    history = {"user": "user", "item": "item"}
    message = refusal(changed("bag.recent.history", history, timeless()))
    assert "event_time is missing: the history of bag recent" in message
    message = refusal(changed("bag.recent", {"column": "recent", "table": "item", "history": history}))
    assert "give one of column and history" in message
    nested = changed("source.derived.late", "hour > 20")
    assert "source.derived.late reads hour, which is derived itself" in refusal(nested)
    message = refusal(changed("source.columns", ["id", "time", "user", "item", "recent", "stars"]))
    assert "column price is used, but source.columns does not list it" in message


def timeless() -> dict[str, Any]:
    """BASE without an event time, and with a split that needs none."""
    split = {"by": "row_index", "modulo": 1, "train": [0]}
    return {key: value for key, value in BASE.items() if key != "event_time"} | {"split": split}


def test_the_files_of_an_outcome_are_written_as_the_impressions_are_unless_it_says_otherwise():
    columns = ["id", "time", "price", "user", "item", "recent", "stars"]
    own = {"files": "buy", "key": "id", "read": {"format": "jsonl", "timezone": "Asia/Tokyo"}}
    content = changed("source.delimiter", ";", changed("source.columns", columns, changed("source.outcomes.buy", own)))
    source = Schema.parse(changed("source.timezone", "Europe/Berlin", content), where="mine.yaml").source
    assert source.format_of(None).columns == columns
    click, buy = source.format_of("click"), source.format_of("buy")
    assert (click.format, click.delimiter, click.timezone, click.columns) == ("csv", ";", "Europe/Berlin", None)
    assert (buy.format, buy.delimiter, buy.timezone, buy.columns) == ("jsonl", ",", "Asia/Tokyo", None)


def test_a_schema_knows_what_to_read_and_what_joins_and_histories_add():
    click = {"files": "c", "key": "id", "time": "at", "columns": {"dwell": "float"}}
    content = changed("source.outcomes.buy", {"files": "b", "key": "id"}, changed("source.outcomes.click", click))
    content = changed("source.derived.long", "click_dwell > CAST(patience AS DOUBLE)", content)
    content = changed("tasks.bought", {"kind": "binary", "label": "buy", "observed_when": "long"}, content)
    content = changed("bag.before", {"history": {"user": "who", "item": "item", "when": "click"}}, content)
    schema = Schema.parse(content, where="mine.yaml")
    assert set(schema.raw_columns) == {
        "price", "user", "item", "recent", "id", "time", "stars", "patience", "who",
    }  # fmt: skip
    assert schema.outcome_columns == {
        "click": "click", "click_count": "click", "click_time": "click", "click_dwell": "click",
        "buy": "buy", "buy_count": "buy",
    }  # fmt: skip
    assert schema.outcomes_of("long AND stars = '5'") == {"click"}
    assert schema.outcomes_of("buy OR click_count > 1") == {"buy", "click"}
    assert schema.outcomes_of("stars = '5'") == set()
    assert schema.raw["before"].column == "item"
    assert schema.raw_types == {"price": "float", "time": "time"}


@pytest.mark.parametrize("content", [None, [], "text", 5])
def test_what_is_no_mapping_is_refused_in_one_line(content):
    assert "mine.yaml: : " not in refusal(content)


def test_every_fault_of_a_file_is_named_at_once():
    message = refusal(changed("tasks.click.kind", "x", changed("dense.price.colour", 1)))
    assert "tasks.click.kind" in message
    assert "dense.price.colour" in message


def test_a_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such schema file"):
        Schema.load(tmp_path / "none.yaml")
    for name, text in (("broken.yaml", "a: [1\nb: 2"), ("empty.yaml", ""), ("bytes.yaml", "a: \x00")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name) as caught:
            Schema.load(tmp_path / name)
        assert caught.value.args


@pytest.mark.parametrize(("setting", "value"), [("times", "ms"), ("optional", 0)])
def test_a_unit_or_default_of_a_column_that_nothing_reads_is_refused(setting, value):
    content = copy.deepcopy(BASE)
    content["source"][setting] = {"nothing_such": value}
    assert f"source.{setting}: column nothing_such is not read: fix or remove it" in refusal(content)


@pytest.mark.parametrize("section", ["outcomes", "tables"])
def test_what_files_of_a_stream_may_lack_is_checked_whatever_its_name(section: str):
    stream = {"files": "x.csv", "key": "id", "columns": {"n": "int"}, "read": {"optional": {"n": 1}}}
    content = changed("source." + section, {"a.b": stream})
    content["tasks"]["click"]["label"] = "1"
    Schema.parse(content, where="mine.yaml")
    stream["read"] = {"optional": {"n": "none"}}
    assert f"source.{section}.a.b.read.optional.n: 'none' is not an integer" in refusal(content)
