"""Whose earlier rows a history or counter has: of a missing user none, whatever the log writes there."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import refused, rows_by_id, run, values_of

pytestmark = pytest.mark.usefixtures("steps_alone")
BASE = 1_700_000_000


def content(**source: Any) -> dict[str, Any]:
    history = {"user": "user", "item": "item"}
    return {
        "source": {
            "files": "log.csv", "row_id": "id", "derived": {"named": "CONCAT(\"user\", '')"},
            "counters": {"rows": {"by": "user", "take": "count"}, "all_rows": {"by": "named", "take": "count"}},
        } | source,
        "dense": {name: {"standardize": False, "missing_flag": True} for name in ("rows", "all_rows")},
        "categorical": {"user": {"dim": 4}},
        "bag": {"seen": {"dim": 4, "history": history}},
        "tasks": {"any": {"kind": "binary", "label": "1"}},
        "event_time": "at",
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }  # fmt: skip


def test_rows_whose_user_is_a_marker_have_no_past_and_keep_their_id(tmp_path: Path) -> None:
    users = ["NULL", "a", "NULL", "a", "None", "NULL", "a", "None"]
    lines = [f"{i},{BASE + i},{user},x\n" for i, user in enumerate(users)]
    (tmp_path / "log.csv").write_text("".join(["id,at,user,item\n", *lines]))
    run(tmp_path, tmp_path / "out", content())
    found, names = rows_by_id(tmp_path / "out"), values_of(tmp_path / "out", "user")
    assert [names[row["user"]] for row in found] == users
    for place, (row, user) in enumerate(zip(found, users, strict=True)):
        earlier = users[:place].count(user)
        assert row["all_rows"] == earlier  # of a derived column any text is taken as it is
        number = None if row["rows_missing"] else row["rows"]
        assert (len(row["seen"]), number) == ((earlier, earlier) if user == "a" else (0, None))


@pytest.mark.parametrize(
    ("user", "words"), [(0.5, "holds 0.5, which is no id"), (1e17, "a float has lost the last digits")]
)
def test_a_number_that_is_no_id_is_refused_where_only_a_counter_reads_it(
    user: float, words: str, tmp_path: Path
) -> None:
    (tmp_path / "log").mkdir()
    columns = {"id": [1, 2], "at": [BASE, BASE + 1], "user": [user, 3.0], "item": ["x", "y"]}
    pq.write_table(pa.table(columns), tmp_path / "log" / "log.parquet")
    counters = {"rows": {"by": "user", "take": "count"}}
    read = content(files="log.parquet", format="parquet", derived={}, counters=counters)
    read["dense"] = {"rows": {}}
    read |= {"categorical": {"item": {"dim": 4}}, "bag": {}}
    assert words in refused(tmp_path / "log", tmp_path / "out", read)
