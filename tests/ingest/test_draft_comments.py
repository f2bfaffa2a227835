"""What a draft offers as comments: each of them, once it is uncommented, is read by jobs.preprocess."""

import json
import random
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ingest_runs import run
from test_draft import FIRST, drafted, log, no_beam, write_csv

from pipeline.dataset.manifest import Manifest

OFFERED = re.compile(r"^( +)# (\S+: \{.*\})$", re.M)


def offered(text: str) -> dict[str, Any]:
    """The entries that are commented out."""
    return {key: value for found in OFFERED.finditer(text) for key, value in yaml.safe_load(found[2]).items()}


def uncommented(tmp_path: Path, folder: Path, text: str) -> tuple[dict[str, Any], Manifest]:
    """The schema with every entry that was commented out, and the dataset of it."""
    schema = yaml.safe_load(OFFERED.sub(r"\1\2", text))["schema"]
    with no_beam():
        manifest = run(folder, tmp_path / "dataset", schema)
    assert sum(manifest.dead_letters.values()) == 0
    return schema, manifest


def items(cost: str = "cost") -> list[dict[str, Any]]:
    return [{"item": 1000 + i, "brand": f"b{i % 7}", cost: i / 4} for i in range(60)]


def versions(since: Any = lambda at: at) -> list[dict[str, Any]]:
    draw = random.Random(5)
    return [
        {"user": f"u{i % 150}", "country": f"c{draw.randrange(5)}", "age": 20 + i % 40, "since": since(FIRST + 97 * (i - 200))}
        for i in range(500)
    ]  # fmt: skip


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_a_side_table_beside_impressions_of_another_format_says_how_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    write_parquet(folder / "impressions.parquet", log(500))
    write_csv(folder / "items.csv", items())
    write_csv(folder / "users.csv", versions(lambda at: at * 1000), delimiter=";")
    _, text = drafted(tmp_path, folder)
    tables = offered(text)["tables"]
    assert tables["item"]["read"] == {"format": "csv"}
    assert tables["user"]["read"] == {"delimiter": ";", "times": {"since": "ms"}}
    _, manifest = uncommented(tmp_path, folder, text)
    assert manifest.side_tables["item"].matched_rows == 500


@pytest.mark.parametrize(
    "since", [int, lambda at: at * 1000, lambda at: datetime.fromtimestamp(at, timezone.utc).isoformat()]
)
def test_a_table_of_several_rows_a_key_is_offered_as_versions_by_its_time(tmp_path: Path, since: Any) -> None:
    folder = tmp_path / "raw"
    write_csv(folder / "impressions.csv", log(500))
    write_csv(folder / "users.csv", versions(since))
    _, text = drafted(tmp_path, folder)
    user = offered(text)["tables"]["user"]
    assert (user["key"], user["valid_from"]) == ("user", "since")
    assert user["columns"] == {"country": "string", "age": "int"}
    _, manifest = uncommented(tmp_path, folder, text)
    assert manifest.side_tables["user"].matched_rows > 0
    assert manifest.side_tables["user"].unmatched_rows == 0


def test_tables_in_files_by_day_are_snapshots_or_where_keys_repeat_versions_of_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    write_csv(folder / "impressions.csv", log(900))
    for day in range(1, 6):
        write_csv(folder / f"items-2026-11-0{day}.csv", items())
        changes = [row | {"since": row["since"] + 86_400 * (day - 1)} for row in versions()]
        write_csv(folder / f"changes-2026-11-0{day}.csv", changes)
    _, text = drafted(tmp_path, folder, impressions="impressions.csv")
    tables = offered(text)["tables"]
    assert tables["item"]["files"] == "items-{date}.csv"
    assert "valid_from" not in tables["item"]
    assert (tables["change"]["files"], tables["change"]["valid_from"]) == ("changes-*.csv", "since")
    _, manifest = uncommented(tmp_path, folder, text)
    assert manifest.side_tables["item"].matched_rows > 0


@pytest.mark.parametrize("drop", ["", "ts"])
def test_files_by_day_with_other_keys_each_are_parts_of_one_table(drop: str, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    write_csv(folder / "impressions.csv", [{k: v for k, v in row.items() if k != drop} for row in log(500)])
    for day in range(1, 4):
        write_csv(folder / f"items-2026-11-0{day}.csv", items()[20 * (day - 1) : 20 * day])
    users = [{"user": f"u{i}", "age": i % 50} for i in range(150)]
    write_csv(folder / "users-2026-11-01.csv", users)
    _, text = drafted(tmp_path, folder)
    tables = offered(text)["tables"]
    assert tables["item"]["files"] == "items-*.csv"
    assert tables["user"]["files"] == ("users-*.csv" if drop else "users-{date}.csv")
    _, manifest = uncommented(tmp_path, folder, text)
    assert [manifest.side_tables[name].matched_rows for name in ("item", "user")] == [500, 500]


def test_outcomes_tables_and_tasks_that_would_share_a_name_get_others(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    rows = [row | {"id": f"r{i:06d}", "item_brand": "x"} for i, row in enumerate(log(600))]
    write_csv(folder / "impressions.csv", [{k: v for k, v in row.items() if k != "click"} for row in rows])
    for name, every in (("orders", 3), ("refunds", 4)):
        write_csv(
            folder / f"{name}.csv",
            [{"id": r["id"], "at": r["ts"] + 60, "amount": i} for i, r in enumerate(rows[::every])],
        )
    write_csv(folder / "items.csv", items())
    write_csv(folder / "more" / "item.csv", items("width"))
    write_csv(folder / "order.csv", [{"user": f"u{i}", "amount": i, "city": "x"} for i in range(150)])
    schema, text = drafted(tmp_path, folder)
    whole, manifest = uncommented(tmp_path, folder, text)
    assert {*schema["tasks"]} == {"order", "refund"}
    assert {*whole["tasks"]} == {"order", "refund", "amount", "refund_amount"}
    assert {table["files"] for table in whole["source"]["tables"].values()} == {
        "items.csv",
        "more/item.csv",
        "order.csv",
    }
    assert sum(found["amount"] for found in manifest.observed.values()) > 190  # of 200, the last in an open window


def test_columns_of_lists_are_named_but_not_offered_as_single_values(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "impressions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log(500)))
    (folder / "items.jsonl").write_text("".join(json.dumps(row | {"tags": ["a", "b"]}) + "\n" for row in items()))
    write_parquet(folder / "users.parquet", [{"user": f"u{i}", "emb": [i / 3, 0.25]} for i in range(150)])
    _, text = drafted(tmp_path, folder)
    assert offered(text)["tables"]["item"]["columns"] == {"brand": "string", "cost": "float"}
    assert "# items.jsonl" in text.replace('"', "")
    assert ": to be added with a bag or vector that reads it: tags" in text
    assert "has no column of one value a row beside its key" in text
    uncommented(tmp_path, folder, text)


@pytest.mark.parametrize(
    ("rows", "drop", "why"),
    [
        (
            [{k: v for k, v in row.items() if k != "since"} for row in versions()],
            "",
            "no time from which each is valid",
        ),
        (versions(), "ts", "the impressions have no event_time"),
    ],
)
def test_a_table_of_several_rows_a_key_that_cannot_be_read_is_named_with_the_true_reason(
    rows: list[dict[str, Any]], drop: str, why: str, tmp_path: Path
) -> None:
    folder = tmp_path / "raw"
    write_csv(folder / "impressions.csv", [{k: v for k, v in row.items() if k != drop} for row in log(900)])
    write_csv(folder / "users.csv", rows)
    _, text = drafted(tmp_path, folder, impressions="impressions.csv")
    assert "tables" not in offered(text)
    said = " ".join(text.replace("#", "").split())
    assert (
        f'"users.csv" has several rows with one user, but {why}: which of them an impression sees is not known' in said
    )


def test_events_of_single_impressions_are_no_versions_of_a_user(tmp_path: Path) -> None:
    rows = [row | {"id": f"r{i:06d}"} for i, row in enumerate(log(600))]
    write_csv(tmp_path / "raw" / "impressions.csv", rows)
    truth = [{"id": r["id"], "user": r["user"], "since": r["ts"], "p": r["click"] / 2} for r in rows]
    write_csv(tmp_path / "raw" / "truth.csv", truth)
    _, text = drafted(tmp_path, tmp_path / "raw", impressions="impressions.csv")
    assert '"truth.csv" has a row for about every impression' in text
    assert "tables" not in offered(text)
