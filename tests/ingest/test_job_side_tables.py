"""Side tables of the whole job against dictionaries and bisect, in logs cut into many units, parts and buckets."""

import bisect
import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_runs import content_of, dead_letters_of, no_beam, refused, rows_by_id, rows_of, run, values_of

from features.errors import UserError
from pipeline.dataset.card.card import read_card
from pipeline.dataset.card.tables import tables
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.verify import verify
from pipeline.ingest import join_check
from pipeline.ingest.formats import text

pytestmark = pytest.mark.integration

BASE = 1_719_800_000  # July 2024
SMALL = st.integers(0, 60)
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Log:
    """Impressions in order, and the rows of an item table and of one of users in versions."""

    impressions: Rows
    items: Rows
    users: Rows


# Drawn logs. Few keys and seconds, so that all that can coincide does.


def some(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([None, *values])


@st.composite
def logs(draw: st.DrawFn) -> Log:
    count, item, user = draw(st.integers(1, 20)), some(*"abcdef"), some("7", "8", "9")
    impressions = [
        {"id": i, "at": BASE + draw(SMALL), "user": draw(user), "item": draw(item), "click": draw(st.integers(0, 1))}
        for i in range(count)
    ]
    brand, tags = some("x", "y", "ä ü"), st.lists(st.sampled_from("pqr"), max_size=3)
    row = st.fixed_dictionaries({"item": item, "brand": brand, "cost": some(0.5, 2.0, -3.25), "tags": tags})
    since = st.none() | SMALL.map(lambda second: BASE + second)
    version = st.fixed_dictionaries({"user": user, "since": since, "country": some("de", "fr"), "age": some(20, 31)})
    return Log(impressions, draw(st.lists(row, max_size=12)), draw(st.lists(version, max_size=12)))


# Files of tables, a format each.


def as_csv(rows: Rows, _: pa.Schema, names: list[str]) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells = ["|".join(row[name]) if isinstance(row[name], list) else row[name] for name in names]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return sink.getvalue().encode()


def as_jsonl(rows: Rows, _: pa.Schema, __: list[str]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: Rows, schema: pa.Schema, _: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def as_avro(rows: Rows, schema: pa.Schema, names: list[str]) -> bytes:
    kinds = {pa.string(): "string", pa.float64(): "double", pa.int64(): "long"}
    array = {"type": "array", "items": "string"}
    fields = [{"name": name, "type": ["null", kinds.get(schema.field(name).type, array)]} for name in names]
    sink = io.BytesIO()
    fastavro.writer(sink, {"type": "record", "name": "row", "fields": fields}, rows)
    return sink.getvalue()


FORMATS: dict[str, Callable[[Rows, pa.Schema, list[str]], bytes]] = {
    "csv": as_csv, "jsonl": as_jsonl, "parquet": as_parquet, "avro": as_avro,
}  # fmt: skip
ITEM = pa.schema({"item": pa.string(), "brand": pa.string(), "cost": pa.float64(), "tags": pa.list_(pa.string())})
USER = pa.schema({"user": pa.string(), "since": pa.int64(), "country": pa.string(), "age": pa.int64()})


def write_files(folder: Path, name: str, ending: str, rows: Rows, schema: pa.Schema) -> None:
    """Three files, the second of which has no row."""
    half = len(rows) // 2
    for number, part in enumerate([rows[:half], [], rows[half:]]):
        (folder / f"{name}-{number}.{ending}").write_bytes(FORMATS[ending](part, schema, schema.names))


def write_log(folder: Path, log: Log, ending: str) -> None:
    names = ["id", "at", "user", "item", "click"]
    for number, part in enumerate([log.impressions[:7], log.impressions[7:]]):
        (folder / f"log-{number}.csv").write_bytes(as_csv(part, ITEM, names))
    write_files(folder, "items", ending, log.items, ITEM)
    write_files(folder, "users", ending, log.users, USER)


def content_for(ending: str) -> dict[str, Any]:
    """A schema whose features show every column that is looked up."""
    item = {"files": "items-*", "key": "item", "columns": {"brand": "string", "cost": "float", "tags": "string"}}
    user = {"files": "users-*", "key": "user", "by": "who", "columns": {"country": "string", "age": "int"}}
    raw = {"standardize": False, "missing_flag": True}
    return {
        "source": {
            "files": "log-*", "row_id": "id",
            "derived": {
                "who": "CAST(\"user\" AS BIGINT) + 0", "shop": "item_brand || '/' || user_country", "odd": "id % 2 = 1",
            },
            "types": {"click": "int"}, "counters": {"brand_rows": {"by": "item_brand", "take": "count"}},
            "tables": {
                "item": item | {"read": {"format": ending}},
                "user": user | {"valid_from": "since", "read": {"format": ending}},
            },
        },
        "dense": {"item_cost": raw, "user_age": raw, "brand_rows": raw},
        "categorical": {"item_brand": {}, "user_country": {}, "shop": {}},
        "bag": {
            "tags": {"column": "item_tags"},
            "brands": {"history": {"user": "user_country", "item": "item_brand", "when": "item_cost > 0 AND odd"}},
        },
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    }  # fmt: skip


# The same by hand, one row at a time.


def expected_rows(log: Log) -> Rows:
    items = {row["item"]: row for row in log.items if row["item"] is not None}
    versions: dict[str, dict[int, dict[str, Any]]] = {}
    for row in log.users:
        if row["user"] is not None and row["since"] is not None:
            versions.setdefault(row["user"], {})[row["since"]] = row
    rows = []
    for seen in log.impressions:
        item = items.get(seen["item"], {})
        of_user = versions.get(seen["user"], {})
        place = bisect.bisect_right(sorted(of_user), seen["at"])
        user = of_user[sorted(of_user)[place - 1]] if place else {}
        brand, country = item.get("brand"), user.get("country")
        rows.append(
            {
                "row_id": seen["id"], "event_time": seen["at"], "label.click": seen["click"], "item_brand": brand,
                "item_cost": item.get("cost"), "user_age": user.get("age"), "user_country": country,
                "shop": None if brand is None or country is None else f"{brand}/{country}", "tags": item.get("tags") or [],
            }
        )  # fmt: skip
    for row in rows:
        earlier = [
            (other["event_time"], other["row_id"], other["item_brand"])
            for other in rows
            if other["user_country"] == row["user_country"] is not None
            and other["item_brand"] is not None
            and (other["item_cost"] or 0) > 0
            and other["row_id"] % 2
            and other["event_time"] < row["event_time"]
        ]
        same = [x for x in rows if x["item_brand"] == row["item_brand"] and x["event_time"] < row["event_time"]]
        row["brand_rows"] = None if row["item_brand"] is None else len(same)
        row["brands"] = [brand for *_, brand in sorted(earlier, reverse=True)]
    return rows


def expected_counts(log: Log) -> dict[str, dict[str, int]]:
    found = {}
    for name, rows, key in (("item", log.items, "item"), ("user", log.users, "user")):
        versioned = name == "user"
        kept = [row for row in rows if row[key] is not None and not (versioned and row["since"] is None)]
        known = {row[key]: min(r.get("since", BASE) for r in kept if r[key] == row[key]) for row in kept}
        counts: Counter[str] = Counter()
        for seen in log.impressions:
            which = "missing_key" if seen[key] is None else "unmatched" if seen[key] not in known else "matched"
            if which == "matched" and seen["at"] < known[seen[key]]:
                which = "early"
            counts[f"{which}_rows"] += 1
        distinct = {(row[key], row["since"] if versioned else 0) for row in kept}
        found[name] = {
            "rows": len(kept), "keys": len(known), "duplicates": len(kept) - len(distinct),
            **{f"{which}_rows": counts[f"{which}_rows"] for which in ("matched", "unmatched", "early", "missing_key")},
            "unmatched_keys": len({seen[key] for seen in log.impressions} - known.keys() - {None}),
        }  # fmt: skip
    return found


def found_rows(out: Path) -> Rows:
    names = {name: values_of(out, name) for name in ("item_brand", "user_country", "shop", "tags", "brands")}
    rows = rows_by_id(out)
    for row in rows:
        del row["weight"], row["split"]
        for name, values in names.items():
            cell = row[name]
            row[name] = [values[i] for i in cell] if isinstance(cell, list) else values.get(cell)
        for name in ("item_cost", "user_age", "brand_rows"):
            if row.pop(f"{name}_missing"):
                row[name] = None
    return rows


@given(
    logs(),
    st.sampled_from(["csv", "jsonl", "parquet"]),
    st.sampled_from([150, 1 << 20]),
    st.sampled_from([400, 1 << 20]),
)
@settings(max_examples=examples(10), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_broadcast_and_bucketed_tables_give_what_dictionaries_hold(
    log: Log, ending: str, unit_bytes: int, bucket_bytes: int
) -> None:
    expected = expected_rows(log)
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch, no_beam():
        patch.setattr(text, "BLOCK_BYTES", 300)
        folder = Path(name)
        write_log(folder, log, ending)
        for broadcast_bytes in (0, 1 << 20):
            out = folder / f"out-{broadcast_bytes}"
            manifest = run(
                folder, out, content_for(ending), max_bad_fraction=1, unit_bytes=unit_bytes, bucket_bytes=bucket_bytes,
                broadcast_bytes=broadcast_bytes, min_joined=0,
            )  # fmt: skip
            assert found_rows(out) == expected
            assert {n: c.model_dump() for n, c in manifest.side_tables.items()} == expected_counts(log)
            assert manifest.read["item"] == len(log.items)
            bad = [row for row in log.users if row["user"] is None or row["since"] is None]
            assert len([x for x in dead_letters_of(out) if x["stream"] == "user"]) == len(bad)
        assert rows_of(folder / "out-0", "train").equals(rows_of(out, "train"))


# The whole job, as a user runs it.

LOG = Log(
    [{"id": i, "at": BASE + i, "user": f"{7 + i % 3}", "item": "abcd"[i % 4], "click": i % 2} for i in range(40)],
    [{"item": key, "brand": f"of {key}", "cost": ord(key) / 2, "tags": ["t", key]} for key in "abc"],
    [
        {"user": user, "since": BASE + 15 * change, "country": f"{user}{change}", "age": 20 + change}
        for change in range(2)
        for user in ("7", "8")
    ],
)  # fmt: skip


@pytest.mark.parametrize("ending", FORMATS)
def test_tables_of_every_format_give_the_same_rows(ending: str, tmp_path: Path) -> None:
    write_log(tmp_path, LOG, ending)
    with no_beam():
        run(tmp_path, tmp_path / "out", content_for(ending))
    assert found_rows(tmp_path / "out") == expected_rows(LOG)


def test_two_workers_write_what_one_writes_of_a_broadcast_and_a_bucketed_table(tmp_path: Path) -> None:
    write_log(tmp_path, LOG, "parquet")
    sizes = [sum(path.stat().st_size for path in tmp_path.glob(f"{name}-*")) for name in ("items", "users")]
    assert sizes[0] != sizes[1]
    settings_ = {"unit_bytes": 300, "bucket_bytes": 1000, "broadcast_bytes": min(sizes)}
    run(tmp_path, tmp_path / "two", content_for("parquet"), workers=2, **settings_)
    with no_beam():
        run(tmp_path, tmp_path / "one", content_for("parquet"), **settings_)
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")
    assert found_rows(tmp_path / "two") == expected_rows(LOG)
    assert list(verify(Dataset(tmp_path / "two")))
    assert not (tmp_path / "two" / "scratch").exists()


def test_movielens_is_three_files(tmp_path: Path) -> None:
    """ratings.csv, movies.csv and users.csv, and the older u.item with a bar between the columns and no header."""
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,10,4.0,964982703\n1,11,2.5,964981247\n2,10,5.0,964982224\n3,99,3,964983815\n"
    )
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n10,"Heat, the",Action|Crime\n11,Up,Comedy|Animation\n')
    (tmp_path / "u.item").write_text("10|Heat (1995)|15-Dec-1995\n11|Up (2009)|29-May-2009\n")
    (tmp_path / "users.csv").write_text("userId,age,occupation\n1,25,writer\n2,61,\n")
    release = {"format": "csv", "delimiter": "|", "columns": ["movieId", "title", "released"]}
    content = {
        "source": {
            "files": "ratings.csv", "types": {"rating": "float"},
            "tables": {
                "movie": {"files": "movies.csv", "key": "movieId", "columns": {"title": "string", "genres": "string"}},
                "release": {"files": "u.item", "key": "movieId", "columns": {"released": "string"}, "read": release},
                "user": {"files": "users.csv", "key": "userId", "columns": {"age": "float", "occupation": "string"}},
            },
        },
        "dense": {"user_age": {"standardize": False, "missing_flag": True}},
        "categorical": {"movieId": {}, "occupation": {"column": "user_occupation"}, "released": {"column": "release_released"}},
        "bag": {"genres": {"column": "movie_genres"}},
        "tasks": {"like": {"kind": "binary", "label": "rating >= 4"}},
        "event_time": "timestamp",
        "split": {"by": "hash", "key": "userId", "valid": 0, "test": 0},
    }  # fmt: skip
    with no_beam():
        manifest = run(tmp_path, tmp_path / "out", content)
    out, rows = tmp_path / "out", rows_by_id(tmp_path / "out")
    assert [row["user_age"] for row in rows][:3] == [25, 25, 61]
    assert [row["user_age_missing"] for row in rows] == [0, 0, 0, 1]
    genres, occupations = values_of(out, "genres"), values_of(out, "occupation")
    assert [[genres[i] for i in row["genres"]] for row in rows] == [
        ["Action", "Crime"], ["Comedy", "Animation"], ["Action", "Crime"], [],
    ]  # fmt: skip
    assert [occupations.get(row["occupation"]) for row in rows] == ["writer", "writer", None, None]
    assert values_of(out, "released")[rows[1]["released"]] == "29-May-2009"
    table = next(t for t in tables(manifest, read_card(out)) if t.title == "Side tables")
    assert table.lines[0] == ["movie", "2", "2", "0", "75.0%", "25.0%", "0.0%", "0.0%", "1"]
    found = json.loads((out / "manifest.json").read_text())
    assert found["read"] == {"impressions": 4, "movie": 2, "release": 2, "user": 2}
    found["side_tables"]["movie"]["rows"] = 1
    (out / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="rows of movie by destination are 1, the manifest says 2"):
        Dataset(out)


@pytest.mark.parametrize("broadcast_bytes", [0, 1 << 20])
def test_lists_of_one_file_and_text_of_another_are_the_same_lists(tmp_path: Path, broadcast_bytes: int) -> None:
    (tmp_path / "log.csv").write_text("id,item,click\n0,a,1\n1,b,0\n2,a,0\n")
    (tmp_path / "items-1.jsonl").write_text('{"item": "a", "tags": ["p", "q|r"]}\n')
    (tmp_path / "items-2.jsonl").write_text('{"item": "b", "tags": "q|r;p"}\n')
    table = {"files": "items-*.jsonl", "key": "item", "columns": {"tags": "string"}, "read": {"format": "jsonl"}}
    content = {
        "source": {"files": "log.csv", "tables": {"item": table}},
        "bag": {"tags": {"column": "item_tags", "separator": ";", "dim": 4, "vocabulary": {"min_count": 1}}},
        "tasks": {"click": {"kind": "binary", "label": "click = '1'"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    with no_beam():
        run(tmp_path, tmp_path / "out", content, broadcast_bytes=broadcast_bytes)
    names = values_of(tmp_path / "out", "tags")
    assert [[names[i] for i in row["tags"]] for row in rows_by_id(tmp_path / "out")] == [
        ["p", "q|r"],
        ["q|r", "p"],
        ["p", "q|r"],
    ]


@pytest.mark.parametrize("broadcast_bytes", [0, 1 << 20])
def test_a_table_in_which_no_impression_has_a_row_stops_the_job_with_both_sides(tmp_path: Path, broadcast_bytes: int):
    (tmp_path / "log.csv").write_text("id,item,click\n" + "".join(f"{i},i{i % 3},{i % 2}\n" for i in range(30)))
    (tmp_path / "items.csv").write_text("item,cost\n" + "".join(f"{i},1.5\n" for i in range(3)))
    content: dict[str, Any] = {
        "source": {"files": "log.csv", "tables": {"item": {"files": "items.csv", "key": "item", "columns": {"cost": "float"}}}},
        "dense": {"item_cost": {}},
        "tasks": {"click": {"kind": "binary", "label": "click = '1'"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }  # fmt: skip
    with no_beam():
        message = refused(tmp_path, tmp_path / "out", content, broadcast_bytes=broadcast_bytes)
        assert message == (
            "source.tables.item: none of 30 impressions has a row in it. Impressions have in item keys such as 'i0', 'i1', "
            "'i2'; the table has in item '0', '1', '2'. Keys are compared as text: fix key or by; "
            "if the log is right, set min_joined=0."
        )
        assert run(tmp_path, tmp_path / "out", content, min_joined=0).side_tables["item"].unmatched_rows == 30


def versions(folder: Path, since: str, at: str = "1793491200") -> dict[str, Any]:
    """30 impressions of 2026-11-01, and an item whose only version begins `since`."""
    (folder / "log.csv").write_text("id,at,item,click\n" + "".join(f"{i},{at},a,{i % 2}\n" for i in range(30)))
    (folder / "items.csv").write_text(f"item,cost,since\na,1.5,{since}\n")
    table = {"files": "items.csv", "key": "item", "columns": {"cost": "float"}, "valid_from": "since"}
    return {
        "source": {"files": "log.csv", "tables": {"item": table}},
        "dense": {"item_cost": {}},
        "tasks": {"click": {"kind": "binary", "label": "click = '1'"}},
        "event_time": "at",
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }


@pytest.mark.parametrize(
    ("since", "unit"),
    [
        ("1793490200000", "milliseconds"),
        ("20261001", "YYYYMMDD"),
        ("20757", "between 1990"),
        ("9999-12-31", "between 1990"),
    ],
)
def test_a_version_that_begins_at_no_plausible_time_is_a_bad_row(since: str, unit: str, tmp_path: Path) -> None:
    message = refused(tmp_path, tmp_path / "out", versions(tmp_path, since))
    assert "1 of 1 rows of item are bad" in message
    assert "since: " in message
    assert unit in message


@pytest.mark.parametrize("since", ["0", "1970-01-01", "1900-01-01", "0001-01-01T00:00:00Z", "1985-03-01", "1793491200"])
def test_a_version_may_have_begun_before_all_logs(since: str, tmp_path: Path) -> None:
    content = versions(tmp_path, since)
    content["source"]["timezone"] = "America/Los_Angeles"
    assert run(tmp_path, tmp_path / "out", content).side_tables["item"].matched_rows == 30


@pytest.mark.parametrize("broadcast_bytes", [0, 1 << 20])
def test_versions_that_all_begin_after_the_impressions_stop_the_job(broadcast_bytes: int, tmp_path: Path) -> None:
    content = versions(tmp_path, "2026-11-02")
    message = refused(tmp_path, tmp_path / "out", content, broadcast_bytes=broadcast_bytes)
    assert message == (
        "source.tables.item: none of 30 impressions has a version that had begun. since runs from 2026-11-02T00:00:00Z to "
        "2026-11-02T00:00:00Z, impressions from 2026-11-01T00:00:00Z to 2026-11-01T00:00:00Z: fix the column since or its "
        "unit in source.times; if the log is right, set min_joined=0."
    )
    assert run(tmp_path, tmp_path / "out", content, min_joined=0).side_tables["item"].early_rows == 30


def test_of_a_part_of_a_log_a_few_impressions_without_a_row_stop_nothing(tmp_path: Path, monkeypatch) -> None:
    content = versions(tmp_path, "2026-10-01")
    run(tmp_path, tmp_path / "out", content)
    (tmp_path / "items.csv").write_text("item,cost,since\nz,1.5,2026-10-01\n")
    settings = {"encoders": {"from": tmp_path / "out"}}
    assert run(tmp_path, tmp_path / "night", content, **settings).side_tables["item"].unmatched_rows == 30
    monkeypatch.setattr(join_check, "ENOUGH", 30)
    assert "none of 30 impressions has a row in it" in refused(tmp_path, tmp_path / "refused", content, **settings)


@pytest.mark.parametrize("at", ["20261101", ""])
def test_bad_times_of_impressions_are_named_before_versions_that_had_not_begun(at: str, tmp_path: Path) -> None:
    message = refused(tmp_path, tmp_path / "out", versions(tmp_path, "2026-10-01", at))
    assert message.startswith("30 of 30 rows of impressions are bad")


@pytest.mark.parametrize("row", [",1.5,2026-10-01", "a,1.5,"])
def test_bad_rows_of_a_table_are_named_before_what_they_lead_to(row: str, tmp_path: Path) -> None:
    content = versions(tmp_path, "2026-10-01")
    (tmp_path / "items.csv").write_text("item,cost,since\n" + f"{row}\n" * 5)
    assert refused(tmp_path, tmp_path / "out", content).startswith("5 of 5 rows of item are bad")
