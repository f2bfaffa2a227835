"""A small log with every kind of feature and column, and its rows as a request has them."""

import csv
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from features.fit.encoders import Encoders
from features.schema.schema import Schema
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess
from pipeline.serving.encoded import Encoded, Lists, encoded

sys.path.append(str(Path(__file__).parents[1] / "ingest"))
from ingest_runs import no_beam, rows_of, values_of

ROWS, BEGIN = 60, 1_700_000_000
CONTENT: dict[str, Any] = {
    "source": {
        "files": "log.csv", "row_id": "id", "key": "id", "trim": True, "missing": ["", "NA"],
        "types": {"qty": "int", "zip": "int"}, "optional": {"lang": "en", "shelf": None},
        "outcomes": {"click": {"files": "clicks.csv", "key": "id", "time": "then", "window": "1h"}},
        "tables": {
            "item": {
                "files": "items.csv", "key": "item", "columns": {"brand": "string", "cost": "float", "tags": "string"},
                "read": {"missing": ["", "none"]},
            }
        },
        "counters": {
            "shows": {"by": "user", "take": "count"},
            "ctr": {"by": "user", "take": "mean", "of": "click", "smoothing": 4},
            "spent": {"by": "user", "take": "mean", "of": "qty"},
        },
        "derived": {
            "hour": "(at // 3600) % 24",
            "per_unit": "price / (1 + qty)",
            "pair": "\"user\" || '/' || item_brand",
            "often": "LN(1 + shows)",
        },
    },
    "tables": {"item": {"dim": 4}, "old": {"dim": 4}, "ages": {"dim": 4, "bins": 4}},
    "dense": {
        "price": {"transform": "log1p", "missing_flag": True}, "age": {"piecewise": 3}, "per_unit": {}, "item_cost": {},
        "ctr": {"standardize": False}, "spent": {"standardize": False, "missing_flag": True}, "qty": {}, "often": {},
    },
    "categorical": {
        "user": {"dim": 4, "hash": 50}, "visitor": {"dim": 4, "column": "user", "managed": {"rows": 64}}, "city": {"dim": 4},
        "item": {"table": "item"}, "age_bin": {"table": "ages", "column": "age"}, "hour": {"dim": 4}, "pair": {"dim": 4},
        "zip": {"dim": 4}, "lang": {"dim": 4}, "shelf": {"dim": 4}, "item_brand": {"dim": 4},
        "rare": {"dim": 4, "column": "city", "vocabulary": {"min_count": 9, "unknown": 3}},
        "cost_bin": {"dim": 4, "bins": 3, "column": "item_cost"},
    },
    "bag": {
        "recent": {"table": "item", "max_length": 3}, "item_tags": {"dim": 4, "separator": "+"},
        "clicked": {"table": "old", "pooling": "sequence", "history": {"user": "user", "item": "item", "when": "click"}},
        "brands": {"dim": 4, "max_length": 2, "history": {"user": "user", "item": "item_brand"}},
    },
    "vector": {"picture": {"length": 2, "missing_flag": True}},
    "tasks": {"click": {"kind": "binary", "label": "click"}},
    "event_time": "at",
    "split": {"by": "row_index", "modulo": 1, "train": [0]},
}  # fmt: skip
PAST = ("shows", "ctr", "spent", "clicked", "brands")
# What a JSON request may have in place of a text of the log.
NUMBERS = {"price": float, "age": float, "qty": int, "zip": int, "item_cost": float, "at": int}
LISTS = {"recent": "|", "item_tags": "+", "picture": ","}


def raw_row(number: int) -> dict[str, str]:
    """A line of the log; each column repeats with a period of its own."""
    return {
        "id": str(number), "at": str(BEGIN + number * 5000), "user": f" u{number % 7}" if number % 11 else "NA",
        "city": ["Köln", "NA", "a, b", "7.0", "7", "-0", "007", "none"][number % 8] if number % 5 else f"only {number}",
        "item": ["i0", " i1 ", "i2", "i3", "gone", "N/A"][number % 6], "price": ["1.5", "20", "", "3e2", "-7"][number % 5],
        "age": str(20 + number % 13) if number % 7 else "NaN", "qty": str(number % 4),
        "zip": ["00501", "7", "0x1F", ""][number % 4],
        "recent": "|".join(f"i{(number + k) % 6}" for k in range(number % 5)), "shelf": f"s{number % 3}",
        "picture": f"{number % 3}, {number / 7:.4f}" if number % 4 else "",
    }  # fmt: skip


ITEMS = [
    {"item": "i0", "brand": "x", "cost": "1.25", "tags": "p+q"},
    {"item": "i1", "brand": "none", "cost": "", "tags": ""},
    {"item": "i2", "brand": " ä", "cost": "7", "tags": "q++r+p"},
    {"item": "i3", "brand": "NA", "cost": "1e3", "tags": "r"},
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class RequestLog:
    """The log's dataset, and its rows as texts of a request.

    Attributes:
        raw: B rows: raw texts, texts of the side table, and what was known of the past, of the dataset.
        expected: the same rows as the job encoded them.
    """

    def __init__(self, folder: Path) -> None:
        write_csv(folder / "log.csv", [raw_row(number) for number in range(ROWS)])
        write_csv(folder / "items.csv", ITEMS)
        clicks = [{"id": number, "then": BEGIN + number * 5000 + 60} for number in range(0, ROWS, 3)]
        write_csv(folder / "clicks.csv", clicks)
        self.schema = Schema.parse(CONTENT, "request_log.yaml")
        with no_beam():
            preprocess(PreprocessConfig(input=str(folder), out=folder / "dataset"), self.schema)
        self.encoders = Encoders.load(folder / "dataset" / "encoders", self.schema)
        table = rows_of(folder / "dataset", "train").sort_by("row_id")
        assert table["row_id"].to_pylist() == list(range(ROWS))
        self.expected = encoded(table, self.schema)
        items, old = {row["item"]: row for row in ITEMS}, values_of(folder / "dataset", "old")
        brands = values_of(folder / "dataset", "brands")
        shows = _shows()
        self.raw: list[dict[str, Any]] = []
        for number, row in enumerate(table.to_pylist()):
            raw = raw_row(number)
            item = items.get(raw["item"].strip(), {})
            past = {
                "shows": shows[number], "ctr": row["ctr"], "spent": None if row["spent_missing"] else row["spent"],
                "clicked": [old[each] for each in row["clicked"]], "brands": [brands[each] for each in row["brands"]],
            }  # fmt: skip
            self.raw.append(raw | {f"item_{c}": item.get(c) for c in ("brand", "cost", "tags")} | past)

    def typed(self) -> list[dict[str, Any]]:
        """The rows with numbers, lists and None in place of texts."""
        return [typed_row(row) for row in self.raw]


def _shows() -> list[int | None]:
    """How many earlier rows each row's user has."""
    seen: dict[str, int] = {}
    found: list[int | None] = []
    for number in range(ROWS):
        user = raw_row(number)["user"]
        found.append(None if user == "NA" else seen.get(user, 0))
        seen[user] = seen.get(user, 0) + 1
    return found


def typed_row(row: dict[str, Any]) -> dict[str, Any]:
    found = dict(row)
    for name, kind in NUMBERS.items():
        text = row[name]
        missing = text in ("", "NaN", None)
        found[name] = None if missing else int(text, 16) if text.startswith("0x") else kind(text)
    for name, separator in LISTS.items():
        items = row[name].split(separator) if row[name] else None
        found[name] = [float(x) for x in items] if items and name == "picture" else items
    return {name: value for name, value in found.items() if value is not None or name in PAST}


def arrow(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of columns of types of their own."""
    return pa.table(
        {name: pa.array([row.get(name) for row in rows]) for name in dict.fromkeys(k for row in rows for k in row)}
    )


def same(left: Encoded, right: Encoded) -> bool:
    """Whether encoded rows are the same, bit for bit."""
    return (
        left.id_BF.equal(right.id_BF)
        and left.dense_BD.equal(right.dense_BD)
        and left.lists.keys() == right.lists.keys()
        and all(
            a.equal(b)
            for name in left.lists
            for a, b in zip(lists_of(left.lists[name]), lists_of(right.lists[name]), strict=True)
        )
    )


def lists_of(found: Lists) -> list[Tensor]:
    """The ids of each row."""
    lists = found.id_V.split(found.length_R.tolist())
    rows = [1] * len(lists) if found.rows_R is None else found.rows_R.tolist()
    return [ids for ids, times in zip(lists, rows, strict=True) for _ in range(times)]
