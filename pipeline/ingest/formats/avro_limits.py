"""What an Avro file may unpack to, checked before fastavro decodes it, which allocates whatever sizes a file gives."""

import bz2
import io
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.ingest.files import RawFile

SYNC_BYTES = 16  # the marker after the header and after every block
BLOCK_LIMIT = 256 << 20  # bytes of a block, packed and unpacked; usual are some hundred thousand
XZ_MEMORY = 256 << 20  # bytes of its dictionary
SCHEMA_TYPES = 100_000  # in a schema, each named type counted wherever it stands
LONG_BYTES = 10
STEP_BYTES = 4 << 20


def block_ends(raw: BinaryIO, position: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Of each block of a file, the first of which is at `position`: where its data begin, its end, and its records.

    Raises:
        ValueError: the file is damaged or truncated, or a block is larger than BLOCK_LIMIT.
    """
    raw.seek(position - SYNC_BYTES)
    sync = raw.read(SYNC_BYTES)
    while position < size:
        count, length = _read_long(raw), _read_long(raw)
        if count < 0 or not 0 <= length <= BLOCK_LIMIT:
            raise ValueError(
                f"the block at byte {position} has {count} records in {length} bytes, {BLOCK_LIMIT} are allowed"
            )
        start = raw.tell()
        raw.seek(length, io.SEEK_CUR)
        if raw.read(SYNC_BYTES) != sync:
            raise ValueError(f"no sync marker after the block at byte {position}")
        position = raw.tell()
        yield start, position, count


def _read_long(raw: BinaryIO) -> int:
    """A variable-length zig-zag integer (Avro 1.12 specification, "Binary Encoding")."""
    value, shift = 0, 0
    while byte := raw.read(1):
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return (value >> 1) ^ -(value & 1)
        shift += 7
        if shift > 7 * LONG_BYTES:
            raise ValueError("a number has too many bytes")
    raise ValueError("it ends within a block")


def check_blocks(file: RawFile, data: bytes, header_bytes: int, codec: str) -> None:
    """Checks a file in memory, or a part of it with its header.

    Raises:
        ValueError: a block has more records than bytes, or unpacks to more than BLOCK_LIMIT.
        UserError: all of them unpack to more than the file may.
    """
    total = 0
    for start, end, count in block_ends(io.BytesIO(data), header_bytes, len(data)):
        size = _unpacked_size(codec, data[start : end - SYNC_BYTES])
        if size > BLOCK_LIMIT:
            raise ValueError(f"the block at byte {start} unpacks to more than {BLOCK_LIMIT} bytes")
        if count > size:
            raise ValueError(f"the block at byte {start} has {size} bytes for {count} records")
        total += size
        file.check_unpacked(total)


def _unpacked_size(codec: str, block: bytes) -> int:
    """The bytes of a block once unpacked, or some number above BLOCK_LIMIT."""
    if codec in DECOMPRESSORS:
        unpack, size = DECOMPRESSORS[codec](), 0
        while not unpack.eof and size <= BLOCK_LIMIT:
            found = unpack.decompress(block, STEP_BYTES)
            block = getattr(unpack, "unconsumed_tail", b"")  # the other two keep it themselves
            size += len(found)
            if not found and not block:
                break
        if codec != "deflate" and unpack.eof and unpack.unused_data:  # a second stream, which would be unpacked as well
            raise ValueError("bytes follow the data of a block")
        return size
    if codec == "zstandard":
        with pa.CompressedInputStream(pa.BufferReader(block), "zstd") as stream:
            size = 0
            while size <= BLOCK_LIMIT and (found := stream.read(STEP_BYTES)):
                size += len(found)
            return size
    if codec == "snappy":  # begins with its size
        return _unsigned(block)
    if codec == "lz4":
        return struct.unpack("<I", block[:4])[0] if len(block) >= 4 else 0
    return len(block)


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "deflate": lambda: zlib.decompressobj(-15), "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY),
}  # fmt: skip


def _unsigned(data: bytes) -> int:
    value = 0
    for place, byte in enumerate(data[:LONG_BYTES]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    return value


def check_schema(schema: Any) -> None:
    """Checks a writer's schema, as fastavro has parsed it.

    Raises:
        ValueError: types that hold themselves, more than SCHEMA_TYPES, or items without bytes, of which an array could have
            any number.
    """
    _count(schema, {})


def _count(schema: Any, named: dict[str, tuple[int, bool] | None]) -> tuple[int, bool]:
    """How many types there are in a type, and whether its values have no bytes; `named` has None for those around it."""
    if isinstance(schema, str):
        if schema in named:
            if (known := named[schema]) is None:
                raise ValueError(f"type {schema} holds itself")
            return known
        return 1, schema == "null"
    if isinstance(schema, list):
        return 1 + sum(_count(branch, named)[0] for branch in schema), False
    kind, name = schema["type"], schema.get("name")
    if name is not None:
        named[name] = None
    if kind in ("record", "error"):
        fields = [_count(field["type"], named) for field in schema["fields"]]
        found = 1 + sum(count for count, _ in fields), all(empty for _, empty in fields)
    elif kind in ("array", "map"):
        count, empty = _count(schema["items" if kind == "array" else "values"], named)
        if empty and kind == "array":
            raise ValueError("an array has items without bytes")
        found = 1 + count, False
    elif kind == "fixed":
        found = 1, schema["size"] == 0
    elif kind == "enum":
        found = 1, False
    else:
        found = _count(kind, named)
    if found[0] > SCHEMA_TYPES:
        raise ValueError(f"its schema has more than {SCHEMA_TYPES} types")
    if name is not None:
        named[name] = found
    return found
