"""Which raw files there are, the units they are cut into, and what is said of those that cannot be read."""

import errno
import gzip
import io
import os
from datetime import date
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import examples
from fsspec.registry import known_implementations
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.source import Format
from pipeline.ingest import files
from pipeline.ingest.files import PatientFile, RawFile, check_unchanged, files_by_date, find, readable
from pipeline.ingest.formats import check_columns, units

DAYS = [date(2024, 1, 1), date(2024, 1, 2), date(2024, 1, 3)]


def log(folder: Path) -> Path:
    for day in ("2024-01-02", "2024-01-01", "2024-02-01"):
        (folder / day).mkdir(parents=True)
        (folder / day / "a.csv").write_text(f"id\n{day}\n")
        (folder / day / "b.csv.gz").write_bytes(gzip.compress(b"id\n1\n"))
    (folder / "2024-01-01" / "folder.csv").mkdir()
    return folder


def names(files: list[RawFile], folder: Path) -> list[str]:
    return [str(Path(file.path).relative_to(folder)) for file in files]


def test_files_are_found_in_the_order_of_their_names_and_folders_are_none(tmp_path: Path) -> None:
    folder = log(tmp_path)
    assert names(find(str(folder), "{date}/*.csv"), folder) == [
        "2024-01-01/a.csv",
        "2024-01-02/a.csv",
        "2024-02-01/a.csv",
    ]
    assert len(find(str(folder), "*/*.csv*")) == 6


def test_dates_pick_the_days_that_have_files(tmp_path: Path) -> None:
    folder = log(tmp_path)
    assert names(find(str(folder), "{date}/a.csv", DAYS), folder) == ["2024-01-01/a.csv", "2024-01-02/a.csv"]
    assert names(find(str(folder), "{date}/a.csv", DAYS[1::-1]), folder) == ["2024-01-02/a.csv", "2024-01-01/a.csv"]
    assert names(find(str(folder), "*/b*", DAYS), folder) == [
        f"2024-{day}/b.csv.gz" for day in ("01-01", "01-02", "02-01")
    ]


@pytest.mark.parametrize(
    ("days", "shown"),
    [(DAYS[2:], "2024-01-03"), ([date(2023, 12, 30), date(2023, 12, 31)], "2023-12-30 to 2023-12-31")],
)
def test_one_of_the_dates_must_have_a_file(tmp_path: Path, days: list[date], shown: str) -> None:
    assert find(str(log(tmp_path)), "{date}/a.csv", [*days, *DAYS])
    said = rf"\{{date\}}/a\.csv: no such file of {shown}\. Set input=FOLDER, or source\.files"
    with pytest.raises(UserError, match=said):
        find(str(tmp_path), "{date}/a.csv", days)


def test_files_by_date_are_those_of_each_day_and_none_where_a_day_has_none(tmp_path: Path) -> None:
    folder = log(tmp_path)
    found = files_by_date(str(folder), "{date}/*.csv*", [DAYS[2], DAYS[1]])
    assert list(found) == [DAYS[2], DAYS[1]]
    assert found[DAYS[2]] == []
    assert names(found[DAYS[1]], folder) == ["2024-01-02/a.csv", "2024-01-02/b.csv.gz"]
    with pytest.raises(UserError, match=r"source\.files is a pattern below the input folder"):
        files_by_date(str(folder), "/{date}/a.csv", DAYS)


@pytest.mark.parametrize("folder", ["logs", "logs/", "./logs/../logs", "file://{root}/logs", "local://{root}/logs"])
def test_paths_are_absolute_as_workers_may_run_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    log(tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    found = find(folder.format(root=tmp_path), "{date}/a.csv", DAYS)
    monkeypatch.chdir("/")
    assert [Path(file.path).is_absolute() for file in found] == [True, True]
    assert [Path(file.path).read_text() for file in found] == ["id\n2024-01-01\n", "id\n2024-01-02\n"]
    for file in found:
        check_unchanged(file)


def test_links_and_odd_names_of_folders_are_followed(tmp_path: Path) -> None:
    folder = log(tmp_path / "we[ir]d *")
    (folder / "2024-03-01").symlink_to(folder / "2024-01-01")
    (folder / "2024-02-01" / "linked.csv").symlink_to(folder / "2024-01-01" / "a.csv")
    found = find(str(folder), "{date}/*.csv")
    assert names(found, folder)[-2:] == ["2024-02-01/linked.csv", "2024-03-01/a.csv"]
    assert {file.size for file in found} == {14}


def test_files_of_another_file_system_are_found_and_watched_too() -> None:
    system = fsspec.filesystem("memory")
    for name in ("b[1]/2024-01-01/a.csv", "b[1]/2024-01-02/a.csv", "b[1]/x.csv", "b1/2024-01-01/a.csv"):
        system.pipe(f"/found/{name}", name.encode())
    found = find("memory://found/b[1]", "{date}/a.csv")
    assert [file.path for file in found] == [f"memory:///found/b[1]/2024-01-0{d}/a.csv" for d in (1, 2)]
    assert [file.path for file in find("memory://found/b[1]", "{date}/a.csv", DAYS[1:])] == [found[1].path]
    check_unchanged(found[0])
    system.pipe("/found/b[1]/2024-01-01/a.csv", b"b[1]/2024-01-01/A.csv")  # of the same size
    with pytest.raises(UserError, match=r"2024-01-01/a\.csv changed while it was read"):
        check_unchanged(found[0])


@pytest.mark.parametrize("what", ["rewritten", "longer", "gone"])
def test_a_file_that_changes_after_it_was_found_is_noticed(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1\n")
    [file] = find(str(tmp_path), "a.csv")
    check_unchanged(file)
    if what == "gone":
        path.unlink()
    else:
        path.write_text("2\n" if what == "rewritten" else "1\n2\n")
        os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"a\.csv changed while it was read\. Run again"):
        check_unchanged(file)


@pytest.mark.parametrize(
    ("folder", "pattern", "said"),
    [
        ("", "/tmp/a.csv", r"/tmp/a\.csv: source\.files is a pattern below the input folder"),
        ("", "s3://bucket/a.csv", r"s3://bucket/a\.csv: source\.files is a pattern"),
        ("", "none-*.csv", r"none-\*\.csv: no such file\. Set input=FOLDER, or source\.files"),
        ("", "a**/b.csv", r"a\*\*/b\.csv: not a glob pattern: .* Fix source\.files"),
        ("nowhere://b/x", "*", "nowhere:// needs a package"),
        ("typo://b/x", "*", "typo://b/x: raw files are read from paths and from file://, s3://"),
        ("memory://none", "*.csv", r"memory://none/\*\.csv: no such file"),
    ],
)
def test_what_cannot_be_found_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, pattern: str, said: str
) -> None:
    nowhere = {"class": "no_such_package.FileSystem", "err": "Install no_such_package to reach nowhere"}
    monkeypatch.setitem(known_implementations, "nowhere", nowhere)
    monkeypatch.setattr(files, "STORES", (*files.STORES, "nowhere"))
    with pytest.raises(UserError, match=said) as caught:
        find(folder or str(tmp_path), pattern)
    assert "\n" not in str(caught.value)


def test_a_storage_that_refuses_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Forbidden\nrequest 4711")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "glob", refuse)
    with pytest.raises(UserError, match=r"^memory://b: the storage .*: Forbidden request 4711\. Check address .*$"):
        find("memory://b", "*.csv")


def test_a_read_that_breaks_off_is_repeated_from_where_it_began() -> None:
    class BreaksOff(io.BytesIO):
        breaks = 2

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            self.breaks -= 1
            if self.breaks == 0:
                raise ConnectionResetError(errno.ECONNRESET, "reset")
            return found

    file = PatientFile("memory://a.csv", lambda: BreaksOff(b"0123456789"))
    assert [file.read(2), file.read(3), file.read()] == [b"01", b"234", b"56789"]


def test_a_store_that_stays_away_is_named_as_such_and_not_as_a_damaged_file() -> None:
    with pytest.raises(UserError) as caught, readable("s3://logs/a.csv"):
        raise OSError(errno.ETIMEDOUT, "the store has not answered for 9 s: reset", "s3://logs/a.csv")
    assert str(caught.value) == "s3://logs/a.csv: the store has not answered for 9 s: reset. Run again once it does."


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3000))
def test_units_of_a_text_file_cover_it_once(size: int, unit_bytes: int) -> None:
    found = units([RawFile("a.csv", 1, "1"), RawFile("b.csv", size, "1")], Format(), unit_bytes)
    assert (found[0].number, found[0].start, found[0].stop) == (0, 0, None)
    parts = [(unit.start, size if unit.stop is None else unit.stop) for unit in found[1:]]
    assert [byte for start, stop in parts for byte in range(start, stop)] == list(range(size))
    assert max(stop - start for start, stop in parts) <= unit_bytes
    assert [unit.first_row for unit in found[1:]] == [start for start, _ in parts]


@pytest.mark.parametrize(
    ("name", "options", "whole", "count"),
    [
        ("a.csv", {}, False, 4),
        ("a.csv", {}, True, 1),
        ("a.csv", {"multiline": True}, False, 1),
        ("a.csv.gz", {}, False, 1),
        ("a.csv.zst", {}, False, 1),
        ("a.csv.bz2", {}, False, 1),
        ("a.jsonl", {"format": "jsonl"}, False, 4),
    ],
)
def test_a_file_that_must_be_read_in_one_piece_is_one_unit(name: str, options: dict, whole: bool, count: int) -> None:
    assert len(units([RawFile(name, 100, "1")], Format(**options), 25, whole)) == count


def test_units_of_parquet_are_row_groups_in_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(1000)}), tmp_path / "a.parquet", row_group_size=300)
    files = find(str(tmp_path), "*.parquet")
    footer = pq.read_metadata(tmp_path / "a.parquet")
    two = footer.row_group(0).total_byte_size + footer.row_group(1).total_byte_size
    for unit_bytes, expected in (
        (1, [(0, 1, 0), (1, 2, 300), (2, 3, 600), (3, 4, 900)]),
        (two, [(0, 2, 0), (2, 4, 600)]),
        (1 << 40, [(0, 4, 0)]),
    ):
        found = units(files, Format(format="parquet"), unit_bytes, whole=True)
        assert [(unit.start, unit.stop, unit.first_row) for unit in found] == expected


@pytest.mark.parametrize(
    ("name", "data", "options", "said"),
    [
        ("a.csv", b"a,c\n1,2\n", {}, r"a\.csv: column b is missing, the file has a, c\. Fix the schema, or name the"),
        ("a.csv", b"", {}, r"a\.csv: is empty, where a header line should be"),
        ("a.csv", b"a,b,b\n", {}, r"a\.csv: there are two columns b"),
        ("a.csv", b"1,2\n", {"columns": ["a", "c"]}, r"column b is missing, the file has a, c"),
        ("a.csv", b"a,b\r1,2\r", {}, r"a\.csv: its lines end with CR alone\. Convert it"),
        ("a.csv.gz", b"a,b\n", {}, r"a\.csv\.gz: is not gzip: rename it to a\.csv if it is plain text\."),
        ("a.parquet", b"PAR1....PAR1", {"format": "parquet"}, r"a\.parquet: cannot be read: .*\. Fetch it again"),
        ("a.jsonl.gz", b"{}", {"format": "jsonl"}, r"a\.jsonl\.gz: is not gzip: rename it to a\.jsonl if"),
    ],
)
def test_a_file_that_lacks_what_is_wanted_is_refused_with_its_name(
    tmp_path: Path, name: str, data: bytes, options: dict, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    [file] = find(str(tmp_path), name)
    with pytest.raises(UserError, match=said) as caught:
        check_columns(file, Format(**options), ["a", "b"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (b'\xef\xbb\xbfa,"b, c",d\r\n1,2,3\r\n', {}),
        (b"\n\r\na,'b, c',d\n", {"quote": "'"}),
        (b"a|b, c|d", {"delimiter": "|", "quote": None}),
        (b' a ," b, c",d\n', {"trim": True}),
    ],
)
def test_the_header_says_the_columns(tmp_path: Path, data: bytes, options: dict) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    [file] = find(str(tmp_path), "a.csv")
    assert check_columns(file, Format(**options), ["d"]) == ["a", "b, c", "d"]


def test_damaged_parquet_is_named_when_it_is_cut_into_units(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(1000)}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read: "):
        units(find(str(tmp_path), "*.parquet"), Format(format="parquet"), 1)


def test_a_mistyped_column_suggests_the_nearest_one_that_a_file_or_the_schema_has(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("impression_id,price\n1,2\n")
    (file,) = find(str(tmp_path), "a.csv")
    for wanted, nearest in (("impresion_id", "impression_id"), ("click_dwel", "click_dwell")):
        with pytest.raises(UserError, match=rf"column {wanted} is missing \(did you mean {nearest}\?\), the file has"):
            check_columns(file, Format(), [wanted], ["click_dwell"])
    with pytest.raises(UserError, match="column qqq is missing, the file has impression_id, price"):
        check_columns(file, Format(), ["qqq"])
