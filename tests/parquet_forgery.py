"""Parquet files with a footer that lies."""

from pathlib import Path

import pyarrow.parquet as pq


def _varint(number: int) -> bytes:
    """An i64 of thrift's compact protocol, with its zigzag."""
    number, found = number << 1, b""
    while number > 127:
        number, found = number >> 7, found + bytes([number & 127 | 128])
    return found + bytes([number])


def lied(path: Path, true: int, told: int) -> pq.FileMetaData:
    """Replaces a number of values in the footer (field 5 of its ColumnMetaData, an i64), where it is there once."""
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    pages, footer = data[: -8 - length], data[-8 - length : -8]
    assert footer.count(b"\x16" + _varint(true)) == 1
    footer = footer.replace(b"\x16" + _varint(true), b"\x16" + _varint(told))
    path.write_bytes(pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return pq.read_metadata(path)
