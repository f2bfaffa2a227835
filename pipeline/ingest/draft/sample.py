"""Some rows of a stream: the beginning of its first, a middle and its last file, and the end of the last."""

import json
from dataclasses import dataclass, field, replace

import polars as pl
import pyarrow as pa

from features.errors import UserError, one_line
from features.source import Format
from pipeline.ingest.draft.dialect import Dialect, NoLogError, dialect_of
from pipeline.ingest.draft.groups import Group
from pipeline.ingest.files import RawFile, Unit, codec_of
from pipeline.ingest.formats import raw_format
from pipeline.ingest.formats.base import Wanted
from pipeline.ingest.formats.jsonl import JsonLines
from pipeline.ingest.formats.text import head_of

PIECE_BYTES, TAIL_BYTES = 8 << 20, 1 << 20
PIECE_ROWS = 100_000
MAX_COLUMNS = 2_000
UNPACKED = 5  # estimated size of a compressed file's content over its own
LIST = pa.list_(pa.string())


@dataclass(frozen=True)
class Sample:
    """Some rows of a stream.

    Attributes:
        group: its files.
        dialect: how they are written.
        columns: text, or lists of text; those that all sampled files have.
        left_out: why the others are not there, by name.
        rows: estimated number of all.
        to_its_end: whether the last rows of the last file are among them.
        bad: lines of the sample that are no rows.
    """

    group: Group
    dialect: Dialect
    columns: dict[str, pl.Series]
    rows: int
    to_its_end: bool
    left_out: dict[str, str] = field(default_factory=dict)
    bad: int = 0

    @property
    def height(self) -> int:
        """Rows of the sample."""
        return max((len(values) for values in self.columns.values()), default=0)


@dataclass(frozen=True)
class _Piece:
    """Rows of one file, of `rows` in all by estimate."""

    table: pa.Table
    left_out: dict[str, str]
    rows: float
    whole: bool
    bad: int


def sample_of(group: Group) -> Sample:
    """Reads some rows of a stream.

    Raises:
        NoLogError: its files are no logs, or have no rows.
        UserError: one cannot be opened.
    """
    files = group.files
    dialect = dialect_of(files[0], files[-1] if len(files) > 1 else None)
    looked_at = list(dict.fromkeys([files[0], files[len(files) // 2], files[-1]]))
    pieces = [_read(file, dialect.form) for file in looked_at]
    end = pieces[-1].whole
    if not end and (tail := _tail(files[-1], dialect.form)):
        pieces.append(tail)
        end = True
    columns, left_out = _together(pieces)
    if not columns or not any(len(values) for values in columns.values()):
        raise NoLogError("has no rows")
    size = sum(file.size for file in looked_at)
    rows = sum(piece.rows for piece in pieces[: len(looked_at)]) * sum(file.size for file in files) / max(size, 1)
    return Sample(group, dialect, columns, round(rows), end, left_out, sum(piece.bad for piece in pieces))


def _together(pieces: list[_Piece]) -> tuple[dict[str, pl.Series], dict[str, str]]:
    """The columns that all pieces have, and why others are left out."""
    left_out = {name: why for piece in pieces for name, why in piece.left_out.items()}
    columns = dict[str, pl.Series]()
    for name in dict.fromkeys(name for piece in pieces for name in piece.table.column_names):
        found = [piece.table[name] for piece in pieces if name in piece.table.column_names]
        if len(found) < len(pieces):
            left_out[name] = f"only {len(found)} of {len(pieces)} sampled files have it"
        elif name not in left_out:
            kinds = {values.type for values in found}
            kind = LIST if LIST in kinds else pa.string()
            columns[name] = pl.concat([_series(name, values, kind) for values in found])
    return columns, left_out


def _series(name: str, values: pa.ChunkedArray, kind: pa.DataType) -> pl.Series:
    series = pl.Series(name, values)
    if pa.types.is_list(kind) and series.dtype == pl.String:  # one item, or none
        return series.reshape((-1, 1)).arr.to_list() if len(series) else pl.Series(name, [], pl.List(pl.String))
    return series


def _read(file: RawFile, form: Format) -> _Piece:
    """The beginning of a file."""
    reader = raw_format(form)
    if form.format in ("parquet", "avro"):
        units = reader.units(file, 0, PIECE_BYTES, False)
        piece = _rows(file, form, units[0])
        last = units[-1]
        rows = last.first_row * len(units) / max(len(units) - 1, 1) if len(units) > 1 else piece.rows
        return replace(piece, rows=rows, whole=piece.whole and len(units) == 1)
    packed = codec_of(file.path) is not None
    cut = not packed and not form.multiline and file.size > PIECE_BYTES
    piece = _rows(file, form, Unit(file, 0, 0, PIECE_BYTES if cut else None))
    if cut:
        return replace(piece, rows=piece.rows * file.size / PIECE_BYTES, whole=False)
    if not piece.whole:
        unpacked = file.size * (UNPACKED if packed else 1)
        return replace(piece, rows=max(piece.rows, piece.rows * unpacked / (32 << 20)))
    return piece


def _tail(file: RawFile, form: Format) -> _Piece | None:
    """The end of a file; None where only reading all before it leads there."""
    if form.format in ("parquet", "avro"):
        units = raw_format(form).units(file, 0, PIECE_BYTES, False)
        return _rows(file, form, units[-1]) if len(units) > 1 else None
    if codec_of(file.path) is not None or form.multiline or file.size <= PIECE_BYTES:
        return None
    return _rows(file, form, Unit(file, 0, max(PIECE_BYTES, file.size - TAIL_BYTES), None))


def _rows(file: RawFile, form: Format, unit: Unit) -> _Piece:
    """The first PIECE_ROWS rows of a unit, with all columns that can be read."""
    names, lists, left_out = _names(file, form)
    try:
        return _blocks(unit, form, names, lists, left_out)
    except UserError:
        # Those that cannot be read as text or lists of text, one by one.
        for name in names:
            try:
                _blocks(unit, form, [name], lists, {})
            except UserError as error:
                left_out[name] = one_line(error)
        return _blocks(unit, form, [name for name in names if name not in left_out], lists, left_out)


def _blocks(unit: Unit, form: Format, names: list[str], lists: dict[str, str], left_out: dict[str, str]) -> _Piece:
    reader = raw_format(form)
    wanted = Wanted(dict.fromkeys(names, "string"), reader.column_names(unit.file), lists)
    tables, rows, bad, whole = list[pa.Table](), 0, 0, True
    if names:
        for block in reader.read(unit, wanted, lambda _: None):
            tables.append(block.columns)
            rows, bad = rows + block.columns.num_rows, bad + len(block.bad)
            if rows >= PIECE_ROWS:
                whole = False
                break
    # A column of JSON lines may have arrays in one block and text in another.
    table = pa.concat_tables([t for t in tables if t.schema == tables[0].schema]) if tables else pa.table({})
    return _Piece(table.slice(0, PIECE_ROWS), left_out, rows, whole, bad)


def _names(file: RawFile, form: Format) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """A file's columns, those that may be lists with a separator, and why others cannot be read."""
    reader = raw_format(form)
    if isinstance(reader, JsonLines):
        return _keys(file)
    found = reader.column_names(file) or []
    if len(found) > MAX_COLUMNS:
        raise NoLogError(f"has {len(found):,} columns, more than the {MAX_COLUMNS:,} that a draft is made for")
    left_out = {name: "several columns have this name" for name in found if found.count(name) > 1}
    return [name for name in found if name not in left_out], {}, left_out


def _keys(file: RawFile) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """As _names, of the objects in the beginning of a file of JSON lines."""
    kinds = dict[str, set[type]]()
    for record in _objects(head_of(file, TAIL_BYTES)):
        for name, value in record.items():
            kinds.setdefault(name, set()).update({type(value)} - {type(None)})
        if len(kinds) > MAX_COLUMNS:
            raise NoLogError(f"has more than the {MAX_COLUMNS:,} keys that a draft is made for")
    left_out = {name: "holds objects" for name, found in kinds.items() if dict in found}
    left_out |= {
        name: "holds arrays and other values" for name, found in kinds.items() if list in found and len(found) > 1
    }
    lists = {name: "|" for name, found in kinds.items() if found == {list}}
    return [name for name in kinds if name not in left_out], lists, left_out


def _objects(head: bytes) -> list[dict[str, object]]:
    """The JSON objects of whole lines."""
    found = []
    for line in head.split(b"\n")[: -1 if len(head) == TAIL_BYTES else None]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
