"""How the files of a stream are written, from the first bytes of one: format, delimiter, quotes, header line."""

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from features.source import LINE_BYTES, Format
from pipeline.ingest.files import RawFile, codec_of, open_raw, readable
from pipeline.ingest.formats.text import head_of

HEAD_BYTES = 1 << 20
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", "\x01": "\\x01"}
LINES = 1_000  # that are looked at
# Beginnings of files that are no logs as they are, with what to do.
OTHERS = {
    b"\x1f\x8b": "is gzip under another name: let it end in .gz",
    b"\x28\xb5\x2f\xfd": "is zstd under another name: let it end in .zst",
    b"BZh": "is bzip2 under another name: let it end in .bz2",
    b"PK\x03\x04": "is a ZIP archive: unpack it",
    b"ORC": "is ORC: write it as Parquet",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
    b"\x89PNG": "is a picture",
    b"%PDF": "is a PDF",
}
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*|\s*\d{4}-\d\d-\d\d.*")
MAX_MULTILINE = 100  # line breaks of a value: more are those of a quote that is not closed


@dataclass(frozen=True)
class Dialect:
    """How files are written.

    Attributes:
        options: keys of `source` that differ from their defaults.
        why: what each of them was told from.
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
        UserError: it cannot be opened.
    """
    with readable(file.path), open_raw(file.path) as raw:
        magic = raw.read(4)
    if magic == b"PAR1":
        return Dialect({"format": "parquet"}, {"format": "by the file's first bytes"})
    if magic == b"Obj\x01":
        return Dialect({"format": "avro"}, {"format": "by the file's first bytes"})
    if codec_of(file.path) is None and (what := next((w for m, w in OTHERS.items() if magic.startswith(m)), None)):
        raise NoLogError(what)
    head = head_of(file, HEAD_BYTES)
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
    delimiter, columns, share = _delimiter(texts)
    if delimiter != ",":
        options["delimiter"] = delimiter
        why["delimiter"] = f"{DELIMITERS[delimiter]} cut {share:.0%} of {len(texts):,} lines into {columns} values"
    rows = _rows(head, delimiter)
    if (broken := _line_breaks(rows, columns)) and columns > 1:
        options["multiline"] = True
        why["multiline"] = f"{broken:,} of {len(rows):,} rows have line breaks within quotes"
    elif (stray := _stray_quotes(texts, delimiter)) is not None:
        options["quote"] = None
        why["quote"] = f'a " within a value, not around it, as in {stray!r:.60}'
    if not options.get("multiline"):
        rows = [_values(text, delimiter, csv.QUOTE_NONE if "quote" in options else csv.QUOTE_MINIMAL) for text in texts]
    first, rest = rows[0] if rows else [], rows[1:]
    header = _is_header(first, rest) or (bool(others) and others == lines[:1] and not any(map(NUMBER.fullmatch, first)))
    if not header:
        options["columns"] = [f"c{i}" for i in range(1, columns + 1)]
        why["columns"] = "no header line: the first line is one of values"
    if _has_spaces(rows):
        options["trim"] = True
        why["trim"] = "values begin or end with spaces"
    return Dialect(options, why)


def _delimiter(texts: list[str]) -> tuple[str, int, float]:
    """The delimiter by which most lines have the same number of values, more than one; with the number and the share."""
    found = []
    for place, delimiter in enumerate(DELIMITERS):
        counts = Counter(len(_values(text, delimiter)) for text in texts)
        columns, lines = max(counts.items(), key=lambda each: (each[1], each[0]))
        if columns > 1:
            found.append((lines / len(texts) >= 0.9, columns, -place, delimiter, lines / len(texts)))
    if not found:
        return ",", 1, 1.0
    _, columns, _, delimiter, share = max(found)
    return delimiter, columns, share


def _values(text: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> list[str]:
    try:
        return next(csv.reader([text], delimiter=delimiter, quoting=quoting), [])
    except csv.Error:  # a value that is too long for it
        return []


def _rows(head: bytes, delimiter: str) -> list[list[str]]:
    """The rows as values with line breaks would have it, up to the first fault."""
    text, found = io.StringIO(head.decode(errors="replace"), newline=""), list[list[str]]()
    try:
        for row in csv.reader(text, delimiter=delimiter):
            if row:
                found.append(row)
            if len(found) == LINES:
                break
    except csv.Error:
        pass
    return found[:-1] if len(head) >= HEAD_BYTES else found


def _line_breaks(rows: list[list[str]], columns: int) -> int:
    """Rows with line breaks in values; none where the rows do not add up, as after a quote that is not closed."""
    broken = [row for row in rows if any("\n" in value or "\r" in value for value in row)]
    fits = all(len(row) == columns and max(value.count("\n") for value in row) <= MAX_MULTILINE for row in broken)
    return len(broken) if fits and sum(len(row) == columns for row in rows) >= 0.98 * len(rows) else 0


def _stray_quotes(texts: list[str], delimiter: str) -> str | None:
    """A value that begins with a quote and does not end with one, where no value is within quotes; None: there is none."""
    values = [value for text in texts if '"' in text for value in text.split(delimiter)]
    around = any(len(v) > 1 and v[0] == v[-1] == '"' for v in values)
    return None if around else next((v for v in values if v.startswith('"')), None)


def _is_header(first: list[str], rest: list[list[str]]) -> bool:
    """Whether the values of the first line are names: distinct, no numbers, and not found in their columns."""
    names = [value.strip() for value in first]
    if len({*names}) < len(names) or any(NUMBER.fullmatch(name) for name in names) or names.count("") > 1:
        return False
    seen = [{row[i].strip() for row in rest if len(row) == len(names)} for i in range(len(names))]
    return not any(name and name in values for name, values in zip(names, seen, strict=True))


def _has_spaces(rows: list[list[str]]) -> bool:
    """Whether most values of a column have spaces around them."""
    by_column = zip(*[row for row in rows if len(row) == len(rows[0])], strict=True) if rows else ()
    for values in by_column:
        filled = [value for value in values if value.strip()]
        if filled and sum(value != value.strip(" ") for value in filled) > 0.5 * len(filled):
            return True
    return False
