"""A first schema from raw files: jobs.preprocess takes it as it stands, and it means what the files were made from."""

import csv
import gzip
import json
import random
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_runs import no_beam, rows_by_id, run
from omegaconf import OmegaConf

from features.errors import UserError
from features.printable import has_controls
from features.schema.schema import Schema
from features.yaml_text import parse_yaml
from pipeline.dataset.manifest import Manifest
from pipeline.ingest.draft.config import DraftConfig
from pipeline.ingest.draft.document import Document
from pipeline.ingest.draft.draft import draft
from pipeline.synthetic.event_log import LogConfig, generate

FIRST = 1_793_491_200  # 2026-11-01


def drafted(tmp_path: Path, folder: Path, **given: Any) -> tuple[dict[str, Any], str]:
    """The schema as the YAML has it, and its text."""
    out = tmp_path / "conf" / "data" / "mine.yaml"
    draft(DraftConfig(input=str(folder), out=out, overwrite=True, **given))
    text = out.read_text()
    content = yaml.safe_load(text)
    assert content == OmegaConf.to_container(OmegaConf.load(out), resolve=True)
    assert content["input"] == str(folder)
    return content["schema"], text


def preprocessed(tmp_path: Path, folder: Path, schema: dict[str, Any]) -> Manifest:
    with no_beam():
        manifest = run(folder, tmp_path / "dataset", schema)
    assert sum(manifest.dead_letters.values()) == 0
    assert set(manifest.rows) == {"train", "valid", "test"}
    assert all(manifest.rows.values())
    return manifest


def refused(tmp_path: Path, folder: Path, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        drafted(tmp_path, folder, **given)
    assert not (tmp_path / "conf").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_csv(path: Path, rows: list[dict[str, Any]], header: bool = True, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        if header:
            writer.writeheader()
        writer.writerows(rows)


def log(rows: int, seed: int = 0, step: int = 300) -> list[dict[str, Any]]:
    """Impressions, with the label and columns that are no use."""
    draw = random.Random(seed)
    return [
        {
            "user": f"u{draw.randrange(150)}", "item": 1000 + draw.randrange(60), "price": round(draw.expovariate(0.05), 2),
            "clicks_seen": int(draw.expovariate(0.01)), "ts": FIRST + step * i + draw.randrange(step),
            "tags": "|".join(f"t{draw.randrange(9)}" for _ in range(draw.randrange(4))), "const": "x",
            "note": f"n{draw.random()}", "click": int(draw.random() < 0.2),
        }
        for i in range(rows)
    ]  # fmt: skip


def test_the_generated_streams_become_impressions_with_outcomes(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    generate(LogConfig(impressions=4000, days=4, users=500, items=100, extra_tasks=1), folder)
    schema, text = drafted(tmp_path, folder)
    source = schema["source"]
    assert (source["files"], source["key"]) == ("impressions-{date}.csv", "impression_id")
    assert schema["keep"] == ["impression_id"]
    assert {n: (o["files"], o["key"], o["time"]) for n, o in source["outcomes"].items()} == {
        "click": ("clicks-{date}.csv", "impression_id", "click_time"),
        "conversion": ("conversions-{date}.csv", "impression_id", "conversion_time"),
        "event_1": ("event_1-{date}.csv", "impression_id", "event_1_time"),
    }
    assert source["outcomes"]["click"]["columns"] == {"dwell_seconds": "float"}
    assert schema["bag"] == {"recent_items": {"table": "item"}}
    assert schema["categorical"]["item_id"] == {"table": "item"}
    assert schema["split"] == {"by": "time", "valid_from": "2026-11-03", "test_from": "2026-11-04"}
    assert {n: t["label"] for n, t in schema["tasks"].items()} == {n: n for n in ("click", "conversion", "event_1")}
    assert '"truth.parquet" has a row for about every impression' in text  # true probabilities are no outcome
    manifest = preprocessed(tmp_path, folder, schema)
    rows = {
        name: sum(1 for f in folder.glob(f"{name}-*.csv") for _ in f.open()) - 4 for name in ("impressions", "clicks")
    }
    assert sum(manifest.rows.values()) == rows["impressions"]
    # Every click is joined: the window that is proposed is no shorter than the delays.
    assert manifest.outcomes["click"]["joined"] == rows["clicks"]


def test_a_proposed_window_covers_the_delays_that_were_seen(tmp_path: Path) -> None:
    impressions = [row | {"id": f"r{i:06d}"} for i, row in enumerate(log(600, step=900))]
    for row in impressions:
        del row["click"]
    delay = random.Random(1)
    buys = [{"id": r["id"], "at": r["ts"] + delay.randrange(4000, 9000)} for r in impressions if delay.random() < 0.3]
    write_csv(tmp_path / "raw" / "imp.csv", impressions)
    write_csv(tmp_path / "raw" / "buys.csv", buys)
    schema, _ = drafted(tmp_path, tmp_path / "raw")
    outcome = schema["source"]["outcomes"]["buy"]
    assert outcome["window"] == "3h"
    assert Schema.parse(schema, where="mine.yaml").source.outcomes["buy"].window >= 9000
    assert preprocessed(tmp_path, tmp_path / "raw", schema).outcomes["buy"]["joined"] == len(buys)


def test_a_window_that_is_long_beside_the_log_leaves_labels_observed(tmp_path: Path) -> None:
    impressions = [row | {"id": f"r{i:06d}"} for i, row in enumerate(log(400, step=10))]
    write_csv(tmp_path / "raw" / "imp.csv", [{k: v for k, v in row.items() if k != "click"} for row in impressions])
    write_csv(tmp_path / "raw" / "orders.csv", [{"id": r["id"], "at": r["ts"] + 3000} for r in impressions[::3]])
    schema, _ = drafted(tmp_path, tmp_path / "raw")
    assert schema["source"]["outcomes"]["order"]["open_window"] == "keep"
    manifest = preprocessed(tmp_path, tmp_path / "raw", schema)
    assert sum(found["order"] for found in manifest.observed.values()) == len(impressions)


def test_times_in_milliseconds_and_in_words_are_read_as_moments(tmp_path: Path) -> None:
    draw, at = random.Random(2), {}
    for day in range(1, 5):
        rows = [row | {"reqId": f"r{day}{i:05d}"} for i, row in enumerate(log(300, day, step=280))]
        rows = [row | {"ts": row["ts"] + 86_400 * (day - 1)} for row in rows]
        clicks = [{"req_id": r["reqId"], "then": r["ts"] + draw.randrange(3000)} for r in rows if r.pop("click")]
        at |= {click["req_id"]: click["then"] for click in clicks}
        clicks = [c | {"then": f"{datetime.fromtimestamp(c['then'], timezone.utc):%d/%m/%Y %H:%M:%S}"} for c in clicks]
        write_csv(tmp_path / "raw" / f"imp-2026-11-0{day}.csv", [row | {"ts": 1000 * row["ts"] + 7} for row in rows])
        write_csv(tmp_path / "raw" / f"clk-2026-11-0{day}.csv", clicks, delimiter=";")
    schema, _ = drafted(tmp_path, tmp_path / "raw")
    assert schema["source"]["times"] == {"ts": "ms"}
    outcome = schema["source"]["outcomes"]["clk"]
    assert outcome["read"] == {"delimiter": ";", "times": {"then": "%d/%m/%Y %H:%M:%S"}}
    assert (outcome["time"], outcome["window"]) == ("then", "1h")
    assert schema["split"] == {"by": "time", "valid_from": "2026-11-03", "test_from": "2026-11-04"}
    manifest = preprocessed(tmp_path, tmp_path / "raw", schema)
    assert manifest.outcomes["clk"]["joined"] == len(at)
    assert {row["event_time"] // 86_400 for row in rows_by_id(tmp_path / "dataset")} == {
        FIRST // 86_400 + i for i in range(4)
    }


def test_a_tsv_without_a_header_line_needs_its_label_named(tmp_path: Path) -> None:
    rows = log(1200)
    write_csv(tmp_path / "raw" / "log.tsv", rows, header=False, delimiter="\t")
    said = refused(tmp_path, tmp_path / "raw")
    assert "no label was found" in said
    assert "c9 is '0' in " in said
    assert "label=c9" in said
    schema, _ = drafted(tmp_path, tmp_path / "raw", label="c9")
    assert schema["tasks"] == {"c9": {"kind": "binary", "label": "c9"}}
    assert schema["source"]["columns"] == [f"c{i}" for i in range(1, 10)]
    assert (schema["event_time"], schema["split"]["by"]) == ("c5", "time")
    named = {"c1": "categorical", "c2": "dense", "c3": "dense", "c4": "dense", "c6": "bag"}
    assert {name: kind for kind in ("dense", "categorical", "bag") for name in schema[kind] if name != "hour"} == named
    manifest = preprocessed(tmp_path, tmp_path / "raw", schema)
    assert sum(manifest.rows.values()) == len(rows)
    assert sum(manifest.positives[s]["c9"] for s in manifest.rows) == sum(row["click"] for row in rows)


def test_json_lines_with_lists_booleans_and_iso_times(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = log(1200)
    with (folder / "log.jsonl").open("w") as file:
        for row in rows:
            when = datetime.fromtimestamp(row.pop("ts"), timezone.utc).isoformat()
            row |= {"tags": row["tags"].split("|"), "isClicked": row.pop("click") == 1, "when": when, "deep": {"a": 1}}
            row["emb"] = [row["price"] / 3, 0.25]
            file.write(json.dumps(row) + "\n")
    schema, text = drafted(tmp_path, folder)
    assert schema["tasks"] == {"isClicked": {"kind": "binary", "label": "isClicked = 'true'"}}
    assert schema["vector"] == {"emb": {"length": 2}}
    assert (list(schema["bag"]), schema["event_time"]) == (["tags"], "when")
    assert "# deep: holds objects" in text
    assert "# const is 'x' in all rows" in text
    assert "# note has another value in every row" in text
    manifest = preprocessed(tmp_path, folder, schema)
    assert sum(manifest.positives[s]["isClicked"] for s in manifest.rows) == sum(row["isClicked"] for row in rows)


def test_parquet_streams_whose_keys_have_other_names(tmp_path: Path) -> None:
    for part in range(3):
        rows = [row | {"imp_id": 10**12 + 1000 * part + i} for i, row in enumerate(log(700, part))]
        clicks = [{"impression": r["imp_id"], "amount": 1.5} for r in rows if r["click"]]
        for row in rows:
            row["ts"] = datetime.fromtimestamp(row["ts"], timezone.utc)
            del row["click"]
        for name, table in (("imp", rows), ("clk", clicks)):
            (tmp_path / "raw" / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(table), tmp_path / "raw" / name / f"part-0000{part}.parquet")
    schema, _ = drafted(tmp_path, tmp_path / "raw")
    assert schema["source"]["files"] == "imp/part-*.parquet"
    assert schema["source"]["key"] == "imp_id"
    outcome = {"files": "clk/part-*.parquet", "key": "impression", "columns": {"amount": "float"}}
    assert schema["source"]["outcomes"] == {"clk": outcome}
    manifest = preprocessed(tmp_path, tmp_path / "raw", schema)
    assert manifest.outcomes["clk"]["unmatched"] == 0
    assert sum(manifest.positives[s]["clk"] for s in manifest.rows) == manifest.outcomes["clk"]["joined"] > 0


def test_a_table_that_a_larger_stream_refers_to_is_not_the_impressions(tmp_path: Path) -> None:
    draw = random.Random(0)
    ratings = [
        {"userId": draw.randrange(200), "movieId": draw.randrange(1, 90), "rating": draw.randrange(1, 6)}
        | {"timestamp": FIRST + 900 * i}
        for i in range(900)
    ]
    write_csv(tmp_path / "raw" / "ratings.csv", ratings)
    movies = [{"movieId": i, "title": f"Film {i}, The", "genres": "Comedy|Drama"} for i in range(1, 90)]
    write_csv(tmp_path / "raw" / "movies.csv", movies)
    write_csv(tmp_path / "raw" / "links.csv", [{"movieId": i, "imdbId": 100_000 + 7 * i} for i in range(1, 90)])
    said = refused(tmp_path, tmp_path / "raw")
    assert "rating is '" in said
    schema, text = drafted(tmp_path, tmp_path / "raw", label="rating >= 4")
    assert schema["source"]["files"] == "ratings.csv"
    assert schema["tasks"] == {"rating": {"kind": "binary", "label": "rating >= 4"}}
    assert set(schema["categorical"]) == {"userId", "movieId", "hour"}  # ids, though numbers
    (suggested,) = [line for line in text.splitlines() if line.startswith("    # tables: ")]
    assert yaml.safe_load(suggested.strip(" #"))["tables"] == {
        "link": {"files": "links.csv", "key": "movieId", "columns": {"imdbId": "int"}},
        "movie": {"files": "movies.csv", "key": "movieId", "columns": {"title": "string", "genres": "string"}},
    }
    manifest = preprocessed(tmp_path, tmp_path / "raw", schema)
    assert sum(manifest.positives[s]["rating"] for s in manifest.rows) == sum(r["rating"] >= 4 for r in ratings)
    for quoted in ("rating", '"rating"', " (rating)"):
        schema, _ = drafted(tmp_path, tmp_path / "raw", label=quoted)
        assert schema["tasks"] == {"rating": {"kind": "regression", "label": "rating"}}


def test_a_label_that_compares_a_column_of_text_with_a_number_is_refused_with_what_computes(tmp_path: Path) -> None:
    rows = [{"v": "n/k" if i == 10 else f"{i % 11}.5", "note": f"n{i % 7}"} for i in range(400)]
    write_csv(tmp_path / "raw" / "imp.csv", rows)
    said = refused(tmp_path, tmp_path / "raw", label="v > 9.0")
    assert "label=v > 9.0: 'v > 9.0' compares text (v) with a number: write TRY_CAST(v AS DOUBLE)" in said
    schema, text = drafted(tmp_path, tmp_path / "raw", label="TRY_CAST(v AS DOUBLE) > 9.0")
    known = [float(row["v"]) > 9 for row in rows if row["v"] != "n/k"]
    assert f"mean {sum(known) / len(known):.4f} of {len(known)} sampled rows" in text
    assert next(iter(schema["tasks"].values()))["label"] == "TRY_CAST(v AS DOUBLE) > 9.0"


@pytest.mark.parametrize("label", ["y", '"y"', "(`y`)"])
def test_a_column_of_two_values_is_the_same_label_quoted_or_not(tmp_path: Path, label: str) -> None:
    rows = [{"y": 1 if i % 3 else -1, "note": f"n{i % 7}"} for i in range(300)]
    write_csv(tmp_path / "raw" / "imp.csv", rows)
    schema, _ = drafted(tmp_path, tmp_path / "raw", label=label)
    assert schema["tasks"] == {"y": {"kind": "binary", "label": "y = 1"}}


def test_of_a_label_that_no_types_fit_the_first_mismatch_is_said(tmp_path: Path) -> None:
    rows = [{"v": "n/k" if i == 10 else f"{i % 11}.5", "price": i % 9} for i in range(400)]
    write_csv(tmp_path / "raw" / "imp.csv", rows)
    said = refused(tmp_path, tmp_path / "raw", label="price > 3.5 AND v > 9.0")
    assert "compares text (v) with a number" in said


@pytest.mark.parametrize("no", ["0.0", "-1.0"])
def test_labels_that_pandas_wrote_as_floats_since_some_are_missing_are_found(tmp_path: Path, no: str) -> None:
    rows = log(400)
    for i, row in enumerate(rows):
        row["click"] = "" if i % 7 == 0 else "1.0" if row["click"] else no
    write_csv(tmp_path / "raw" / "imp.csv", rows)
    schema, text = drafted(tmp_path, tmp_path / "raw")
    known = [row["click"] == "1.0" for row in rows if row["click"]]
    assert f"1 in {sum(known) / len(known):.2%} of the sampled rows" in text
    preprocessed(tmp_path, tmp_path / "raw", schema)
    labels = [row["label.click"] for row in rows_by_id(tmp_path / "dataset")]
    assert labels == [None if not row["click"] else float(row["click"] == "1.0") for row in rows]


def test_columns_that_give_the_label_away_are_left_out(tmp_path: Path) -> None:
    rows = [
        row
        | {
            "dwell_seconds": 5 * row["click"],
            "state": "ab"[row["click"]],
            "paid": i / 4 if row["click"] else "",
            "also": i % 7,
        }
        for i, row in enumerate(log(600))
    ]
    write_csv(tmp_path / "raw" / "log.csv", rows)
    schema, text = drafted(tmp_path, tmp_path / "raw")
    features = {name for kind in ("dense", "categorical", "bag") for name in schema[kind]}
    assert features & {"dwell_seconds", "state", "paid", "click"} == set()
    assert {"also", "user", "item", "price"} <= features
    for line in ("dwell_seconds looks like", "state gives the label click away", "paid gives the label click away"):
        assert f"# {line}" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"label": "clik"}, "(did you mean click?)"),
        ({"label": "click = 2"}, "it is 0 for all 300 sampled rows. click is '0' in"),
        ({"label": "tags"}, "tags"),
        ({"label": "user"}, "Type which value counts as 1: "),
        ({"label": "click ="}, "not a SQL expression"),
        ({"label": "click", "key": "usr"}, "key=usr: no such column"),
        ({"label": "click", "event_time": "user"}, "event_time=user: its values are no times"),
        ({"label": "click", "impressions": "lgo.csv"}, "(did you mean log.csv?)"),
        ({"files": ["none-*.csv"]}, "no such file"),
    ],
)
def test_what_is_given_and_wrong_is_answered_in_one_line(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    write_csv(tmp_path / "raw" / "log.csv", log(300))
    assert says in refused(tmp_path, tmp_path / "raw", **given)


def test_a_file_is_written_where_config_dir_reads_it_and_not_replaced(tmp_path: Path) -> None:
    write_csv(tmp_path / "raw" / "log.csv", log(300))
    for out in ("mine.yaml", "data/mine.json", "data/my schema.yaml"):
        with pytest.raises(UserError, match="out="):
            draft(DraftConfig(input=str(tmp_path / "raw"), out=tmp_path / out))
    with pytest.raises(UserError, match=r"^out=s3:.*: a draft is a file on this machine"):
        draft(DraftConfig(input=str(tmp_path / "raw"), out=Path("s3://bucket/data/mine.yaml")))
    out = tmp_path / "data" / "mine.yaml"
    draft(DraftConfig(input=str(tmp_path / "raw"), out=out))
    first = out.read_text()
    with pytest.raises(UserError, match="overwrite=true"):
        draft(DraftConfig(input=str(tmp_path / "raw"), out=out))
    draft(DraftConfig(input=str(tmp_path / "raw"), out=out, overwrite=True))
    assert out.read_text() == first  # the same files, the same draft


HOSTILE = [
    "a: b", "{x}", "- y", "# z", "yes", "null", "'", '"', "価格 (¥)", "a.b", "c/d", "\\", "weight", "&a", "*a", "!t", "%",
    "@p", "a,b", "${x}", "bad\x1b[31m", "\u202e", "", "select", 'quo"te',
]  # fmt: skip


def test_names_of_columns_are_quoted_or_left_out(tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [
        {name: f"v{draw.randrange(5)}" for name in HOSTILE} | {"click": int(draw.random() < 0.5)} for _ in range(300)
    ]
    write_csv(tmp_path / "raw" / "log.csv", rows)
    schema, text = drafted(tmp_path, tmp_path / "raw")
    assert not has_controls(text.replace("\n", ""))
    read = {entry.get("column", name) for name, entry in schema["categorical"].items()}
    assert read == {*HOSTILE} - {"${x}", "bad\x1b[31m", "\u202e", ""}
    assert "bad\\u001b[31m" in text
    preprocessed(tmp_path, tmp_path / "raw", schema)
    stored = rows_by_id(tmp_path / "dataset")
    assert len(stored) == 300


def test_a_column_of_an_odd_name_can_be_the_label(tmp_path: Path) -> None:
    for name in ("価格 ok", 'is "good"', "select", "A B"):
        rows = [{"user": f"u{i % 40}", name: "xy"[i % 3 == 0]} for i in range(300)]
        write_csv(tmp_path / "raw" / "log.csv", rows)
        quoted = '"' + name.replace('"', '""') + '"'
        schema, _ = drafted(tmp_path, tmp_path / "raw", label=f"{quoted} = 'y'")
        manifest = preprocessed(tmp_path, tmp_path / "raw", schema)
        assert sum(sum(found.values()) for found in manifest.positives.values()) == 100
        (tmp_path / "dataset").rename(tmp_path / f"dataset-{len(name)}-{name[0]}")


NAMES = st.text(min_size=1, max_size=12).filter(lambda text: not has_controls(text))
VALUES = st.recursive(
    NAMES | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=15,
)


@settings(max_examples=examples(60), deadline=None)
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=3), st.text(max_size=150))
def test_what_is_written_is_what_yaml_reads(content: dict[str, Any], comment: str) -> None:
    page = Document()
    page.remark(0, comment)
    page.section(0, "top", comment)
    for key, value in content.items():
        page.entry(1, key, value, comment)
        page.suggestion(1, key, value)
    assert parse_yaml(page.text().encode(), "x") == {"top": content}
