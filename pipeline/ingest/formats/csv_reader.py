"""Text of CSV, whole good rows, as columns."""

import csv
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from features.kinds.values import MISSING_MARKERS
from features.parse.convert import TEXT
from features.source import Format, RawType
from features.time_units import is_format
from pipeline.ingest.files import BOM
from pipeline.ingest.formats.csv_rows import columns_fault
from pipeline.ingest.formats.text import NOT_UTF8, is_utf8


def reader_options(options: Format) -> dict[str, Any]:
    """Keyword arguments of Python's csv.reader."""
    quotes = {"quotechar": options.quote} if options.quote else {"quoting": csv.QUOTE_NONE}
    return {"delimiter": options.delimiter, **quotes}


class CsvReader:
    """Reads rows whose quotes are closed."""

    def __init__(self, options: Format, names: Sequence[str], types: Mapping[str, RawType]) -> None:
        """`names` are the file's columns, `types` those that are wanted, in order."""
        self.options, self.names, self.columns = options, list(names), list(types)
        formatted = {c for c, unit in options.times.items() if is_format(unit)}  # 01022026 is no number there
        numeric = {c: t for c, t in types.items() if t != "string" and c not in formatted}
        self.numbers = {c: pa.float64() if t == "float" else pa.int64() for c, t in numeric.items()}
        if options.trim and any(_is_number(text) for text in options.missing):
            self.numbers = {}  # the reader would take " -1" for a number where "-1" is missing

    def table(self, data: bytes, rows: int) -> pa.Table | None:
        """The rows of `data`; None where they are not `rows` good ones.

        A column with another value than numbers is read as text from then on.
        """
        try:
            table = self._read(data, self.numbers)
        except pa.ArrowInvalid:
            try:
                table = self._read(data, {})
            except pa.ArrowInvalid:
                return None
            if table.num_rows == rows:
                self.numbers = {c: t for c, t in self.numbers.items() if self._casts(table[c], t)}
        return table if table.num_rows == rows else None

    def faults(self, rows: Sequence[bytes]) -> dict[int, str]:
        """The reasons why rows, given without their line end, are bad, by index: not UTF-8, or the number of columns."""
        found = {i: reason for i, row in enumerate(rows) if not is_utf8(row) and (reason := self._text_fault(row))}
        rest = [i for i in range(len(rows)) if i not in found and is_utf8(rows[i])]

        def add_fault(row: pcsv.InvalidRow) -> str:
            found[rest[row.number - 1]] = columns_fault(row.actual_columns, row.expected_columns)
            return "skip"

        self._convert(b"".join(rows[i] + b"\n" for i in rest), {}, self.columns, add_fault)
        return found

    def _text_fault(self, row: bytes) -> str | None:
        """The reason why a row that is not UTF-8 is bad; None where only values that are not wanted are not."""
        try:
            values = next(csv.reader([row.decode(errors="surrogateescape")], **reader_options(self.options)))
        except csv.Error:  # a value that is too long for it
            return NOT_UTF8
        if len(values) != len(self.names):
            return columns_fault(len(values), len(self.names))
        wanted = "".join(value for name, value in zip(self.names, values, strict=True) if name in self.columns)
        return None if is_utf8(wanted.encode(errors="surrogateescape")) else NOT_UTF8

    def _read(self, data: bytes, numbers: Mapping[str, pa.DataType]) -> pa.Table:
        table = self._convert(data, numbers, self.columns)
        floats = [c for c, t in numbers.items() if t == pa.float64()]
        # So that messages show the text of the file.
        odd = [c for c in floats if not pc.all(pc.is_finite(table[c]), min_count=0).as_py()]
        if odd:
            again = self._convert(data, {}, odd)
            for column in odd:
                table = table.set_column(table.column_names.index(column), column, again[column])
        return table

    def _convert(
        self, data: bytes, numbers: Mapping[str, pa.DataType], columns: list[str], handler: Callable | None = None
    ) -> pa.Table:
        """The rows of `data`. Raises pa.ArrowInvalid."""
        wanted = {c: numbers.get(c, TEXT) for c in columns}
        if not data:
            return pa.table({c: pa.array([], kind) for c, kind in wanted.items()})
        # After a blank line a byte order mark is a character, as it is anywhere but at a file's beginning.
        data = b"\n" + data if data.startswith(BOM) else data
        return pcsv.read_csv(
            pa.BufferReader(data),
            pcsv.ReadOptions(column_names=self.names, use_threads=False, block_size=len(data) + 1),
            pcsv.ParseOptions(
                delimiter=self.options.delimiter, quote_char=self.options.quote or False, invalid_row_handler=handler
            ),
            pcsv.ConvertOptions(
                column_types=wanted,
                include_columns=columns,
                null_values=[*self.options.missing, *MISSING_MARKERS],  # of numbers only
                strings_can_be_null=False,
            ),
        )

    def _casts(self, texts: pa.ChunkedArray, kind: pa.DataType) -> bool:
        known = texts.filter(pc.invert(pc.is_in(texts, pa.array([*self.options.missing, *MISSING_MARKERS], TEXT))))
        try:
            pc.cast(known, kind)
        except pa.ArrowInvalid:
            return False
        return True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
