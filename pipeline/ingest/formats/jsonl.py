"""JSON lines: every line an object, whose keys may be absent."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import polars as pl
import pyarrow as pa

from features.errors import one_line
from features.parse.convert import LIST, TEXT
from features.source import RawType
from pipeline.ingest.files import RawFile, Unit
from pipeline.ingest.formats.base import Block, OnBytes, RawFormat, Wanted
from pipeline.ingest.formats.json_doubts import DoubtfulLines
from pipeline.ingest.formats.lines import line_blocks
from pipeline.ingest.formats.text import NOT_UTF8, byte_ranges, head_of

UNREADABLE = "not JSON that can be read"
INTEGER_DIGITS = 40  # and the sign; the reader's integers end at 2 ** 128, which has 39


class JsonLines(RawFormat):
    """A JSON object a line."""

    def column_names(self, file: RawFile) -> None:
        """See RawFormat: none, since every object has keys of its own."""
        head_of(file)

    def units(self, file: RawFile, number: int, unit_bytes: int, whole: bool) -> list[Unit]:
        """See RawFormat."""
        return byte_ranges(file, number, unit_bytes, whole)

    def read(self, unit: Unit, wanted: Wanted, on_bytes: OnBytes) -> Iterator[Block]:
        """See RawFormat."""
        return line_blocks(
            unit, JsonParser(wanted.types, wanted.lists, wanted.ids), False, self.options.max_line_bytes, on_bytes
        )


class JsonParser:
    """Lines that are JSON objects."""

    spaces = b" \t\r"

    def __init__(self, types: Mapping[str, RawType], lists: Mapping[str, str], ids: Collection[str]) -> None:
        """`lists` are the columns that may hold arrays, with the separator of items where they hold text; ids: see Wanted."""
        self.columns, self.lists = list(types), {c: s for c, s in lists.items() if c in types}
        self.as_text = False  # whether a value of `lists` was no array
        self.doubtful = DoubtfulLines(self.columns, ids, self.lists)

    def table(self, data: bytes, rows: int) -> pa.Table | None:
        """See LineParser."""
        frame = self._read(data)
        if frame is None or frame.height != rows:
            return None
        if self.as_text:
            frame = frame.with_columns(_lists_of_text(frame[c], separator) for c, separator in self.lists.items())
        table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
        kinds = {c: LIST if frame.schema[c] == pl.List else TEXT for c in self.columns}
        table = table.cast(pa.schema(kinds.items()))
        return None if self.doubtful.any_fault(data, table, self.spaces) else table

    def faults(self, lines: Sequence[bytes]) -> dict[int, str]:
        """See LineParser."""
        found = {
            i: reason for i, line in enumerate(lines) if (reason := _json_fault(line) or self.doubtful.fault(line))
        }
        return found | self._refused(lines, [i for i in range(len(lines)) if i not in found])

    def _refused(self, lines: Sequence[bytes], among: Sequence[int]) -> dict[int, str]:
        """Those of the lines at the indices `among` that the reader refuses, found by halving them."""
        frame = self._read(b"".join(lines[i] + b"\n" for i in among))
        if frame is not None and frame.height == len(among):
            return {}
        if len(among) == 1:
            return {among[0]: UNREADABLE}
        middle = len(among) // 2
        return self._refused(lines, among[:middle]) | self._refused(lines, among[middle:])

    def _read(self, data: bytes) -> pl.DataFrame | None:
        for as_text in [True] if self.as_text or not self.lists else [False, True]:
            kind = pl.String() if as_text else pl.List(pl.String)
            schema = {c: kind if c in self.lists else pl.String() for c in self.columns}
            try:
                frame = pl.read_ndjson(data, schema=schema)
            except pl.exceptions.PolarsError:
                continue
            self.as_text = as_text
            return frame
        return None


def _json_fault(line: bytes) -> str | None:
    """The reason why a line is no JSON object; some of what only the reader refuses is found by `_refused`."""
    try:
        found = json.loads(line, parse_constant=_no_number, parse_int=_integer, parse_float=_finite)
        return None if isinstance(found, dict) else "no JSON object"
    except UnicodeDecodeError:
        return NOT_UTF8
    except _UnreadableError:
        return UNREADABLE
    except (ValueError, RecursionError) as error:
        return f"not JSON: {one_line(error)}"


class _UnreadableError(Exception):
    """A number that Python reads and the reader does not, which would take long to find among many lines."""


def _no_number(_: str) -> float:
    raise _UnreadableError


def _integer(text: str) -> int:
    if len(text) > INTEGER_DIGITS:
        raise _UnreadableError
    return 0


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise _UnreadableError
    return 0.0


def _lists_of_text(texts: pl.Series, separator: str) -> pl.Series:
    """JSON arrays that were read as text, as lists, and so the texts beside them; where there are no arrays, the text."""
    array = texts.str.starts_with("[").fill_null(False)
    if not array.any():
        return texts
    column, kind = pl.col(texts.name), pl.List(pl.String)
    items = pl.when(array).then(column).str.json_decode(kind)
    try:
        return texts.to_frame().select(pl.when(array).then(items).otherwise(column.str.split(separator))).to_series()
    except pl.exceptions.PolarsError:  # a text that only begins as an array does
        return pl.Series(texts.name, [None if t is None else _items(t, separator) for t in texts], kind)


def _items(text: str, separator: str) -> Sequence[str | None]:
    if text.startswith("["):
        try:
            return pl.Series([text]).str.json_decode(pl.List(pl.String))[0].to_list()
        except pl.exceptions.PolarsError:
            pass
    return text.split(separator)
