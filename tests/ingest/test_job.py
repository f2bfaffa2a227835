"""The ingest job end to end on a log whose every row is known: values, dead letters, manifest, order, files."""

import csv
import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ingest_runs import ROOT, SPLITS, content_of, dead_letters_of, rows_by_id, rows_of, run, values_of

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.verify import verify
from pipeline.ingest.formats import text

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]


def raw_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Every impression that is a row, read with nothing of ours."""
    for path in sorted(folder.glob("impressions-*")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


# A log with bad lines, each known by its place.

BAD_LINES = {
    "impressions-1.csv": [(5, "9,9"), (6, "8,8,8"), (9, "price"), (301, "1,2,3,4,5,6,7,8,9,10,11"), (304, "qty")],
    "impressions-2.csv.gz": [(2, "age"), (3, "short"), (7, "at"), (150, "id"), (290, "also short")],
    "impressions-3.csv": [(40, "price")],
}
LINES_THAT_ARE_NO_ROWS = ["9,9", "8,8,8", "1,2,3,4,5,6,7,8,9,10,11", "short", "also short"]
SIZES = {"rows_per_row_group": 32, "rows_per_shard": 100, "max_bad_fraction": 0.05}


@pytest.fixture(scope="module")
def messy_log(small_log, tmp_path_factory) -> tuple[Path, dict[tuple[str, int], str]]:
    """`small_log` with bad lines in it, and by file and line what is wrong."""
    folder = shutil.copytree(small_log, tmp_path_factory.mktemp("messy") / "log")
    expected = {}
    for name, bad in BAD_LINES.items():
        opened = gzip.open if name.endswith("gz") else open
        with opened(folder / name, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        header = next(csv.reader([lines[0]]))
        for line, what in bad:  # in order, so that each lands on its line
            if what in header:
                cells = next(csv.reader([lines[line - 1]]))
                cells[header.index(what)] = "oops"
                written = StringIO()
                csv.writer(written, lineterminator="").writerow(cells)
                lines[line - 1] = written.getvalue()
                expected[str(folder / name), line] = f"{what}: 'oops' is not a"
            else:
                lines.insert(line - 1, what)
                expected[str(folder / name), line] = f"{what.count(',') + 1} columns instead of 9"
        with opened(folder / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    clicks = (folder / "clicks-1.csv").read_text() + "none,1\n"
    (folder / "clicks-1.csv").write_text(clicks)
    expected[str(folder / "clicks-1.csv"), clicks.count("\n")] = "id: 'none' is not an integer"
    return folder, expected


@pytest.fixture(scope="module")
def messy(messy_log, small_content, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("messy_dataset") / "dataset"
    run(messy_log[0], out, small_content(), **SIZES)
    return out


def test_bad_lines_are_in_dead_letters_with_file_line_and_reason(messy, messy_log):
    _, expected = messy_log
    found = {(letter["file"], letter["line"]): letter["reason"] for letter in dead_letters_of(messy)}
    assert found.keys() == expected.keys()
    assert {place: reason for place, reason in expected.items() if not found[place].startswith(reason)} == {}
    assert {letter["stream"] for letter in dead_letters_of(messy) if "clicks" in letter["file"]} == {"click"}
    assert {letter["stream"] for letter in dead_letters_of(messy) if "impressions" in letter["file"]} == {"impressions"}


def test_every_raw_line_is_in_exactly_one_of_train_valid_test_and_dead_letters(messy, messy_log):
    ids = [row["row_id"] for row in rows_by_id(messy)]
    assert len(ids) == len(set(ids))
    raws = [letter["raw"] for letter in dead_letters_of(messy) if letter["stream"] == "impressions"]
    assert [raw for raw in raws if not raw.startswith("{")] == LINES_THAT_ARE_NO_ROWS
    spoiled = [json.loads(raw)["id"] for raw in raws if raw.startswith("{")]
    assert sorted([*map(str, ids), *(i for i in spoiled if i != "oops")]) == sorted(
        row["id"]
        for row in raw_rows(messy_log[0])
        if row["id"].isdigit() and int(row["id"]) >= 1000 and None not in row
    )
    assert len(ids) + len(raws) == 900 + 5


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
        assert all(group == 32 for group in groups[:-1])
        assert 0 < groups[-1] <= 32
    for split in SPLITS:
        table = rows_of(messy, split)
        assert manifest["rows"][split] == table.num_rows
        for task in ("click", "bought", "dwell"):
            label = table[f"label.{task}"].drop_null().to_numpy().astype(np.float64)
            assert manifest["observed"][split][task] == len(label)
            assert manifest["positives"][split][task] == pytest.approx(label.sum(), rel=1e-9)
    assert manifest["read"] == {"impressions": 905, "click": 303}
    assert sum(manifest["outcomes"]["click"].values()) == 302
    assert sum(manifest["dead_letters"].values()) == len(dead_letters_of(messy)) == 12
    assert manifest["dead_letters"]["price: wrong value"] == 2
    assert manifest["dead_letters"]["1 columns instead of 9"] == 2
    for letters in manifest["letters"]:
        data = (messy / letters["path"]).read_bytes()
        assert (letters["bytes"], letters["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        found = pq.read_table(messy / letters["path"])
        assert (letters["rows"], {letters["stream"]}) == (found.num_rows, set(found["stream"].to_pylist()))
    list(verify(Dataset(messy)))


def test_a_dataset_holds_its_parts_and_nothing_else(messy):
    parts = {"manifest.json", "schema.yaml", "statistics.json", "encoders", "dead_letters", *SPLITS}
    assert {p.name for p in messy.iterdir()} == parts
    for split in SPLITS:
        names = sorted(p.name for p in (messy / split).iterdir())
        assert names == [f"part-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
    assert [p.name for p in messy.parent.iterdir()] == ["dataset"]


def test_rows_keep_their_values_and_on_request_their_order(small_dataset, small_log, small_content):
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
            known_age = moments["age"]["mean"] if given["age"] == "NA" else float(given["age"])
            age = row["age"] * moments["age"]["std"] + moments["age"]["mean"]
            assert age == pytest.approx(known_age, abs=1e-4)
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


# Order


def test_an_order_decides_where_rows_lie_and_nothing_else(small_dataset, small_log, small_content, tmp_path):
    sizes = {"rows_per_row_group": 32, "rows_per_shard": 100}
    run(small_log, tmp_path / "shuffled", small_content(), **sizes)
    run(small_log, tmp_path / "seeded", small_content(), seed=1, **sizes)
    run(small_log, tmp_path / "time", small_content(), order="time", **sizes)
    placed = {}
    for name in ("shuffled", "seeded", "time"):
        assert rows_by_id(tmp_path / name) == rows_by_id(small_dataset)
        assert content_of(tmp_path / name / "encoders") == content_of(small_dataset / "encoders")
        placed[name] = rows_of(tmp_path / name, "train")["row_id"].to_pylist()
    assert placed["shuffled"] != placed["seeded"]
    assert placed["time"] == sorted(placed["time"])  # in this log a later row has a larger id
    for name in ("shuffled", "seeded"):
        # Far from any order: of all pairs of neighbours about half go up.
        ups = np.mean(np.diff(placed[name]) > 0)
        assert 0.4 < ups < 0.6
        firsts = [Dataset(tmp_path / name).shards("train")[0].path]
        first = pq.read_table(tmp_path / name / firsts[0])["row_id"].to_numpy() - 1000
        assert 120 < first.mean() < 180  # each shard is a sample of the whole day
        assert all(abs(shard.rows - 100) < 40 for shard in Dataset(tmp_path / name).shards("train"))
    for split in SPLITS:  # bounds of shards are made of samples, so their sizes are about right
        assert all(abs(shard.rows - 100) <= 10 for shard in Dataset(tmp_path / "time").shards(split))


def test_a_file_read_in_many_blocks_becomes_what_it_becomes_in_one(
    messy, messy_log, small_content, tmp_path, monkeypatch
):
    monkeypatch.setattr(text, "BLOCK_BYTES", 700)
    out = tmp_path / "dataset"
    manifest = run(messy_log[0], out, small_content(), **SIZES)
    # Moments of blocks merge in another order, so the last digit of a number may differ; nothing else may.
    for one, other in zip(rows_by_id(out), rows_by_id(messy), strict=True):
        for name in ("price", "age"):
            assert one.pop(name) == pytest.approx(other.pop(name), rel=1e-5, abs=1e-6)
        assert one == other
    assert dead_letters_of(out) == dead_letters_of(messy)
    assert manifest.dead_letters == Dataset(messy).manifest.dead_letters
    assert [(s.path, s.rows, s.row_groups) for s in manifest.shards] == [
        (s.path, s.rows, s.row_groups) for s in Dataset(messy).manifest.shards
    ]


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


def test_rows_without_an_id_of_their_own_have_their_file_and_their_place_in_it(tmp_path):
    for name in ("b", "a", "empty"):
        rows = "".join(f"{name}{i},{i % 2},{i}\n" for i in range(7 if name != "empty" else 0))
        (tmp_path / f"{name}.csv").write_text("a,b,x\n" + rows)
    manifest = run(tmp_path, tmp_path / "out", simple(), unit_bytes=10)
    assert manifest.rows == {"train": 10, "valid": 0, "test": 4}
    assert {s.split for s in manifest.shards} == {"train", "test"}
    text_of = values_of(tmp_path / "out", "a")
    # The index in the file says the split, so each file starts anew: rows 2 and 5 of each are test rows.
    assert [(row["row_id"], text_of.get(row["a"], "only in test")) for row in rows_by_id(tmp_path / "out")] == [
        (file << 40 | i, "only in test" if i in (2, 5) else f"{name}{i}")
        for file, name in enumerate(("a", "b"))
        for i in range(7)
    ]


def test_ids_of_rows_are_unique_and_ascend_when_files_are_cut(tmp_path):
    (tmp_path / "log.csv").write_text("a,b,x\n" + "".join(f"v{i},{i % 2},{i}\n" for i in range(100)))
    content = simple(split={"by": "hash", "key": "a", "valid": 0, "test": 0})
    run(tmp_path, tmp_path / "out", content, unit_bytes=50)
    text_of = values_of(tmp_path / "out", "a")
    rows = rows_by_id(tmp_path / "out")
    assert [text_of[row["a"]] for row in rows] == [f"v{i}" for i in range(100)]
    assert len({row["row_id"] for row in rows}) == 100


def test_a_schema_of_hashed_features_alone_needs_nothing_fitted(tmp_path):
    (tmp_path / "log.csv").write_text("a,b\n" + "".join(f"v{i},{i % 2}\n" for i in range(9)))
    hashed = simple(dense={}, categorical={"a": {"hash": 5}})
    manifest = run(tmp_path, tmp_path / "out", hashed)
    assert manifest.rows == {"train": 6, "valid": 0, "test": 3}
    run(tmp_path, tmp_path / "again", hashed, encoders={"from": tmp_path / "out"})
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
    manifest = run(tmp_path, tmp_path / "out", content, max_bad_fraction=0.5)
    rows = rows_by_id(tmp_path / "out")
    assert [row["label.t"] for row in rows] == [0, 1, 0, 1, 1, 0]
    assert [row["label.r"] for row in rows] == [None, 5, None, None, 2, None]
    assert manifest.dead_letters == {"a: missing key": 1}
    [letter] = dead_letters_of(tmp_path / "out")
    assert (letter["line"], json.loads(letter["raw"])["revenue"]) == (4, 7)


def test_one_file_may_hold_impressions_and_outcomes(tmp_path):
    """Each is read on its own: a bad line is a dead letter of both, under the same number."""
    lines = [f"k{i},0,{i},{i + 1}" for i in range(40)]
    lines[17] = "short"
    (tmp_path / "log.csv").write_text("a,b,at,bought\n" + "\n".join(lines) + "\n")
    outcome = {"files": "log.csv", "key": "a", "time": "bought", "window": 5}
    content = simple(
        source={
            "files": "log.csv",
            "key": "a",
            "outcomes": {"buy": outcome},
            "times": {"at": "index", "bought": "index"},
        },
        dense={},
        tasks={"t": {"kind": "binary", "label": "buy"}},
        event_time="at",
        split={"by": "hash", "key": "a", "valid": 0, "test": 0},
    )
    manifest = run(tmp_path, tmp_path / "out", content, unit_bytes=100, max_bad_fraction=0.5, as_of="1971-01-01")
    assert [(x["stream"], x["line"], x["raw"]) for x in dead_letters_of(tmp_path / "out")] == [
        ("buy", 19, "short"),
        ("impressions", 19, "short"),
    ]
    assert manifest.outcomes["buy"]["joined"] == manifest.rows["train"] == 39


def test_a_log_ends_at_the_latest_of_its_times_though_they_are_derived(tmp_path):
    """A window of ten seconds is closed for all but the last rows, and nobody clicked."""
    (tmp_path / "log.csv").write_text("a,ms\n" + "".join(f"k{i},{1000 * i}\n" for i in range(40)))
    (tmp_path / "clicks.csv").write_text("a,when\n")
    outcome = {"files": "clicks.csv", "key": "a", "time": "when", "window": 10}
    content = simple(
        source={
            "files": "log.csv", "key": "a", "outcomes": {"click": outcome}, "types": {"ms": "int"},
            "derived": {"at": "CAST(ms / 1000 AS BIGINT)"}, "times": {"at": "index"},
        },
        dense={},
        tasks={"t": {"kind": "binary", "label": "click"}},
        event_time="at",
        split={"by": "hash", "key": "a", "valid": 0, "test": 0},
    )  # fmt: skip
    run(tmp_path, tmp_path / "out", content)
    rows = rows_by_id(tmp_path / "out")
    assert [row["event_time"] for row in rows] == list(range(40))
    assert [row["label.t"] for row in rows] == [0.0 if i + 10 <= 39 else None for i in range(40)]


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
    found: pa.Table = rows_of(tmp_path / "census", "test").sort_by("row_id")
    assert found["age"].to_numpy() == pytest.approx(
        (np.log1p([float(row["age"]) for row in test]) - ages.mean()) / ages.std(), abs=1e-5
    )
    countries = values_of(tmp_path / "census", "country_self")
    assert [countries.get(i) for i in found["country_self"].to_pylist()] == [
        None if row["country_self"] == "?" else row["country_self"] for row in test
    ]
