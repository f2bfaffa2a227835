"""Joins and histories of the whole job against loops over rows, in logs cut into many units, parts and buckets."""

import csv
import math
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_runs import rows_by_id, run, values_of

from features.errors import UserError
from pipeline.ingest.formats import text

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

BASE = 1_719_800_000  # July 2024
ZONE = "Europe/Berlin"  # two hours ahead of UTC then
LENGTH = 3  # of a history
SMALL = st.integers(0, 60)
# Bags of a user's earlier rows, by which of them count.
HISTORIES = {"clicked": "click", "ignored": "NOT click", "either": "buy OR click_amount > 1"}


@dataclass(frozen=True)
class Impression:
    id: int
    key: str
    at: int
    user: str | None
    item: str | None


@dataclass(frozen=True)
class Event:
    key: str
    at: int
    amount: int | None


@dataclass(frozen=True)
class Rules:
    """Settings of an outcome, as in features.source.Outcome."""

    window: int | None
    take: str
    duplicates: str
    late: str
    open_window: str


# Drawn logs. Few keys, users and seconds, so that all that can coincide does.


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Impression], list[Event], list[Event]]:
    keys, users = st.sampled_from("abcdef"), st.sampled_from(["u", "v", "w", None])
    count = draw(st.integers(1, 20))
    impressions = [
        Impression(i, draw(keys), BASE + draw(SMALL), draw(users), draw(st.sampled_from(["x", "y", "z", None])))
        for i in range(count)
    ]
    event = st.builds(
        Event, st.sampled_from("abcdefgh"), SMALL.map(lambda s: BASE + s), st.one_of(st.none(), st.integers(0, 3))
    )
    return impressions, draw(st.lists(event, max_size=30)), draw(st.lists(event, max_size=15))


rules = st.builds(
    Rules,
    window=st.one_of(st.none(), st.integers(1, 30), st.integers(1, 30)),
    take=st.sampled_from(["first", "last", "sum", "min", "max"]),
    duplicates=st.sampled_from(["drop", "keep"]),
    late=st.sampled_from(["drop", "drop", "keep"]),
    open_window=st.sampled_from(["unobserved", "leave_out", "keep"]),
)


def written(second: int, form: int) -> str:
    """A second since 1970 in one of the ways in which logs write it."""
    moment = datetime.fromtimestamp(second, timezone.utc)
    return [
        str(second),
        moment.astimezone(timezone(timedelta(hours=-3, minutes=-30))).isoformat(),
        moment.strftime("%Y-%m-%d %H:%M:%SZ"),
        moment.astimezone(ZoneInfo(ZONE)).replace(tzinfo=None).isoformat(),
        moment.astimezone(timezone(timedelta(hours=9))).strftime("%Y-%m-%dT%H:%M:%S.75+0900"),
    ][form % 5]


def write_files(folder: Path, name: str, header: list[str], rows: list[list[Any]]) -> None:
    """Three files, the second of which has no row."""
    half = len(rows) // 2
    for number, part in enumerate([rows[:half], [], rows[half:]]):
        with (folder / f"{name}-{number}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(["" if cell is None else cell for cell in row] for row in part)


def write_log(folder: Path, impressions: list[Impression], streams: dict[str, list[Event]]) -> None:
    shown = [[x.id, x.key, written(x.at, x.id), x.user, x.item] for x in impressions]
    write_files(folder, "log", ["id", "key", "at", "user", "item"], shown)
    for name, events in streams.items():
        write_files(
            folder, name, ["amount", "at", "key"], [[e.amount, written(e.at, i), e.key] for i, e in enumerate(events)]
        )


def closes(rule: Rules | None) -> bool:
    """Whether there is a moment from which on an outcome is settled, as schemas ask for where a history reads more of it."""
    return rule is not None and rule.window is not None and rule.late == "drop"


def content_for(outcomes: dict[str, Rules]) -> dict[str, Any]:
    """A schema whose labels show every column that a join adds."""
    tasks: dict[str, Any] = {}
    for name in outcomes:
        tasks |= {
            f"{name}_any": {"kind": "binary", "label": name},
            f"{name}_count": {"kind": "regression", "label": f"{name}_count"},
            f"{name}_wait": {"kind": "regression", "label": f"{name}_time - at"},
            f"{name}_amount": {"kind": "regression", "label": f"{name}_amount"},
        }
    return {
        "source": {
            "files": "log-*", "row_id": "id", "key": "key", "timezone": ZONE,
            "outcomes": {
                name: {"files": f"{name}-*", "key": "key", "time": "at", "columns": {"amount": "int"}, **vars(rule)}
                for name, rule in outcomes.items()
            },
        },
        "bag": {
            "seen": {"max_length": LENGTH, "history": {"user": "user", "item": "item"}},
            **{
                name: {"max_length": LENGTH, "history": {"user": "user", "item": "item", "when": when}}
                for name, when in HISTORIES.items()
                if when == "click" or all(closes(outcomes.get(read)) for read in ("click", "buy") if read in when)
            },
        },
        "tasks": tasks,
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    }  # fmt: skip


# The same by hand, one row at a time.


def once(events: list[Event], rule: Rules) -> list[Event]:
    return list(dict.fromkeys(events)) if rule.duplicates == "drop" else events


def belongs(event: Event, impression: Impression, rule: Rules) -> bool:
    closed = rule.window is not None and rule.late == "drop" and event.at > impression.at + rule.window
    return event.key == impression.key and event.at >= impression.at and not closed


def expected_labels(impression: Impression, events: list[Event], rule: Rules) -> dict[str, float | None]:
    found = sorted((e for e in once(events, rule) if belongs(e, impression, rule)), key=lambda event: event.at)
    amounts = [event.amount for event in found if event.amount is not None]
    told = found[-1:] if rule.take == "last" else found[:1]
    if rule.take in ("first", "last"):
        amount = told[0].amount if told else None
    else:
        amount = {"sum": sum, "min": min, "max": max}[rule.take](amounts) if amounts else None
    wait = told[0].at - impression.at if told else None
    return {"any": bool(found), "count": len(found), "wait": wait, "amount": amount}


def expected_statuses(impressions: list[Impression], events: list[Event], rule: Rules) -> dict[str, int]:
    join_statuses = dict.fromkeys(("joined", "duplicate", "early", "late", "unmatched"), 0)
    join_statuses["duplicate"] = len(events) - len(once(events, rule))
    for event in once(events, rule):
        of_key = [x for x in impressions if x.key == event.key]
        if not of_key:
            join_statuses["unmatched"] += 1
        elif any(belongs(event, x, rule) for x in of_key):
            join_statuses["joined"] += 1
        else:
            join_statuses["early" if all(event.at < x.at for x in of_key) else "late"] += 1
    return join_statuses


def known_from(
    name: str, row: Impression, streams: dict[str, list[Event]], outcomes: dict[str, Rules], ends: dict[str, int]
) -> float:
    """The second from which a row belongs to a history, if ever: then it has happened, and so has what the history asks."""
    if name == "seen":
        return row.at
    labels = {outcome: expected_labels(row, streams[outcome], rule) for outcome, rule in outcomes.items()}
    click = labels["click"]
    if name == "clicked":
        return math.inf if click["wait"] is None else row.at + click["wait"]
    reads = {"ignored": ["click"], "either": ["click", "buy"]}[name]
    settled: float = row.at + max(outcomes[outcome].window or 0 for outcome in reads)
    if any(row.at + (outcomes[outcome].window or 0) > ends.get(outcome, math.inf) for outcome in reads):
        settled = math.inf  # the log has ended before
    if name == "ignored":
        return math.inf if click["any"] else settled
    return settled if labels["buy"]["any"] or (click["amount"] or 0) > 1 else math.inf


def expected_history(row: Impression, impressions: list[Impression], known: list[float]) -> list[str]:
    """Items of the user's rows that were known before this one."""
    found = [
        (moment, other.id, other.item)
        for other, moment in zip(impressions, known, strict=True)
        if other.user == row.user and other.user and other.item and moment < row.at
    ]
    return [item for _, _, item in sorted(found, reverse=True)[:LENGTH]]


def expected_end(impressions: list[Impression], events: list[Event], rule: Rules) -> int:
    """Until when a stream of outcomes is complete where nobody says it: those of no impression say nothing."""
    found = [event.at for event in events if any(belongs(event, x, rule) for x in impressions)]
    return max(found or [x.at for x in impressions])


def expected_ends(
    impressions: list[Impression], streams: dict[str, list[Event]], outcomes: dict[str, Rules], as_of: int | None
) -> dict[str, int]:
    """The same of each outcome for which it matters."""
    return {
        name: expected_end(impressions, streams[name], rule) if as_of is None else as_of
        for name, rule in outcomes.items()
        if rule.window is not None and rule.open_window != "keep"
    }


def expected_rows(
    impressions: list[Impression],
    streams: dict[str, list[Event]],
    outcomes: dict[str, Rules],
    ends: dict[str, int],
    histories: list[str],
) -> list[dict[str, Any]]:
    known = {name: [known_from(name, x, streams, outcomes, ends) for x in impressions] for name in histories}
    rows = []
    for x in impressions:
        still_open = {name for name, end in ends.items() if x.at + (outcomes[name].window or 0) > end}
        if any(outcomes[name].open_window == "leave_out" for name in still_open):
            continue
        row: dict[str, Any] = {"row_id": x.id, "event_time": x.at}
        for name, rule in outcomes.items():
            labels = expected_labels(x, streams[name], rule)
            row |= {f"label.{name}_{what}": None if name in still_open else value for what, value in labels.items()}
        rows.append(row | {name: expected_history(x, impressions, known[name]) for name in histories})
    return rows


def found_rows(out: Path, histories: list[str]) -> list[dict[str, Any]]:
    names = {bag: values_of(out, bag) for bag in histories}
    rows = rows_by_id(out)
    for row in rows:
        del row["weight"], row["split"]
        row |= {bag: [values[i] for i in row[bag]] for bag, values in names.items()}
    return rows


@given(
    logs(), st.tuples(rules, rules), st.one_of(st.none(), SMALL), st.sampled_from([100, 1 << 20]),
    st.sampled_from([100, 400, 1 << 20]),
)  # fmt: skip
@settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_joined_columns_fates_and_histories_are_those_of_a_loop_over_rows(
    log: tuple[list[Impression], list[Event], list[Event]],
    drawn: tuple[Rules, Rules],
    as_of: int | None,
    unit_bytes: int,
    bucket_bytes: int,
) -> None:
    impressions, clicks, buys = log
    streams, outcomes = {"click": clicks, "buy": buys}, dict(zip(("click", "buy"), drawn, strict=True))
    content = content_for(outcomes)
    histories = list(content["bag"])
    moment = None if as_of is None else BASE + as_of
    ends = expected_ends(impressions, streams, outcomes, moment)
    expected = expected_rows(impressions, streams, outcomes, ends, histories)
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", 150)
        folder, out = Path(name), Path(name) / "out"
        write_log(folder, impressions, streams)
        settings_ = {} if moment is None else {"as_of": written(moment, 2)}
        sizes = {"unit_bytes": unit_bytes, "bucket_bytes": bucket_bytes, "min_joined": 0}
        if not expected:
            with pytest.raises(UserError, match="no rows are left"):
                run(folder, out, content, **settings_, **sizes)
            return
        manifest = run(folder, out, content, **settings_, **sizes)
        assert found_rows(out, histories) == expected
        for outcome, rule in outcomes.items():
            assert manifest.outcomes[outcome] == expected_statuses(impressions, streams[outcome], rule)
        assert manifest.complete_until == ends
        assert sum(manifest.left_out.values()) == len(impressions) - len(expected)
        assert manifest.dead_letters == {}


def test_what_a_row_teaches_about_joins_in_a_log_small_enough_to_read(tmp_path: Path) -> None:
    impressions = [
        Impression(0, "a", BASE, "u", "x"),
        Impression(1, "b", BASE + 5, "u", "y"),
        Impression(2, "c", BASE + 20, "u", "z"),
        Impression(3, "d", BASE + 60, "u", "z"),
    ]
    # The click on x comes after impression 1, that on y one second too late, and that on z has no impression.
    clicks = [Event("a", BASE + 10, 2), Event("a", BASE + 10, 2), Event("b", BASE + 16, 1), Event("z", BASE + 99, None)]
    rule = Rules(window=10, take="first", duplicates="drop", late="drop", open_window="unobserved")
    write_log(tmp_path, impressions, {"click": clicks})
    manifest = run(tmp_path, tmp_path / "out", content_for({"click": rule}), min_joined=0.3)
    rows = found_rows(tmp_path / "out", ["seen", "clicked", "ignored"])
    # The last click that belongs to a row is that of second 10: of rows whose window closed later nothing is known.
    assert [row["label.click_any"] for row in rows] == [1, None, None, None]
    assert [row["label.click_wait"] for row in rows] == [10, None, None, None]
    assert [row["seen"] for row in rows] == [[], ["x"], ["y", "x"], ["z", "y", "x"]]
    assert [row["clicked"] for row in rows] == [[], [], ["x"], ["x"]]
    assert [row["ignored"] for row in rows] == [[], [], [], []]
    assert manifest.outcomes["click"] == {"joined": 1, "duplicate": 1, "early": 0, "late": 1, "unmatched": 1}
    assert manifest.complete_until == {"click": BASE + 10}
    run(tmp_path, tmp_path / "told", content_for({"click": rule}), as_of=written(BASE + 60, 2), min_joined=0.3)
    rows = found_rows(tmp_path / "told", ["seen", "clicked", "ignored"])
    assert [row["label.click_any"] for row in rows] == [1, 0, 0, None]
    assert [row["ignored"] for row in rows] == [[], [], ["y"], ["z", "y"]]  # known in the seconds 15 and 30


@pytest.mark.parametrize("windows", [(5, 20), (20, 5)])
def test_what_reads_two_outcomes_is_known_once_both_windows_have_closed(
    windows: tuple[int, int], tmp_path: Path
) -> None:
    impressions = [Impression(0, "a", BASE, "u", "x")]
    impressions += [Impression(i, f"b{i}", BASE + wait, "u", None) for i, wait in enumerate((1, 6, 20, 21), 1)]
    streams = {"click": [Event("a", BASE, 2)], "buy": [Event("a", BASE, 1)]}
    outcomes = {
        name: Rules(window=window, take="first", duplicates="drop", late="drop", open_window="keep")
        for name, window in zip(streams, windows, strict=True)
    }
    write_log(tmp_path, impressions, streams)
    run(tmp_path, tmp_path / "out", content_for(outcomes))
    rows = found_rows(tmp_path / "out", ["clicked", "either"])
    assert [row["clicked"] for row in rows] == [[], ["x"], ["x"], ["x"], ["x"]]
    assert [row["either"] for row in rows] == [[], [], [], [], ["x"]]
