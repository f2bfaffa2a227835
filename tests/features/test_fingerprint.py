"""The fingerprint of a schema: what changes it and what does not, and the schemas that are shipped."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from test_schema import BASE, changed

from features.errors import UserError
from features.schema.schema import Schema

CONF = Path(__file__).parents[2] / "jobs" / "conf" / "data"


def shuffled(value: Any, rng: random.Random) -> Any:
    """The same mappings with their keys in another order."""
    if isinstance(value, dict):
        keys = rng.sample(list(value), len(value))
        return {key: shuffled(value[key], rng) for key in keys}
    return value


def test_comments_order_of_keys_and_defaults_written_out_do_not_change_the_fingerprint(tmp_path):
    plain = Schema.parse(BASE, where="mine.yaml")
    text = yaml.safe_dump(BASE, sort_keys=False)
    (tmp_path / "commented.yaml").write_text("# a comment\n" + text.replace("\ndense:", "\n# another\n\ndense:"))
    assert Schema.load(tmp_path / "commented.yaml").fingerprint == plain.fingerprint
    for seed in range(5):
        other = shuffled(BASE, random.Random(seed))
        for section in ("dense", "categorical", "bag", "tasks"):
            other[section] = {name: other[section][name] for name in BASE[section]}
        assert Schema.parse(other, where="mine.yaml").fingerprint == plain.fingerprint
    written_out = plain.model_dump(mode="json")
    # A feature of a shared table has no settings of its own to write out.
    for feature in (written_out["categorical"]["item"], written_out["bag"]["recent"]):
        for key in ("dim", "vocabulary", "hash", "bins", "managed"):
            del feature[key]
    # Nor has a binary task a loss or a transform.
    for task in written_out["tasks"].values():
        if task["kind"] == "binary":
            del task["loss"], task["transform"]
    assert Schema.parse(written_out, where="mine.yaml").fingerprint == plain.fingerprint
    assert len(plain.fingerprint) == 16
    assert int(plain.fingerprint, 16) >= 0


def test_schemas_of_one_fingerprint_give_a_model_its_inputs_and_logits_in_one_order():
    """A job lets artifacts of an equal fingerprint meet, so the order of inputs may not differ between them."""
    content = changed("dense.age", {}, changed("tasks.zeal", {"kind": "regression", "label": "stars"}))
    orders: dict[str, set[tuple]] = {}
    for seed in range(20):
        s = Schema.parse(shuffled(content, random.Random(seed)), where="mine.yaml")
        orders.setdefault(s.fingerprint, set()).add((*s.columns, *s.tasks))
    assert {len(found) for found in orders.values()} == {1}


CHANGES = [
    ("source.files", "log.csv"), ("source.key", "user"), ("source.trim", True), ("source.missing", ["-"]),
    ("source.delimiter", ";"), ("source.row_id", "id"), ("source.types", {"user": "int"}),
    ("source.outcomes.click.files", "clicks.csv"), ("source.outcomes.click.columns", {"dwell": "int"}),
    ("source.quote", None), ("source.multiline", True), ("source.timezone", "Asia/Tokyo"), ("source.format", "jsonl"),
    ("source.types", {"user": "time"}), ("source.outcomes.click.time", "at"), ("source.outcomes.click.take", "last"),
    ("source.outcomes.click.duplicates", "keep"), ("source.outcomes.click.late", "keep"),
    ("source.outcomes.click.open_window", "keep"), ("source.outcomes.click.open_window", "leave_out"),
    ("source.outcomes.click.read", {"delimiter": ";"}), ("tables.item.vocabulary.unknown", 2),
    ("source.outcomes.click", {"files": "click-*.csv", "key": "id", "time": "at", "window": "7d"}),
    ("bag.recent.history", {"user": "user", "item": "item"}), ("bag.recent.history", {"user": "id", "item": "item"}),
    ("source.derived.hour", "CAST(FLOOR(time / 3600) % 12 AS BIGINT)"), ("tables.item.dim", 12),
    ("tables.item.vocabulary.min_count", 3), ("tables.item.vocabulary.max_size", 9), ("dense.price.transform", "none"),
    ("dense.price.standardize", False), ("dense.price.missing_flag", True), ("dense.price.column", "cost"),
    ("dense.more", {}), ("categorical.user.hash", 11), ("bag.recent.max_length", 4), ("bag.recent.separator", ","),
    ("tasks.click.label", "NOT click"), ("tasks.click.loss_weight", 2), ("tasks.good.kind", "regression"),
    ("tasks.good.observed_when", "click"), ("weight", "2"), ("split.test_from", "2026-01-03T01:00"),
    ("split", {"by": "hash", "key": "id", "valid": 0.1, "test": 0.1}),
    ("source.counters", {"seen": {"by": "user", "take": "count"}}),
    ("source.counters", {"seen": {"by": "user", "take": "count", "decay": "1d"}}),
]  # fmt: skip


def test_any_other_value_changes_the_fingerprint():
    contents = [BASE, *(changed(path, value) for path, value in CHANGES)]
    prints = [Schema.parse(content, where="mine.yaml").fingerprint for content in contents]
    assert len(set(prints)) == len(prints)


def test_a_schema_written_as_a_dataset_does_and_read_again_is_the_same(tmp_path):
    for name in ("census", "demo"):
        schema = shipped(name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(schema.model_dump(mode="json", exclude_unset=True), sort_keys=False))
        again = Schema.load(path)
        assert again == schema
        assert again.fingerprint == schema.fingerprint
        assert json.dumps(list(again.dense)) == json.dumps(list(schema.dense))


def test_dates_are_utc_whether_quoted_or_not_and_whatever_the_machines_zone(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    prints = set()
    for i, day in enumerate(['"2026-01-02"', "2026-01-02", "2026-01-02T00:00:00", '"2026-01-02T00:00:00+00:00"']):
        content = yaml.safe_dump(changed("split.valid_from", "DAY")).replace("DAY", day)
        (tmp_path / f"{i}.yaml").write_text(content)
        schema = Schema.load(tmp_path / f"{i}.yaml")
        assert schema.split.valid_from.isoformat() == "2026-01-02T00:00:00+00:00"
        prints.add(schema.fingerprint)
    assert len(prints) == 1


def test_the_earlier_name_of_a_key_is_read_with_one_warning_and_the_same_fingerprint(caplog):
    old = Schema.parse(changed("source.outcomes.click.young", "leave_out"), where="mine.yaml")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "`young` is now `open_window`" in caplog.text
    caplog.clear()
    new = Schema.parse(changed("source.outcomes.click.open_window", "leave_out"), where="mine.yaml")
    assert not caplog.records
    assert old == new
    assert old.fingerprint == new.fingerprint


def test_a_key_under_both_of_its_names_is_refused():
    both = changed("source.outcomes.click.young", "leave_out")
    both["source"]["outcomes"]["click"]["open_window"] = "keep"
    with pytest.raises(UserError, match="young is the earlier name of open_window; remove it"):
        Schema.parse(both, where="mine.yaml")


# What is shipped


def shipped(name: str) -> Schema:
    content = OmegaConf.load(CONF / f"{name}.yaml")
    return Schema.parse(OmegaConf.to_container(content, resolve=False)["schema"], where=f"{name}.yaml")


def test_census_is_what_the_readme_of_its_data_says():
    schema = shipped("census")
    assert schema.source.files == "census-income.test.gz"
    assert len(schema.source.columns) == 42
    # Seven numbers; five columns are numbers that name categories; label columns and instance_weight are never inputs.
    assert list(schema.dense) == [
        "age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked",
    ]  # fmt: skip
    assert {"det_ind_code", "det_occ_code", "own_or_self", "vet_benefits", "year"} <= set(schema.categorical)
    unused = set(schema.source.columns) - set(schema.dense) - set(schema.categorical)
    assert unused == {"income_50k", "marital_stat", "education", "instance_weight"}
    assert list(schema.tasks) == ["income", "never_married", "college"]
    assert (schema.split.train, schema.split.valid, schema.split.test) == ([0, 1, 2, 3, 4, 5], [6, 7], [8, 9])


def test_demo_has_every_kind_of_thing_a_schema_can_say():
    schema = shipped("demo")
    assert schema.dense
    assert schema.categorical
    assert schema.bag
    assert schema.source.outcomes.keys() == {"click", "conversion"}
    assert {t.kind for t in schema.tasks.values()} == {"binary", "regression"}
    assert schema.table_of("item_id") == schema.table_of("recent_items") == "item"
    assert not schema.outcome_columns.keys() & {f.column or n for n, f in {**schema.dense, **schema.sparse}.items()}
