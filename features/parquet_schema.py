"""The nesting of a Parquet file's columns, read before pyarrow reads it: a very deep one overflows the stack of a process."""

import os
from pathlib import Path
from typing import BinaryIO

from features.errors import UserError
from features.parquet_pages import STRUCT, Thrift

MAX_NESTING = 50  # groups within groups; a list is two
MAX_ELEMENTS = 200_000  # columns and groups
MAX_FOOTER_BYTES = 256 << 20
SCHEMA, CHILDREN = 2, 5  # fields of FileMetaData and SchemaElement (parquet.thrift)
MAGIC = b"PAR1"


def check_nesting(file: BinaryIO, where: object) -> None:
    """Checks the schema in a file's footer. What is no Parquet file at all is left to pyarrow, which refuses it.

    Args:
        file: its position changes. where: the file is, for errors.
    Raises:
        UserError: columns nested deeper than MAX_NESTING, more than MAX_ELEMENTS, or a footer without a schema.
    """
    size = file.seek(0, os.SEEK_END)
    if size < 12:
        return
    file.seek(size - 8)
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or length > size - 12:
        return
    if length > MAX_FOOTER_BYTES:
        raise UserError(f"{where}: its footer has {length:,} bytes, more than {MAX_FOOTER_BYTES:,}")
    file.seek(size - 8 - length)
    footer = file.read(length)
    try:
        _check_elements(Thrift(footer, 0, len(footer)), where)
    except (IndexError, TypeError):
        raise UserError(f"{where}: its footer has no schema: the file is damaged") from None


def check_nesting_of(path: Path) -> None:
    """As `check_nesting`, of a path. Raises OSError too."""
    with path.open("rb") as file:
        check_nesting(file, path)


def _check_elements(footer: Thrift, where: object) -> None:
    """Walks the schema, which lists groups before their members. Raises UserError; IndexError, TypeError for no schema."""
    field = 0
    while field != SCHEMA:  # preceded by the version alone
        kind = footer.byte()
        field = field + (kind >> 4) if kind >> 4 else footer.integer()
        if field != SCHEMA:
            footer.value(kind & 15, 0)
    head = footer.byte()
    count = head >> 4 if head >> 4 != 15 else footer.varint()
    if head & 15 != STRUCT:
        raise TypeError
    if count > MAX_ELEMENTS:
        raise UserError(f"{where}: {count:,} columns and groups, more than {MAX_ELEMENTS:,}")
    members: list[int] = []  # that are still to come, of each group around an element
    for _ in range(count):
        if len(members) > MAX_NESTING:
            raise UserError(f"{where}: columns nested more than {MAX_NESTING} deep")
        element, _ = footer.struct()
        if (children := element.get(CHILDREN) or 0) > 0:
            members.append(children)
            continue
        while members:
            members[-1] -= 1
            if members[-1]:
                break
            members.pop()
