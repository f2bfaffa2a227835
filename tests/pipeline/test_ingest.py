"""The Beam job end to end: every raw row is accounted for, and what fails leaves nothing behind."""

import csv
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from features.errors import UserError
from features.schema import Schema
from features.statistics import Moments, Statistics
from jobs.preprocess import main
from pipeline.dataset import Dataset, Manifest
from pipeline.ingest import source
from pipeline.ingest.job import PreprocessConfig, _merge, preprocess

SPLITS = ("train", "valid", "test")
ROOT = Path(__file__).parents[2]


def run(folder: Path, out: Path, content: dict[str, Any], **settings: Any) -> Manifest:
    return preprocess(
        PreprocessConfig(input=str(folder), out=out, **settings), Schema.parse(content, where="mine.yaml")
    )


def refused(folder: Path, out: Path, content: dict[str, Any], **settings: Any) -> str:
    """The one line that stops a job, which must leave everything beside `out` as it was."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        run(folder, out, content, **settings)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def rows_of(dataset: Path, split: str) -> pa.Table:
    """A split's rows, in the order of its shards."""
    return pa.concat_tables(pq.read_table(path) for path in sorted((dataset / split).glob("*.parquet")))


def letters_of(dataset: Path) -> list[dict[str, Any]]:
    found = [row for path in (dataset / "dead_letters").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(found, key=lambda letter: (letter["file"], letter["line"]))


def values_of(dataset: Path, table: str) -> dict[int, str]:
    rows = pq.read_table(dataset / "encoders" / "vocabularies" / f"{table}.parquet").to_pylist()
    return {row["id"]: row["value"] for row in rows}


def raw_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Every impression that is a row, read with nothing of ours."""
    for path in sorted(folder.glob("impressions-*")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


# A log with bad lines, each known by its place.


@pytest.fixture(scope="module")
def messy_log(small_log, tmp_path_factory) -> tuple[Path, dict[tuple[str, int], str]]:
    """`small_log` with bad lines in it, and by file and line what is wrong."""
    folder = shutil.copytree(small_log, tmp_path_factory.mktemp("messy") / "log")
    expected = {}
    for name, bad in {
        "impressions-1.csv": [(5, "9,9"), (6, "8,8,8"), (9, "price"), (301, "1,2,3,4,5,6,7,8,9,10,11"), (304, "qty")],
        "impressions-2.csv.gz": [(2, "age"), (3, "short"), (7, "at"), (150, "id"), (290, "also short")],
        "impressions-3.csv": [(40, "price")],
    }.items():
        opened = gzip.open if name.endswith("gz") else open
        with opened(folder / name, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        header = next(csv.reader([lines[0]]))
        for line, what in bad:  # in order, so that each lands on its line
            if what in header:
                cells = next(csv.reader([lines[line - 1]]))
                cells[header.index(what)] = "oops"
                text = StringIO()
                csv.writer(text, lineterminator="").writerow(cells)
                lines[line - 1] = text.getvalue()
                expected[str(folder / name), line] = f"{what}: 'oops' is not a"
            else:
                lines.insert(line - 1, what)
                expected[str(folder / name), line] = f"{what.count(',') + 1} columns instead of 9"
        with opened(folder / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    return folder, expected


@pytest.fixture(scope="module")
def messy(messy_log, small_content, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("messy_dataset") / "dataset"
    run(messy_log[0], out, small_content(), max_bad_fraction=0.05, rows_per_row_group=32, rows_per_shard=100)
    return out


def test_bad_lines_are_in_dead_letters_with_file_line_and_reason(messy, messy_log):
    _, expected = messy_log
    found = {(letter["file"], letter["line"]): letter["reason"] for letter in letters_of(messy)}
    assert found.keys() == expected.keys()
    assert {place: reason for place, reason in expected.items() if not found[place].startswith(reason)} == {}


def test_every_raw_line_is_in_exactly_one_of_train_valid_test_and_dead_letters(messy, messy_log):
    ids = [row_id for split in SPLITS for row_id in rows_of(messy, split)["row_id"].to_pylist()]
    assert len(ids) == len(set(ids))
    letters = letters_of(messy)
    texts = [json.loads(x["raw"]) if x["raw"].startswith("{") else x["raw"] for x in letters]
    spoiled = [raw["id"] for raw in texts if isinstance(raw, dict)]
    assert sorted([*map(str, ids), *(i for i in spoiled if i != "oops")]) == sorted(
        row["id"]
        for row in raw_rows(messy_log[0])
        if row["id"].isdigit() and int(row["id"]) >= 1000 and None not in row
    )
    assert [raw for raw in texts if isinstance(raw, str)] == [
        "9,9", "8,8,8", "1,2,3,4,5,6,7,8,9,10,11", "short", "also short",
    ]  # fmt: skip
    assert len(ids) + len(letters) == 900 + 5


def test_the_manifest_adds_up_and_its_checksums_are_those_of_the_files(messy):
    manifest = json.loads((messy / "manifest.json").read_text())
    files = {str(p.relative_to(messy)) for split in SPLITS for p in (messy / split).iterdir()}
    assert {shard["path"] for shard in manifest["shards"]} == files
    for shard in manifest["shards"]:
        data = (messy / shard["path"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        metadata = pq.ParquetFile(messy / shard["path"]).metadata
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert (shard["rows"], shard["row_groups"]) == (sum(groups), groups)
        assert max(groups) <= 32
        assert all(group == 32 for group in groups[:-1])
        assert shard["rows"] <= 100
    for split in SPLITS:
        table = rows_of(messy, split)
        assert manifest["rows"][split] == table.num_rows
        for task in ("click", "bought", "dwell"):
            label = table[f"label.{task}"].drop_null().to_numpy().astype(np.float64)
            assert manifest["observed"][split][task] == len(label)
            assert manifest["positives"][split][task] == pytest.approx(label.sum(), rel=1e-9)
    assert sum(manifest["dead_letters"].values()) == len(letters_of(messy)) == 11
    assert manifest["dead_letters"]["price: wrong value"] == 2
    assert manifest["dead_letters"]["1 columns instead of 9"] == 2
    Dataset(messy).verify()


def test_a_dataset_holds_its_parts_and_nothing_else(messy):
    assert {p.name for p in messy.iterdir()} == {
        "manifest.json", "schema.yaml", "encoders", "dead_letters", *SPLITS,
    }  # fmt: skip
    for split in SPLITS:
        names = sorted(p.name for p in (messy / split).iterdir())
        assert names == [f"part-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
    assert [p.name for p in messy.parent.iterdir()] == ["dataset"]


def test_rows_keep_their_values_and_their_order(small_dataset, small_log, small_content):
    """Ids lead back to the raw text through the vocabularies, numbers through the moments."""
    moments = json.loads((small_dataset / "encoders" / "encoders.json").read_text())["moments"]
    cities, items = values_of(small_dataset, "city"), values_of(small_dataset, "item")
    clicks = {n + 1000: n % 50 for n in range(0, 900, 3)}
    raw = {int(row["id"]): row for row in raw_rows(small_log)}
    train_cities = {row["city"] for number, row in raw.items() if number < 1300}
    for code, split in enumerate(SPLITS):
        found = rows_of(small_dataset, split).to_pylist()
        assert [row["row_id"] for row in found] == list(range(1000 + 300 * code, 1300 + 300 * code))
        for row in found:
            number, given = row["row_id"], raw[row["row_id"]]
            if given["city"] == "NA":
                assert row["city"] == 0
            elif given["city"] not in train_cities:
                assert row["city"] == 1
            else:
                assert cities[row["city"]] == given["city"]
            assert items[row["item"]] == given["item"]
            assert [items[i] for i in row["recent"]] == given["recent"].split("|")[:3] * bool(given["recent"])
            assert 1 <= row["user"] <= 50
            age = row["age"] * moments["age"]["std"] + moments["age"]["mean"]
            assert age == pytest.approx(
                moments["age"]["mean"] if given["age"] == "NA" else float(given["age"]), abs=1e-4
            )
            assert row["age_missing"] == (given["age"] == "NA")
            if given["price"]:
                price = np.expm1(row["price"] * moments["price"]["std"] + moments["price"]["mean"])
                assert price == pytest.approx(float(given["price"]), rel=1e-4)
            assert row["weight"] == (2 if given["qty"] == "3" else 1)
            assert row["event_time"] == int(given["at"])
            assert row["label.click"] == (number in clicks)
            assert row["label.bought"] == (float(int(given["qty"]) > 1) if number in clicks else None)
            dwell = np.log1p(clicks[number]) if number in clicks else None
            assert row["label.dwell"] == (dwell if dwell is None else pytest.approx(dwell, rel=1e-6))
    assert yaml.safe_load((small_dataset / "schema.yaml").read_text()) == small_content() | {
        "split": {"by": "time", "valid_from": "1970-01-02T00:00:00Z", "test_from": "1970-01-03T00:00:00Z"}
    }


def assert_same_rows(one: Path, other: Path, digits: float) -> None:
    for split in SPLITS:
        a, b = rows_of(one, split), rows_of(other, split)
        assert a.schema == b.schema
        for name in a.column_names:
            if name in ("price", "age"):
                assert a[name].to_numpy() == pytest.approx(b[name].to_numpy(), rel=digits, abs=digits)
            else:
                assert a[name].to_pylist() == b[name].to_pylist()


def test_a_file_read_in_many_blocks_becomes_what_it_becomes_in_one(
    messy, messy_log, small_content, tmp_path, monkeypatch
):
    monkeypatch.setattr(source, "BLOCK_BYTES", 700)
    blocks = []
    real = source.blocks
    monkeypatch.setattr(source, "blocks", lambda *given: (blocks.append(1) or block for block in real(*given)))
    out = tmp_path / "dataset"
    manifest = run(messy_log[0], out, small_content(), max_bad_fraction=0.05, rows_per_row_group=32, rows_per_shard=100)
    assert len(blocks) > 100
    # Moments of blocks merge in another order, so the last digit of a number may differ; nothing else may.
    assert_same_rows(out, messy, 1e-6)
    assert letters_of(out) == letters_of(messy)
    assert manifest.dead_letters == Dataset(messy).manifest.dead_letters
    assert [(s.path, s.rows, s.row_groups) for s in manifest.shards] == [
        (s.path, s.rows, s.row_groups) for s in Dataset(messy).manifest.shards
    ]


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one(small_dataset, small_log, small_content, tmp_path):
    run(small_log, tmp_path / "two", small_content(), workers=2, rows_per_row_group=32, rows_per_shard=100)
    assert content_of(tmp_path / "two") == content_of(small_dataset)


def test_statistics_of_files_add_up_to_the_same_digits_in_whatever_order_workers_finish():
    rng = np.random.default_rng(0)
    parts = [
        {
            index: Statistics(
                values={"t": pl.DataFrame({"value": [f"v{index % 3}"], "count": [index]})},
                moments={"x": Moments.of(rng.normal(3, 50, 999))},
            )
        }
        for index in range(20)
    ]
    found = set()
    for _ in range(10):
        rng.shuffle(parts)
        merged = _merge([_merge(parts[:7]), _merge([_merge(parts[7:9]), *parts[9:]]), _merge([])])
        total = Statistics().merge(*(merged[index] for index in sorted(merged)))
        assert dict(total.values["t"].iter_rows()) == {f"v{k}": sum(range(k, 20, 3)) for k in range(3)}
        found.add((total.moments["x"].mean, total.moments["x"].squares))
    assert len(found) == 1


# What a CSV file can be like, without the job around it.


def read(path: Path, **settings: Any) -> tuple[list[dict[str, str]], list[tuple[int, str]], source.Malformed]:
    """Rows and malformed lines of a file with the columns a and b."""
    content = {
        "source": {"files": "x", **settings},
        "categorical": {"a": {}},
        "tasks": {"t": {"kind": "binary", "label": "b = '1'"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    schema = Schema.parse(content, where="mine.yaml")
    source.check_columns(str(path), schema)
    malformed = source.Malformed(schema.source.header_lines)
    share = source.Share(path.parent, 0)
    rows = [row for block in source.blocks(str(path), schema, malformed, share) for row in block.to_dicts()]
    return rows, list(zip(malformed.numbers, malformed.texts, strict=True)), malformed


@pytest.mark.parametrize("block", [12, 1 << 20])
@pytest.mark.parametrize(
    ("text", "settings", "rows"),
    [
        ("a,b\n1,2\n3,4\n", {}, [("1", "2"), ("3", "4")]),
        ("a,b\r\n1,2\r\n3,4\r\n", {}, [("1", "2"), ("3", "4")]),
        ("\ufeffa,b\n1,2\n", {}, [("1", "2")]),
        ('"a","b"\n"1,5","2"\n"say ""so""",""\n', {}, [("1,5", "2"), ('say "so"', "")]),
        ('"x,y",a,b\n0,1,2\n', {}, [("1", "2")]),
        ('b,other,a\n2,?,1\n4,"?",3\n', {}, [("1", "2"), ("3", "4")]),
        ("1,2\n3,4", {"columns": ["a", "b"]}, [("1", "2"), ("3", "4")]),
        ("a\tb\n1,5\t2\n", {"delimiter": "\t"}, [("1,5", "2")]),
        ('a,b\n"line\nbreak",2\n"li\nne\nbr",4\n5,6\n', {}, [("line\nbreak", "2"), ("li\nne\nbr", "4"), ("5", "6")]),
        ("a,b\n", {}, []),
        ("a,b\nnull,NaN\nNA,N/A\n", {}, [("null", "NaN"), ("NA", "N/A")]),
    ],
)
def test_files_of_every_form_are_read_as_text_whatever_the_block(text, settings, rows, block, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", block)
    for name, data in (("log.csv", text.encode()), ("log.csv.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        found, bad, _ = read(tmp_path / name, **settings)
        assert [(row["a"], row["b"]) for row in found] == rows
        assert bad == []


@pytest.mark.parametrize("block", [12, 1 << 20])
@pytest.mark.parametrize("header", [True, False])
def test_lines_keep_their_numbers_after_malformed_ones_before_them(header, block, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", block)
    rng = np.random.default_rng(1)
    lines = ["a,b"] * header + [["7,8", "7", "7,8,9"][k] for k in rng.integers(0, 3, 60)]
    lines[int(header)] = "7,8"  # the reader counts columns on the first line
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    rows, bad, malformed = read(tmp_path / "log.csv", **({} if header else {"columns": ["a", "b"]}))
    assert bad == [(n, line) for n, line in enumerate(lines, 1) if line in ("7", "7,8,9")]
    assert [malformed.line(i) for i in range(len(rows))] == [n for n, line in enumerate(lines, 1) if line == "7,8"]


# Shapes of logs


def simple(**changes: Any) -> dict[str, Any]:
    """A schema over the columns a, b and x, two of three rows to train."""
    return {
        "source": {"files": "*.csv"},
        "dense": {"x": {}},
        "categorical": {"a": {}},
        "tasks": {"t": {"kind": "binary", "label": "b = '1'"}},
        "split": {"by": "row_index", "modulo": 3, "train": [0, 1], "test": [2]},
    } | changes


def test_rows_without_an_id_of_their_own_get_unique_ones_over_all_files_in_name_order(tmp_path):
    for name in ("b", "a", "empty"):
        rows = "".join(f"{name}{i},{i % 2},{i}\n" for i in range(7 if name != "empty" else 0))
        (tmp_path / f"{name}.csv").write_text("a,b,x\n" + rows)
    manifest = run(tmp_path, tmp_path / "out", simple())
    assert manifest.rows == {"train": 10, "valid": 0, "test": 4}
    assert {s.split for s in manifest.shards} == {"train", "test"}
    text = values_of(tmp_path / "out", "a")
    table = pa.concat_tables([rows_of(tmp_path / "out", "train"), rows_of(tmp_path / "out", "test")])
    ids = table["row_id"].to_pylist()
    assert len(set(ids)) == 14
    # The index in the file says the split, so each file starts anew: rows 2 and 5 of each are test rows.
    ordered = [text.get(i, "only in test") for _, i in sorted(zip(ids, table["a"].to_pylist(), strict=True))]
    tested = {2, 5}
    assert ordered == ["only in test" if i in tested else f"{name}{i}" for name in ("a", "b") for i in range(7)]


def test_a_schema_of_hashed_features_alone_needs_nothing_fitted(tmp_path):
    (tmp_path / "log.csv").write_text("a,b\n" + "".join(f"v{i},{i % 2}\n" for i in range(9)))
    manifest = run(tmp_path, tmp_path / "out", simple(dense={}, categorical={"a": {"hash": 5}}))
    assert manifest.rows == {"train": 6, "valid": 0, "test": 3}
    run(tmp_path, tmp_path / "again", simple(dense={}, categorical={"a": {"hash": 5}}), encoders=tmp_path / "out")
    assert rows_of(tmp_path / "again", "train").equals(rows_of(tmp_path / "out", "train"))


def test_outcomes_are_cleaned_as_impressions_are(tmp_path):
    (tmp_path / "log.csv").write_text("a,b,x\n" + "".join(f"k{i},0,{i}\n" for i in range(6)))
    (tmp_path / "buys.tsv").write_text("a,revenue\n k1 ,5\nk3,NA\n,7\nk4, 2 \n")
    content = simple(
        source={"files": "*.csv", "key": "a", "trim": True, "missing": ["", "NA"],
                "outcomes": {"buy": {"files": "buys.tsv", "key": "a", "columns": {"revenue": "float"}}}},
        categorical={},
        tasks={"t": {"kind": "binary", "label": "buy"},
               "r": {"kind": "regression", "label": "buy_revenue", "observed_when": "buy"}},
        split={"by": "row_index", "modulo": 1, "train": [0]},
    )  # fmt: skip
    found = source.load_outcomes(str(tmp_path), Schema.parse(content, where="mine.yaml"))["buy"].to_dicts()
    assert found == [
        {"key": "k1", "buy": True, "buy_revenue": 5.0},
        {"key": "k3", "buy": True, "buy_revenue": None},
        {"key": "k4", "buy": True, "buy_revenue": 2.0},
    ]


# Refusals: one line, and nothing left behind


def test_more_bad_rows_than_allowed_stop_the_job_with_the_first_of_them(messy_log, small_content, tmp_path):
    message = refused(messy_log[0], tmp_path / "out", small_content(), max_bad_fraction=0.01)
    assert message.startswith("11 of 905 rows are bad, more than max_bad_fraction=0.01; the first: ")
    assert any(f"{file}, line {line}: {reason}" in message for (file, line), reason in messy_log[1].items())


def cut(path: Path, copies: int = 1) -> None:
    """Leaves three quarters of a gzip file, whose rows may be repeated first."""
    header, _, body = gzip.decompress(path.read_bytes()).partition(b"\n")
    data = gzip.compress(header + b"\n" + body * copies, 1)
    path.write_bytes(data[: len(data) * 3 // 4])


FAULTS: dict[str, tuple[Any, list[str]]] = {
    "a cut gzip file": (lambda f: cut(f / "impressions-2.csv.gz"), ["impressions-2.csv.gz: cannot be read"]),
    "a long cut gzip file": (
        lambda f: cut(f / "impressions-2.csv.gz", 100), ["impressions-2.csv.gz: cannot be read to its end"],
    ),
    "a gzip file that is none": (
        lambda f: (f / "impressions-2.csv.gz").write_text("id,at\n1,2\n"), ["impressions-2.csv.gz: cannot be read"],
    ),
    "a missing column": (
        lambda f: (f / "impressions-3.csv").write_text("id,at\n1,2\n"),
        ["impressions-3.csv: column price is missing, the file has id, at"],
    ),
    "an empty file": (lambda f: (f / "impressions-3.csv").write_text(""), ["impressions-3.csv: column price is"]),
    "a folder among the files": (lambda f: (f / "impressions-4.csv").mkdir(), ["impressions-4.csv: cannot be read"]),
    "no impressions": (lambda f: [p.unlink() for p in f.glob("impressions*")], ["impressions-*: no such file"]),
    "no outcomes": (lambda f: [p.unlink() for p in f.glob("clicks*")], ["clicks-*.csv: no such file"]),
    "an outcome's missing column": (lambda f: (f / "clicks-2.csv").write_text("id\n1\n"), ["clicks-2.csv", "dwell"]),
    "an outcome's malformed line": (
        lambda f: (f / "clicks-2.csv").write_text("id,dwell\n1,2\n1\n"),
        ["clicks-2.csv, line 3: 1 columns instead of 2"],
    ),
    "an outcome's bad number": (
        lambda f: (f / "clicks-2.csv").write_text("id,dwell\n1,2\n1,x\n"),
        ["clicks-2.csv: outcome click, line 3: dwell: 'x' is not a number"],
    ),
    "bytes that are no text": (
        lambda f: (f / "clicks-2.csv").write_bytes(b"id,dwell\n\xff,1\n"), ["clicks-2.csv: cannot be read"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_log_that_cannot_be_read_stops_the_job_in_one_line(fault, small_log, small_content, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", 1 << 14)
    folder = shutil.copytree(small_log, tmp_path / "log")
    spoil, says = FAULTS[fault]
    spoil(folder)
    message = refused(folder, tmp_path / "out", small_content())
    assert [words for words in says if words not in message] == []


def test_a_split_without_rows_stops_the_job(small_log, small_content, tmp_path):
    content = small_content() | {"split": {"by": "time", "valid_from": "1970-01-02", "test_from": "1970-02-01"}}
    assert "split test is empty: none of 900 rows" in refused(small_log, tmp_path / "out", content)


def test_an_expression_that_does_not_fit_the_columns_stops_the_job(small_log, small_content, tmp_path):
    content = small_content()
    content["weight"] = "city + 1"
    assert "weight: 'city + 1' cannot be computed" in refused(small_log, tmp_path / "out", content)


@pytest.mark.parametrize(
    "setting",
    [
        {"rows_per_shard": 0},
        {"rows_per_row_group": 0},
        {"workers": 0},
        {"max_bad_fraction": 2},
        {"max_bad_fraction": -1},
    ],
)
def test_a_size_that_makes_no_sense_is_refused(setting):
    with pytest.raises(ValidationError, match=next(iter(setting))):
        PreprocessConfig(input="x", out=Path("y"), **setting)


def test_an_out_that_cannot_be_written_is_refused(small_log, small_content, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/out cannot be written"):
        run(small_log, tmp_path / "file" / "out", small_content())


def test_runners_known_to_lose_rows_are_refused(small_log, small_content, tmp_path):
    assert "runner=dask" in refused(small_log, tmp_path / "out", small_content(), runner="DaskRunner")


# A dataset that stands already


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_standing_dataset_is_refused_or_replaced_whole_and_outlives_a_failed_replacement(
    small_dataset, small_log, small_content, tmp_path
):
    out = shutil.copytree(small_dataset, tmp_path / "out")
    (out / "train" / "part-99999-of-99999.parquet").write_bytes(b"of another run")
    before = content_of(out)
    assert "exists" in refused(small_log, out, small_content())
    content = small_content() | {"split": {"by": "time", "valid_from": "1970-01-02", "test_from": "1970-02-01"}}
    refused(small_log, out, content, overwrite=True)
    assert content_of(out) == before
    run(small_log, out, small_content() | {"weight": "3"}, overwrite=True)
    after = Dataset(out)
    after.verify()
    assert "train/part-99999-of-99999.parquet" not in content_of(out)
    assert set(rows_of(out, "train")["weight"].to_pylist()) == {3.0}
    assert after.manifest.fingerprint != Dataset(small_dataset).manifest.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_leaves_alone_what_is_no_dataset(small_log, small_content, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    assert "is no dataset" in refused(small_log, tmp_path / "thesis", small_content(), overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_given_encoders_are_used_as_they_are(small_dataset, small_log, small_content, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    shutil.copy(small_log / "clicks-1.csv", folder)
    rows = list(raw_rows(small_log))[300:303]
    changed = [row | {"city": city} for row, city in zip(rows, ["Atlantis", "Köln", "NA"], strict=True)]
    with (folder / "impressions-9.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(changed)
    manifest = run(folder, tmp_path / "out", small_content(), encoders=small_dataset)
    assert manifest.rows == {"train": 0, "valid": 3, "test": 0}
    assert content_of(tmp_path / "out" / "encoders") == content_of(small_dataset / "encoders")
    known = {value: i for i, value in values_of(small_dataset, "city").items()}
    found = rows_of(tmp_path / "out", "valid")
    assert found["city"].to_pylist() == [1, known["Köln"], 0]
    assert found["price"].to_pylist() == rows_of(small_dataset, "valid")["price"].to_pylist()[:3]

    labels = small_content() | {"weight": "2"}  # other labels and weights of the same features
    assert run(folder, tmp_path / "labels", labels, encoders=small_dataset).rows == manifest.rows
    assert Dataset(tmp_path / "labels").encoders_id == Dataset(small_dataset).encoders_id
    other = small_content() | {"dense": {"price": {"transform": "none"}}}
    message = refused(folder, tmp_path / "no", other, encoders=small_dataset)
    assert Dataset(small_dataset).schema.inputs_fingerprint in message
    assert Schema.parse(other, where="x").inputs_fingerprint in message
    assert "encoders.json" in refused(folder, tmp_path / "no", small_content(), encoders=folder)


def test_a_changed_or_missing_shard_is_named(small_dataset, tmp_path):
    out = shutil.copytree(small_dataset, tmp_path / "out")
    path = out / "train" / "part-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"part-00001-of-00003\.parquet: checksum"):
        Dataset(out).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"part-00001-of-00003\.parquet has .* bytes, the manifest says"):
        Dataset(out)
    path.unlink()
    with pytest.raises(UserError, match=r"part-00001-of-00003\.parquet is missing"):
        Dataset(out)


# The command line


@pytest.fixture
def conf(small_content, tmp_path) -> Path:
    """A --config-dir with the data groups `small` and `broken`."""
    folder = tmp_path / "conf" / "data"
    folder.mkdir(parents=True)
    broken = small_content()
    broken["dense"]["qty"] = {}
    for name, schema in (("small", small_content()), ("broken", broken)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"input": "nowhere", "schema": schema}, sort_keys=False))
    return folder.parent


def command(conf: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "jobs.preprocess", f"--config-dir={conf}", *map(str, arguments)]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_cut_file_ends_the_command_with_one_line_and_exit_code_1(conf, small_log, tmp_path):
    folder = shutil.copytree(small_log, tmp_path / "log")
    cut(folder / "impressions-2.csv.gz", 100)
    before = sorted(tmp_path.iterdir())
    arguments = ("data=small", f"input={folder}", f"out={tmp_path / 'out'}")
    done = subprocess.run(command(conf, *arguments), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("fit", "encode"))]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {folder}/impressions-2.csv.gz: cannot be read")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["data=broken", "out=out"],
            "broken.yaml: tasks.bought.label uses column qty, which is also read by the feature qty",
        ),
        (["data=small", "out=out"], "nowhere/impressions-*: no such file"),
        (["data=small"], "out"),
        (["out=out"], "data is missing"),
        (["data=nosuch", "out=out"], "nosuch"),
        (["data=small", "out=out", "rows_per_shard=0"], "rows_per_shard"),
        (["data=small", "out=out", "colour=blue"], "colour"),
    ],
)
def test_a_command_that_cannot_work_exits_with_one_line(arguments, says, conf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["preprocess", f"--config-dir={conf}", *arguments])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        main()
    assert str(caught.value).startswith("error: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_says_what_it_wrote(conf, small_log, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["preprocess", f"--config-dir={conf}", "data=small", f"input={small_log}", f"out={out}"]
    )
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [[split, "300", "rows"] for split in SPLITS]
    assert "click 0.3333 of 300, bought 0.5000 of 100" in lines[0]
    assert Dataset(out).manifest.fingerprint in lines[3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["conf", "out"]


HOLD = """
import pathlib, sys, time
import pipeline.ingest.job as job
from features.schema import Schema

def hold(*_):
    print("ready", flush=True)
    time.sleep(300)

job.commit = hold
config = job.PreprocessConfig(input=sys.argv[1], out=pathlib.Path(sys.argv[2]), overwrite=True)
job.preprocess(config, Schema.load(pathlib.Path(sys.argv[3])))
"""


def test_a_job_killed_before_its_last_step_leaves_no_dataset_and_the_next_is_no_mixture(
    small_dataset, small_log, small_content, tmp_path
):
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", HOLD, str(small_log), str(out), str(small_dataset / "schema.yaml")]
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as job:
        assert job.stdout.readline() == b"ready\n"
        job.send_signal(signal.SIGKILL)
    assert not out.exists()
    with pytest.raises(UserError, match="no dataset"):
        Dataset(out)
    run(small_log, out, small_content(), rows_per_row_group=32, rows_per_shard=100)
    Dataset(out).verify()
    assert_same_rows(out, small_dataset, 0)


def test_a_run_repeated_gives_the_same_bytes(small_dataset, small_log, small_content, tmp_path):
    run(small_log, tmp_path / "out", small_content(), rows_per_row_group=32, rows_per_shard=100)
    assert content_of(tmp_path / "out") == content_of(small_dataset)


# The census file


def test_census_has_the_rows_and_base_rates_of_its_readme(census_folder, tmp_path):
    content = yaml.safe_load((ROOT / "jobs" / "conf" / "data" / "census.yaml").read_text())["schema"]
    manifest = run(census_folder, tmp_path / "census", content)
    assert manifest.rows == {"train": 59_858, "valid": 19_952, "test": 19_952}
    assert manifest.dead_letters == {}
    rates = {
        task: manifest.positives["test"][task] / manifest.observed["test"][task] for task in manifest.observed["test"]
    }
    assert {task: round(rate, 4) for task, rate in rates.items()} == {
        "income": 0.0633, "never_married": 0.4302, "college": 0.1509,
    }  # fmt: skip

    # The same from the file itself.
    with gzip.open(census_folder / "census-income.test.gz", "rt") as file:
        lines = [[cell.strip() for cell in line.split(",")] for line in file]
    assert len(lines) == 99_762
    names = content["source"]["columns"]
    test = [dict(zip(names, cells, strict=True)) for i, cells in enumerate(lines) if i % 10 >= 8]
    assert rates["income"] == sum(row["income_50k"] == "50000+." for row in test) / len(test)
    assert rates["never_married"] == sum(row["marital_stat"] == "Never married" for row in test) / len(test)
    ages = np.log1p([float(cells[0]) for i, cells in enumerate(lines) if i % 10 < 6])
    found = rows_of(tmp_path / "census", "test")
    assert found["age"].to_numpy() == pytest.approx(
        (np.log1p([float(row["age"]) for row in test]) - ages.mean()) / ages.std(), abs=1e-5
    )
    countries = values_of(tmp_path / "census", "country_self")
    assert [countries.get(i) for i in found["country_self"].to_pylist()] == [
        None if row["country_self"] == "?" else row["country_self"] for row in test
    ]
