"""Random logs with random damage: every line that is not blank is a row, a dead letter or left out, and counted once."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_runs import dead_letters_of, rows_by_id, run

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.verify import verify
from pipeline.ingest.formats import text

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

# Every line names itself with a tag, which is also its row id: it can be found again wherever it went.
COLUMNS = ["tag", "id", "k", "at", "x", "y", "c"]
AS_OF, WINDOW = 1000, 100
ROW, LETTER, LEFT_OUT, BLANK = "row", "letter", "left out", "blank"


@dataclass
class Line:
    tag: int
    data: bytes
    fate: str


@dataclass
class File:
    """A raw file: its lines after the header, its line ends, and whether the last line has one."""

    name: str
    lines: list[Line]
    end: bytes = b"\n"
    mark: bool = False
    closed: bool = True
    header: list[str] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        lines = [",".join(self.header).encode()] * bool(self.header) + [line.data for line in self.lines]
        data = self.end.join(lines) + self.end * (self.closed or not lines)
        return b"\xef\xbb\xbf" * self.mark + data

    def letters(self) -> set[tuple[str, int]]:
        number, found = 1 + bool(self.header), set()
        for line in self.lines:
            found |= {(self.name, number)} if line.fate == LETTER else set()
            number += 1 + line.data.count(b"\n")
        return found

    def counts(self) -> Counter[str]:
        """Lines as the manifest has them, but for whether a row can be read."""
        blank = sum(line.fate == BLANK for line in self.lines[: None if self.closed or not self.lines else -1])
        blank += not (self.header or self.lines)
        return Counter(
            physical=self.data.count(b"\n") + (self.data[-1:] not in (b"", b"\n")),
            header=bool(self.header),
            blank=blank,
        )


def good(tag: int) -> dict[str, str]:
    at = str(tag * 37 % 600)  # of the first three 37, 74 and 111: a row for each split
    return {"tag": f"t{tag}.", "id": str(tag), "k": f"k{tag % 5}", "at": at, "x": "1.5", "y": "1", "c": "Köln"}


def csv_line(row: dict[str, str]) -> bytes:
    return ",".join(row.values()).encode()


def json_line(row: dict[str, str]) -> bytes:
    return json.dumps(row).encode()


Write = Callable[[dict[str, str]], bytes]
# What a line can be like, by what becomes of it; of all formats, and of one.
ROWS: dict[str, tuple[dict[str, str], str]] = {
    "plain": ({}, ROW),
    "missing number": ({"x": ""}, ROW),
    "missing text": ({"c": ""}, ROW),
    "open window": ({"at": str(AS_OF - WINDOW + 1)}, LEFT_OUT),
    "just old enough": ({"at": str(AS_OF - WINDOW)}, ROW),
    "bad number": ({"x": "1.5.2"}, LETTER),
    "no finite number": ({"x": "inf"}, LETTER),
    "no number": ({"x": "NaNs"}, LETTER),
    "marked as missing": ({"x": "NaN", "c": "NULL"}, ROW),
    "bad integer": ({"y": "1.5"}, LETTER),
    "bad time": ({"at": "yesterday"}, LETTER),
    "missing time": ({"at": ""}, LETTER),
    "missing key": ({"k": ""}, LETTER),
    "key marked as missing": ({"k": "NULL"}, LETTER),
    "missing id": ({"id": ""}, LETTER),
    "negative id": ({"id": "-5"}, LETTER),
    "impossible label": ({"y": "7"}, LETTER),
    "open window and impossible": ({"at": str(AS_OF), "y": "7"}, LETTER),
}
CSV: dict[str, tuple[Callable[[int], bytes], str]] = {
    "quoted": (lambda tag: csv_line(good(tag) | {"c": '"a, ""b"""', "x": '"2"'}), ROW),
    "too short": (lambda tag: b"t%d.,5" % tag, LETTER),
    "too long": (lambda tag: csv_line(good(tag)) + b",1", LETTER),
    "half a line": (lambda tag: csv_line(good(tag))[:-8], LETTER),
    "an open quote": (lambda tag: csv_line(good(tag) | {"c": '"a'}), LETTER),
    "no UTF-8": (lambda tag: csv_line(good(tag) | {"c": ""}) + b"\xff\xfe", LETTER),
    "a line break": (lambda tag: csv_line(good(tag) | {"c": '"a\nt1.,1,k1,1,1,1,b\n"'}), LETTER),
    "a line break and a column": (lambda tag: csv_line(good(tag) | {"c": '"a\nb"'}) + b",1", LETTER),
    "a return": (lambda tag: csv_line(good(tag) | {"c": "a\rb"}), LETTER),
}
JSON: dict[str, tuple[Callable[[int], bytes], str]] = {
    "numbers": (lambda tag: json.dumps(good(tag) | {"x": 1.5, "y": 0, "id": tag}).encode(), ROW),
    "nulls": (lambda tag: json.dumps(good(tag) | {"x": None, "c": None}).encode(), ROW),
    "spaces": (lambda tag: b"  " + json_line(good(tag)) + b" ", ROW),
    "lacks what may be missing": (lambda tag: json.dumps({k: v for k, v in good(tag).items() if k != "c"}).encode(), ROW),
    "more keys": (lambda tag: json.dumps(good(tag) | {"other": [1, {"a": 2}]}).encode(), ROW),
    "half a line": (lambda tag: json_line(good(tag))[:-8], LETTER),
    "a list": (lambda tag: json.dumps([f"t{tag}."]).encode(), LETTER),
    "a key that is a list": (lambda tag: json.dumps(good(tag) | {"k": ["k1"]}).encode(), LETTER),
    "a key twice": (lambda tag: json_line(good(tag))[:-1] + b', "k": "k1"}', LETTER),
    "half a character": (lambda tag: json.dumps(good(tag) | {"c": "\ud800"}).encode(), LETTER),
    "text": (lambda tag: json.dumps(f"t{tag}.").encode(), LETTER),
    "two objects": (lambda tag: json_line(good(tag)) * 2, LETTER),
    "no UTF-8": (lambda tag: json_line(good(tag)).replace(b"1.5", b"\xff"), LETTER),
    "a bad number that is one in JSON": (lambda tag: json.dumps(good(tag) | {"y": 1.5}).encode(), LETTER),
}  # fmt: skip
CLICKS: dict[str, tuple[Callable[[int], bytes], str]] = {
    "joined or not": (lambda tag: b"t%d.,k%d,%d" % (tag, tag % 7, tag), ROW),
    "quoted": (lambda tag: b'"t%d.","k0",5' % tag, ROW),
    "missing key": (lambda tag: b"t%d.,,5" % tag, LETTER),
    "missing time": (lambda tag: b"t%d.,k1," % tag, LETTER),
    "bad time": (lambda tag: b"t%d.,k1,now" % tag, LETTER),
    "too short": (lambda tag: b"t%d." % tag, LETTER),
    "no UTF-8": (lambda tag: b"t%d.,\xff,5" % tag, LETTER),
}


def line_of(kind: str, tag: int, special: dict[str, tuple[Callable[[int], bytes], str]], write: Write) -> Line:
    if kind == BLANK:
        return Line(tag, b"", BLANK)
    if kind in special:
        data, fate = special[kind]
        return Line(tag, data(tag), fate)
    changes, fate = ROWS[kind]
    return Line(tag, write(good(tag) | changes), fate)


@st.composite
def logs(draw: st.DrawFn) -> tuple[str, list[File], list[File]]:
    """The format, the files of impressions, and those of clicks."""
    form = draw(st.sampled_from(["csv", "jsonl"]))
    special, write = (CSV, csv_line) if form == "csv" else (JSON, json_line)
    # Good rows are as frequent as all that can go wrong.
    kinds = st.one_of(st.just("plain"), st.sampled_from([*ROWS, *special, BLANK]))
    clicks = st.one_of(st.just("joined or not"), st.sampled_from([*CLICKS, BLANK]))
    tag, files, outcomes = 1, [], []
    for number in range(draw(st.integers(1, 3))):
        names = draw(st.lists(kinds, max_size=12))
        # The first rows are surely good: a split without any would stop the job.
        lines = [line_of(kind, tag + i, special, write) for i, kind in enumerate(["plain"] * 3 * (number == 0) + names)]
        tag += len(lines)
        name = f"log-{number}.{form}{draw(st.sampled_from(['', '.gz']))}"
        files.append(_file(draw, name, lines, COLUMNS if form == "csv" else []))
    for number in range(draw(st.integers(1, 2))):
        lines = [line_of(kind, tag + i, CLICKS, csv_line) for i, kind in enumerate(draw(st.lists(clicks, max_size=8)))]
        tag += len(lines)
        outcomes.append(_file(draw, f"clicks-{number}.csv", lines, ["tag", "k", "when"]))
    return form, files, outcomes


def _file(draw: st.DrawFn, name: str, lines: list[Line], header: list[str]) -> File:
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    return File(name, lines, end, draw(st.booleans()), draw(st.booleans()), header)


def content_for(form: str) -> dict:
    return {
        "source": {
            "files": "log-*", "format": form, "row_id": "id", "key": "k", "types": {"y": "int"},
            "times": {"at": "index"},
            "outcomes": {
                "click": {
                    "files": "clicks-*", "key": "k", "time": "when", "columns": {"tag": "string"}, "window": WINDOW,
                    "open_window": "leave_out", "read": {"format": "csv", "times": {"when": "index"}},
                }
            },
        },
        "dense": {"x": {}},
        "categorical": {"tag": {}, "c": {}},
        "tasks": {"y": {"kind": "binary", "label": "y"}, "click": {"kind": "binary", "label": "click"}},
        "event_time": "at",
        "split": {"by": "time", "valid_from": "1970-01-01T00:01:00", "test_from": "1970-01-01T00:01:40"},
    }  # fmt: skip


def tags(lines: list[Line], fate: str) -> list[int]:
    return [line.tag for line in lines if line.fate == fate]


def check_sums(out: Path, files: list[File], outcomes: list[File], letters: list[dict]) -> None:
    """The manifest's numbers against a plain count of lines."""
    manifest = Dataset(out).manifest
    join_statuses = {
        name: Counter(line.fate for file in found for line in file.lines)
        for name, found in (("impressions", files), ("click", outcomes))
    }
    assert {name: manifest.read.get(name, 0) for name in join_statuses} == {
        name: count.total() - count[BLANK] for name, count in join_statuses.items()
    }
    assert sum(manifest.rows.values()) == join_statuses["impressions"][ROW]
    assert sum(manifest.left_out.values()) == join_statuses["impressions"][LEFT_OUT]
    assert sum(manifest.outcomes["click"].values()) == join_statuses["click"][ROW]
    assert sum(manifest.dead_letters.values()) == len(letters)
    for name, found in (("impressions", files), ("click", outcomes)):
        counts = sum((file.counts() for file in found), Counter())
        lines = manifest.lines[name].model_dump() if name in manifest.lines else {}
        assert {key: lines.get(key, 0) for key in ("physical", "header", "blank")} == {
            key: counts[key] for key in ("physical", "header", "blank")
        }
    assert Counter(letter["stream"] for letter in letters) == Counter(
        {name: count[LETTER] for name, count in join_statuses.items() if count[LETTER]}
    )
    for shard in manifest.shards:
        assert pq.ParquetFile(out / shard.path).metadata.num_rows == shard.rows
    list(verify(Dataset(out)))


@given(logs(), st.sampled_from([100, 300, 1 << 20]), st.sampled_from([50, 1 << 20]), st.sampled_from([60, 1 << 20]))
@settings(max_examples=examples(20), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_line_goes_to_one_place_and_no_good_one_is_lost_for_a_bad_neighbour(
    log: tuple[str, list[File], list[File]], unit_bytes: int, bucket_bytes: int, block_bytes: int
) -> None:
    form, files, outcomes = log
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", block_bytes)
        folder, out = Path(name), Path(name) / "out"
        for file in files + outcomes:
            (folder / file.name).write_bytes(gzip.compress(file.data) if file.name.endswith(".gz") else file.data)
        sizes = {
            "unit_bytes": unit_bytes,
            "bucket_bytes": bucket_bytes,
            "max_bad_fraction": 1,
            "min_joined": 0,
            "as_of": "1970-01-01T00:16:40",
        }
        run(folder, out, content_for(form), **sizes)
        letters = dead_letters_of(out)
        lines = [line for file in files for line in file.lines]
        everything = lines + [line for file in outcomes for line in file.lines]
        assert [row["row_id"] for row in rows_by_id(out)] == tags(lines, ROW)
        assert {(Path(x["file"]).name, x["line"]) for x in letters} == set().union(
            *(f.letters() for f in files + outcomes)
        )
        assert sorted(int(re.search(r"t(\d+)\.", x["raw"])[1]) for x in letters) == tags(everything, LETTER)  # type: ignore[index]
        check_sums(out, files, outcomes, letters)
