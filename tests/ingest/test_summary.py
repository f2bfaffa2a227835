"""The end of jobs.preprocess: what every job says, and what only those say that have something to warn of."""

import csv
import gzip
from typing import Any

import pyarrow as pa
import pytest
from dataset_by_hand import SCHEMA, draw_rows, fit_encoders, write_dead_letters, write_manifest, write_shard
from ingest_runs import no_beam, run

from features.fit.split_counts import FeatureCounts, count_features, summed
from features.schema.schema import Schema
from pipeline.dataset.card.card import card, read_card, with_splits
from pipeline.dataset.card.summary import summary
from pipeline.dataset.entries import DeadLetterExample, SideTableCounts
from pipeline.dataset.manifest import Manifest


@pytest.fixture
def made(tmp_path) -> tuple[Manifest, dict[str, Any]]:
    """A manifest of 100 train rows, 11 left out and five bad ones, and its card."""
    rows = draw_rows(100)
    encoders, statistics = fit_encoders(rows)
    shard = write_shard(tmp_path, "train/part.parquet", "train", encoders.encode(rows))
    letters = [write_dead_letters(tmp_path, "impressions", ["bad"] * 4), write_dead_letters(tmp_path, "click", ["bad"])]
    return write_manifest(tmp_path, [shard], letters), card(SCHEMA, encoders, statistics)


def lines_of(made: tuple[Manifest, dict[str, Any]], splits: Any = None, **changes: Any) -> list[str]:
    manifest, found = made
    plain: dict[str, Any] = {"absent_days": {}, "undecided": {}, "dead_letter_examples": {}}
    return summary(manifest.model_copy(update=plain | changes), found | ({"splits": splits} if splits else {}))


def test_it_says_where_every_row_went(made):
    lines = lines_of(made)
    clicks = sum(draw_rows(100)["label.click"].to_pylist())
    assert lines[0].startswith("train         100 rows   mean label: click ")
    assert f"click {clicks / 100:.4f} of 100, bought " in lines[0]
    assert lines[1:3] == [f"{split:5}           0 rows   mean label: -" for split in ("valid", "test")]
    assert lines[3:] == [
        "impressions: 115 rows read, 100 in splits, 11 left out (window of click still open), 4 bad",
        "click: 81 rows read, 70 joined, 2 duplicate, 0 early, 3 late, 5 unmatched, 1 bad",
        "bad             3 rows   3 columns instead of 9",
        "bad             2 rows   price: 'x' is not a number",
    ]


def test_examples_stand_beside_their_reasons_and_rare_reasons_are_counted(made):
    reasons = {f"reason {n}": 10 - n for n in range(7)}
    examples = {
        "reason 0": DeadLetterExample(file="/logs/a.csv", line=7, reason="reason 0"),
        "reason 1": DeadLetterExample(file="/logs/b.csv", line=8, reason="x: " + "y" * 300),
    }
    lines = lines_of(made, dead_letters=reasons, dead_letter_examples=examples)[5:]
    evil = DeadLetterExample(file="/logs/a\n.csv", line=7, reason="x: '\x1b[2J\n' is not a number")
    assert lines_of(made, dead_letters={"evil\r": 1}, dead_letter_examples={"evil\r": evil})[5:] == [
        r"bad             1 rows   evil\x0d; the first: a\x0a.csv, line 7: x: '\x1b[2J\x0a' is not a number"
    ]
    assert lines[0] == "bad            10 rows   reason 0; the first: a.csv, line 7"
    assert lines[1] == "bad             9 rows   reason 1; the first: b.csv, line 8: x: " + "y" * 156 + "…"
    assert lines[2] == "bad             8 rows   reason 2"
    assert lines[5] == "bad             9 rows   2 other reasons (jobs.inspect lists them)"
    assert len(lines) == 6


def test_ids_that_train_has_not_seen_are_named_the_worst_first(made):
    made[1]["ids"] = {f"f{n}": {} for n in range(8)}
    splits = {
        "valid": {f"f{n}": {"missing": 0.0, "unknown": 0.02 * n} for n in range(7)},
        "test": {"f2": {"missing": 0.0, "unknown": 0.876}, "f7": {"missing": 0.0}},
    }
    lines = [line for line in lines_of(made, splits) if line.startswith("unseen ids")]
    assert lines[0] == "unseen ids  f2: 4.00% of valid, 87.6% of test (values outside the vocabulary)"
    assert [line.split()[2] for line in lines] == ["f2:", "f6:", "f5:", "f4:", "f3:"]
    for found in splits["valid"].values():
        found["unknown"] = 0.01
    splits["test"]["f2"]["unknown"] = 0.005
    assert not [line for line in lines_of(made, splits) if line.startswith("unseen ids")]


def test_what_is_not_known_and_what_is_absent_is_said(made):
    days = [f"2026-03-{n:02}" for n in range(1, 30, 2)]
    lines = lines_of(
        made,
        complete_until={"click": 1_772_323_200},
        undecided={"click": {"window still open": 30, "files of a day absent": 1200}},
        absent_days={"click": days, "impressions": ["2026-02-01..2026-02-07"]},
    )
    kept = lines_of(made, absent_days={"click": days[:1]})  # of an outcome that hides no label for it
    assert kept[-1] == "warning  click: no file of 2026-03-01"
    assert lines[4].endswith(", 1 bad; complete until 2026-03-01T00:00:00Z")
    assert lines[5] == "click: unknown for 1,230 impressions: 30 (window still open), 1,200 (files of a day absent)"
    assert lines[-2:] == [
        "warning  click: no file of 2026-03-01, 2026-03-03, 2026-03-05, 2026-03-07, 2026-03-09 and 10 more; "
        "where the day had no rows, set open_window: keep",
        "warning  impressions: no file of 2026-02-01..2026-02-07",
    ]
    none = dict.fromkeys(("joined", "duplicate", "early", "late"), 0)
    assert lines_of(made, outcomes={"click": none | {"unmatched": 80}})[-1].endswith(
        "none of its rows belongs to an impression"
    )
    assert lines_of(made, outcomes={"click": none}, read={"impressions": 115})[-1].endswith(
        "its files are empty: every impression counts as one without it"
    )
    all_bad = lines_of(made, outcomes={"click": none | {"unmatched": 0}})
    assert all_bad[-1] == "warning  click: none of its rows belongs to an impression"


def test_the_share_of_unmatched_keys_is_of_all_impressions(made):
    counts = {"rows": 9, "keys": 9, "duplicates": 0, "unmatched_keys": 3, "missing_key_rows": 40}
    items = SideTableCounts(matched_rows=30, unmatched_rows=20, early_rows=10, **counts)
    assert lines_of(made, side_tables={"item": items})[-1] == (
        "warning  item: 20.0% of the impressions have a key without a row here (3 keys)"
    )


def test_of_many_features_and_columns_with_a_warning_the_first_are_named(made):
    made[1]["ids"] = {f"f{n}": made[1]["ids"]["city"] | {"markers": {"NULL": 3}} for n in range(9)}
    lines = lines_of(made, absent_columns={"impressions": {f"c{n}": 2 for n in range(7)}})
    assert [line.split(":")[0] for line in lines[-12:]] == [
        *["warning  impressions"] * 6, *(f"warning  f{n}" for n in range(5)),
        "warning  4 other features have such values, too (jobs.inspect lists them)",
    ]  # fmt: skip
    assert lines[-7] == "warning  impressions: files lack 2 other columns, too (jobs.inspect lists them)"


def test_features_that_drifted_are_listed(made):
    line = {"psi": 0.3, "chance": 0.0, "missing": 0.1, "missing_before": 0.0, "unknown": None, "unknown_before": None}
    drift = [{"feature": f"f{n}", "verdict": "shifted" if n < 7 else "stable"} | line for n in range(9)]
    drift[0] |= {"unknown": 0.5, "unknown_before": 0.25}
    made[1]["drift"] = drift
    lines = [line for line in lines_of(made) if line.startswith("drift")]
    assert lines[0] == "drift  f0 shifted: PSI 0.300, missing 10.0% (was 0.0%), unknown 50.0% (was 25.0%)"
    assert lines[1] == "drift  f1 shifted: PSI 0.300, missing 10.0% (was 0.0%)"
    assert lines[5:] == ["drift  of 2 other features (jobs.inspect lists them)"]


def test_counts_of_a_split_are_those_of_a_loop_and_those_of_parts_add_up():
    rows = draw_rows(600, cities=90)
    encoders, _ = fit_encoders(rows.slice(0, 200))
    parts = [rows.slice(start, 130) for start in range(200, 600, 130)]
    found = summed(count_features(encoders, part, encoders.encode(part)) for part in parts)
    mine = rows.slice(200).to_pylist()
    known = {name: set(encoders.vocabularies[name].to_pylist()) for name in ("city", "tags")}
    cities = [row["city"] for row in mine if row["city"] is not None]
    tags = [tag for row in mine for tag in row["tags"]]
    prices = [row["price"] for row in mine if row["price"] is not None]
    ages = [row["age"] for row in mine if row["age"] is not None]
    assert found == {
        "price": FeatureCounts(400, 400 - len(prices), len(prices), total=pytest.approx(sum(prices))),
        "city": FeatureCounts(400, 400 - len(cities), len(cities), sum(city not in known["city"] for city in cities)),
        "user": FeatureCounts(400, 0, 400),  # hashed: nothing is unknown
        "age": FeatureCounts(400, 400 - len(ages), len(ages), total=pytest.approx(sum(ages))),
        "tags": FeatureCounts(
            400, sum(not row["tags"] for row in mine), len(tags), sum(t not in known["tags"] for t in tags)
        ),
    }
    assert found["city"].unknown
    splits = with_splits({}, {"test": found})["splits"]["test"]
    assert splits["city"] == {"missing": (400 - len(cities)) / 400, "unknown": found["city"].unknown / len(cities)}
    assert splits["price"]["mean"] == pytest.approx(sum(prices) / len(prices))
    none = rows.set_column(0, "price", pa.nulls(600, pa.float64()))
    nothing = with_splits({}, {"test": count_features(encoders, none, encoders.encode(none))})["splits"]["test"]
    assert nothing["price"] == {"missing": 1.0, "mean": None}


def test_the_example_of_a_reason_is_its_first_bad_row_by_file_and_line(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    for number, bad in ((0, (57, 90)), (1, (3,))):
        rows = [f"{200 * number + n},{'x' if n in bad else 1},2" for n in range(100)]
        (folder / f"log-{number}.csv").write_text("\n".join(["id,x,y", *rows, ""]))
    content = {
        "source": {"files": "log-*.csv", "row_id": "id"},
        "dense": {"x": {}},
        "tasks": {"y": {"kind": "binary", "label": "y = '2'"}},
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    }
    with no_beam():
        found = run(folder, tmp_path / "out", content, max_bad_fraction=0.1, unit_bytes=200).dead_letter_examples
    [example] = found.values()
    line = (folder / "log-0.csv").read_text().split("\n").index("57,x,2") + 1
    assert (example.file, example.line) == (str(folder / "log-0.csv"), line)


@pytest.mark.parametrize("order", ["shuffled", "time", "input"])
def test_a_job_counts_valid_and_test_whatever_the_order_of_its_rows(order, small_log, small_content, tmp_path):
    with no_beam():
        run(small_log, tmp_path / "out", small_content(), order=order, unit_bytes=3000, rows_per_shard=70)
    found = read_card(tmp_path / "out", Schema.parse(small_content(), "small.yaml"))["splits"]
    assert list(found) == ["valid", "test"]
    days = []
    for name in ("impressions-1.csv", "impressions-2.csv.gz", "impressions-3.csv"):
        with (gzip.open if name.endswith(".gz") else open)(small_log / name, "rt", newline="") as file:
            days.append(list(csv.DictReader(file)))
    train = {row["city"] for row in days[0]} - {"NA"}
    for split, rows in zip(("valid", "test"), days[1:], strict=True):
        cities = [row["city"] for row in rows if row["city"] != "NA"]
        prices = [float(row["price"]) for row in rows if row["price"]]
        assert found[split]["city"]["missing"] == (300 - len(cities)) / 300
        assert found[split]["city"]["unknown"] == sum(city not in train for city in cities) / len(cities) > 0.2
        assert found[split]["price"]["missing"] == (300 - len(prices)) / 300
        assert found[split]["price"]["mean"] == pytest.approx(sum(prices) / len(prices))
        assert found[split]["recent"] == {"missing": 0.2, "unknown": 0.0}
        assert found[split]["user"] == {"missing": 0.0}


def test_a_task_without_a_label_in_train_is_named_unless_no_task_has_one(made):
    observed = {"train": {"click": 100, "bought": 0}}
    assert lines_of(made, observed=observed)[-1] == (
        "warning  task bought: no train row has a label; check its label, observed_when and given"
    )
    assert not any("no train row" in line for line in lines_of(made, observed={"train": {"click": 0, "bought": 0}}))
