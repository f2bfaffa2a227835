"""Parquet files that declare text which is not UTF-8: its rows are bad ones, and the others as in a file without them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import dead_letters_of, refused, rows_by_id, run, values_of

pytestmark = pytest.mark.usefixtures("steps_alone")
BAD = (3, 17, 18)


def content(column: str) -> dict[str, Any]:
    features: dict[str, Any] = {"categorical": {"user": {"dim": 4}}}
    if column == "tags":
        features = {"bag": {"tags": {"dim": 4}}}
    return {
        "source": {"files": "log.parquet", "format": "parquet", "row_id": "id"},
        **features,
        "tasks": {"click": {"kind": "binary", "label": "click = '1'"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }


def write(path: Path, column: str, kind: pa.DataType, bad: tuple[int, ...], rows: list[int]) -> None:
    texts = pa.array([b"\xffu" if n in bad else b"u%d" % (n % 4) for n in rows], pa.binary())
    values = texts.view(pa.string()) if not pa.types.is_binary(kind) else texts
    if column == "tags":
        values = pa.ListArray.from_arrays(list(range(len(rows) + 1)), values)
    if pa.types.is_dictionary(kind):
        values = values.dictionary_encode()
    table = pa.table({"id": rows, column: values, "click": [n % 2 for n in rows]})
    pq.write_table(table, path, row_group_size=8)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("user", pa.string()),
        ("user", pa.binary()),
        ("user", pa.dictionary(pa.int32(), pa.string())),
        ("tags", pa.string()),
    ],
)
def test_rows_with_text_that_is_not_utf8_are_dead_letters_and_no_others(column, kind, tmp_path):
    rows = list(range(30))
    for name, bad, kept in (("bad", BAD, rows), ("good", (), [n for n in rows if n not in BAD])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "log.parquet", column, kind, bad, kept)
    manifest = run(tmp_path / "bad", tmp_path / "out", content(column), max_bad_fraction=0.2)
    run(tmp_path / "good", tmp_path / "plain", content(column))
    assert manifest.read == {"impressions": 30}
    assert manifest.dead_letters == {"not UTF-8": 3}
    letters = dead_letters_of(tmp_path / "out")
    assert [(letter["line"], letter["reason"]) for letter in letters] == [(n + 1, "not UTF-8") for n in BAD]
    assert all(
        "\N{REPLACEMENT CHARACTER}u" in letter["raw"] and f'"id": {n}' in letter["raw"]
        for n, letter in zip(BAD, letters, strict=True)
    )
    assert rows_by_id(tmp_path / "out") == rows_by_id(tmp_path / "plain")
    assert values_of(tmp_path / "out", column) == values_of(tmp_path / "plain", column)
    assert "line 4: not UTF-8" in refused(tmp_path / "bad", tmp_path / "refused", content(column))
