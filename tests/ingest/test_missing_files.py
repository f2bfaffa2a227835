"""Files that are not there: the message names the key of their stream, not that of the impressions."""

from pathlib import Path
from typing import Any

import pytest
from ingest_runs import refused

from features.errors import UserError
from pipeline.ingest.draft.config import DraftConfig
from pipeline.ingest.draft.draft import draft

CONTENT = {
    "source": {"files": "log.csv", "key": "id", "types": {"y": "int"}},
    "categorical": {"item": {}},
    "tasks": {"y": {"kind": "binary", "label": "y"}},
    "split": {"by": "row_index", "modulo": 1, "train": [0]},
}
STREAMS: dict[str, dict[str, Any]] = {
    "outcomes.click": {"key": "id"},
    "tables.user": {"key": "item", "columns": {"age": "int"}},
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("files", "says"),
    [
        ("none-*.csv", "/none-*.csv: no such file. Set input=FOLDER, or source.{stream}.files."),
        ("a**/b.csv", "a**/b.csv: not a glob pattern: "),
        ("../x.csv", "../x.csv: source.{stream}.files is a pattern below the input folder."),
    ],
)
def test_what_is_not_found_of_an_outcome_or_side_table_names_its_own_key(
    stream: str, files: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "log.csv").write_text("id,item,y\n1,a,1\n2,b,0\n")
    section, name = stream.split(".")
    content = CONTENT | {"source": CONTENT["source"] | {section: {name: {"files": files} | STREAMS[stream]}}}
    said = refused(tmp_path, tmp_path / "out", content)
    assert says.format(stream=stream) in said
    assert f"source.{stream}.files" in said


def test_a_pattern_of_a_draft_that_matches_nothing_names_its_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: no such file\. Set input=FOLDER, or files=PATTERN\.$"):
        draft(DraftConfig(input=str(tmp_path), out=tmp_path / "data" / "x.yaml", files=["none.csv"]))
