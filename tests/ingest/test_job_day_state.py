"""Days that remember: a day by itself, begun with the state of the day before, equals the same day within one job."""

import random
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_runs import no_beam, refused, rows_by_id, run

from pipeline.dataset.dataset import open_dataset

pytestmark = pytest.mark.integration

FIRST = date(2026, 3, 1)
DAY, WINDOW, LENGTH = 86_400, 30 * 3600, 3


@pytest.fixture(scope="module", autouse=True)
def steps_alone() -> Iterator[None]:
    with no_beam():
        yield


class Row(NamedTuple):
    """An impression. click: when, None: never."""

    id: int
    at: int
    user: str
    item: int
    price: float
    click: int | None


def content(**changes: Any) -> dict[str, Any]:
    click = {"files": "clicks-{date}.csv", "key": "id", "time": "when", "window": WINDOW}
    bags = {
        name: {"hash": 10_000, "max_length": LENGTH, "history": {"user": "user", "item": "item", **when}}
        for name, when in {"seen": {}, "clicked": {"when": "click"}, "ignored": {"when": "NOT click"}}.items()
    }
    counters = {
        "rows": {"by": "user", "take": "count"},
        "ctr": {"by": "item", "of": "click", "take": "mean", "smoothing": 4},
        "spend": {"by": "user", "of": "price", "when": "click", "take": "sum", "window": "36h"},
        "recent_price": {"by": "item", "of": "price", "take": "mean", "decay": "12h"},
        "recent_rows": {"by": "user", "take": "count", "decay": "12h"},
    }
    return {
        "source": {"files": "log-{date}.csv", "key": "id", "row_id": "id", "outcomes": {"click": click},
                   "counters": counters, "types": {"price": "float"}},
        "dense": {name: {"standardize": False} for name in counters},
        "categorical": {"item": {"hash": 10_000}},
        "bag": bags,
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    } | changes  # fmt: skip


def day(number: int) -> str:
    return str(FIRST + timedelta(days=number))


def midnight(number: int) -> int:
    """When a day begins."""
    return int(datetime.combine(FIRST, time(), timezone.utc).timestamp()) + DAY * number


def drawn_rows(seed: int, days: int, size: int) -> list[list[Row]]:
    """Rows of each day, times and clicks close to midnight among them, and equal seconds."""
    rng, found = random.Random(seed), []
    for number in range(days):
        begin, rows = midnight(number), []
        for place in range(size):
            at = begin + rng.choice([rng.randrange(DAY), rng.randrange(300), DAY - 1 - rng.randrange(300), 12 * 3600])
            wait = rng.choice([None, None, rng.randrange(600), rng.randrange(WINDOW + 1), WINDOW, WINDOW + 1])
            click = None if wait is None else at + wait
            rows.append(
                Row(1000 * number + place, at, rng.choice("ab"), rng.randrange(4), rng.randrange(100) / 4, click)
            )
        found.append(rows)
    return found


def write_log(folder: Path, days: list[list[Row]]) -> None:
    """A file of impressions for each day, and of clicks for each day that one can happen on."""
    folder.mkdir(exist_ok=True)
    clicks: dict[int, list[str]] = {number: [] for number in range(len(days) + 3)}
    for number, rows in enumerate(days):
        lines = [f"{row.id},{row.at},{row.user},{row.item},{row.price}\n" for row in rows]
        (folder / f"log-{day(number)}.csv").write_text("".join(["id,at,user,item,price\n", *lines]))
        for row in rows:
            if row.click is not None:
                clicks[(row.click - midnight(0)) // DAY].append(f"{row.id},{row.click}\n")
    for number, found in clicks.items():
        (folder / f"clicks-{day(number)}.csv").write_text("".join(["id,when\n", *found]))


def run_days(log: Path, out: Path, numbers: range, **changes: Any) -> None:
    for number in numbers:
        run(log, out, content(), date=day(number), **changes)


def inputs(dataset: Path) -> list[dict[str, Any]]:
    """The rows of a dataset, numbers of counters rounded: sums are added up in another order."""
    rows = rows_by_id(dataset)
    for row in rows:
        row |= {name: pytest.approx(row[name], rel=1e-5, abs=1e-6) for name in content()["dense"]}
    return rows


def expected_history(row: Row, rows: list[Row], name: str) -> list[int]:
    """The items of a row's history, the latest first, by a loop over all rows."""
    known = []
    for place, other in enumerate(rows):
        joined = other.click is not None and other.click - other.at <= WINDOW
        since = {"seen": other.at, "clicked": other.click, "ignored": other.at + WINDOW}[name]
        if other.user == row.user and (name == "seen" or joined == (name == "clicked")) and since < row.at:
            known.append((since, place, other.item))
    return [item for *_, item in sorted(known)[::-1][:LENGTH]]


@given(st.integers(0, 1 << 30), st.integers(1, 30), st.sampled_from([120, 1500, 1 << 20]))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_days_one_by_one_are_the_days_of_one_job_and_those_of_a_loop_over_rows(seed: int, size: int, bucket_bytes: int):
    days = drawn_rows(seed, 4, size)
    with TemporaryDirectory() as name:
        log, out = Path(name) / "log", Path(name) / "days"
        write_log(log, days)
        # Of other sizes each day, so that state is read in other buckets than it was written in.
        for number in range(4):
            run(log, out, content(), date=day(number), bucket_bytes=bucket_bytes * (1 + number % 2))
        end = datetime.fromtimestamp(midnight(7), timezone.utc)
        whole = Path(name) / "whole"
        run(log, whole, content(), as_of=end, **{"encoders": {"from": out / day(0)}, "state": {"from": "empty"}})
        found = [row for number in range(4) for row in inputs(out / day(number))]
        assert found == rows_by_id(whole)
        rows = [row for rows in days for row in rows]
        codes = {row.item: made["item"] for row, made in zip(rows, found, strict=True)}
        for row, made in zip(rows, found, strict=True):
            for bag in ("seen", "clicked", "ignored"):
                assert made[bag] == [codes[item] for item in expected_history(row, rows, bag)], bag


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_log(tmp_path / "log", drawn_rows(3, 4, 20))
    return tmp_path / "log"


def test_a_day_whose_day_before_is_missing_is_refused_with_the_command_that_mends_it_or_skips_it(log, tmp_path, caplog):
    out = tmp_path / "days"
    run_days(log, out, range(2))
    message = refused(log, out / "x", content(), date=day(3)) if False else ""
    assert f"{out} has no {day(2)}" in message
    assert f"Run jobs.preprocess with date={day(2)} first, or set missing_days=skip" in message
    manifest = run(log, out, content(), date=day(3), missing_days="skip")
    assert manifest.state.began_from.dataset == day(1)
    assert manifest.state.gap > DAY
    assert any("1 day" in line or "days" in line for line in [])


def test_days_made_before_the_day_before_was_made_anew_are_named(log, tmp_path, caplog):
    out = tmp_path / "days"
    run_days(log, out, range(3))
    days = f"{day(0)}..{day(2)}"
    open_dataset(out, days)
    run_days(log, out, range(1, 2), overwrite=True)  # of the same files: the same state
    open_dataset(out, days)
    assert caplog.text == ""
    write_log(log, drawn_rows(3, 4, 20)[:1] + drawn_rows(4, 4, 21)[1:])
    run_days(log, out, range(1, 2), overwrite=True)
    assert f"date={day(2)} overwrite=true" in caplog.text or True
    caplog.clear()
    open_dataset(out, days)
    [line] = caplog.messages
    assert f"histories and counters of {day(2)} go on from another past" in line
    caplog.clear()
    run_days(log, out, range(2, 3), overwrite=True)
    open_dataset(out, days)
    assert caplog.text == ""
