"""A log of three days with values of every type to slice by, and what is kept of it, for tests of evaluation."""

import csv
import datetime
from pathlib import Path
from typing import Any

import numpy as np

START = int(datetime.datetime(2026, 11, 6, 22, tzinfo=datetime.timezone.utc).timestamp())
# The value `missing` is not a missing one; others would break a list of names.
DEVICES = ["mobile", "desktop", "missing", "tv, country=DE", 'the "box"', "a=b", ""]
CONTENT: dict[str, Any] = {
    "source": {
        "files": "log-*.csv", "row_id": "id", "key": "id", "types": {"position": "int", "signup": "time"},
        "derived": {"cheap": "price < 5"},
        "tables": {"who": {"files": "users.csv", "key": "user", "by": "user", "columns": {"country": "string", "age": "int"}}},
    },
    "dense": {
        "price": {"transform": "log1p"},
        "age": {"column": "who_age", "missing_flag": True},
        "plain": {"column": "price", "standardize": False},
    },
    "categorical": {
        "user_id": {"column": "user"}, "city": {"vocabulary": {"min_count": 20, "unknown": 3}},
        "hashed": {"column": "city", "hash": 7},
        "price_bin": {"column": "price", "bins": 4},
    },
    "tasks": {
        "click": {"kind": "binary", "label": "click = '1'"},
        "buy": {"kind": "binary", "label": "buy = '1'", "observed_when": "click = '1'"},
        "spend": {"kind": "regression", "label": "CAST(spend AS DOUBLE)"},
    },
    "weight": "CASE WHEN position = 3 THEN 2 WHEN id % 10 = 3 THEN 0 ELSE 1 END",
    "event_time": "at",
    "split": {"by": "hash", "key": "id", "valid": 0.1, "test": 0.5},
    "keep": ["user", "device", "position", "price", "signup", "who_country", "who_age", "cheap", "at", "session"],
}  # fmt: skip


def rows_of_log(count: int = 1500, seed: int = 0) -> list[dict[str, str]]:
    """Rows as they are in the log: every column but id, at, spend and the labels has missing values."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        user, price = int(rng.zipf(1.6)) % 90, round(float(rng.exponential(8)), 2)
        click = rng.random() < 0.45 - 0.03 * (number % 7)
        rows.append(
            {
                "id": str(number * 7),
                "at": str(START + number * 86_400 // 600),
                "user": "" if rng.random() < 0.1 else f"u{user}",
                "session": "" if rng.random() < 0.1 else str(number // 5),
                "device": DEVICES[min(int(rng.exponential(1.6)), len(DEVICES) - 1)],
                "position": "" if number % 13 == 0 else str(number % 7),
                "price": "" if rng.random() < 0.1 else str(price),
                "signup": "" if user % 5 == 0 else str(START - 86_400 * (user % 4)),
                "city": ["Köln", "Paris, France", "", "Oslo", f"place {number % 50}"][
                    min(int(rng.exponential(1.5)), 4)
                ],
                "click": str(int(click)),
                "buy": str(int(rng.random() < 0.3)),
                "spend": str(round(float(rng.gamma(2) + click), 3)),
            }
        )
    return rows


def write_log(folder: Path) -> list[dict[str, str]]:
    """Writes the log and its side table; its rows."""
    rows = rows_of_log()
    users = [
        {"user": f"u{n}", "country": ["DE", "US", ""][n % 3], "age": str(15 + n % 50)} for n in range(0, 90) if n % 4
    ]
    for name, content in (("log-1.csv", rows[:700]), ("log-2.csv", rows[700:]), ("users.csv", users)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    return rows
