"""A log whose values, columns and file names would control a terminal: from preprocess to jobs.inspect."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ingest_runs import refused, run

from features.errors import UserError
from features.printable import has_controls, printable
from jobs.entry import user_errors
from jobs.inspect import main
from pipeline.dataset.dataset import Dataset

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

VALUES = ["\x1b]0;owned\x07", "\x9b31m", "\u202etxt", "a\x7f", "<script>", "$x_{$", "é漢字🙂", "عربى"]
CONTENT: dict[str, Any] = {
    "source": {"files": "*.csv", "types": {"y": "int"}},
    "categorical": {"city": {"vocabulary": {"min_count": 1}}},
    "dense": {"x": {}},
    "tasks": {"t": {"kind": "binary", "label": "y"}},
    "split": {"by": "row_index", "modulo": 5, "train": [0, 1, 2], "valid": [3], "test": [4]},
}
BAD = ['1,"a",\x1b]0;owned\x07bad,1', '2,"b",1,\x1b]0;x\x07', "3,\u202e", '4,"c",1,7']


def write_log(folder: Path, name: bytes, header: str = "id,city,x,y", bad: list[str] = BAD) -> Path:
    rows = [f'{n},"{VALUES[n % len(VALUES)]}",{n},{n % 2}' for n in range(400)]
    folder.mkdir()
    (folder / os.fsdecode(name)).write_text("\n".join([header, *bad, *rows]) + "\n", encoding="utf-8")
    return folder


def said(call: Any) -> str:
    """What a job prints as its error."""
    with pytest.raises(SystemExit) as stopped, user_errors():
        call()
    return str(stopped.value)


@pytest.mark.parametrize(
    "name", [b"log.csv", b"l\x1b]0;owned\x07og.csv", b"l\xffog.csv", b"l\nog.csv", "é漢字.csv".encode()]
)
def test_a_log_of_any_name_and_values_is_ingested_as_it_is_and_shown_as_text(
    name: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    manifest = run(write_log(tmp_path / "log", name), tmp_path / "out", CONTENT, max_bad_fraction=0.5)
    assert sum(manifest.rows.values()) == 400
    vocabulary = pq.read_table(tmp_path / "out" / "encoders" / "vocabularies" / "city.parquet")["value"].to_pylist()
    assert sorted(vocabulary) == sorted(VALUES)
    letters = pq.read_table(tmp_path / "out" / manifest.dead_letter_files[0].path)
    raw = letters["raw"].to_pylist()  # data stays what it is
    assert json.loads(raw[0])["x"] == "\x1b]0;owned\x07bad"
    assert raw[2] == BAD[2]
    main([str(tmp_path / "out"), "--verify"])
    shown = capsys.readouterr()
    page = (tmp_path / "out.card.html").read_text(encoding="utf-8")
    for text in (shown.out, shown.err, page):
        assert not has_controls(text.replace("\n", ""))
    assert {printable(value) for value in VALUES if "<" not in value} <= {
        line.removeprefix("<span>").partition("</span>")[0] for line in page.splitlines()
    }
    assert "<script" not in page
    Dataset(tmp_path / "out")


@pytest.mark.parametrize(
    "name", [b"log.csv", b"l\x1b]0;owned\x07og.csv", b"l\xffog.csv", b"l\nog.csv", "é漢字.csv".encode()]
)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named_without_its_controls(name: bytes, bad: str, tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", name, bad=[bad])
    line = said(lambda: run(folder, tmp_path / "out", CONTENT, max_bad_fraction=0.0))
    assert not has_controls(line)
    assert "1 of 401 rows of impressions are bad" in line
    if name.startswith("é".encode()):
        assert "é漢字.csv, line 2" in line


@pytest.mark.parametrize("column", ["\x1b]0;owned\x07", "\x9b31m", "\u202e", "x\x00", "\x7f"])
def test_a_column_of_an_odd_name_is_quoted_without_its_controls_and_otherwise_left_alone(
    column: str, tmp_path: Path
) -> None:
    lacking = write_log(tmp_path / "lacking", b"log.csv", f"id,{column},x,y")
    line = said(lambda: run(lacking, tmp_path / "out", CONTENT))
    assert not has_controls(line)
    assert f"column city is missing, the file has id, {printable(column)}, x, y" in line
    unused = write_log(tmp_path / "unused", b"log.csv", f"{column},city,x,y", bad=[])
    assert sum(run(unused, tmp_path / "out", CONTENT).rows.values()) == 400
    named = {**CONTENT, "dense": {"x": {"column": column}}}
    with pytest.raises(UserError, match="control character"):
        run(unused, tmp_path / "other", named)


def test_the_message_of_a_failed_step_is_the_same_through_the_runner(tmp_path: Path) -> None:
    """Between steps a message is JSON, whatever is in it."""
    folder = write_log(tmp_path / "log", b"log.csv")
    assert "\x1b]0;owned\x07bad" in refused(folder, tmp_path / "out", CONTENT, max_bad_fraction=0.0)
