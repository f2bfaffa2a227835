"""JSON lines that the reader accepts and that are no rows: what makes a line doubtful, and whether it is one.

The reader takes half a character (an escape of a lone surrogate) for NUL, writes a list or an object where one value is needed
as its JSON, which would be an id, and of a key that stands twice takes the first value, where other readers take the last.
Most lines have nothing of the kind; those that may have are parsed again, by Python.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.printable import has_surrogates

SEARCHED_BYTES = 1 << 18  # of a block: one that is no larger is searched for keys that stand twice line by line
SAMPLE, SAMPLED_PART = 1000, 64  # lines of a larger block that are, and at most which part of it
HALF_CHARACTER = r"not text, but an escape of half a character such as \ud800"
_HIGH, _LOW = rb"[89abAB][0-9a-fA-F]{2}", rb"[c-fC-F][0-9a-fA-F]{2}"
# A half whose neighbour does not make it whole. In text that has a backslash before u, what is found is no escape.
_HALVES = [
    re.compile(rb"\\u%s(?:%s(?!\\u[dD]%s)|%s(?<!\\u[dD]%s\\u[dD]%s))" % (d, _HIGH, _LOW, _LOW, _HIGH, _LOW))
    for d in (b"d", b"D")
]


class DoubtfulLines:
    """The faults of lines that the reader accepts.

    A list, an object and half a character are found wherever they are. Keys that stand twice would need a second reading of all
    lines, so of a large block a sample is searched, and from the first find on every line: who writes a key twice mostly does
    so in every line. Even counting one name in a block takes 7% of the time that reading it takes, for every column.
    """

    def __init__(self, columns: Sequence[str], ids: Collection[str], lists: Mapping[str, str]) -> None:
        """`columns` are those that are read; ids, lists: see pipeline.ingest.formats.base.Wanted."""
        self.columns, self.ids = set(columns), [c for c in columns if c in ids]
        self.lists, self.found_twice = lists, False
        names = b"|".join(re.escape(json.dumps(c, ensure_ascii=False).encode()) for c in self.ids)
        self.nested = re.compile(rb"(?:%s)\s*:\s*[\[{]|\\u" % names)

    def any_fault(self, data: bytes, table: pa.Table, spaces: bytes) -> bool:
        """Whether a line of `data`, all of which the reader has accepted, is no row; `table` has the rows, blank lines none."""
        doubtful = (self._halves(data), self._nested(data, table, spaces), self._sample(data, table.num_rows))
        return any(line.strip(spaces) and self.fault(line) for lines in doubtful for line in lines)

    def fault(self, line: bytes) -> str | None:
        """The reason why a line is no row, among those that the reader does not see."""
        try:
            found = json.loads(line, object_pairs_hook=_Object, strict=False)
        except (ValueError, RecursionError):  # which the reader sees, too
            return None
        if b"\\u" in line and has_surrogates(json.dumps(found, ensure_ascii=False)):
            return HALF_CHARACTER
        if not isinstance(found, _Object):
            return None
        if twice := [name for name in found.twice if name in self.columns]:
            self.found_twice = True
            return f"key {twice[0]} stands twice"
        return next((reason for name in self.ids if (reason := self._several(name, found.get(name)))), None)

    def _several(self, name: str, value: Any) -> str | None:
        items = value if name in self.lists and isinstance(value, list) else [value]
        odd = next((item for item in items if isinstance(item, (list, dict))), None)
        if odd is None:
            return None
        what = "a list" if isinstance(odd, list) else "an object"
        return f"{name} holds {what} where one value is needed" + (" in a list" if items is value else "")

    def _halves(self, data: bytes) -> Iterator[bytes]:
        for start, pattern in zip((rb"\ud", rb"\uD"), _HALVES, strict=True):
            for match in pattern.finditer(data) if start in data else ():
                yield data[data.rfind(b"\n", 0, match.start()) + 1 : data.find(b"\n", match.end())]

    def _nested(self, data: bytes, table: pa.Table, spaces: bytes) -> Iterator[bytes]:
        """Lines with an id whose text begins as a list or object does."""
        row_N = np.unique(np.concatenate([[], *(_begins_nested(table[name]) for name in self.ids)])).astype(np.int64)
        if len(row_N):
            lines = [line for line in data.split(b"\n") if line.strip(spaces)]
            yield from (lines[row] for row in row_N if self.nested.search(lines[row]))

    def _sample(self, data: bytes, rows: int) -> Iterator[bytes]:
        """All lines of a small block, evenly spaced ones of a large one."""
        if self.found_twice or len(data) <= SEARCHED_BYTES:
            yield from data.split(b"\n")
            return
        for place in np.linspace(0, len(data) - 1, min(SAMPLE, 1 + rows // SAMPLED_PART), dtype=np.int64).tolist():
            start = data.rfind(b"\n", 0, place) + 1
            yield data[start : data.find(b"\n", start)]


class _Object(dict[str, Any]):
    """A JSON object, and which of its keys stand twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs) if len(self) < len(pairs) else Counter[str]()
        self.twice = [name for name, count in counts.items() if count > 1]


def _begins_nested(column: pa.ChunkedArray) -> np.ndarray:
    """The rows of a column in which a text, or one in a list, begins as JSON of a list or an object does."""
    values = column.combine_chunks()
    texts = values.flatten() if pa.types.is_list(values.type) else values
    begins = pc.or_(pc.starts_with(texts, "["), pc.starts_with(texts, "{"))
    place = np.flatnonzero(begins.fill_null(False).to_numpy(False))
    return pc.list_parent_indices(values).to_numpy()[place] if texts is not values else place
