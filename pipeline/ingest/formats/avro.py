"""Avro object container files: units are runs of blocks, and rows are numbered in their file.

fastavro decodes a record to a Python dictionary, so reading is slower than that of columnar formats. The records of each
Avro block become Arrow columns at once, and everything after is columnar.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import fastavro
import numpy as np
import pyarrow as pa
from fastavro.schema import expand_schema

from features.errors import UserError
from features.parse.convert import convert_columns
from features.source import RawType
from pipeline.ingest.files import BLOCK_BYTES, RawFile, Unit, open_raw, readable
from pipeline.ingest.formats.avro_limits import block_ends, check_blocks, check_schema
from pipeline.ingest.formats.base import Block, OnBytes, RawFormat, Wanted
from pipeline.ingest.formats.columns import type_names

HEADER_BYTES = 4 << 20  # that a header may have
BLOCK_ROWS = 1 << 17  # that are Python objects at a time
PRIMITIVES = {
    "null": pa.null(), "boolean": pa.bool_(), "int": pa.int32(), "long": pa.int64(), "float": pa.float32(),
    "double": pa.float64(), "bytes": pa.binary(), "fixed": pa.binary(), "string": pa.string(), "enum": pa.string(),
}  # fmt: skip
LOGICAL = {
    "date": pa.date32(),
    **{f"timestamp-{name}": pa.timestamp(unit, "UTC") for name, unit in (("millis", "ms"), ("micros", "us"), ("nanos", "ns"))},
    **{f"local-timestamp-{name}": pa.timestamp(unit) for name, unit in (("millis", "ms"), ("micros", "us"), ("nanos", "ns"))},
    "time-millis": pa.time32("ms"), "time-micros": pa.time64("us"),
}  # fmt: skip


class Avro(RawFormat):
    """Avro files of records; a unit is held in memory as it lies in the file, compressed by whatever codec it names."""

    def column_names(self, file: RawFile) -> list[str] | None:
        """See RawFormat."""
        with readable(file.path), open_raw(file.path) as raw:
            return list(_fields(file.path, _reader(raw)[0]))

    def units(self, file: RawFile, number: int, unit_bytes: int, whole: bool) -> list[Unit]:  # noqa: ARG002
        """See RawFormat. To cut a file the headers of its blocks are read, which have the number of rows in each."""
        if file.size <= unit_bytes:
            return [Unit(file, number)]
        found, start, first_row, rows = [], 0, 0, 0
        with readable(file.path, to_its_end=True), open_raw(file.path) as raw:
            for _, end, count in block_ends(raw, _reader(raw)[1], file.size):
                rows += count
                if end - start >= unit_bytes or end == file.size:
                    found.append(Unit(file, number, start, end, first_row))
                    start, first_row = end, rows
        return found or [Unit(file, number)]

    def read(self, unit: Unit, wanted: Wanted, on_bytes: OnBytes) -> Iterator[Block]:
        """See RawFormat."""
        path, row, batches, size = unit.file.path, 0, list[pa.Table](), 0
        with readable(path, to_its_end=True):
            data, header_bytes = _unit_data(unit)
            reader, first_block = _reader(io.BytesIO(data))
            check_blocks(unit.file, data, first_block, reader.codec)
            reader = fastavro.block_reader(io.BytesIO(data))
            kinds = _arrow_types(path, _fields(path, reader), wanted.types)
            for block in reader:
                for records in _slices(block):
                    if size >= BLOCK_BYTES:
                        yield self._block(unit, wanted, batches, row)
                        row, batches, size = row + sum(batch.num_rows for batch in batches), [], 0
                    batches.append(_columns(records, kinds))
                    size += batches[-1].nbytes
                on_bytes(block.offset + block.size - header_bytes)
            if batches:
                yield self._block(unit, wanted, batches, row)

    def _block(self, unit: Unit, wanted: Wanted, batches: list[pa.Table], row: int) -> Block:
        table = pa.concat_tables(batches)
        columns = {name: table[name].combine_chunks() for name in wanted.types}
        first = unit.first_row + row + 1
        numbers = partial(np.arange, first, first + table.num_rows)
        converted = convert_columns(unit.file.path, columns, wanted.types, self.options, wanted.ids)
        return Block(converted, row, numbers, types=type_names(columns))


def _slices(block: Iterable[Any]) -> Iterator[list[Any]]:
    """The records of a block, BLOCK_ROWS at a time; one slice without any where it has none."""
    records = iter(block)
    yield list(islice(records, BLOCK_ROWS))
    while found := list(islice(records, BLOCK_ROWS)):
        yield found


def _reader(raw: BinaryIO) -> tuple[fastavro.block_reader, int]:
    """A reader of the header of a file, and where its blocks begin. Raises ValueError for a schema that is refused."""
    head = io.BytesIO(raw.read(HEADER_BYTES))
    reader = fastavro.block_reader(head)
    check_schema(reader.writer_schema)
    return reader, head.tell()


def _unit_data(unit: Unit) -> tuple[bytes, int]:
    """The bytes of a unit as a file of its own, and how many of them are a header that was put in front."""
    with open_raw(unit.file.path) as raw:
        stop = unit.file.size if unit.stop is None else unit.stop
        if not unit.start:
            return raw.read(stop), 0
        size = _reader(raw)[1]
        raw.seek(0)
        header = raw.read(size)
        raw.seek(unit.start)
        return header + raw.read(stop - unit.start), size


def _fields(path: str, reader: fastavro.block_reader) -> dict[str, Any]:
    """The type of each field, named types in full. Raises UserError where a file holds something else than records."""
    schema: Any = expand_schema(reader.writer_schema)
    if not (isinstance(schema, dict) and schema["type"] == "record"):
        raise UserError(f"{path}: holds no Avro records but {reader.writer_schema}. Write one record a row.")
    return {field["name"]: field["type"] for field in schema["fields"]}


def _arrow_types(path: str, fields: Mapping[str, Any], types: Mapping[str, RawType]) -> dict[str, pa.DataType]:
    """The Arrow type of each wanted field. Raises UserError for records, maps and unions of text and numbers."""
    found = {}
    for name in types:
        try:
            found[name] = _arrow_type(fields[name])
        except KeyError as error:
            raise UserError(
                f"{path}: column {name} is Avro {error.args[0]}, which cannot be read as text or numbers. "
                "Write it as another type."
            ) from None
    return found


def _arrow_type(avro: Any) -> pa.DataType:
    """The Arrow type of an Avro type. Raises KeyError, of its name, for one that blocks do not hold."""
    if isinstance(avro, list):
        branches = [branch for branch in avro if branch != "null"]
        if len(branches) < 2:
            return _arrow_type(branches[0] if branches else "null")
        kinds = [_arrow_type(branch) for branch in branches]
        if not all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
            raise KeyError("union of several types")
        return pa.int64() if all(map(pa.types.is_integer, kinds)) else pa.float64()
    if isinstance(avro, str):
        return PRIMITIVES[avro]
    kind, logical = avro["type"], avro.get("logicalType")
    if kind == "array":
        return pa.list_(_arrow_type(avro["items"]))
    if logical == "decimal":
        return pa.decimal256(avro["precision"], avro.get("scale", 0))
    return LOGICAL[logical] if logical in LOGICAL else _arrow_type(kind)


def _columns(records: list[Any], kinds: Mapping[str, pa.DataType]) -> pa.Table:
    """Records as columns of these types; fastavro gives a UUID as an object, which Arrow does not take as text."""
    found = {}
    for name, kind in kinds.items():
        values = [record[name] for record in records]
        if pa.types.is_string(kind):
            values = [None if value is None else str(value) for value in values]
        found[name] = pa.array(values, kind)
    return pa.table(found)
