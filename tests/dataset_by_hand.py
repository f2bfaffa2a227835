"""Typed rows drawn at random, and a dataset of them that is written file by file, apart from any job."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from features.fit.encoders import Encoders
from features.fit.split_counts import count_features
from features.fit.statistics import Statistics
from features.schema.schema import SPLITS, Schema
from pipeline.dataset.card.card import card, with_splits
from pipeline.dataset.entries import DeadLetterFile, Shard
from pipeline.dataset.manifest import Manifest, footer_sha256
from pipeline.storage.files import sha256

CONTENT: dict[str, Any] = {
    "source": {
        "files": "log.csv",
        "key": "id",
        "outcomes": {"click": {"files": "clicks.csv", "key": "id"}},
    },
    "dense": {"price": {"transform": "log1p"}},
    "categorical": {"city": {"vocabulary": {"min_count": 3}}, "user": {"hash": 50}, "age": {"bins": 5}},
    "bag": {"tags": {}},
    "tasks": {
        "click": {"kind": "binary", "label": "click"},
        "bought": {"kind": "binary", "label": "y", "observed_when": "click"},
        "spent": {"kind": "regression", "label": "z"},
    },
    "split": {"by": "row_index", "modulo": 5, "train": [0, 1, 2], "valid": [3], "test": [4]},
}
SCHEMA = Schema.parse(CONTENT, where="hand.yaml")
MISSING = {"price": 0.1, "age": 0.2, "city": 0.3}  # shares


def draw_rows(count: int, seed: int = 0, shift: float = 0.0, cities: int = 40) -> pa.Table:
    """Rows as features.raw hands them over; another `shift` or number of `cities` is another distribution."""
    rng = np.random.default_rng(seed)

    def number(name: str, values: np.ndarray) -> pa.Array:
        return pa.array(values, mask=rng.random(count) < MISSING[name])

    def words(prefix: str, number_B: np.ndarray) -> pa.DictionaryArray:
        return pa.array([f"{prefix}{n}" for n in number_B], pa.large_string()).dictionary_encode()

    city_B = np.minimum(rng.zipf(1.5, count), cities)
    city = words("city", city_B)
    lost = pa.array(rng.random(count) < MISSING["city"])
    city = pa.DictionaryArray.from_arrays(pa.array(city.indices.to_numpy(), mask=lost.to_numpy(False)), city.dictionary)
    length_B = rng.integers(0, 4, count)
    tags = words("tag", rng.integers(0, 9, length_B.sum()))
    click_B = (rng.random(count) < 0.3).astype(np.float32)
    bought_B = (rng.random(count) < 0.5).astype(np.float32)
    return pa.table(
        {
            "price": number("price", rng.lognormal(1 + shift, 1, count)),
            "city": city,
            "user": words("user", rng.integers(0, 3000, count)),
            "age": number("age", rng.integers(18, 80, count).astype(np.float64)),
            "tags": pa.LargeListArray.from_arrays(pa.array(np.cumsum([0, *length_B])), tags),
            "label.click": pa.array(click_B),
            "label.bought": pa.array(bought_B, mask=click_B == 0),
            "label.spent": pa.array((rng.normal(5, 2, count) + 3 * click_B).astype(np.float32)),
            "weight": pa.array(np.ones(count, np.float32)),
            "event_time": pa.array(np.arange(count)),
            "row_id": pa.array(np.arange(count) + 100),
            "split": pa.array(np.array([0, 0, 0, 1, 2], np.int8)[np.arange(count) % 5]),
        }
    )


def fit_encoders(rows: pa.Table) -> tuple[Encoders, Statistics]:
    statistics = Statistics.of(SCHEMA, rows)
    return Encoders.fit(SCHEMA, statistics), statistics


def write_shard(folder: Path, path: str, split: str, rows: pa.Table) -> Shard:
    """Writes one shard in row groups of 64."""
    file = folder / path
    file.parent.mkdir(exist_ok=True)
    pq.write_table(rows, file, row_group_size=64)
    labels = {task: rows[f"label.{task}"].drop_null().to_pylist() for task in SCHEMA.tasks}
    sizes = [min(64, rows.num_rows - start) for start in range(0, rows.num_rows, 64)]
    return Shard(
        path=path, split=split, rows=rows.num_rows, bytes=file.stat().st_size, sha256=sha256(file),
        footer_sha256=footer_sha256(file), row_groups=sizes, observed={t: len(x) for t, x in labels.items()},
        positives={t: float(sum(x)) for t, x in labels.items()},
    )  # fmt: skip


def write_dead_letters(folder: Path, stream: str, reasons: list[str]) -> DeadLetterFile:
    path = f"dead_letters/{stream}.parquet"
    (folder / "dead_letters").mkdir(exist_ok=True)
    columns = {
        "stream": [stream] * len(reasons),
        "file": ["log.csv"] * len(reasons),
        "line": range(2, len(reasons) + 2),
    }
    table = pa.table(columns | {"reason": reasons, "raw": ["{}"] * len(reasons)})
    pq.write_table(table, folder / path)
    file = folder / path
    return DeadLetterFile(path=path, stream=stream, rows=len(reasons), bytes=file.stat().st_size, sha256=sha256(file))


def write_manifest(folder: Path, shards: list[Shard], letters: list[DeadLetterFile], **changes: Any) -> Manifest:
    """A manifest whose sums are right, but for what is changed."""
    splits = {split: [s for s in shards if s.split == split] for split in SPLITS}
    rows = {split: sum(s.rows for s in found) for split, found in splits.items()}
    bad = {stream: sum(x.rows for x in letters if x.stream == stream) for stream in ("impressions", "click")}
    outcomes = {"joined": 70, "duplicate": 2, "early": 0, "late": 3, "unmatched": 5}
    content = {
        "fingerprint": SCHEMA.fingerprint,
        "rows": rows,
        "read": {"impressions": sum(rows.values()) + 11 + bad["impressions"], "click": 80 + bad["click"]},
        "left_out": {"window of click still open": 11},
        "outcomes": {"click": outcomes},
        "dead_letters": {"price: 'x' is not a number": 2, "3 columns instead of 9": sum(bad.values()) - 2},
        "letters": letters,
        "shards": shards,
        "absent_days": {"click": ["2026-03-02", "2026-03-04..2026-03-05"]},
        "undecided": {"click": {"window still open": 11}},
        "dead_letter_examples": {"3 columns instead of 9": {"file": "log.csv", "line": 2, "reason": "bad"}},
    }
    for sums in ("observed", "positives"):
        content[sums] = {
            split: {task: sum(getattr(s, sums)[task] for s in found) for task in SCHEMA.tasks}
            for split, found in splits.items()
        }
    manifest = Manifest.model_validate(content | changes)
    (folder / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
    return manifest


def write_dataset(folder: Path, rows: pa.Table, reference: dict[str, Any] | None = None) -> Manifest:
    """A whole dataset of rows, in two shards a split."""
    folder.mkdir()
    split = rows["split"].to_numpy()
    encoders, statistics = fit_encoders(rows.filter(pa.array(split == 0)))
    encoders.save(folder / "encoders")
    (folder / "schema.yaml").write_text(
        yaml.safe_dump(SCHEMA.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    )
    shards, counts = [], {}
    for number, name in enumerate(SPLITS):
        mine = rows.filter(pa.array(split == number))
        found = encoders.encode(mine)
        if name != "train":
            counts[name] = count_features(encoders, mine, found)
        half = found.num_rows // 2
        for index, part in enumerate([found.slice(0, half), found.slice(half)]):
            shards.append(write_shard(folder, f"{name}/part-{index:05d}-of-00002.parquet", name, part))
    described = with_splits(card(SCHEMA, encoders, statistics, reference), counts)
    (folder / "statistics.json").write_text(json.dumps(described))
    letters = [write_dead_letters(folder, "impressions", ["bad"] * 4), write_dead_letters(folder, "click", ["bad"])]
    return write_manifest(folder, shards, letters)
