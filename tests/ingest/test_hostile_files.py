"""Raw files that lie elsewhere, are no files, or unpack to far more than they hold."""

import bz2
import gzip
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ingest_runs import no_beam, refused, run
from test_blocks import read

from features.errors import UserError
from features.source import Format
from pipeline.ingest import files
from pipeline.ingest.files import files_by_date, find
from pipeline.ingest.formats import check_columns, raw_format, units
from pipeline.ingest.formats.base import Wanted

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


@pytest.mark.parametrize(
    "pattern",
    ["../secret.csv", "logs/../../secret.csv", "*/../../*.csv", "..", "{root}/secret.csv", "file://{root}/secret.csv",
     "{{date}}/../../secret.csv", "/{{date}}/a.csv"],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["{root}/in", "memory://in"])
def test_source_files_do_not_leave_the_input_folder(tmp_path: Path, pattern: str, folder: str) -> None:
    (tmp_path / "in" / "logs").mkdir(parents=True)
    (tmp_path / "secret.csv").write_text("a\nsecret\n")
    pattern, days = pattern.format(root=tmp_path), [date(2024, 1, 1)]
    for found in (find, lambda *given: find(*given, days), lambda *given: files_by_date(*given, days)):
        with pytest.raises(UserError, match=r"source\.files is a pattern below the input folder\. Set input=FOLDER"):
            found(folder.format(root=tmp_path), pattern)


def test_names_with_dots_are_found_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a..b").mkdir()
    (tmp_path / "a..b" / "..c.csv").write_text("a\n1\n")
    assert [file.path for file in find(str(tmp_path), "a..*/..c.csv")] == [str(tmp_path / "a..b" / "..c.csv")]


def schema(**source: Any) -> dict[str, Any]:
    return {
        "source": {"files": "log.csv", "types": {"y": "int"}} | source,
        "categorical": {"item": {"dim": 4}},
        "tasks": {"click": {"kind": "binary", "label": "y"}},
        "split": {"by": "row_index", "modulo": 4, "train": [0, 1], "valid": [2], "test": [3]},
    }


@pytest.mark.integration
def test_the_files_of_outcomes_do_not_leave_the_input_folder_either(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "log.csv").write_text("id,item,y\n" + "".join(f"{i},i{i},{i % 2}\n" for i in range(20)))
    (tmp_path / "secret.csv").write_text("id\n1\n")
    for files_, link in (("../secret.csv", False), ("linked.csv", True)):
        content = schema(key="id", outcomes={"seen": {"files": files_, "key": "id"}})
        with no_beam():
            if link:  # the operator's own choice
                (folder / "linked.csv").symlink_to(tmp_path / "secret.csv")
                assert run(folder, tmp_path / "out", content).read["seen"] == 1
            else:
                assert "../secret.csv: source.outcomes.seen.files is a pattern below" in refused(
                    folder, tmp_path / "out", content
                )


def test_a_pipe_a_device_and_links_to_them_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    (tmp_path / "b.csv").symlink_to("/dev/zero")
    (tmp_path / "c.csv").symlink_to(tmp_path / "a.csv")
    (tmp_path / "d.csv").symlink_to(tmp_path / "d.csv")
    (tmp_path / "e.csv").mkdir()
    for name in ("*.csv", "a.csv", "b.csv", "c.csv", "d.csv", "e.csv"):
        with pytest.raises(UserError, match="no such file"):
            find(str(tmp_path), name)
    (tmp_path / "f.csv").write_text("a\n1\n")
    assert [Path(file.path).name for file in find(str(tmp_path), "*.csv")] == ["f.csv"]


def test_a_file_that_becomes_a_pipe_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    [file] = find(str(tmp_path), "a.csv")
    (tmp_path / "a.csv").unlink()
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"a\.csv: cannot be read: .*is not a regular file"):
        check_columns(file, Format(), ["a"])


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("options", [{}, {"multiline": True}, {"columns": ["a", "b"]}, {"format": "jsonl"}])
def test_a_file_that_unpacks_to_too_much_stops_the_job_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(files, "ALWAYS_ALLOWED_BYTES", 1 << 16)
    line = b'{"a": "0", "b": "0"}\n' if options.get("format") else b"0,0\n"
    data = line * (3 << 14) if {"format", "columns"} & options.keys() else b"a,b\n" + line * (3 << 14)
    packed = PACK[ending](data)
    (tmp_path / f"a.{ending}").write_bytes(packed)
    with pytest.raises(UserError) as caught:
        read_packed(tmp_path, f"a.{ending}", Format(**options), ratio=len(data) // len(packed) - 1)
    message = str(caught.value)
    assert f"a.{ending}: {len(packed):,} bytes unpack to " in message
    assert "Raise max_unpack_ratio" in message
    assert "\n" not in message
    assert read_packed(tmp_path, f"a.{ending}", Format(**options), len(data) // len(packed) + 1) == 3 << 14


def read_packed(folder: Path, name: str, format: Format, ratio: int) -> int:
    """The number of rows."""
    [file] = find(str(folder), name, max_unpack_ratio=ratio)
    names, count = check_columns(file, format, ["a"]), 0
    for unit in units([file], format, 1 << 40):
        for block in raw_format(format).read(unit, Wanted({"a": "string"}, names), lambda _: None):
            count += block.columns.num_rows
    return count


def test_one_long_line_in_a_small_file_is_not_unpacked_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ALWAYS_ALLOWED_BYTES", 1 << 24)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"0" * (32 << 20) + b"\n1,2\n"))
    with pytest.raises(UserError, match=r"bytes unpack to .* max_unpack_ratio=500 times"):
        read(tmp_path, "a.csv.gz", Format(), {"a": "string"})


@pytest.mark.integration
def test_the_ratio_is_a_setting_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ALWAYS_ALLOWED_BYTES", 1 << 10)
    (tmp_path / "in").mkdir()
    rows = "".join(f"i{i % 4},{i % 2}\n" for i in range(4000))
    (tmp_path / "in" / "log.csv.gz").write_bytes(gzip.compress(f"item,y\n{rows}".encode()))
    with no_beam():
        message = refused(tmp_path / "in", tmp_path / "out", schema(files="log.csv.gz"), max_unpack_ratio=10)
        assert "max_unpack_ratio=10 times" in message
        assert run(tmp_path / "in", tmp_path / "out", schema(files="log.csv.gz")).read == {"impressions": 4000}


@pytest.mark.parametrize("folder", [
    "reference::{root}/refs.json", "zip://a::{root}/a.zip", "simplecache::s3://b", "http://127.0.0.1:9/", "github://a:b@/",
    "reference://x", "dir::file://{root}", "data:,x://", "data:,x", "python://", "S3 ://b",
])  # fmt: skip
def test_only_stores_of_files_are_read(tmp_path: Path, folder: str) -> None:
    """A data file of a --config-dir names its input: it cannot make fsspec follow references or fetch pages."""
    (tmp_path / "refs.json").write_text('{"version": 1, "templates": {}, "refs": {"a.csv": "file:///etc/passwd"}}')
    with pytest.raises(UserError, match="raw files are read from paths and from file://, s3://"):
        find(folder.format(root=tmp_path), "*.csv")


def test_a_path_with_colons_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "x.csv").write_text("a\n")
    assert [file.path for file in find(str(tmp_path / "a:b"), "*.csv")] == [str(tmp_path / "a:b" / "x.csv")]
    assert len(find(f"file://{tmp_path}/a:b", "*.csv")) == 1
