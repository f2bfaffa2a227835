"""CSV read one character after the other, by the rules that formats/csv_quotes.py, csv_rows.py and csv_spans.py state."""

import codecs

from pipeline.ingest.files import BOM
from pipeline.ingest.formats.csv_quotes import AFTER_QUOTE, LINE_BREAKS, LONE_RETURN, OPEN_QUOTE, STRAY_QUOTE
from pipeline.ingest.formats.csv_rows import FURTHER, NOT_CLOSED, RETURN_OUTSIDE
from pipeline.ingest.formats.text import NOT_UTF8

Bad = tuple[int, str, str, int]  # line, reason, text, lines
MORE = "more lines are needed"


def row_of(
    text: str, quote: str | None, plain_from: int | None = None, most: int | None = None
) -> tuple[list[str], str | None, int]:
    """The values of a row that is all of `text`, the reason why it is none, and where its last quoted value began.

    At `plain_from` a quote is a character like others, and so are those after it. Beyond the first line at most `most`
    columns end in one that has quotes.
    """
    values, value, state, opened = list[str](), "", "start", 0
    position = 0
    while position < len(text):
        c = text[position]
        quotes = quote is not None and (plain_from is None or position < plain_from)
        if state == "quoted":
            if c == quote and text[position + 1 : position + 2] == quote:
                value += c
                position += 1
            elif c == quote:
                state = "closed"
            else:
                value += c
        elif c == ",":
            values.append(value)
            value, state = "", "start"
        elif c == "\r" and position < len(text) - 1 and text[position + 1] != "\n":
            return values, LONE_RETURN, opened
        elif (c == "\r" and position < len(text) - 1) or c == "\n":
            return values, "ends", opened
        elif c == "\r":
            break
        elif state == "closed":
            return values, AFTER_QUOTE, opened
        elif c == quote and quotes and state == "start":
            state, opened = "quoted", position
            if most is not None and len(values) + 1 > most and "\n" in text[:position]:
                return values, f"more than {most} columns", opened
        else:
            value += c
            state = "plain"
        position += 1
    return [*values, value], MORE if state == "quoted" else None, opened


def extent(
    lines: list[str], i: int, columns: int, quote: str | None, limits: tuple[int, int], long: dict[int, str]
) -> tuple:
    """How many lines the row takes that begins at line i, its values, and the reason why it is bad."""
    max_lines, max_bytes = limits
    for count in range(1, max_lines + 1):
        if i + count > len(lines):
            return 1, [], NOT_CLOSED.format("")
        text = "\n".join(lines[i : i + count])
        if len(encoded(text)) > max_bytes or long.keys() & set(range(i, i + count)):
            return 1, [], NOT_CLOSED.format(f" within max_line_bytes={max_bytes} bytes")
        most = 2 * columns + FURTHER
        values, fault, opened = row_of(text, quote, most=most)
        if fault == MORE:
            continue
        if fault and fault.startswith("more than"):
            return 1, [], f"{fault} instead of {columns}"
        if fault:
            return 1, [], RETURN_OUTSIDE if fault == LONE_RETURN else fault
        if len(values) == columns:
            return count, values, None
        if count > 1 and columns > 2 and row_of(lines[i + count - 1], quote)[1] is None:
            _, _, opened = row_of(lines[i], quote)
            plain, fault, _ = row_of(lines[i], quote, opened)
            if fault is None and len(plain) == len(row_of(lines[i + count - 1], quote)[0]) == columns:
                return 1, [], STRAY_QUOTE
        return count, values, f"{len(values)} columns instead of {columns}"
    return 1, [], NOT_CLOSED.format(f" within max_row_lines={max_lines} lines")


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def decoded(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def shown(text: str) -> str:
    return codecs.decode(encoded(text).rstrip(b"\r"), errors="replace")


def with_a_line_end(data: bytes) -> bytes:
    """Data that are not refused for carriage returns alone."""
    return b"\n" + data if b"\n" not in data and b"\r" in data.rstrip(b"\r") else data


def by_hand(
    data: bytes,
    columns: int,
    quote: str | None = '"',
    multiline: bool = False,
    limits: tuple[int, int] = (1000, 1 << 20),
    wanted: int | None = None,
) -> tuple[list[tuple], list[Bad]]:
    """The rows of a file without a header as (line, the first `wanted` values), and its bad rows."""
    raw = data.removesuffix(b"\n").split(b"\n") if data else []
    lines = [decoded(line) for line in [line.removeprefix(BOM if not i else b"") for i, line in enumerate(raw)]]
    long = {
        i: f"line of {len(line)} bytes is longer than max_line_bytes={limits[1]}"
        for i, line in enumerate(raw)
        if len(line) > limits[1]
    }
    read = _rows if multiline and quote else _lines
    rows, bad = list[tuple](), list[Bad]()
    for i, count, values, fault in read(lines, columns, quote, limits, long):
        fault = fault or (NOT_UTF8 if any("\udc80" <= c <= "\udcff" for c in "".join(values[:wanted])) else None)
        if fault:
            bad.append((i + 1, fault, shown("\n".join(lines[i : i + count])), count))
        else:
            rows.append((i + 1, *values[:wanted]))
    return rows, bad


def _rows(
    lines: list[str], columns: int, quote: str | None, limits: tuple[int, int], long: dict[int, str]
) -> list[tuple]:
    found, i = [], 0
    while i < len(lines):
        if i in long:
            found.append(
                (i, 1, [], f"line of {len(encoded(lines[i]))} bytes is longer than max_line_bytes={limits[1]}")
            )
        elif lines[i] not in ("", "\r"):
            count, values, fault = extent(lines, i, columns, quote, limits, long)
            found.append((i, count, values, fault))
            i += count - 1
        i += 1
    return found


def _lines(
    lines: list[str], columns: int, quote: str | None, limits: tuple[int, int], long: dict[int, str]
) -> list[tuple]:
    found, reach = [], 0
    for i, line in enumerate(lines):
        if i in long:
            found.append((i, 1, [], long[i]))
            continue
        values, fault, _ = row_of(line, quote)
        if fault == MORE:
            count, _, reason = extent(lines, i, columns, quote, limits, long)
            if count > 1:
                first, reach_before = max(i, reach), reach
                reach = max(reach, i + count)
                if reach > reach_before:
                    found.append((first, reach - first, [], reason or LINE_BREAKS))
                continue
        if i < reach or not line.strip("\r"):
            continue
        if "\r" in line.removesuffix("\r"):
            found.append((i, 1, [], LONE_RETURN))
        elif fault:
            found.append((i, 1, [], OPEN_QUOTE if fault == MORE else fault))
        elif len(values) != columns:
            found.append((i, 1, [], f"{len(values)} columns instead of {columns}"))
        else:
            found.append((i, 1, values, None))
    return sorted(found, key=lambda each: each[0])
