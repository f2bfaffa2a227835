"""Which split a row belongs to, against the hash in plain integers, remainders and datetime."""

from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hashing import plain_hash
from test_raw import parsed, schema, typed

from features.parse.raw import HASH_SPLIT_SEED, LINE, ROW, SPLIT, parse
from features.schema.schema import SPLITS


def test_a_hash_split_sends_a_key_to_one_split_by_its_text_alone():
    s = schema(split={"by": "hash", "key": "k", "valid": 0.2, "test": 0.3})
    keys = [f"user {i % 5000}" for i in range(12_000)]
    found = parsed(s, k=keys, x=[str(i) for i in range(12_000)]).rows[SPLIT].to_pylist()
    share = {k: plain_hash(k, HASH_SPLIT_SEED) / 2**64 for k in keys}
    assert found == [2 if share[k] < 0.3 else 1 if share[k] < 0.5 else 0 for k in keys]
    rate = np.bincount(found[:5000]) / 5000
    assert np.abs(rate - [0.5, 0.2, 0.3]).max() < 0.03
    assert parsed(s, k=keys[100:90:-1]).rows[SPLIT].to_pylist() == found[100:90:-1]


@pytest.mark.parametrize("use", ["text", "id", "number", "derived"])
def test_a_hash_split_is_the_same_whatever_else_its_column_is_used_for(use):
    """A number is hashed as the text of its value."""
    changes: dict[str, Any] = {
        "text": {},
        "id": {"categorical": {"k": {}}},
        "number": {"source": {"files": "x", "types": {"k": "int"}}},
        "derived": {"source": {"files": "x", "derived": {"d": "k || ''"}}},
    }[use]
    s = schema(split={"by": "hash", "key": "d" if use == "derived" else "k", "valid": 0.3, "test": 0.3}, **changes)
    keys = [str(i % 40) for i in range(100)]
    share = [plain_hash(k, HASH_SPLIT_SEED) / 2**64 for k in keys]
    assert parsed(s, k=keys).rows[SPLIT].to_pylist() == [2 if v < 0.3 else 1 if v < 0.6 else 0 for v in share]


@settings(max_examples=examples(50), deadline=None)
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 30), st.randoms(use_true_random=False))
def test_a_row_index_split_goes_on_over_blocks_and_bad_rows(modulo, first, height, random):
    names = {remainder: random.choice(SPLITS) for remainder in range(modulo)}
    remainders = {name: [r for r, n in names.items() if n == name] for name in SPLITS}
    s = schema(split={"by": "row_index", "modulo": modulo, **remainders})
    x = [random.choice(["1", "zz"]) for _ in range(height)]
    cells = typed(s, {"x": pa.array(x, pa.string()), "y": pa.array(["1"] * height, pa.string())}, row=first)
    good = [first + i for i in range(height) if x[i] == "1"]
    assert cells.rows[ROW].to_pylist() == good
    assert cells.rows[LINE].to_pylist() == [3 + 2 * place for place in good]
    assert parse(s, cells.rows, 0).rows[SPLIT].to_pylist() == [SPLITS.index(names[place % modulo]) for place in good]


@pytest.mark.parametrize("zone", ["", "+00:00", "+02:00", "-09:30"])
def test_a_split_by_time_is_by_the_moment_in_its_zone_whatever_the_machines(zone, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    s = schema(
        event_time="at",
        split={"by": "time", "valid_from": f"2026-11-07T00:00:00{zone}", "test_from": f"2026-11-08T12:00:00.5{zone}"},
    )
    sign, hours, minutes = (zone[0], *map(int, zone[1:].split(":"))) if zone else ("+", 0, 0)
    offset = timedelta(hours=hours, minutes=minutes) * (1 if sign == "+" else -1)
    valid_from = int((datetime(2026, 11, 7, tzinfo=timezone.utc) - offset).timestamp())
    test_from = int((datetime(2026, 11, 8, 12, tzinfo=timezone.utc) - offset).timestamp())  # and half a second
    times = [valid_from - 1, valid_from, test_from, test_from + 1]
    assert parsed(s, at=list(map(str, times))).rows[SPLIT].to_pylist() == [0, 1, 1, 2]
    written = [
        f"2026-11-06T23:59:59{zone}",
        f"2026-11-07{zone}",
        f"2026-11-08 12:00{zone}",
        f"2026-11-08 12:00:01{zone}",
    ]
    assert parsed(s, at=written).rows[SPLIT].to_pylist() == [0, 1, 1, 2]
