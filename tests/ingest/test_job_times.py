"""Units of times and implausible ones, through the job; what a split without rows is answered with."""

import csv
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import dead_letters_of, refused, rows_by_id, run

pytestmark = pytest.mark.usefixtures("steps_alone")
START = int(datetime(2026, 11, 7, tzinfo=timezone.utc).timestamp())
ROWS = 40
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def content_for(**source: Any) -> dict[str, Any]:
    return {
        "source": {"files": "log.*", "row_id": "id", "types": {"y": "int"}} | source,
        "dense": {"x": {}},
        "tasks": {"y": {"kind": "binary", "label": "y > 0"}},
        "event_time": "at",
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_avro(path: Path, rows: list[dict[str, Any]]) -> None:
    fields = [{"name": name, "type": {int: "long", float: "double"}[type(value)]} for name, value in rows[0].items()]
    with path.open("wb") as file:
        fastavro.writer(file, {"type": "record", "name": "row", "fields": fields}, rows)


def log(at: list[Any]) -> list[dict[str, Any]]:
    return [{"id": n, "x": n % 3, "y": n % 2, "at": value} for n, value in enumerate(at)]


def times_of(out: Path) -> list[int]:
    return [row["event_time"] for row in rows_by_id(out)]


KINDS = ["csv", "floats.csv", "jsonl", "parquet", "floats.parquet", "avro", "floats.avro"]


@pytest.mark.parametrize(("unit", "kind"), [*((unit, "csv") for unit in UNITS), *(("ms", kind) for kind in KINDS[1:])])
def test_numbers_of_a_unit_are_the_seconds_that_they_name(tmp_path: Path, unit: str, kind: str) -> None:
    moments = [START + 60 * n for n in range(ROWS)]
    ticks: list[Any] = [moment * UNITS[unit] + UNITS[unit] // 2 for moment in moments]
    rows = log([float(tick) for tick in ticks] if kind.startswith("floats") else ticks)
    if kind.endswith("csv"):
        write(tmp_path / "log.csv", rows)
    elif kind == "jsonl":
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / "log.jsonl").write_text("".join(lines))
    elif kind.endswith("avro"):
        write_avro(tmp_path / "log.avro", rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    run(tmp_path, tmp_path / "out", content_for(format=kind.rpartition(".")[2], times={"at": unit}))
    assert times_of(tmp_path / "out") == moments


@pytest.mark.parametrize(
    ("form", "zone", "offset"),
    [
        ("%d/%m/%Y %H:%M", "UTC", 0), ("%Y%m%d%H%M%S", "Asia/Tokyo", 9), ("%d.%m.%Y %H:%M %z", "Asia/Tokyo", 0),
        ("%d%m%Y%H%M", "UTC", 0),
    ],
)  # fmt: skip
def test_times_of_a_strptime_format_are_those_that_python_reads(
    tmp_path: Path, form: str, zone: str, offset: int
) -> None:
    moments = [datetime(2026, 2, 1 + n % 28, n % 24, n, tzinfo=timezone.utc) for n in range(ROWS)]
    texts = [moment.strftime(form) for moment in moments]
    write(tmp_path / "log.csv", log(texts))
    run(tmp_path, tmp_path / "out", content_for(times={"at": form}, timezone=zone))
    assert times_of(tmp_path / "out") == [int(moment.timestamp()) - 3600 * offset for moment in moments]


def test_a_text_of_another_form_is_a_dead_letter_that_names_the_form(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", log(["07/11/2026 10:00"] * 10 + ["2026-11-07 10:00"]))
    run(tmp_path, tmp_path / "out", content_for(times={"at": "%d/%m/%Y %H:%M"}), max_bad_fraction=0.5)
    [letter] = dead_letters_of(tmp_path / "out")
    assert letter["reason"] == "at: '2026-11-07 10:00' is not a time of the form %d/%m/%Y %H:%M"


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (lambda at: at * 1000, "milliseconds? set source.times: {at: ms}"),
        (lambda at: at * 10**6, "microseconds? set source.times: {at: us}"),
        (lambda at: at * 10**9, "nanoseconds? set source.times: {at: ns}"),
        (lambda at: f"{datetime.fromtimestamp(at, timezone.utc):%Y%m%d}", 'YYYYMMDD? set source.times: {at: "%Y%m%d"}'),
        (
            lambda at: f"{datetime.fromtimestamp(at, timezone.utc):%Y%m%d%H%M%S}",
            'YYYYMMDDhhmmss? set source.times: {at: "%Y%m%d%H%M%S"}',
        ),
        (lambda at: at - START, "where it is a plain order, set source.times: {at: index}"),
    ],
)
def test_times_of_another_unit_stop_the_job_with_their_range_and_the_unit_that_mends_it(
    tmp_path: Path, scale: Any, says: str
) -> None:
    at = [scale(START + 3600 * n) for n in range(ROWS)]
    write(tmp_path / "log.csv", log(at))
    message = refused(tmp_path, tmp_path / "out", content_for())
    assert message.startswith("40 of 40 rows of impressions are bad")
    assert f"at: {at[0]} is not between 1990 and 2100 in seconds since 1970: {says}" in message
    assert f"{says}. In 40 rows at is from {at[0]} to {at[-1]}. Fix the log or the schema" in message
    unit = says.partition("at: ")[2].rstrip("}").strip('"')
    run(tmp_path, tmp_path / "out", content_for(times={"at": unit}))
    days = len(str(at[0])) == 8
    expected = [START + 3600 * n - (3600 * n % 86_400 if days else 0) for n in range(ROWS)]
    assert times_of(tmp_path / "out") == ([n * 3600 for n in range(ROWS)] if unit == "index" else expected)


@pytest.mark.parametrize(
    "outcomes", [{}, {"click": {"files": "clicks.parquet", "key": "id", "read": {"format": "parquet"}}}]
)
@pytest.mark.parametrize("ticks", [[START + n for n in range(ROWS)], [20_261_107] * ROWS])
def test_timestamps_of_a_wrong_unit_are_not_mended_by_the_schema_but_written_again(
    tmp_path: Path, ticks: list[int], outcomes: dict[str, Any]
) -> None:
    columns = {**{name: pa.array(range(ROWS)) for name in ("id", "x", "y")}, "at": pa.array(ticks, pa.timestamp("ms"))}
    (tmp_path / "log").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "log" / "log.parquet")
    pq.write_table(pa.table({"id": range(ROWS)}), tmp_path / "log" / "clicks.parquet")
    source: dict[str, Any] = {"format": "parquet", "key": "id", "outcomes": outcomes}
    says = (
        f"at: {ticks[0] // 1000} is not between 1990 and 2100 in seconds since 1970: its timestamps have a unit of their own, "
        "the wrong one: write the column again, or where it is a plain order, set source.times: {at: index}. In 40 rows"
    )
    assert says in refused(tmp_path / "log", tmp_path / "out", content_for(**source))
    run(tmp_path / "log", tmp_path / "out", content_for(**source, times={"at": "index"}))
    assert times_of(tmp_path / "out") == [tick // 1000 for tick in ticks]


def test_an_outcome_whose_timestamps_have_a_wrong_unit_is_to_be_written_again(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", log([START + n for n in range(ROWS)]))
    clicks = {"id": range(ROWS), "then": pa.array([START] * ROWS, pa.timestamp("ms"))}
    pq.write_table(pa.table(clicks), tmp_path / "clicks.parquet")
    click = {"files": "clicks.parquet", "key": "id", "time": "then", "read": {"format": "parquet"}}
    message = refused(tmp_path, tmp_path / "out", content_for(key="id", outcomes={"click": click}, files="log.csv"))
    assert f"then: {START // 1000} is not between" in message
    assert "its timestamps have a unit of their own, the wrong one: write the column again" in message


def test_a_derived_time_is_mended_where_it_is_derived(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", [row | {"ms": row.pop("at")} for row in log([1000 * (START + n) for n in range(ROWS)])])
    source: dict[str, Any] = {"types": {"y": "int", "ms": "int"}, "derived": {"at": "ms"}}
    message = refused(tmp_path, tmp_path / "out", content_for(**source))
    assert "in seconds since 1970: milliseconds? make it seconds in source.derived.at. In 40 rows" in message
    source["derived"] = {"at": "CAST(FLOOR(ms / 1000) AS BIGINT)"}
    run(tmp_path, tmp_path / "out", content_for(**source))
    assert times_of(tmp_path / "out") == [START + n for n in range(ROWS)]


def test_the_range_and_the_unit_are_named_though_the_first_bad_row_has_another_fault(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", log(["noon", *(1000 * (START + n) for n in range(ROWS)), START * 10**9, -5, START]))
    message = refused(tmp_path, tmp_path / "out", content_for())
    assert "the first: " in message
    assert (
        "line 2: at: 'noon' is not a time (of other forms than ISO 8601: set source.times). In 40 rows at is from "
        in message
    )
    assert (
        f"from {START}000 to {START + ROWS - 1}000: milliseconds? set source.times: {{at: ms}}. Fix the log" in message
    )
    manifest = run(tmp_path, tmp_path / "out", content_for(), max_bad_fraction=0.99)
    assert manifest.rows["train"] == 1
    assert len(dead_letters_of(tmp_path / "out")) == ROWS + 3


EXTREMES = [0, -1, 631_151_999, 4_102_444_801, 2**62, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("derived", [False, True])
def test_extreme_times_of_impressions_and_outcomes_are_dead_letters_and_join_nothing(
    tmp_path: Path, derived: bool
) -> None:
    write(tmp_path / "log.csv", log([START, *EXTREMES, START + 5]))
    clicks = [{"id": n, "when": when} for n, when in enumerate([START + 1, *EXTREMES, 2**63 - 1])]
    write(tmp_path / "clicks.csv", clicks)
    source: dict[str, Any] = {"files": "log.csv", "key": "id"}
    source["outcomes"] = {"click": {"files": "clicks.csv", "key": "id", "time": "when", "window": "7d"}}
    content = content_for(**source)
    if derived:
        content["source"] |= {"types": {"at": "int", "y": "int"}, "derived": {"moment": "at"}}
        content["event_time"] = "moment"
    content["tasks"] = {"click": {"kind": "binary", "label": "click"}}
    content["bag"] = {"before": {"history": {"user": "y", "item": "id", "when": "NOT click"}}}
    manifest = run(tmp_path, tmp_path / "out", content, max_bad_fraction=0.99, as_of="2099-01-01")
    rows = rows_by_id(tmp_path / "out")
    assert [(row["row_id"], row["label.click"], row["before"]) for row in rows] == [(0, 1.0, []), (8, 0.0, [])]
    assert manifest.outcomes["click"]["joined"] == 1
    bad = [x["stream"] for x in dead_letters_of(tmp_path / "out") if "is not between 1990 and 2100" in x["reason"]]
    assert bad == ["click"] * (len(EXTREMES) + 1) + ["impressions"] * len(EXTREMES)


def test_a_clock_that_is_far_ahead_closes_no_window_of_other_rows(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", log([START, START + 7200, 1000 * START]))
    (tmp_path / "clicks.csv").write_text("id,when\n")
    content = content_for(
        files="log.csv",
        key="id",
        outcomes={"click": {"files": "clicks.csv", "key": "id", "time": "when", "window": "1h"}},
    )
    content["tasks"] = {"click": {"kind": "binary", "label": "click"}}
    manifest = run(tmp_path, tmp_path / "out", content, max_bad_fraction=0.5)
    assert manifest.complete_until == {"click": START + 7200}
    assert [row["label.click"] for row in rows_by_id(tmp_path / "out")] == [0.0, None]


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (
            {"by": "time", "valid_from": "2026-11-01", "test_from": "2026-11-02"},
            "split train is empty: none of 40 rows belongs to it. Event times run from 2026-11-07T00:00:00Z to "
            "2026-11-08T15:00:00Z, and train ends before valid_from=2026-11-01T00:00:00Z. Move the bounds of split into that "
            "range, such as valid_from: 2026-11-08T07:12:00Z and test_from: 2026-11-08T11:06:00Z, or use",
        ),
        (
            {"by": "time", "valid_from": "2026-11-08", "test_from": "2026-12-02T00:00+01:00"},
            "test begins at test_from=2026-12-01T23:00:00Z",
        ),
        (
            {"by": "time", "valid_from": "2026-11-07T00:10", "test_from": "2026-11-07T00:20"},
            "valid is from valid_from=2026-11-07T00:10:00Z until before test_from=2026-11-07T00:20:00Z",
        ),
        ({"by": "hash", "key": "id", "valid": 0, "test": 1e-9}, "shared out as train 1, valid 0, test 1e-09"),
        ({"by": "hash", "key": "id", "valid": 1e-9, "test": 0.25}, "shared out as train 0.75, valid 1e-09, test 0.25"),
        (
            {"by": "row_index", "modulo": 100, "train": list(range(90)), "valid": list(range(90, 100)), "test": []},
            "index in their file is 90, 91, 92, 93, 94, 95, 96, 97, 98, 99 modulo 100, counted from 0",
        ),
    ],
)  # fmt: skip
def test_a_split_without_rows_is_answered_with_what_the_log_has(
    tmp_path: Path, split: dict[str, Any], says: str
) -> None:
    write(tmp_path / "log.csv", log([START + 3600 * n for n in range(ROWS)]))
    assert says in refused(tmp_path, tmp_path / "out", content_for() | {"split": split})


def test_bounds_are_proposed_only_where_the_log_has_times_between_them(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", log([START] * ROWS))
    split = {"by": "time", "valid_from": "2026-11-01", "test_from": "2026-11-02"}
    message = refused(tmp_path, tmp_path / "out", content_for() | {"split": split})
    assert "Move the bounds of split into that range, or use another dataset's encoders" in message
