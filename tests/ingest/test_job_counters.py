"""Counters of the whole job against loops over rows, in logs cut into many units, parts and buckets."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_runs import content_of, refused, rows_by_id
from ingest_runs import run as run_job
from test_job_joins import (
    BASE,
    SMALL,
    Event,
    Impression,
    Rules,
    closes,
    expected_ends,
    expected_labels,
    logs,
    rules,
    write_log,
    written,
)

from pipeline.ingest import job as ingest_job
from pipeline.ingest.formats import text

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

Labels = dict[str, dict[str, float | None]]  # of a row, by outcome and what of it
RUN_STEPS = ingest_job.run_steps  # with Beam
run = partial(run_job, min_joined=0)  # of outcomes at random few belong to an impression
CLOSED = Rules(window=10, take="first", duplicates="drop", late="drop", open_window="unobserved")


@dataclass(frozen=True)
class Case:
    """A counter, and the same by hand.

    Attributes:
        content: as in a schema.
        value: what a row adds; None: nothing.
        reads: the outcomes of which more is asked than that they happened.
        happens: the outcome whose happening alone makes a row an event, or (with `absence`) gives it its value.
    """

    content: dict[str, Any]
    value: Callable[[Impression, Labels], float | None]
    reads: tuple[str, ...] = ()
    happens: str | None = None
    absence: bool = False


def always(row: Impression, labels: Labels) -> float | None:
    return 1


def number(row: Impression, labels: Labels) -> float | None:
    return row.id


def clicked(row: Impression, labels: Labels) -> float | None:
    return float(bool(labels["click"]["any"]))


def only_clicked(row: Impression, labels: Labels) -> float | None:
    return 1 if labels["click"]["any"] else None


def amount(row: Impression, labels: Labels) -> float | None:
    found = labels["click"]["amount"]
    return found if (found or 0) > 0 else None


def bought_unclicked(row: Impression, labels: Labels) -> float | None:
    return None if labels["click"]["any"] else (labels["buy"]["count"] or 0) + 0.25 * row.id


CTR = {"of": "click", "take": "mean"}
CASES = {
    "rows": Case({"by": "user", "take": "count"}, always),
    "rows_of_item": Case({"by": "item", "take": "count", "window": 15}, always),
    "fading": Case({"by": "user", "take": "count", "decay": 9}, always),
    "ids": Case({"by": "pair", "of": "double / 2.0", "take": "mean"}, number),
    "clicks": Case({"by": "user", "of": "click", "take": "sum"}, only_clicked, happens="click"),
    "clicked": Case({"by": "user", "when": " click", "take": "count", "window": 20}, only_clicked, happens="click"),
    "ctr": Case({"by": "user", **CTR, "window": 30}, clicked, happens="click", absence=True),
    "smooth": Case({"by": "item", **CTR, "smoothing": 2.5}, clicked, happens="click", absence=True),
    "fading_ctr": Case({"by": "item", **CTR, "decay": 5, "smoothing": 1}, clicked, happens="click", absence=True),
    "amount": Case(
        {"by": "user", "of": "click_amount", "when": "click_amount > 0", "take": "mean", "decay": 10}, amount, ("click",)
    ),
    "bought": Case(
        {"by": "user", "of": "buy_count + 0.25 * id", "when": "NOT click", "take": "sum", "window": 25},
        bought_unclicked, ("click", "buy"),
    ),
}  # fmt: skip


def allowed(case: Case, outcomes: dict[str, Rules]) -> bool:
    """Whether a schema with these outcomes takes the counter."""
    needs_closed = {*case.reads, *([case.happens] if case.happens and case.absence else [])}
    return all(closes(outcomes[name]) for name in needs_closed)


def content_for(outcomes: dict[str, Rules], counters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A schema whose features are the counters as they are, and whether there is none."""
    return {
        "source": {
            "files": "log-*", "row_id": "id", "key": "key", "types": {"id": "int"}, "timezone": "Europe/Berlin",
            "outcomes": {
                name: {"files": f"{name}-*", "key": "key", "time": "at", "columns": {"amount": "int"}, **vars(rule)}
                for name, rule in outcomes.items()
            },
            "counters": counters,
            "derived": {"pair": "\"user\" || '-' || item", "double": "id * 2"},
        },
        "dense": {name: {"standardize": False, "missing_flag": True} for name in counters},
        "tasks": {"high": {"kind": "regression", "label": "double"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    }  # fmt: skip


# The same by hand, one row at a time.


def known_from(case: Case, row: Impression, labels: Labels, outcomes: dict[str, Rules], ends: dict[str, int]) -> float:
    """The second from which a row counts, if ever."""
    known: float = row.at
    if case.happens and labels[case.happens]["any"]:
        known = row.at + (labels[case.happens]["wait"] or 0)
    asked = [*case.reads, *([case.happens] if case.happens and not labels[case.happens]["any"] else [])]
    for name in asked:
        closed = row.at + (outcomes[name].window or math.inf)
        known = max(known, closed) if closed <= ends.get(name, math.inf) else math.inf
    return known


def key_of(content: dict[str, Any], row: Impression) -> str | None:
    pair = f"{row.user}-{row.item}" if row.user and row.item else None
    return {"user": row.user, "item": row.item, "pair": pair}[content["by"]]


def expected_numbers(
    case: Case, rows: list[Impression], labels: dict[int, Labels], outcomes: dict[str, Rules], ends: dict[str, int]
) -> list[float | None]:
    """The counter at each row; None where it has none."""
    content, events = case.content, []
    for row in rows:
        known, value = known_from(case, row, labels[row.id], outcomes, ends), case.value(row, labels[row.id])
        if value is not None and known < math.inf:
            events.append((key_of(content, row), known, value))
    smoothing = content.get("smoothing", 0)
    mean = sum(value for *_, value in events) / len(events) if smoothing and events else 0
    found: list[float | None] = []
    for row in rows:
        key, total, weight = key_of(content, row), 0.0, 0.0
        for who, known, value in events:
            if who == key and known < row.at and row.at - known <= content.get("window", math.inf):
                share = 2 ** -((row.at - known) / content["decay"]) if "decay" in content else 1.0
                total, weight = total + value * share, weight + share
        if key is None:
            found.append(None)
        elif content["take"] == "mean":
            whole = weight + smoothing
            found.append((total + smoothing * mean) / whole if whole else None)
        else:
            found.append(weight if content["take"] == "count" else total)
    return found


def labels_of(rows: list[Impression], streams: dict[str, list[Event]], outcomes: dict[str, Rules]) -> dict[int, Labels]:
    return {row.id: {n: expected_labels(row, streams[n], rule) for n, rule in outcomes.items()} for row in rows}


def found_numbers(out: Path, name: str) -> dict[int, float | None]:
    return {row["row_id"]: None if row[f"{name}_missing"] else row[name] for row in rows_by_id(out)}


# Four at a time: each has its own work for every part and bucket.
SOME = st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=4, unique=True)


@given(
    logs(), st.tuples(rules, rules), st.one_of(st.none(), SMALL), st.sampled_from([150, 1 << 20]),
    st.sampled_from([400, 1 << 20]), SOME,
)  # fmt: skip
@settings(max_examples=examples(15), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_counters_are_those_of_a_loop_over_rows(
    log: tuple[list[Impression], list[Event], list[Event]],
    drawn: tuple[Rules, Rules],
    as_of: int | None,
    unit_bytes: int,
    bucket_bytes: int,
    names: list[str],
) -> None:
    rows, clicks, buys = log
    drawn = tuple(rule if rule.open_window != "leave_out" else replace(rule, open_window="keep") for rule in drawn)
    streams, outcomes = {"click": clicks, "buy": buys}, dict(zip(("click", "buy"), drawn, strict=True))
    ends = expected_ends(rows, streams, outcomes, None if as_of is None else BASE + as_of)
    labels, expected = labels_of(rows, streams, outcomes), {}
    for name, case in ((name, CASES[name]) for name in names):
        events = [known_from(case, row, labels[row.id], outcomes, ends) for row in rows]
        if allowed(case, outcomes) and ("smoothing" not in case.content or min(events) < math.inf):
            expected[name] = expected_numbers(case, rows, labels, outcomes, ends)
    content = content_for(outcomes, {name: CASES[name].content for name in expected})
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", 150)
        folder, out = Path(name), Path(name) / "out"
        write_log(folder, rows, streams)
        moment = {} if as_of is None else {"as_of": written(BASE + as_of, 2)}
        run(folder, out, content, **moment, unit_bytes=unit_bytes, bucket_bytes=bucket_bytes)
        for counter, numbers in expected.items():
            found = found_numbers(out, counter)
            assert sorted(found) == [row.id for row in rows]
            for row, number_ in zip(rows, numbers, strict=True):
                assert found[row.id] == (None if number_ is None else pytest.approx(number_, rel=1e-6, abs=1e-9)), (
                    counter
                )


@given(logs(), SMALL, SOME, st.data())
@settings(max_examples=examples(10), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_nothing_that_happens_from_a_second_on_changes_a_counter_until_then(
    log: tuple[list[Impression], list[Event], list[Event]], second: int, names: list[str], data: st.DataObject
) -> None:
    rows, clicks, buys = log
    now, outcomes = BASE + second, {"click": CLOSED, "buy": replace(CLOSED, window=3)}
    other = data.draw(logs())
    later = [x for x in rows if x.at < now] + [
        replace(x, id=x.id + 100) for x in data.draw(st.permutations(other[0])) if x.at >= now
    ]
    streams = [{"click": clicks, "buy": buys}]
    streams += [{n: [e for e in streams[0][n] if e.at < now] + [e for e in new if e.at >= now]
                 for n, new in (("click", other[1]), ("buy", other[2]))}]  # fmt: skip
    # A mean of the train split is of all its rows, as the mean of a feature is.
    counters = {name: CASES[name].content for name in names if "smoothing" not in CASES[name].content}
    found = []
    for shown, events in zip((rows, later), streams, strict=True):
        with TemporaryDirectory() as name:
            folder, out = Path(name), Path(name) / "out"
            if not shown:
                return
            write_log(folder, shown, events)
            run(folder, out, content_for(outcomes, counters), as_of=written(BASE + 10**6, 2))
            found.append({name: found_numbers(out, name) for name in counters})
    until = [row.id for row in rows if row.at < now]
    for name in counters:
        assert [found[0][name][i] for i in until] == [found[1][name][i] for i in until], name


# Logs small enough to read


def shown_at(*moments: int, user: str = "u") -> list[Impression]:
    return [Impression(i, f"k{i}", BASE + moment, user, "x") for i, moment in enumerate(moments)]


def test_a_click_rate_waits_for_clicks_to_happen_and_for_windows_to_close(tmp_path: Path) -> None:
    # Of rows 0 (clicked at 4) and 1 (not clicked, closed at 11).
    rows = shown_at(0, 1, 4, 5, 11, 12)
    write_log(tmp_path, rows, {"click": [Event("k0", BASE + 4, 1)]})
    counters = {"ctr": {"by": "user", **CTR}, "clicks": {"by": "user", "of": "click", "take": "sum"}}
    run(tmp_path, tmp_path / "out", content_for({"click": CLOSED}, counters), as_of=written(BASE + 100, 2))
    assert list(found_numbers(tmp_path / "out", "ctr").values()) == [None, None, None, 1, 1, 0.5]
    assert list(found_numbers(tmp_path / "out", "clicks").values()) == [0, 0, 0, 1, 1, 1]


def test_an_absence_that_the_log_ended_before_is_not_counted(tmp_path: Path) -> None:
    rows = shown_at(0, 1, 50)
    write_log(tmp_path, rows, {"click": [Event("k0", BASE + 4, 1)]})
    content = content_for({"click": CLOSED}, {"ctr": {"by": "user", **CTR}})
    for end, rate in ((10, 1), (11, 0.5)):
        run(tmp_path, tmp_path / f"out-{end}", content, as_of=written(BASE + end, 2))
        assert found_numbers(tmp_path / f"out-{end}", "ctr")[2] == rate


def by_halves(rows: int) -> dict[str, Any]:
    """A split whose train part are the rows of even index in each file."""
    assert rows % 4 == 0
    return {"by": "row_index", "modulo": 2, "train": [0], "valid": [1]}


def test_means_are_smoothed_towards_that_of_the_train_split_and_later_towards_that_of_the_encoders(
    tmp_path: Path,
) -> None:
    rows = shown_at(0, 10, 20, 30)  # ids 0 and 2 are train
    write_log(tmp_path, rows, {})
    counters = {"ids": {"by": "user", "of": "id", "take": "mean", "smoothing": 4}}
    content = content_for({}, counters) | {"split": by_halves(len(rows))}
    out = tmp_path / "out"
    run(tmp_path, out, content)
    assert json.loads((out / "encoders" / "encoders.json").read_text())["counter_means"] == {"ids": 1.0}
    smoothed = [(sum(range(i)) + 4 * 1.0) / (i + 4) for i in range(4)]
    assert list(found_numbers(out, "ids").values()) == pytest.approx(smoothed)
    other = tmp_path / "other"
    other.mkdir()
    write_log(other, [replace(row, id=row.id + 40) for row in rows], {})
    run(other, tmp_path / "next", content, encoders={"from": out}, state={"from": "empty"})
    smoothed = [(sum(range(40, 40 + i)) + 4 * 1.0) / (i + 4) for i in range(4)]
    assert list(found_numbers(tmp_path / "next", "ids").values()) == pytest.approx(smoothed)


def test_smoothing_towards_the_mean_of_nothing_is_refused(tmp_path: Path) -> None:
    write_log(tmp_path, shown_at(0, 10), {})
    counters = {"none": {"by": "user", "of": "id", "when": "id > 5", "take": "mean", "smoothing": 4}}
    message = refused(tmp_path, tmp_path / "out", content_for({}, counters))
    assert message == (
        "source.counters.none: smoothing needs a mean, but no row of the split train counts. Check of, when and split, or "
        "remove smoothing."
    )


def test_rows_that_turn_out_bad_are_counted_all_the_same(tmp_path: Path) -> None:
    write_log(tmp_path, shown_at(0, 10, 20), {})
    content = content_for({}, {"rows": {"by": "user", "take": "count"}})
    content["tasks"]["high"]["label"] = "1 / (id - 1)"  # infinite in row 1
    manifest = run(tmp_path, tmp_path / "out", content, max_bad_fraction=0.5)
    assert sum(manifest.dead_letters.values()) == 1
    assert found_numbers(tmp_path / "out", "rows") == {0: 0, 2: 2}


def test_what_is_no_number_does_not_count(tmp_path: Path) -> None:
    write_log(tmp_path, shown_at(0, 10, 20, 30, 40, 50), {})
    of = "CASE id WHEN 0 THEN NULL WHEN 1 THEN 1 / (id - 1) WHEN 2 THEN 1e300 WHEN 3 THEN 0 / (id - 3) ELSE 7 END"
    counters = {name: {"by": "user", "of": of, "take": name} for name in ("mean", "sum")}
    run(tmp_path, tmp_path / "out", content_for({}, counters))
    assert list(found_numbers(tmp_path / "out", "mean").values()) == [None, None, None, None, None, 7]
    assert list(found_numbers(tmp_path / "out", "sum").values()) == [0, 0, 0, 0, 0, 7]


def test_any_kind_of_feature_reads_a_counter_and_so_do_derived_columns_and_weights(tmp_path: Path) -> None:
    write_log(tmp_path, shown_at(0, 10, 20, 30), {})
    content = content_for({}, {"rows": {"by": "user", "take": "count"}})
    content["source"]["derived"]["again"] = "rows * 10"
    content["dense"] |= {"again": {"standardize": False}}
    content["categorical"] = {
        "binned": {"column": "rows", "bins": 2},
        "hashed": {"column": "rows", "hash": 1000},
        "named": {"column": "again", "vocabulary": {"min_count": 1}},
    }
    content["weight"] = "1 + rows"
    run(tmp_path, tmp_path / "out", content)
    rows = rows_by_id(tmp_path / "out")
    assert [row["rows"] for row in rows] == [0, 1, 2, 3]
    assert [row["again"] for row in rows] == [0, 10, 20, 30]
    assert [row["weight"] for row in rows] == [1, 2, 3, 4]
    assert [row["binned"] for row in rows] == sorted(row["binned"] for row in rows)
    assert [len({row[name] for row in rows}) for name in ("hashed", "named")] == [4, 4]
    assert rows[0]["binned"] < rows[3]["binned"]


def test_a_column_of_the_log_with_the_name_of_a_counter_is_refused(tmp_path: Path) -> None:
    write_log(tmp_path, shown_at(0, 10), {})
    content = content_for({}, {"item": {"by": "user", "take": "count"}})
    content["source"]["derived"] = {"double": "id * 2"}
    message = refused(tmp_path, tmp_path / "out", content)
    assert (
        "column item is also what the schema adds: rename the outcome, side table, counter or derived column" in message
    )


def test_text_is_refused_as_what_is_added_up(tmp_path: Path) -> None:
    write_log(tmp_path, shown_at(0, 10), {})
    message = refused(tmp_path, tmp_path / "out", content_for({}, {"x": {"by": "user", "of": "item", "take": "sum"}}))
    assert "source.counters.x.of: 'item' is text" in message


def test_units_buckets_and_workers_do_not_change_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Impression(i, f"k{i}", BASE + 7 * (i % 90), f"u{i % 5}", f"i{i % 7}") for i in range(200)]
    clicks = [Event(f"k{i}", rows[i].at + i % 9, i % 3) for i in range(0, 200, 3)]
    write_log(tmp_path, rows, {"click": clicks, "buy": clicks[::2]})
    names = ("fading", "smooth", "ctr", "bought")
    content = content_for({"click": CLOSED, "buy": CLOSED}, {name: CASES[name].content for name in names})
    small = {"unit_bytes": 1500, "bucket_bytes": 2000}
    run(tmp_path, tmp_path / "whole", content)
    run(tmp_path, tmp_path / "cut", content, **small)
    assert rows_by_id(tmp_path / "whole") == rows_by_id(tmp_path / "cut")
    monkeypatch.setattr(ingest_job, "run_steps", RUN_STEPS)
    run(tmp_path, tmp_path / "beam", content, **small, workers=2)
    assert content_of(tmp_path / "cut") == content_of(tmp_path / "beam")


def test_times_of_another_unit_are_named_before_what_they_do_to_counters(tmp_path: Path) -> None:
    write_log(tmp_path, shown_at(0, 10), {})
    for path in tmp_path.glob("*.csv"):
        pl.read_csv(path, infer_schema=False).with_columns(at=pl.lit(str(BASE * 1000))).write_csv(path)
    counters = {"many": {"by": "user", "of": "id", "take": "mean", "smoothing": 4}}
    message = refused(tmp_path, tmp_path / "out", content_for({}, counters))
    assert message.startswith("2 of 2 rows of impressions are bad")
    assert "milliseconds? set source.times" in message
