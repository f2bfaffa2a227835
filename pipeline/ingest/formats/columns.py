"""Columns of formats with types of their own (Parquet, Avro) for messages: their types, and rows that are no text."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.parse.convert import decoded, is_list
from pipeline.ingest.formats.text import is_utf8

MOST_TYPE_CHARACTERS = 60  # of a type's name: a time zone's is the file's


def not_utf8(columns: Mapping[str, pa.Array]) -> np.ndarray:
    """Which rows have a text, or one in a list, that is not UTF-8: bool (B,). Value by value, for blocks with such a row."""
    found = np.zeros(len(next(iter(columns.values()))), bool)
    for values in map(decoded, columns.values()):
        kind = values.type.value_type if (nested := is_list(values.type)) else values.type
        if _is_text(kind):
            row_V = pc.list_parent_indices(values).to_numpy() if nested else np.arange(len(values))
            texts = (values.flatten() if nested else values).cast(pa.large_binary())
            found[row_V[[not is_utf8(text or b"") for text in texts.to_pylist()]]] = True
    return found


def shown_rows(columns: Mapping[str, pa.Array]) -> list[str]:
    """Rows as JSON for a person to read, with a sign for what is not UTF-8."""
    cells = {}
    for name, values in columns.items():
        plain = decoded(values)
        kind = plain.type.value_type if is_list(plain.type) else plain.type
        binary = pa.list_(pa.large_binary()) if is_list(plain.type) else pa.large_binary()
        cells[name] = (plain.cast(binary) if _is_text(kind) else plain).to_pylist()
    rows = (dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True))
    return [json.dumps(row, ensure_ascii=False, default=_shown) for row in rows]


def _shown(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _is_text(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def type_names(columns: Mapping[str, pa.Array]) -> dict[str, str]:
    """The types of columns in a few words each, as a person reads them."""
    return {name: _type_name(values.type)[:MOST_TYPE_CHARACTERS] for name, values in columns.items()}


def _type_name(kind: pa.DataType) -> str:
    return f"{kind.value_type} (dictionary)" if pa.types.is_dictionary(kind) else str(kind)
