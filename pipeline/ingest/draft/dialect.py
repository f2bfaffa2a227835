"""How the files of a stream are written, from the first bytes of one: format, delimiter, quotes, header line."""

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from features.errors import UserError
from features.source import LINE_BYTES, Format
from pipeline.ingest.files import RawFile, open_raw, readable
from pipeline.ingest.formats.text import head_of

HEAD_BYTES = 1 << 20
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", "\x01": "\\x01"}
LINES = 1_000  # of a sample
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*|\s*\d{4}-\d\d-\d\d.*")
MAX_MULTILINE = 100  # line breaks of a value: more are those of a quote that is not closed


@dataclass(frozen=True)
class Dialect:
    """How files are written.

    Attributes:
        options: keys of `source` that differ from their defaults.
        why: the evidence for each of them.
    """

    options: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def form(self) -> Format:
        """As the readers of raw formats take it."""
        return Format(**self.options)


class NoLogError(Exception):
    """Why a file is not read."""


def dialect_of(file: RawFile, other: RawFile | None) -> Dialect:
    """How a file is written.

    Args:
        other: another file of the stream: a first line that both have is a header.

    Raises:
        NoLogError: it is no log, or in a format that is not read.
        UserError: it cannot be opened, or the other cannot be read.
    """
    with readable(file.path), open_raw(file.path) as raw:
        magic = raw.read(4)
    if magic == b"PAR1":
        return Dialect({"format": "parquet"}, {"format": "by the file's first bytes"})
    if magic == b"Obj\x01":
        return Dialect({"format": "avro"}, {"format": "by the file's first bytes"})
    try:
        head = head_of(file, HEAD_BYTES)
    except UserError as error:  # it can be opened, so the fault is in what it holds
        raise NoLogError(str(error).removeprefix(f"{file.path}: ").rstrip(".")) from None
    if b"\0" in head:
        raise NoLogError("is binary, of a format that is not read")
    lines = _lines(head)
    if not lines:
        raise NoLogError("is empty")
    if lines[0].lstrip().startswith(b"{"):
        return _json(lines)
    if lines[0].lstrip().startswith((b"[", b"<")):
        raise NoLogError("begins as one JSON or XML document: write a row a line")
    return _csv(head, lines, _lines(head_of(other, LINE_BYTES))[:1] if other else [])


def _lines(head: bytes) -> list[bytes]:
    """The lines that are not blank, without one that may be cut."""
    whole = head if len(head) < HEAD_BYTES else head[: head.rfind(b"\n") + 1]
    return [line.rstrip(b"\r") for line in whole.split(b"\n") if line.strip()][:LINES]


def _json(lines: list[bytes]) -> Dialect:
    try:
        objects = sum(isinstance(json.loads(line), dict) for line in lines[:20])
    except (ValueError, RecursionError):
        raise NoLogError("begins as JSON, but its lines are no objects: write an object a line") from None
    return Dialect({"format": "jsonl"}, {"format": f"the first {objects} lines are JSON objects"})


def _csv(head: bytes, lines: list[bytes], others: list[bytes]) -> Dialect:
    options, why = dict[str, Any](), dict[str, str]()
    texts = [line.decode(errors="replace") for line in lines]
    cut = _cut(head, texts)
    if cut.delimiter != ",":
        options["delimiter"] = cut.delimiter
        why["delimiter"] = (
            f"{DELIMITERS[cut.delimiter]} cut {cut.share:.0%} of {len(cut.rows):,} rows into {cut.columns} values"
        )
    rows = cut.rows
    if broken := sum(any("\n" in value or "\r" in value for value in row) for row in rows):
        options["multiline"] = True
        why["multiline"] = f"{broken:,} of {len(rows):,} rows have line breaks within quotes"
    elif (stray := _stray_quotes(texts, cut)) is not None:
        options["quote"] = None
        why["quote"] = f'a " is no quote around a value, as in {stray!r:.60}'
        rows = [_values(text, cut.delimiter, csv.QUOTE_NONE) for text in texts]
    first, rest = rows[0] if rows else [], rows[1:]
    header = _is_header(first, rest) or (bool(others) and others == lines[:1] and not any(map(NUMBER.fullmatch, first)))
    if not header:
        options["columns"] = [f"c{i}" for i in range(1, cut.columns + 1)]
        why["columns"] = "no header line: the first line is one of values"
    if _has_spaces(rows):
        options["trim"] = True
        why["trim"] = "values begin or end with spaces"
    return Dialect(options, why)


@dataclass(frozen=True)
class _Cut:
    """The rows that a delimiter makes of a text, and the share that has the same number of values."""

    delimiter: str
    rows: list[list[str]]
    columns: int
    share: float


def _cut(head: bytes, texts: list[str]) -> _Cut:
    """The delimiter and the meaning of quotes by which most rows have as many values as the first, more than one."""
    found = []
    for place, delimiter in enumerate(DELIMITERS):
        enclosed = [_values(text, delimiter, strict=True) for text in texts]
        plain = [_values(text, delimiter, csv.QUOTE_NONE) for text in texts] if any('"' in t for t in texts) else []
        for trust, rows in enumerate([plain, _rows(head, delimiter), enclosed]):
            counts = Counter(map(len, rows))
            columns, most = max(counts.items(), key=lambda each: (each[1], each[0]), default=(0, 0))
            if columns > 1:
                share = most / len(rows)
                fits = share >= 0.9 and len(rows[0]) == columns
                found.append(((fits, trust, columns, -place), _Cut(delimiter, rows, columns, share)))
    return max(found, key=lambda each: each[0])[1] if found else _Cut(",", [[text] for text in texts], 1, 1.0)


def _values(text: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL, strict: bool = False) -> list[str]:
    try:
        return next(csv.reader([text], delimiter=delimiter, quoting=quoting, strict=strict), [])
    except csv.Error:  # a value that is too long for it, or a stray quote
        return []


def _rows(head: bytes, delimiter: str) -> list[list[str]]:
    """The rows as values with line breaks would have it; none where a value is as long as after a quote that is not closed."""
    text, found = io.StringIO(head.decode(errors="replace"), newline=""), list[list[str]]()
    try:
        for row in csv.reader(text, delimiter=delimiter, strict=True):
            if any(value.count("\n") > MAX_MULTILINE for value in row):
                return []
            if row:
                found.append(row)
            if len(found) == LINES:
                break
    except csv.Error:  # such as text after a closing quote
        return []
    return found[:-1] if len(head) >= HEAD_BYTES and len(found) < LINES else found


def _stray_quotes(texts: list[str], cut: _Cut) -> str | None:
    """A line that has as many values as others only where quotes are plain characters; None: most quotes enclose values."""
    delimiter, columns = cut.delimiter, cut.columns
    quoted = [text for text in texts if '"' in text]
    plain = [len(_values(text, delimiter, csv.QUOTE_NONE)) == columns for text in quoted]
    enclosed = [len(_values(text, delimiter, strict=True)) == columns for text in quoted]
    stray = [
        text for text, as_plain, as_quoted in zip(quoted, plain, enclosed, strict=True) if as_plain and not as_quoted
    ]
    needed = sum(as_quoted and not as_plain for as_plain, as_quoted in zip(plain, enclosed, strict=True))
    return stray[0] if len(stray) > needed else None


def _is_header(first: list[str], rest: list[list[str]]) -> bool:
    """Whether the values of the first line are names: no numbers, and not found in their columns.

    They are distinct, but where a column of numbers below them leaves no doubt.
    """
    names = [value.strip() for value in first]
    if any(NUMBER.fullmatch(name) for name in names) or names.count("") > 1:
        return False
    seen = [{row[i].strip() for row in rest if len(row) == len(names)} - {""} for i in range(len(names))]
    numbers = any(
        name and values and all(map(NUMBER.fullmatch, values)) for name, values in zip(names, seen, strict=True)
    )
    return (numbers or len({*names}) == len(names)) and not any(map(set.__contains__, seen, names))


def _has_spaces(rows: list[list[str]]) -> bool:
    """Whether most values of a column have spaces around them."""
    by_column = zip(*[row for row in rows if len(row) == len(rows[0])], strict=True) if rows else ()
    for values in by_column:
        filled = [value for value in values if value.strip()]
        if filled and sum(value != value.strip(" ") for value in filled) > 0.5 * len(filled):
            return True
    return False
