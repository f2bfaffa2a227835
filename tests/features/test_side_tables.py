"""Looking up rows of side tables against dictionaries and bisect, one key at a time."""

import bisect
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.join import side_tables as s

KEYS = st.sampled_from(["a", "b", "c", "", "ä", "d"])
TIMES = st.integers(-3, 6)
ROWS = st.lists(st.tuples(KEYS, TIMES, st.sampled_from([None, "x", "y", ""]), st.integers(0, 9)), max_size=20)
LOOKUPS = st.lists(st.tuples(st.none() | KEYS, st.none() | TIMES), max_size=30)

Row = tuple[str, int, str | None, int]


def table_of(rows: list[Row], versioned: bool) -> pa.Table:
    keys, starts, names, numbers = zip(*rows, strict=True) if rows else ((), (), (), ())
    found = {s.KEY: pa.array(keys, pa.large_string()), s.VALID_FROM: pa.array(starts, pa.int64())}
    found |= {"name": pa.array(names, pa.large_string()), "number": pa.array(numbers, pa.int64())}
    lists = [[str(number)] * (number % 3) for number in numbers]
    table = pa.table(found | {"items": pa.array(lists, pa.large_list(pa.large_string()))})
    return table if versioned else table.drop_columns([s.VALID_FROM])


def looked_up(
    rows: list[Row], wanted: list[tuple[str | None, int | None]], kind: str, snapshots: list[int]
) -> tuple[list[dict[str, Any]], dict[str, int], int]:
    """What this package finds: the columns of each impression, statuses, and the number of unmatched keys."""
    versioned = kind != "latest"
    index = s.SideTableIndex(table_of(rows, versioned), snapshots if kind == "snapshots" else None)
    times = np.array([s.NEVER if time is None else time for _, time in wanted], np.int64)
    codes = s.canonical_codes(pa.array([key for key, _ in wanted], pa.string()), "here")
    lookups = s.lookups(codes, times if versioned else None)
    found = index.find(lookups.distinct)
    columns = s.spread(s.take(index.values, found.row_Q, "t"), lookups.lookup_B, "t")
    return pa.table(columns).to_pylist() if wanted else [], found.statuses, s.distinct_keys(found.sketch)


def one_by_one(
    rows: list[Row], wanted: list[tuple[str | None, int | None]], kind: str, snapshots: list[int]
) -> tuple[list[dict[str, Any]], dict[str, int], int]:
    """The same by dictionaries: key to time to the last row."""
    nothing = {"t_name": None, "t_number": None, "t_items": None}
    table: dict[str, dict[int, Row]] = {}
    for row in rows:
        table.setdefault(row[0], {})[0 if kind == "latest" else row[1]] = row
    found, statuses, unmatched = [], dict.fromkeys(("matched", "unmatched", "early"), 0), set()
    for key, time in wanted:
        if key is None:
            found.append(nothing)
            continue
        versions = table.get(key, {})
        began = sorted(snapshots) if kind == "snapshots" else sorted(versions)
        place = 1 if kind == "latest" else 0 if time is None else bisect.bisect_right(began, time)
        row = versions.get(began[place - 1]) if place and began else None
        early = not place and (bool(versions) or kind == "snapshots")
        status = "matched" if row is not None else "early" if early else "unmatched"
        unmatched |= {key} if status == "unmatched" else set()
        statuses[status] += 1
        items = None if row is None else [str(row[3])] * (row[3] % 3)
        found.append(nothing if row is None else {"t_name": row[2], "t_number": row[3], "t_items": items})
    return found, statuses, len(unmatched)


@pytest.mark.parametrize("kind", ["latest", "versions", "snapshots"])
@given(rows=ROWS, wanted=LOOKUPS, more=st.lists(TIMES, max_size=2))
@settings(max_examples=examples(60), deadline=None, derandomize=True)
def test_every_row_finds_what_dictionaries_hold_for_its_key_and_time(
    kind: str, rows: list[Row], wanted: list[tuple[str | None, int | None]], more: list[int]
) -> None:
    snapshots = sorted({row[1] for row in rows} | set(more))  # one may have no rows
    assert looked_up(rows, wanted, kind, snapshots) == one_by_one(rows, wanted, kind, snapshots)


@given(rows=ROWS)
@settings(max_examples=examples(30), deadline=None, derandomize=True)
def test_rows_that_a_later_one_replaces_are_counted(rows: list[Row]) -> None:
    for versioned in (False, True):
        index = s.SideTableIndex(table_of(rows, versioned))
        distinct = {row[:2] if versioned else row[:1] for row in rows}
        assert (index.keys, index.duplicates) == (len({row[0] for row in rows}), len(rows) - len(distinct))


def test_a_hot_key_is_one_lookup_and_its_text_is_held_once() -> None:
    keys = s.canonical_codes(pa.array(["hot"] * 1000 + ["cold", None]), "here")
    lookups = s.lookups(keys, None)
    assert lookups.distinct.to_pydict() == {s.KEY: ["hot", "cold"], s.ROWS: [1000, 1]}
    index = s.SideTableIndex(table_of([("hot", 0, "x" * 1000, 1)], False))
    found = s.spread(s.take(index.values, index.find(lookups.distinct).row_Q, "t"), lookups.lookup_B, "t")
    assert found["t_name"].nbytes < 10_000


def test_dictionaries_may_hold_values_that_no_row_has() -> None:
    codes = pa.DictionaryArray.from_arrays(pa.array([2, None, 2], pa.int32()), pa.array(["a", None, "c"]))
    assert s.lookups(s.canonical_codes(codes, "here"), None).distinct.to_pydict() == {s.KEY: ["c"], s.ROWS: [2]}


def test_a_row_without_a_text_has_no_code() -> None:
    results = pa.table({"name": pa.array(["x", None], pa.large_string())})
    found = s.spread(results, np.array([1, 0, -1]), "t")["t_name"]
    assert found.indices.to_pylist() == [None, 0, None]  # a null among the codes' values counts as a value


@pytest.mark.parametrize("count", [0, 1, 63, 64, 5_000, 100_000])
def test_unmatched_keys_are_counted_exactly_up_to_63_and_estimated_beyond(count: int) -> None:
    index, keys = s.SideTableIndex(table_of([], False)), pa.array([f"k{i}" for i in range(count)], pa.large_string())
    halves = [keys.slice(0, count // 2 + count % 2), keys.slice(count // 3)]  # they overlap
    sketches = [index.find(s.lookups(s.canonical_codes(half, "here"), None).distinct).sketch for half in halves]
    estimate = s.distinct_keys(s.merged_sketch(sketches))
    assert estimate == count if count < 64 else abs(estimate / count - 1) < 0.4


@pytest.mark.parametrize("columns", ["name", "items"])
def test_texts_that_would_not_fit_into_memory_stop_the_job_with_a_line_that_says_what_to_do(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = s.SideTableIndex(table_of([("hot", 0, "x" * 100, 8)], False))
    lookups = s.lookups(s.canonical_codes(pa.array(["hot"] * 50 + ["cold"]), "here"), None)
    results = s.take(index.values.select([columns]), index.find(lookups.distinct).row_Q, "t")
    size = 50 * (100 if columns == "name" else 2 + 2 * 16)
    monkeypatch.setattr(s, "MAX_BYTES", size)
    s.spread(results, lookups.lookup_B, "t")
    monkeypatch.setattr(s, "MAX_BYTES", size - 1)
    with pytest.raises(UserError, match=rf"source.tables.t: column {columns} has {size:,} bytes .* lower unit_bytes="):
        s.spread(results, lookups.lookup_B, "t")


def test_parts_of_a_table_that_hold_lists_and_text_become_lists() -> None:
    text = pa.table({"items": pa.array(["a,b", None, ""], pa.large_string()), "n": [1, 2, 3]})
    lists = pa.table({"items": pa.array([["c"], None], pa.large_list(pa.large_string())), "n": [4, 5]})
    both = s.same_types([text, lists], {"items": ","})
    assert both.to_pydict() == {"items": [["a", "b"], None, [""], ["c"], None], "n": [1, 2, 3, 4, 5]}
    assert s.same_types([text, text], {"items": ","})["items"].type == pa.large_string()


def test_keys_compare_by_one_text_whatever_holds_them() -> None:
    holders = [pa.array([7, None]), pa.array([7.0, None]), pa.array([7.0, float("nan")], pa.float32())]
    holders += [pa.array(["7", None]), pa.array(["7.0", None]), pa.array([7, None], pa.decimal128(9, 2))]
    for held in [*holders, *(h.dictionary_encode() for h in holders if not pa.types.is_decimal(h.type))]:
        assert s.canonical_codes(held, "here").to_pylist() == ["7", None]
    assert s.canonical_codes(pa.array(["7.0", "x", "7"]), "here").dictionary.to_pylist() == ["7", "x"]


def test_keys_that_are_fractions_are_refused() -> None:
    with pytest.raises(UserError, match=r"here holds 0.5, which is no id"):
        s.canonical_codes(pa.array([0.5]), "here")
