"""Side tables: the row of a key, or its version at a time, for each impression, without a loop over rows.

Only lookups travel: the distinct keys of a block of impressions, with versions the distinct keys and times. A hot key is one
lookup, and its texts are in memory once however many rows have it.
"""

# Shapes: B impressions, Q lookups, R rows of a table as read, V its rows without duplicates, K its keys.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.hashing import hash_strings
from features.join.places import Places
from features.kinds.canonical import as_ids
from features.kinds.values import as_lists

KEY, TIME, ROWS, VALID_FROM = "__key", "__time", "__rows", "__valid_from"  # columns of lookups and of tables
NEVER = np.iinfo(np.int64).min  # before any version
MAX_BYTES = 2 << 30  # that the texts looked up for one block of rows may have
SKETCH = 64  # smallest hashes of unmatched keys, from which their number is estimated
SKETCH_SEED = 23
LOOK_UP_STATUSES = ("matched", "unmatched", "early")


@dataclass(frozen=True)
class Lookups:
    """The lookups of a block of impressions in a table.

    Attributes:
        distinct: [Q] KEY, ROWS (how many rows have it), and TIME for a table with versions; no two are equal.
        lookup_B: the lookup of each row, -1 where its key is missing.
    """

    distinct: pa.Table
    lookup_B: np.ndarray


def lookups(keys: pa.Array, time_B: np.ndarray | None) -> Lookups:
    """The lookups of B impressions.

    Args:
        keys: B texts as codes into distinct ones, see `canonical_codes`.
        time_B: seconds, NEVER where it is missing; None: the table has no versions.
    """
    code_B = keys.indices.fill_null(-1).to_numpy()
    present = np.flatnonzero(code_B >= 0)
    number_B, times = code_B[present].astype(np.int64), np.zeros(1, np.int64)
    if time_B is not None:
        times, rank = np.unique(time_B[present], return_inverse=True)
        number_B = number_B * len(times) + rank
    number_Q, lookup, rows_Q = np.unique(number_B, return_inverse=True, return_counts=True)
    columns = {KEY: keys.dictionary.take(pa.array(number_Q // max(len(times), 1))), ROWS: pa.array(rows_Q)}
    if time_B is not None:
        columns[TIME] = pa.array(times[number_Q % max(len(times), 1)])
    lookup_B = np.full(len(code_B), -1)
    lookup_B[present] = lookup
    return Lookups(pa.table(columns), lookup_B)


def canonical_codes(values: pa.Array, where: str) -> pa.DictionaryArray:
    """Keys as codes into their distinct canonical texts, by which both sides compare.

    Raises:
        UserError: naming `where`, for a number that is not whole.
    """
    codes = as_ids(values, where)
    texts = codes.dictionary.dictionary_encode()
    return pa.DictionaryArray.from_arrays(texts.indices.take(codes.indices), texts.dictionary)


@dataclass(frozen=True)
class Found:
    """What lookups find in a table.

    Attributes:
        row_Q: index of the row of `SideTableIndex.values` for each lookup, -1 without one.
        statuses: impressions by what became of their key: matched, unmatched (no such key, or not in the snapshot of the
            time), early (before the first version or snapshot).
        sketch: smallest hashes of the distinct unmatched keys (see `distinct_keys`).
    """

    row_Q: np.ndarray
    statuses: dict[str, int]
    sketch: list[int]


class SideTableIndex:
    """The rows of a table by key, and within a key by the time from which they are valid.

    Of rows of one key (and time) the last one read counts, the others are duplicates.

    Args:
        rows: [R] KEY, VALID_FROM where rows have versions, and other columns, in the order in which they were read.
        snapshots: times at which whole tables begin: a row is valid up to the next snapshot only. None: up to its key's next
            version.

    Attributes:
        values: [V] the other columns.
        keys, duplicates: distinct keys, and rows that a later one replaces.
    """

    def __init__(self, rows: pa.Table, snapshots: Sequence[int] | None = None) -> None:
        codes = rows[KEY].combine_chunks().dictionary_encode()
        key_R, self.texts = codes.indices.to_numpy(), codes.dictionary
        versioned = VALID_FROM in rows.column_names
        from_R = rows[VALID_FROM].to_numpy() if versioned else np.full(len(key_R), NEVER)
        order_R = Places(key_R.astype(np.int64), from_R).order_E
        key, start = key_R[order_R], from_R[order_R]
        last = np.append((key[1:] != key[:-1]) | (start[1:] != start[:-1]), np.ones(min(len(key), 1), bool))
        self.from_V = start[last]
        self.places = Places(key[last].astype(np.int64), self.from_V)
        self.values = rows.drop_columns([KEY, *([VALID_FROM] if versioned else [])]).take(pa.array(order_R[last]))
        self.keys, self.duplicates = len(self.texts), int(len(key_R) - last.sum())
        self.snapshots = None if snapshots is None else np.unique(np.array(snapshots, np.int64))

    def find(self, lookups: pa.Table) -> Found:
        """The rows of lookups (see Lookups.distinct; without TIME all versions are valid)."""
        keys = lookups[KEY].combine_chunks()
        key_Q = pc.index_in(keys, value_set=self.texts).fill_null(-1).to_numpy().astype(np.int64)
        time_Q = (
            lookups[TIME].to_numpy() if TIME in lookups.column_names else np.full(len(keys), np.iinfo(np.int64).max)
        )
        stop_Q = self.places.of(key_Q, time_Q, "right")
        row_Q = np.where(stop_Q > self.places.first(key_Q), stop_Q - 1, -1)
        unmatched_Q, early_Q = key_Q < 0, (key_Q >= 0) & (row_Q < 0)
        if self.snapshots is not None:
            place_Q = np.searchsorted(self.snapshots, time_Q, side="right") - 1
            early_Q = place_Q < 0
            current_Q = np.append(self.snapshots, NEVER)[place_Q]
            row_Q = np.where(np.append(self.from_V, NEVER)[row_Q] == current_Q, row_Q, -1)
            unmatched_Q = ~early_Q & (row_Q < 0)
        rows_Q = lookups[ROWS].to_numpy()
        counts = [int(rows_Q[which].sum()) for which in (row_Q >= 0, unmatched_Q, early_Q)]
        hashes = np.unique(hash_strings(keys.filter(pa.array(unmatched_Q)), SKETCH_SEED))[:SKETCH]
        return Found(row_Q, dict(zip(LOOK_UP_STATUSES, counts, strict=True)), hashes.tolist())


def merged_sketch(sketches: Sequence[Sequence[int]]) -> list[int]:
    """The sketch of all keys together."""
    return sorted({each for sketch in sketches for each in sketch})[:SKETCH]


def distinct_keys(sketch: Sequence[int]) -> int:
    """Distinct keys by their sketch: exact below SKETCH, else an estimate with a standard error of 1 in 8.

    (SKETCH - 1) / u for the SKETCH-th smallest of hashes in [0, 1) (Bar-Yossef et al. 2002, algorithm 1, unbiased form).
    """
    return len(sketch) if len(sketch) < SKETCH else round((SKETCH - 1) * 2.0**64 / sketch[-1])


def take(values: pa.Table, row: np.ndarray, name: str) -> pa.Table:
    """Rows of a table, nulls for -1. Raises UserError where texts are too large, naming table `name`."""
    index = pa.array(row, mask=row < 0)
    for column in values.column_names:
        _check_bytes(name, column, values[column].combine_chunks(), row)
    return values.take(index)


def spread(results: pa.Table, lookup_B: np.ndarray, name: str) -> dict[str, pa.Array]:
    """The results for each of B rows: texts as codes into those of the lookups.

    Raises:
        UserError: texts are too large for what reads them, naming table `name`.
    """
    found: dict[str, pa.Array] = {}
    index = pa.array(lookup_B.astype(np.int32), mask=lookup_B < 0)
    for column in results.column_names:
        values = results[column].combine_chunks()
        _check_bytes(name, column, values, lookup_B)
        if pa.types.is_large_string(values.type):
            missing_B = (lookup_B < 0) | np.append(values.is_null().to_numpy(False), True)[lookup_B]
            codes = pa.array(np.where(missing_B, 0, lookup_B).astype(np.int32), mask=missing_B)
            found[f"{name}_{column}"] = pa.DictionaryArray.from_arrays(codes, values)
        else:
            found[f"{name}_{column}"] = values.take(index)
    return found


def same_types(tables: Sequence[pa.Table], separators: dict[str, str]) -> pa.Table:
    """Parts of a table as one: where some hold lists and others text, as JSON lines may, lists.

    Args:
        separators: of the items of texts, by column.
    """
    for column in tables[0].column_names:
        if len({table.schema.field(column).type for table in tables}) > 1:
            split = [as_lists(table[column].combine_chunks(), separators.get(column, "|")) for table in tables]
            place = tables[0].column_names.index(column)
            tables = [t.set_column(place, column, lists) for t, lists in zip(tables, split, strict=True)]
    return pa.concat_tables(tables)


def _check_bytes(name: str, column: str, values: pa.Array, row: np.ndarray) -> None:
    """Raises UserError where the texts of these rows (-1: none) are too large to be in memory."""
    if not (pa.types.is_large_string(values.type) or pa.types.is_large_list(values.type)):
        return
    if pa.types.is_large_list(values.type):
        ends = np.append(0, np.cumsum(pc.binary_length(values.values).fill_null(0).to_numpy(), dtype=np.int64))
        offsets = values.offsets.to_numpy()
        bytes_V = ends[offsets[1:]] - ends[offsets[:-1]] + 16 * np.diff(offsets)
    else:
        bytes_V = pc.binary_length(values).fill_null(0).to_numpy()
    size = int(np.append(bytes_V, 0)[row].sum())
    if size > MAX_BYTES:
        raise UserError(
            f"source.tables.{name}: column {column} has {size:,} bytes for one block of rows, more than {MAX_BYTES:,}: leave "
            "it out, shorten it, or set a lower unit_bytes="
        )
