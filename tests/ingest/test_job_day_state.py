"""Days that remember: a day by itself, begun with the state of the day before, equals the same day within one job."""

import json
import random
import re
import shutil
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_runs import content_of, no_beam, rows_by_id, run

from features.errors import UserError
from features.hashing import bucket_of
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.past_state import state_id, state_lines
from pipeline.dataset.verify import verify
from pipeline.ingest import job as ingest_job
from pipeline.release import encoded_day
from pipeline.release.config import NightlyConfig
from pipeline.storage.files import make_folder, sha256

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

FIRST = date(2026, 3, 1)
DAY, WINDOW, LENGTH = 86_400, 30 * 3600, 3


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


def test_of_clicks_in_one_second_those_on_rows_of_the_day_before_come_first(tmp_path):
    second = midnight(1) + 3600
    days = [[Row(1000 * number + i, midnight(number) + 100 + i, "a", 2 * number + i, 1.0, second) for i in range(2)]
            for number in range(2)]  # fmt: skip
    days[1].append(Row(1002, second + 60, "a", 9, 1.0, None))
    write_log(tmp_path / "log", days)
    run_days(tmp_path / "log", tmp_path / "days", range(2))
    rows = [row for rows in days for row in rows]
    made = [row for number in range(2) for row in rows_by_id(tmp_path / "days" / day(number))]
    codes = {row.item: found["item"] for row, found in zip(rows, made, strict=True)}
    assert made[-1]["clicked"] == [codes[item] for item in expected_history(rows[-1], rows, "clicked")]
    assert made[-1]["clicked"] == [codes[item] for item in (3, 2, 1)]


@given(st.integers(0, 1 << 30), st.integers(1, 30), st.sampled_from([600, 1 << 20]))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
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


@pytest.fixture(scope="module")
def three_days(tmp_path_factory) -> Path:
    """A log of four days, and the datasets of the first three."""
    folder = tmp_path_factory.mktemp("three")
    write_log(folder / "log", drawn_rows(3, 4, 20))
    with no_beam():
        run_days(folder / "log", folder / "days", range(3))
    return folder


@pytest.fixture
def three(three_days: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The log and the days, copies that a test may change."""
    shutil.copytree(three_days, tmp_path / "three")
    return tmp_path / "three" / "log", tmp_path / "three" / "days"


def refusal(log: Path, out: Path, **changes: Any) -> str:
    """The line that stops a job, which leaves everything below `out` as it was."""
    before = content_of(out)
    with pytest.raises(UserError) as caught:
        run(log, out, changes.pop("content", content()), **changes)
    assert content_of(out) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(manifest: Manifest) -> str:
    assert manifest.state is not None
    return "\n".join(state_lines(manifest.state))


def test_a_manifest_says_where_histories_began_and_verification_reads_their_files(three):
    _, days = three
    states = [Dataset(days / day(number)).manifest.state for number in range(3)]
    assert [state.horizon for state in states] == [midnight(number) for number in (1, 2, 3)]
    assert states[0].began_from is None
    for number in (1, 2):
        assert states[number].began_from.model_dump() == {
            "dataset": day(number - 1),
            "state": state_id(states[number - 1]),
        }
    later = states[0].model_copy(update={"horizon": midnight(2)})
    assert len({state_id(state) for state in (*states, later)}) == 4
    assert "began empty" in lines(Dataset(days / day(0)).manifest)
    assert f"began with the state of {day(0)}, and end at 2026-03-03T00:00:00Z" in lines(
        Dataset(days / day(1)).manifest
    )
    events = sum(pq.read_metadata(days / day(2) / file.path).num_rows for file in states[2].files)
    assert f"state: {events:,} events of 8 histories and counters" in list(verify(Dataset(days / day(2))))
    keys = pq.read_table(days / day(2) / "state" / "seen.parquet")["key"].to_pylist()
    assert sorted(keys) == ["a"] * LENGTH + ["b"] * LENGTH  # and not all that there were


def test_a_day_whose_day_before_is_missing_is_refused_with_what_mends_it_or_skips_it(three):
    log, days = three
    shutil.rmtree(days / day(2))
    message = refusal(log, days, date=day(3))
    assert f"{days} has no {day(2)}" in message
    assert (
        f"Run jobs.preprocess with date={day(2)} first, or set missing_days=skip to begin with those of {day(1)}"
        in message
    )
    manifest = run(log, days, content(), date=day(3), missing_days="skip")
    assert manifest.state.began_from.dataset == day(1)
    assert f"the first row is 1.0 days after the end of {day(1)}" in lines(manifest)
    rows = [row for number in (0, 1, 3) for row in drawn_rows(3, 4, 20)[number]]
    codes = {row.item: made["item"] for number in (0, 1, 3) for row, made in zip(
        drawn_rows(3, 4, 20)[number], rows_by_id(days / day(number)), strict=True)}  # fmt: skip
    found = [made["seen"] for made in rows_by_id(days / day(3))]
    assert found == [[codes[item] for item in expected_history(row, rows, "seen")] for row in rows[40:]]


def test_days_made_before_the_day_before_was_made_anew_are_named_when_they_are_made_and_opened(three, caplog):
    log, days = three
    span = f"{day(0)}..{day(2)}"
    run_days(log, days, range(1, 2), overwrite=True)  # of the same files: the same state
    open_dataset(days, span)
    assert caplog.text == ""
    write_log(log, drawn_rows(3, 4, 20)[:1] + drawn_rows(4, 4, 21)[1:])
    run_days(log, days, range(1, 2), overwrite=True)
    open_dataset(days, span)
    stale = f"{days}: histories and counters of {day(2)} go on from another past than the day before now has. Run "
    stale += f"jobs.preprocess again with date={day(2)} overwrite=true, then for the days after it."
    assert caplog.messages == [stale, stale]
    caplog.clear()
    run_days(log, days, range(2, 3), overwrite=True)
    open_dataset(days, span)
    assert caplog.text == ""
    run_days(log, days, range(2, 3), overwrite=True, state={"from": "empty"})  # as its user wants it
    open_dataset(days, span)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "damage",
    [
        "flipped",
        "short",
        "missing",
        "link",
        "no state",
        "other key",
        "infinite",
        "other group",
        "unlisted",
        "no groups",
    ],
)
def test_a_damaged_state_is_refused(three, damage):
    log, days = three
    folder = days / day(2)
    file, listed = folder / "state" / "clicked.parquet", json.loads((folder / "manifest.json").read_text())
    data, words = file.read_bytes(), "clicked.parquet"
    if damage == "flipped":
        place = data.find(b"(\xb5/\xfd") + 20  # within the first page that is packed
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        words = "checksum"
    elif damage == "short":
        file.write_bytes(data[:-9])
    elif damage == "missing":
        file.unlink()
    elif damage == "link":
        file.rename(folder.parent / "elsewhere")
        file.symlink_to(folder.parent / "elsewhere")
        words = "is a link"
    elif damage == "no state":
        listed["state"] = None
        words = "has no state: seen, clicked"
    elif damage == "other key":
        table = pq.read_table(file)
        changed = table.set_column(0, "key", pa.array([None] * len(table), pa.large_string()))
        pq.write_table(changed, file, row_group_size=max(1, len(table)))
        entry = next(entry for entry in listed["state"]["files"] if entry["name"] == "clicked")
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
        words = "key is missing"
    elif damage == "infinite":
        file = folder / "state" / "recent_price.parquet"
        table = pq.read_table(file)
        changed = table.set_column(
            table.column_names.index("value"), "value", pa.array([np.inf, *table["value"].to_pylist()[1:]])
        )
        groups = next(entry for entry in listed["state"]["files"] if entry["name"] == "recent_price")["row_groups"]
        assert len(groups) == 1
        pq.write_table(changed, file, row_group_size=len(table), write_page_checksum=True)
        entry = next(entry for entry in listed["state"]["files"] if entry["name"] == "recent_price")
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
        words = "value is missing or not finite"
    elif damage == "other group":
        table = pq.read_table(file)
        pq.write_table(
            pa.concat_tables([table, table]), file, row_group_size=len(table)
        )  # a key is of one of two groups
        entry = next(entry for entry in listed["state"]["files"] if entry["name"] == "clicked")
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file), "row_groups": [len(table)] * 2}
        words = "row group . has other keys"
    elif damage == "unlisted":
        listed["state"]["files"].pop()
        words = "state lists other files"
    elif damage == "no groups":
        listed["state"]["files"][0]["row_groups"] = []
        words = "row_groups"
    (folder / "manifest.json").write_text(json.dumps(listed))
    assert re.search(words, refusal(log, days, date=day(3)))
    if damage != "no state":
        with pytest.raises(UserError, match=words):
            list(verify(Dataset(folder)))


def test_a_state_with_keys_in_another_row_group_than_that_of_their_hash_is_refused(three):
    log, days = three
    file, manifest = days / day(2) / "state" / "clicked.parquet", days / day(2) / "manifest.json"
    table = pq.read_table(file)
    bucket = bucket_of(table["key"].combine_chunks(), 2)
    groups = [table.filter(pa.array(bucket == number)) for number in (1, 0)]
    with pq.ParquetWriter(file, table.schema, write_page_checksum=True) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=max(1, len(group)))
    listed = json.loads(manifest.read_text())
    entry = next(entry for entry in listed["state"]["files"] if entry["name"] == "clicked")
    entry |= {"bytes": file.stat().st_size, "sha256": sha256(file), "row_groups": [len(group) for group in groups]}
    manifest.write_text(json.dumps(listed))
    assert "clicked.parquet: row group " in (said := refusal(log, days, date=day(3)))
    assert "has other keys" in said


def test_a_state_of_another_definition_is_refused_by_name(three):
    log, days = three
    other = content()
    other["bag"]["clicked"]["max_length"] = LENGTH + 1
    assert f"{days / day(2)}: clicked has another definition in its state" in refusal(
        log, days.parent / "other", content=other, date=day(3), state={"from": str(days)}
    )
    plain = content(bag={})
    plain["source"]["counters"], plain["dense"] = {}, {}
    assert "state.from: the schema has no history" in refusal(
        log, days.parent / "x", content=plain, state={"from": "empty"}
    )


def test_an_interrupted_job_leaves_no_half_state(three, monkeypatch):
    log, days = three

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest_job, "commit_job", stopped)
    before = content_of(days)
    with pytest.raises(KeyboardInterrupt):
        run(log, days, content(), date=day(2), overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        run(log, days, content(), date=day(3))
    assert content_of(days) == before


def test_what_late_outcomes_would_have_added_is_counted(three):
    log, days = three
    for number in (3, 4, 5):
        (log / f"clicks-{day(number)}.csv").unlink()
    manifest = run(log, days, content(), date=day(2), overwrite=True)
    rows = [row for row in drawn_rows(3, 4, 20)[2] if row.at + WINDOW > midnight(3)]
    left_out = [row for row in rows if row.click is None or row.click >= midnight(3)]
    assert manifest.state.undecided["seen"] == 0
    assert manifest.state.undecided["clicked"] == len(left_out)
    assert manifest.state.undecided["ignored"] == len(rows)
    assert f"{len(rows)} of ignored, {len(left_out)} of clicked, " in lines(manifest)


@pytest.mark.parametrize("count", [1, 20])
def test_rows_before_the_midnight_that_the_state_begins_at_are_counted(three, count):
    """Of a day by itself even where all rows are: its files are those of the day, on clocks of another zone."""
    log, days = three
    rows = drawn_rows(3, 4, 20)
    rows[3][:count] = [row._replace(at=midnight(3) - 7, click=None) for row in rows[3][:count]]
    rows[3][count:] = [row._replace(at=midnight(3), click=None) for row in rows[3][count:]]
    write_log(log, rows)
    manifest = run(log, days, content(), date=day(3))
    assert manifest.state.cut_short == count
    assert f"{count} rows are earlier than the end of {day(2)}" in lines(manifest)


def test_rows_after_the_end_of_their_files_day_are_counted(three):
    log, days = three
    rows = drawn_rows(3, 4, 20)
    rows[3][7:9] = [row._replace(at=midnight(4) + i, click=None) for i, row in enumerate(rows[3][7:9])]
    write_log(log, rows)
    manifest = run(log, days, content(), date=day(3))
    assert (manifest.state.ahead, manifest.state.cut_short) == (2, 0)
    assert f"2 rows are at or after {day(4)}T00:00:00Z, the end of the day: rows of later files" in lines(manifest)


# A log that is read with the encoders of another dataset


def log_of_day(log: Path, number: int, folder: Path) -> Path:
    """A folder with the files of one day alone, and the clicks on its rows."""
    folder.mkdir()
    for days, name in ((1, "log"), (4, "clicks")):
        for later in range(days):
            if (file := log / f"{name}-{day(number + later)}.csv").exists():
                shutil.copy(file, folder)
    return folder


def test_a_days_log_with_encoders_from_goes_on_from_the_newest_day_and_is_the_day(three, tmp_path):
    log, days = three
    rows = drawn_rows(3, 4, 20)
    rows[3][0] = rows[3][0]._replace(at=midnight(3), click=None)  # when the state of the day before ends
    write_log(log, rows)
    alone = log_of_day(log, 3, tmp_path / "alone")
    run(alone, tmp_path / "out", content(), encoders={"from": days / day(0)}, as_of=str(FIRST + timedelta(days=7)))
    run(log, days, content(), date=day(3))
    assert inputs(tmp_path / "out") == rows_by_id(days / day(3))
    # Once the day itself is there, its rows would be seen twice.
    message = refusal(alone, tmp_path / "again", encoders={"from": days / day(0)})
    assert f"20 of 20 rows are before 2026-03-05T00:00:00Z, where the state of {days / day(3)} ends" in message
    assert f", such as {days / day(2)}, or state.from=empty; with jobs.nightly, date= is the day" in message
    run(alone, tmp_path / "again", content(), encoders={"from": days / day(0)}, state={"from": str(days / day(2))},
        as_of=str(FIRST + timedelta(days=7)))  # fmt: skip
    assert inputs(tmp_path / "again") == rows_by_id(days / day(3))


def test_where_a_state_is_not_to_be_found_the_message_says_what_is_missing(log, tmp_path):
    missing, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    assert refusal(log, tmp_path / "out", state={"from": str(missing)}) == (
        f"state.from={missing}: no such folder. Name a dataset, a folder of days, or empty."
    )
    message = refusal(log, tmp_path / "out", state={"from": str(empty)})
    assert message.startswith(f"{empty}: no dataset and no days in it.")
    whole = tmp_path / "whole"
    run(log, whole, content())
    message = refusal(log, tmp_path / "out", state={"from": str(whole)})
    assert f"the state of {whole} ends: it has them already. Set state.from to a dataset that ends before " in message
    assert "such as" not in message


def test_a_whole_dataset_has_a_state_too_and_one_without_it_is_refused(three, tmp_path):
    log, days = three
    whole, alone = tmp_path / "whole", log_of_day(log, 3, tmp_path / "alone")
    (log / f"log-{day(3)}.csv").rename(tmp_path / "later.csv")
    end = str(FIRST + timedelta(days=7))
    manifest = run(log, whole, content(), as_of=end, encoders={"from": days / day(0)}, state={"from": "empty"})
    assert manifest.state.horizon == max(row.at for rows in drawn_rows(3, 4, 20)[:3] for row in rows) + 1
    run(alone, tmp_path / "out", content(), encoders={"from": whole}, as_of=end)
    (tmp_path / "later.csv").rename(log / f"log-{day(3)}.csv")
    run(log, days, content(), date=day(3))
    assert inputs(tmp_path / "out") == rows_by_id(days / day(3))
    listed = json.loads((whole / "manifest.json").read_text())
    del listed["state"]  # as an earlier release wrote it
    (whole / "manifest.json").write_text(json.dumps(listed))
    message = refusal(alone, tmp_path / "refused", encoders={"from": whole})
    assert f"{whole} has no state: seen, clicked, ignored" in message
    assert "state.from=empty" in message
    run(alone, tmp_path / "empty", content(), encoders={"from": whole}, state={"from": "empty"}, as_of=end)
    assert rows_by_id(tmp_path / "empty")[0]["rows"] == 0


def test_nightly_goes_on_from_the_day_before_and_encodes_the_day_as_it_is_encoded_later(three, tmp_path):
    log, days = three

    class Trained:
        path = checkpoints = tmp_path

        def config(self) -> dict[str, Any]:
            return {"dataset": str(days), "days": f"{day(0)}..{day(1)}"}

    settings_ = {"run": tmp_path, "input": str(log_of_day(log, 3, tmp_path / "alone")), "out": tmp_path / "night"}

    def judge(**changes: Any) -> Dataset:
        config = NightlyConfig.model_validate(settings_ | {"date": day(3)} | changes)
        make_folder(config.folder)
        return Dataset(encoded_day.encode(config, encoded_day.origin_of(config, Trained())))

    encoded = judge()
    assert encoded.manifest.state.began_from.dataset == str(days / day(2))
    run(log, days, content(), date=day(3))
    for row, made in zip(inputs(encoded.path), rows_by_id(days / day(3)), strict=True):
        assert {name: row[name] for name in ("seen", *content()["dense"])} == {
            name: made[name] for name in ("seen", *content()["dense"])
        }
    shutil.rmtree(days / day(2))
    with pytest.raises(UserError, match=f"{days} has no {day(2)}, .*missing_days=skip"):
        judge()
    assert judge(missing_days="skip").manifest.state.began_from.dataset == str(days / day(1))
